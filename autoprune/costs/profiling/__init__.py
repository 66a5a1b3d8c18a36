"""Measuring a model on this machine, for a latency table."""
