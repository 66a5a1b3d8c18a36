"""Residual branches: parts of a model that are added to a stream, found from its operations, which may be left out."""
