"""Closed-form re-fit: least squares, biases and statistics of the layers that read removed units."""
