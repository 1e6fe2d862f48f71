"""Losses that make a model forget by changing its weights."""
