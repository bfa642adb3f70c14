"""One path for every method: setup, build, fit, save."""
