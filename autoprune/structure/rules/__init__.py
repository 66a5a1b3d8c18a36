"""Rules that give the labels of an operation's results from those of its arguments.

A rule takes the propagation and the operation and returns the labels of each result. It is found by the operation's
name; all operations that PyTorch tags as pointwise share one rule. An operation without a rule freezes its labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from autoprune.structure.propagate import Dims, Propagation
from autoprune.structure.record import Op

Rule = Callable[[Propagation, Op], list[Dims]]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by name, without namespace and overload, for example ``"convolution"``."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def rule_of(op: Op) -> Rule | None:
    """Find the rule of an operation, or None."""
    from autoprune.structure.rules import arithmetic, indexing, layers, views  # noqa: F401  (each registers its rules)

    if op.name in RULES:
        return RULES[op.name]
    return RULES["pointwise"] if torch.Tag.pointwise in op.func.tags else None
