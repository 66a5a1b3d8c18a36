"""Evaluators: score candidates without, or with little, training."""
