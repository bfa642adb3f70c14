"""Masks that are not learned, with the counts of learned ones: random, by magnitude, Wanda."""
