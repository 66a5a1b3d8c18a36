"""Optimizers: propose candidates, learn from their evaluations; they know a `Problem`, never a model."""
