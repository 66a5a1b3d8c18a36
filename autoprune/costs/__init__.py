"""Costs that a budget limits, exact and vectorised over a population of candidates."""

from autoprune.costs.structural import CostFunction, StructuralCosts, make_costs

__all__ = ["CostFunction", "StructuralCosts", "make_costs"]
