"""Inspection of a model: its prunable groups, the reasons why the rest stays, and reports of them."""

from autoprune.inspection.inspection import Inspection, inspect

__all__ = ["Inspection", "inspect"]
