"""Notebooks that explain the model, and what they share; they run from a checkout."""
