"""The operations that a network runs, in PyTorch and under onnxruntime, with their sizes as functions of its widths."""
