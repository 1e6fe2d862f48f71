"""Dynamic SAE Guardrails: make a language model forget with a sparse autoencoder, and test it."""
