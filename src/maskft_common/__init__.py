"""Shared by every layer of maskft: errors in one line, files written whole, the machine. Imports no torch."""

__version__ = "0.1.0"
