"""The language model: tokens, chat, hook points, loading, likelihood, the frozen reference."""
