"""Tracing: the operations that one forward pass runs, on the meta device where possible."""
