"""Benchmarks: every line is a ratio of two sides measured in one run, alternating. ``make bench`` runs all of them."""
