"""Masks inside other trainers: axolotl, ms-swift, LLaMA-Factory. Each file is imported by its host, and imports it."""
