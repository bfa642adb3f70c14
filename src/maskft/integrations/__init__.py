"""Masks inside other trainers: axolotl, ms-swift and LLaMA-Factory. Each file is imported by its host, and imports it."""
