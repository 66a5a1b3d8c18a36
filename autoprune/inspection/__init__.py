"""What can be pruned from a model, why the rest stays, and the pages that say so."""

from autoprune.inspection.inspection import Inspection, inspect

__all__ = ["Inspection", "inspect"]
