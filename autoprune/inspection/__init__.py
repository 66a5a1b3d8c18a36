"""Inspection of a model: its prunable groups, the reasons why the rest stays, and reports of them."""

from autoprune.inspection.inspection import FrozenPart, Inspection, inspect, what_stays

__all__ = ["FrozenPart", "Inspection", "inspect", "what_stays"]
