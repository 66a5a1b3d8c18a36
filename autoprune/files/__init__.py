"""Files: atomic replacement, checked reading, and tensors with a hash."""
