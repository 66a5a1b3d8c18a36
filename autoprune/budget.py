"""Budget grammar: limits on the costs of a pruned model, and on its loss of score."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from autoprune.arguments import shown
from autoprune.errors import BudgetError
from autoprune.pareto import Direction

ALIASES = {"latency": "latency_ms", "memory": "memory_bytes"}
_SAME_METRIC = {"cross_entropy": "loss"}  # `search` takes either name
_ROUNDING = 1e-9  # a score of 387/400 meets 395/400 - 2pp, in spite of rounding in floats
BUILT_IN_COSTS = (
    "flops",
    "params",
    "nonzero_params",
    "memory_bytes",
    "latency_ms",
    "ms_per_sample",
    "sparse_flops",
    "stored_bytes",
)
THROUGHPUT = "throughput"
"""Name of a lower limit on samples a second, which is an upper limit on ``ms_per_sample``."""
FORMS = (
    "'flops <= 50%' (of the dense model), 'params <= 1.2M', 'memory_bytes <= 200MB', 'latency_ms <= 4', "
    "'throughput >= 900/s', '70% <= params <= 80%' (fronts within that range), "
    "'accuracy drop <= 1pp', 'accuracy >= 0.98', or several joined by commas, by 'and', or in a list"
)
_OWN = "; pass a cost of your own under this name with costs=, or limit what candidates are scored by, set by metric="
_MULTIPLIERS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_NUMBER = r"[+-]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_CLAUSE = re.compile(
    rf"(?:(?P<least>{_NUMBER})\s*(?P<least_unit>[A-Za-z%]*)\s*(?:<=|≤)\s*)?"
    r"(?P<name>[A-Za-z_][\w.]*)(?P<drop>\s+drop)?\s*(?P<sign><=|≤|>=|≥)\s*"
    rf"(?P<number>{_NUMBER})\s*(?P<unit>/s|[A-Za-z%]*)"
)


@dataclass(frozen=True)
class Limit:
    """Upper limit on a cost of a model.

    Attributes:
        name: The cost, for example ``"flops"``; ``"latency"`` and ``"memory"`` mean ``latency_ms``, ``memory_bytes``,
            and a throughput of at least something is a limit on ``ms_per_sample``.
        value: In the unit of the cost, or as a fraction of the dense model's cost in (0, 1] if `relative`.
        relative: Whether `value` is a fraction of the dense model's cost.
        least: Lower end of the costs that the front is wanted for, in the unit of `value`; None for half of it. Where
            networks are searched, not a limit: cheaper ones that are found belong to the front, too.
    """

    name: str
    value: float
    relative: bool = False
    least: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", ALIASES.get(self.name, self.name))
        if not (math.isfinite(self.value) and self.value > 0):
            raise BudgetError(f"the limit on {self.name} must be positive and finite, got {self.value}")
        if self.relative and self.value > 1:
            raise BudgetError(
                f"a percentage is of the dense model, so the limit on {self.name} must be at most 100%, "
                f"got {100 * self.value:g}%; leave the limit out, or give an absolute number"
            )
        if self.least is not None and not 0 <= self.least <= self.value:
            raise BudgetError(
                f"the lower end for {self.name} must be between 0 and its limit of {self.value:g}, got {self.least:g}"
            )

    def __str__(self) -> str:
        if self.name == "ms_per_sample":
            least = f"{100 / self.value:.12g}%" if self.relative else f"{1e3 / self.value:.12g}/s"
            return f"{THROUGHPUT} >= {least}"
        lower = "" if self.least is None else f"{self._amount(self.least)} <= "
        return f"{lower}{self.name} <= {self._amount(self.value)}"

    def _amount(self, value: float) -> str:
        return f"{100 * value:.12g}%" if self.relative else f"{value:.15g}"


@dataclass(frozen=True)
class ScoreLimit:
    """Limit on the score of a model.

    Attributes:
        name: The metric, for example ``"accuracy"``.
        value: In the metric's own unit: the largest loss against the dense model (one point, ``1pp``, is 0.01) if
            `drop`, else the worst score allowed.
        drop: Whether `value` is a loss against the dense model: a fall, or a rise where lower is better.
        at_most: Whether lower is better, so that `value` is the highest score; only without `drop`.
    """

    name: str
    value: float
    drop: bool
    at_most: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or (self.drop and self.value < 0):
            rule = "finite and not negative" if self.drop else "finite"
            raise BudgetError(f"the limit on {self.name} must be {rule}, got {self.value}")

    def __str__(self) -> str:
        return f"{self.name}{' drop' * self.drop} {'<=' if self.drop or self.at_most else '>='} {self.value:.15g}"

    def worst(self, dense_score: float, direction: Direction) -> float:
        """Worst score allowed, in the metric's own direction, where the dense model scores `dense_score`."""
        if not self.drop:
            return self.value
        return direction.worsened(dense_score, self.value)


@dataclass(frozen=True)
class Budget:
    """Everything a pruned model must respect; ``str(budget)`` can be parsed again.

    Attributes:
        limits: At most one for each cost; met by construction.
        score_limits: Constraints on the score; verified on held-out data. An upper limit on a metric, such as
            ``loss <= 0.3``, is among `limits` until `judged_by` knows that it is no cost.

    Raises:
        BudgetError: If there is no limit at all, or two on the same quantity.

    Example:
        >>> budget = Budget.parse("flops <= 50% and params <= 1.2M")
        >>> budget.resolve({"flops": 8e6, "params": 3e6})
        {'flops': 4000000.0, 'params': 1200000.0}
    """

    limits: tuple[Limit, ...] = ()
    score_limits: tuple[ScoreLimit, ...] = ()

    def __post_init__(self) -> None:
        names = [limit.name for limit in self.limits]
        names += [f"{limit.name} drop" if limit.drop else limit.name for limit in self.score_limits]
        if not names:
            raise BudgetError(f"the budget is empty; give at least one limit, for example {FORMS}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise BudgetError(f"the budget limits {', '.join(twice)} more than once: '{self}'; keep one limit each")

    def __str__(self) -> str:
        return " and ".join(str(limit) for limit in (*self.limits, *self.score_limits))

    @classmethod
    def parse(cls, budget: str | Budget | Iterable[str | Budget]) -> Budget:
        """Read a budget from text, a list of texts or budgets, or a budget.

        Raises:
            BudgetError: If a part cannot be read; the message shows valid forms.
        """
        if isinstance(budget, Budget):
            return budget
        found: list[Limit | ScoreLimit]
        if isinstance(budget, str):
            found = [_parse_clause(text) for text in re.split(r",|\band\b", budget) if text.strip()]
        elif isinstance(budget, Mapping):
            raise BudgetError(f"budget must be text, a list of texts or a Budget, got {shown(budget)}; write {FORMS}")
        elif isinstance(budget, Iterable) and not hasattr(budget, "__array__"):
            found = []
            for part in map(cls.parse, budget):
                found += [*part.limits, *part.score_limits]
        else:
            raise BudgetError(f"budget must be text, a list of texts or a Budget, got {shown(budget)}; write {FORMS}")
        return cls(
            limits=tuple(limit for limit in found if isinstance(limit, Limit)),
            score_limits=tuple(limit for limit in found if isinstance(limit, ScoreLimit)),
        )

    def judged_by(self, metric: str, direction: Direction, costs: Container[str]) -> Budget:
        """Tell limits on the score from limits on costs, once the metric and the costs are known.

        Raises:
            BudgetError: If a limit names another metric, or is on the wrong side for its direction.
        """
        limits = []
        score_limits = list(self.score_limits)
        higher = direction.higher_is_better
        for limit in self.limits:
            if limit.name in costs or not _same_metric(limit.name, metric):
                limits.append(limit)
            elif limit.least is not None:
                raise BudgetError(f"a range is of a cost, not of the metric {metric!r}, got '{limit}'")
            elif higher or limit.relative:
                way_out = f"{limit.name} >= {limit.value:.15g}" if higher else f"{limit.name} drop <= 0.1"
                raise BudgetError(f"'{limit}' cannot limit the metric {metric!r}; write for example '{way_out}'")
            else:
                score_limits.append(ScoreLimit(limit.name, limit.value, drop=False, at_most=True))
        for score_limit in score_limits:
            if score_limit.name in costs:
                continue  # `resolve` says what is wrong with it
            if not _same_metric(score_limit.name, metric):
                raise BudgetError(
                    f"budget limits {score_limit.name!r}, but candidates are scored by {metric!r}; "
                    f"limit {metric!r}, or pass metric="
                )
            if not (higher or score_limit.drop or score_limit.at_most):
                raise BudgetError(
                    f"lower is better for {metric!r}, so it takes an upper limit (<=), got '{score_limit}'"
                )
        return Budget(tuple(limits), tuple(score_limits))

    def worst_score(self, dense_score: float, direction: Direction) -> float | None:
        """Worst score that meets every limit on it, up to rounding, in the metric's own direction; None without."""
        worst = [limit.worst(dense_score, direction) for limit in self.score_limits]
        if not worst:
            return None
        slack = _ROUNDING * max(1.0, abs(dense_score))
        return direction.worsened(direction.best(worst), slack)

    def resolve(self, dense_costs: Mapping[str, float]) -> dict[str, float]:
        """Turn the limits on costs into absolute numbers.

        Args:
            dense_costs: Every cost of the dense model, by name.

        Returns:
            The largest cost allowed, by name, in the order of `limits`; empty if only the score is limited.

        Raises:
            BudgetError: If a limit names no cost of `dense_costs`, or is a lower limit on a cost.
        """
        for score_limit in self.score_limits:
            if score_limit.name in dense_costs:
                raise BudgetError(f"{score_limit.name} is a cost and takes an upper limit (<=), got '{score_limit}'")
        absolute = {}
        for limit in self.limits:
            if limit.name not in dense_costs:
                nearest = difflib.get_close_matches(limit.name, dense_costs, n=1, cutoff=0.75)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else _OWN
                if limit.name in ("latency_ms", "ms_per_sample"):
                    hint = "; search under a limit on latency, or pass it a table as costs={'latency_ms': table}"
                raise BudgetError(f"budget must limit one of {sorted(dense_costs)}, got {limit.name!r}{hint}")
            absolute[limit.name] = limit.value * (dense_costs[limit.name] if limit.relative else 1.0)
        return absolute


def _same_metric(name: str, metric: str) -> bool:
    return _SAME_METRIC.get(name, name) == _SAME_METRIC.get(metric, metric)


def _parse_clause(text: str) -> Limit | ScoreLimit:
    """Read one comparison."""
    match = _CLAUSE.fullmatch(text.strip())
    if match is None:
        raise BudgetError(f"cannot read {shown(text.strip())} as a budget; write {FORMS}")
    name = _cost_name(match["name"])
    unit = match["unit"]
    value = float(match["number"])
    at_least = match["sign"] in (">=", "≥")
    if match["least"] is not None and (at_least or match["drop"] or name == THROUGHPUT):
        raise BudgetError(f"a range is of a cost, such as '70% <= params <= 80%', got {text.strip()!r}")
    if name == THROUGHPUT and not match["drop"]:
        return _throughput(text.strip(), at_least, unit, value)
    if match["drop"]:
        if at_least or unit not in ("", "pp"):
            raise BudgetError(f"a drop takes an upper limit (<=) in points, for example '1pp', got {text.strip()!r}")
        return ScoreLimit(name, value / 100 if unit else value, drop=True)
    if at_least:
        if name in BUILT_IN_COSTS:
            raise BudgetError(f"{name} is a cost and takes an upper limit (<=), got {text.strip()!r}")
        if unit not in ("", "%"):
            raise BudgetError(f"a score takes a plain number or a percentage, got {text.strip()!r}")
        return ScoreLimit(name, value / 100 if unit else value, drop=False)
    least = None if match["least"] is None else float(match["least"])
    if least is not None and (match["least_unit"] == "%") != (unit == "%"):
        raise BudgetError(f"both ends of a range must be percentages, or none of them, got {text.strip()!r}")
    if unit == "%":
        return Limit(name, value / 100, True, None if least is None else least / 100)
    return Limit(name, value * _unit(name, unit), False, least and least * _unit(name, match["least_unit"]))


def _cost_name(name: str) -> str:
    """Normalise the name of a cost: ``FLOPs`` in any spelling, and ``MACs``, which equal FLOPs here."""
    known = {"macs": "flops", "parameters": "params", **ALIASES}
    found = known.get(name.lower(), name.lower())
    return found if found in (*BUILT_IN_COSTS, THROUGHPUT) else name


def _throughput(text: str, at_least: bool, unit: str, value: float) -> Limit:
    """Convert samples a second, or a percentage of the dense model's, to a limit on milliseconds a sample."""
    if not at_least or value <= 0 or unit not in ("", "/s", "%"):
        raise BudgetError(f"throughput takes a lower limit (>=) in samples a second, such as '900/s', got {text!r}")
    if unit == "%" and value < 100:
        raise BudgetError(
            f"a percentage is of the dense model, so the limit on throughput must be at least 100%, got {text!r}"
        )
    return Limit("ms_per_sample", 100 / value, relative=True) if unit == "%" else Limit("ms_per_sample", 1e3 / value)


def _unit(name: str, unit: str) -> float:
    """Factor from `unit` to the cost's own unit; ``ms`` fits any cost whose name ends in ``_ms``."""
    known = _MULTIPLIERS | (_BYTES if name.endswith("_bytes") else {})
    factor = known.get("K" if unit == "k" else unit)
    if factor is None and unit and name.lower().endswith(f"_{unit.lower()}"):
        factor = 1.0
    if factor is None:
        units = [u for u in (*known, name.rpartition("_")[2] if "_" in name else "") if u]
        raise BudgetError(f"the unit of {name} must be % or one of {units}, got {unit!r}")
    return factor
