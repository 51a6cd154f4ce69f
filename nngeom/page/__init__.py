"""Pages of HTML about a model, self-contained and interactive."""
