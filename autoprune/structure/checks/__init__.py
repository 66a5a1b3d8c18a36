"""Checks: a structure is compared with the model by permutation, replay and the model's own forward."""
