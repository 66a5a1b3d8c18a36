"""Peak memory of inference, predicted from live tensors and the scratch memory of operations."""
