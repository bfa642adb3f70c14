"""Model-written code, confined."""
