"""Optimizers: propose candidates, learn from their evaluations; they know a `Problem`, never a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

from autoprune.arguments import shown, why_no_function
from autoprune.optimizers.auto import Auto
from autoprune.optimizers.bayes import Bayes
from autoprune.optimizers.history import Archive
from autoprune.optimizers.knapsack.knapsack import Knapsack, milp
from autoprune.optimizers.level_switch import LevelSwitch, evopress
from autoprune.optimizers.nsga2 import NSGA2
from autoprune.optimizers.problem import Problem, uniform_seeds
from autoprune.optimizers.random import RandomSearch
from autoprune.protocols import Optimizer

__all__ = [
    "NSGA2",
    "OPTIMIZERS",
    "Archive",
    "Auto",
    "Bayes",
    "Knapsack",
    "LevelSwitch",
    "OptimizerName",
    "Problem",
    "RandomSearch",
    "evopress",
    "find_optimizer",
    "milp",
    "uniform_seeds",
]

MakeOptimizer = Callable[[Problem, int], Optimizer]

OptimizerName = Literal["auto", "knapsack", "milp", "level_switch", "nsga2", "bayes", "random"]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "auto": Auto,
    "bayes": Bayes,
    "knapsack": Knapsack,
    "level_switch": LevelSwitch,
    "milp": milp,
    "nsga2": NSGA2,
    "random": RandomSearch,
}
"""Optimizers of `search(optimizer=)` by name."""


def find_optimizer(spec: str | MakeOptimizer | Optimizer) -> MakeOptimizer:
    """Find the function of (problem, seed) for `spec`: a name, such a function or class, or a finished optimizer.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If `spec` is none of these.
    """
    if isinstance(spec, str):
        if spec not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {sorted(OPTIMIZERS)}, got {shown(spec)}")
        return OPTIMIZERS[spec]
    if not isinstance(spec, type) and hasattr(spec, "ask") and hasattr(spec, "tell"):
        made = cast(Optimizer, spec)
        return lambda problem, seed: made
    makes_none = isinstance(spec, type) and not (hasattr(spec, "ask") and hasattr(spec, "tell"))
    if why := f"got {shown(spec)}" if makes_none else why_no_function(spec, 2, classes=True):
        raise TypeError(f"optimizer must be a name, a function of (problem, seed) or have ask and tell, {why}")
    return spec
