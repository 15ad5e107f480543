"""The wrapper around a user's module, and ways to look at a module through its own training step."""
