"""Saved masks: their file (codec, checksums, fingerprints, card), reading, merging and verifying them."""
