"""Dynamic SAE Guardrails: make a language model forget with a sparse autoencoder, and test it."""

import lazy_loader

# Resolved on first use, so that `dsg --help` need not import torch; the names stand in the stub.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
