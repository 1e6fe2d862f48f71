"""The user's own text."""
