"""Activation cache: candidates that agree up to some module compute everything up to it once."""
