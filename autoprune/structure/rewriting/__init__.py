"""Rewriting: modules whose code does not follow the widths, delivered as graphs that do."""
