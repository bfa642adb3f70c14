"""Masks inside other trainers: axolotl and ms-swift. Each file is imported by its host, and imports it."""
