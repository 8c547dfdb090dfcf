"""Dataset and training recipes: the only place that knows torch."""
