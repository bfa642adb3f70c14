"""One YAML in, runs and a table out."""
