"""Measurements of cost on random weights, so that nothing has to be downloaded."""
