"""Analyses of finished runs: models, result files and training histories -> arrays in files. Nothing here draws.

Each analysis writes one file, whole, with the settings that decide its numbers; a file with the same settings is not
computed again. Long computations keep their finished parts beside the file.
"""
