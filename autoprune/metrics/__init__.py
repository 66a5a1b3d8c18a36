"""Metrics: scores, losses and signals of the outputs of a model, sample by sample."""
