"""Masks over quantised weights: zero is a level of many formats, so a mask merges into them without rounding."""
