"""Rules that give the labels of an operation's results from those of its arguments, and all else known of operations.

All entries are made when this package is imported, so that those of users come later and count.
"""

from autoprune.structure.rules import (
    arithmetic,
    attention,
    contractions,
    indexing,
    layers,
    linear_systems,
    shuffles,
    slices,
    views,
    without_rule,
)
from autoprune.structure.rules.registry import (
    OPERATIONS,
    Operation,
    operation_named,
    operation_of,
    register_rule,
    rule_of,
)

ENTRIES = (arithmetic, attention, contractions, indexing, layers, linear_systems, shuffles, slices, views, without_rule)
"""Modules that enter operations."""

__all__ = ["ENTRIES", "OPERATIONS", "Operation", "operation_named", "operation_of", "register_rule", "rule_of"]
