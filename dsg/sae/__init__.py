"""Activations -> features: loading an SAE, slices of it, training one, does it fit a model."""
