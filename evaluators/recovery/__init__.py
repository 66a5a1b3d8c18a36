"""Recovery: training of a pruned network that brings back what pruning took, with a receipt."""
