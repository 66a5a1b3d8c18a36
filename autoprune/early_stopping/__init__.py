"""Early stopping of evaluations: racing on samples, and successive halving on training steps."""
