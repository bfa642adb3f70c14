"""Studies: base model, data, methods, seeds, grid and evaluation in one recipe; see ``docs/studies.md``."""
