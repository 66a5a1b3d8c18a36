"""Search spaces: what a candidate means for the model."""
