"""Memory, communication and arithmetic of a run, from the model's shape alone. Never imports torch."""
