"""Command line of maskft."""
