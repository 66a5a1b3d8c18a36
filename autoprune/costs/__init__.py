"""Costs that a budget limits, exact and vectorised over a population of candidates."""

from autoprune.costs.latency import Latency
from autoprune.costs.structural import CostFunction, StructuralCosts, make_costs

__all__ = ["CostFunction", "Latency", "StructuralCosts", "make_costs"]
