"""Activations -> features: loading an SAE, slices of it, training one, does it fit a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
