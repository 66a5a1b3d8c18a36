"""What can be removed from a model: trace, rules, units, checks and slicing."""
