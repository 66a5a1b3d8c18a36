"""Training inside evaluators: one candidate, or the shared weights of a supernet."""
