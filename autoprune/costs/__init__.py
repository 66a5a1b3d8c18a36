"""Costs that a budget limits, exact and vectorised over a population of candidates."""
