"""Search how much of each layer of a PyTorch model to remove."""

__version__ = "0.1.0"
