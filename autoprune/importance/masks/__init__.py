"""Masks of zeros in weights, and the weights that make up for them."""
