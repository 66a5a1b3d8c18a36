"""Sizes that the code of a model keeps in Python, and the groups that it ties."""
