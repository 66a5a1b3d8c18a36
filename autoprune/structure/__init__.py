"""Structure of a model: trace, rules, units, checks and slicing."""
