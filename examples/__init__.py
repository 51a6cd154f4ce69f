"""Runnable examples: ``python examples/fisher_of_digits.py``."""
