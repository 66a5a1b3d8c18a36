"""Costs that a budget limits, exact and vectorised over a population of candidates."""

from autoprune.costs.candidates import Candidates, GivenCost
from autoprune.costs.latency.model import Latency
from autoprune.costs.structural import CostFunction, StructuralCosts, make_costs

__all__ = ["Candidates", "CostFunction", "GivenCost", "Latency", "StructuralCosts", "make_costs"]
