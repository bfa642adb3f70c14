"""GGUF files: their head, which tensor holds which weight, and which code of a format is zero."""
