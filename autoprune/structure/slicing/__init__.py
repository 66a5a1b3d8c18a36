"""Slicing: a plain, smaller module made from a structure and the units to keep."""
