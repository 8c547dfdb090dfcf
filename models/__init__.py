"""The embedded default model and its card."""
