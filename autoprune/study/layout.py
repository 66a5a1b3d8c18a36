"""Layout of a problem: the costs of the space, the limits as numbers, and the candidates to begin from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from autoprune.budget import Budget
from autoprune.costs import CostFunction, Latency, make_costs
from autoprune.costs.changes import Changes, LimitedCosts
from autoprune.costs.given import require_steady
from autoprune.errors import BudgetError, InfeasibleBudgetError
from autoprune.metrics.judge import Judge
from autoprune.optimizers import Problem, uniform_seeds
from autoprune.protocols import ChoosesWidths, FloatArray, IntArray, SearchSpace
from autoprune.search_spaces import ProductSpace, Settings, why_no_less
from autoprune.structure.structure import Structure
from autoprune.study.measured_costs import MeasuredCosts
from autoprune.study.request import Request
from autoprune.study.start import Beginning, candidates_of
from autoprune.study.study import TIMED

_ROUNDING = 1e-9  # a user's cost of the cheapest candidate may differ in its last bit with the size of the population


@dataclass(frozen=True)
class Layout:
    """Problem of the optimizer, with the costs and limits that it was made from.

    Attributes:
        costs: Every cost by name, of candidates (n, d).
        budget: The budget, with the limits on the metric told apart.
        limits: The limited costs, absolute, in the order of the budget. A budget of score limits alone limits the
            minimised cost to that of the dense model.
        problem: Without a prior.
    """

    costs: Mapping[str, CostFunction]
    budget: Budget
    limits: Mapping[str, float]
    problem: Problem

    @property
    def minimises(self) -> bool:
        """True if the search minimises a cost subject to a limit on the score."""
        return bool(self.budget.score_limits)

    @property
    def uniform(self) -> IntArray:
        """Uniform pruning at the budget, or at half of the dense cost where the cost is minimised; shape (d,)."""
        candidate: IntArray = uniform_seeds(self.problem, (0.5,) if self.minimises else (1.0,))[-1]
        return candidate


def lay_out(
    request: Request,
    budget: Budget,
    settings: Settings,
    start: Sequence[Beginning],
    space: SearchSpace,
    structure: Structure,
    judge: Judge,
    measured: MeasuredCosts,
) -> Layout:
    """Lay out the problem.

    Raises:
        BudgetError: If the budget names an unknown cost or another metric.
        InfeasibleBudgetError: If no candidate can meet it; names the cheapest and what stops there.
    """
    predict = None if measured.memory is None else measured.memory.predict
    costs = make_costs(structure, space, request.cost_functions, request.example.cost_batch, measured.latency, predict)
    require_steady({name: costs[name] for name in request.cost_functions}, space)
    budget = budget.judged_by(judge.name, judge.direction, costs)
    limits = budget.resolve({name: float(cost(_dense(space))[0]) for name, cost in costs.items()})
    limits = limits or _cost_to_minimise(space, costs, not structure.terms.uncounted)
    minimise = bool(budget.score_limits)
    reach = {limit.name: limit.least / limit.value for limit in budget.limits if limit.least is not None}
    make = partial(_problem, structure, space, costs, start=start, reach=None if minimise else reach)
    try:
        problem = _within_upper(make, limits, None if minimise else measured.latency)
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(f"{error}; {_why_no_less(settings, space, costs, limits)}") from error
    return Layout(costs, budget, limits, problem)


def _within_upper(
    make: Callable[[Mapping[str, float]], Problem], limits: Mapping[str, float], latency: Latency | None
) -> Problem:
    """Make the problem so that candidates meet limits at the upper ends of predicted latencies, if possible."""
    slack = 1.0 if latency is None else 1 / (1 + latency.correction.margin)
    tight = {name: limit * slack if name in TIMED else limit for name, limit in limits.items()}
    try:
        return make(tight)
    except InfeasibleBudgetError:
        if tight == dict(limits):
            raise
        return make(limits)


def _why_no_less(
    settings: Settings, space: SearchSpace, costs: Mapping[str, CostFunction], limits: Mapping[str, float]
) -> str:
    """Describe the smallest network of the space, in percent of the dense model, and the settings that limit it."""
    ends = np.concatenate([_dense(space), space.canonical(space.sizes[None] - 1)])
    shares = {name: costs[name](ends)[1] / costs[name](ends)[0] for name in limits if costs[name](ends)[0] > 0}
    told = ", ".join(f"{share:.2%} of the dense {name}" for name, share in shares.items())
    found = f"every dimension at its least leaves {told}" if told else "every dimension is at its least"
    return f"{found}; what stops there is {why_no_less(settings)}: loosen these, or allow more"


def _cost_to_minimise(space: SearchSpace, costs: Mapping[str, CostFunction], counted: bool) -> dict[str, float]:
    """Choose the cost to minimise under score limits alone, with the dense model's as its limit: FLOPs if they differ.

    They do not where elements are set to zero, nor in a model without multiplications.
    """
    ends = np.concatenate([_dense(space), space.canonical(space.sizes[None] - 1)])
    for name in ("flops", "nonzero_params") if counted else ("nonzero_params",):
        dense, least = costs[name](ends)
        if least < dense:
            return {name: float(dense)}
    raise BudgetError("budget must limit a cost, because no option of the space changes flops or nonzero_params")


def _dense(space: SearchSpace) -> IntArray:
    return np.zeros((1, len(space.sizes)), dtype=np.int64)


def _problem(
    structure: Structure,
    space: SearchSpace,
    costs: Mapping[str, CostFunction],
    limits: Mapping[str, float],
    start: Sequence[Beginning],
    reach: Mapping[str, float] | None,
) -> Problem:
    """Lay out the problem.

    Args:
        structure: Of the model.
        space: Bound.
        costs: By name.
        limits: Absolute.
        start: Candidates to begin with.
        reach: Lower end of the wanted costs, as a share of the limit, where one is given; None for the whole reachable
            range, where the cost is minimised.
    """
    names = tuple(limits)
    problem = Problem(
        sizes=space.sizes,
        cost_names=names,
        limits=np.array([limits[name] for name in names]),
        cost_function=LimitedCosts(costs, names, changes_of(structure, space, names)),
        ordered=np.array([dimension.ordered for dimension in space.dimensions]),
        canonical=space.canonical,
    )
    fractions: tuple[float, ...] = (0.8, 0.6, 0.4, 0.2)
    low, high = problem.budget_range.T
    if reach is None:
        low = (1 + _ROUNDING) * problem.costs(problem.cheapest[None])[0]
    else:
        nearest = max(reach.get(name, 0.5) for name in names)
        fractions = (1.0, (1 + nearest) / 2, nearest)
        asked = [
            min(reach[name] * limits[name], top) if name in reach else np.inf
            for name, top in zip(names, high, strict=True)
        ]
        low = np.where(np.isfinite(asked), asked, low)
    problem = replace(problem, budget_range=np.stack([low, high], axis=1))
    given = [candidate for item in start for candidate in candidates_of(item, space)]
    unread = np.array([dimension.name in structure.unread for dimension in space.dimensions])
    uniform = uniform_seeds(problem, fractions, unread)
    return replace(
        problem, seeds=np.concatenate([np.array(given, dtype=np.int64).reshape(-1, len(space.sizes)), uniform])
    )


def changes_of(structure: Structure, space: SearchSpace, names: tuple[str, ...]) -> Changes | None:
    """Make the fast update of limited costs by single changes; None where costs or space are of another kind."""
    choices = _choices(space) if set(names) <= set(Changes.SUMS) else None
    if choices is None:
        return None
    changes = Changes(structure, names, *choices, space if (choices[0] < 0).any() else None)
    return changes if changes.exact else None


def _choices(space: SearchSpace) -> tuple[IntArray, FloatArray] | None:
    """Groups and widths as of `ChoosesWidths`, for products of such spaces, too, unless two choose for one group."""
    if isinstance(space, ChoosesWidths):
        return space.choices
    each = [_choices(member) for member in space.members] if isinstance(space, ProductSpace) else []
    known = [choices for choices in each if choices is not None]
    if not known or len(known) < len(each):
        return None
    groups = np.concatenate([groups for groups, _ in known])
    if len(np.unique(groups[groups >= 0])) < (groups >= 0).sum():
        return None
    most = max(widths.shape[1] for _, widths in known)
    return groups, np.concatenate([np.pad(widths, ((0, 0), (0, most - widths.shape[1]))) for _, widths in known])
