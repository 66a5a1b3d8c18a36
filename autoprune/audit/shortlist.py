"""A little training of a few candidates of a search, to choose the one that is worth training for long."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from autoprune.arguments import MOST_SEED, shown, whole_number
from autoprune.audit.training import builder_of, trained, training_by
from autoprune.budget import Budget
from autoprune.errors import InfeasibleBudgetError
from autoprune.evaluators.recovery.recovery import Recovery
from autoprune.evaluators.scoring.scorer import Measuring
from autoprune.metrics.statistics import Evaluation
from autoprune.protocols import OK, Failure, Measurement
from autoprune.result import SearchResult
from autoprune.result.choosing import best_of, judged, rank_of
from autoprune.result.tables import aligned, engineering
from autoprune.result.trials import Trial
from autoprune.search_spaces.counts import counted

log = logging.getLogger(__name__)

KEEP = 4
"""One of this number of candidates goes on to the next round, which trains this number of times as long."""
NEAR = 0.9
"""Share of a limit from which on a candidate counts as one that uses the budget."""


@dataclass(frozen=True)
class Shortlisted:
    """Candidate that was trained a little.

    Attributes:
        trial: Of the search.
        uniform: True if all widths are pruned alike.
        scores: The metric on the validation samples after each round that it was trained in; NaN where that failed.
        signals: Likewise the signal, lower is better, which chooses.
        reason: Reason why a training failed.
    """

    trial: Trial
    uniform: bool = False
    scores: tuple[float, ...] = ()
    signals: tuple[float, ...] = ()
    reason: str = ""

    @property
    def rank(self) -> tuple[float, ...]:
        """Key that sorts from the best to the worst: whether it failed, rounds trained in, then the latest signal."""
        known = [signal for signal in self.signals if math.isfinite(signal)]
        return (bool(self.reason), -len(known), known[-1] if known else math.inf)


@dataclass(frozen=True)
class Shortlist:
    """Candidates after a little training, the best first; ``print`` shows them.

    Attributes:
        rows: The candidates.
        steps: Steps of each round, ascending.
        cost: Name of the first limited cost.
        metric: Name of the metric.
    """

    rows: tuple[Shortlisted, ...]
    steps: tuple[int, ...]
    cost: str
    metric: str

    @property
    def best(self) -> Trial:
        """The trial to build and to train for long."""
        return self.rows[0].trial

    def __str__(self) -> str:
        table = [
            ["trial", self.cost, f"{self.metric}, untrained", *(counted(steps, "step") for steps in self.steps), ""]
        ]
        for row in self.rows:
            scores = [f"{score:.4f}" if math.isfinite(score) else "failed" for score in row.scores]
            blank = [""] * (len(self.steps) - len(scores))
            name = "uniform" if row.uniform else row.reason[:40]
            cost = engineering(row.trial.costs[self.cost])
            table.append([str(row.trial.id), cost, f"{row.trial.score:.4f}", *scores, *blank, name])
        return aligned(table)


def shortlist(
    result: SearchResult,
    train_fn: Callable[..., object],
    k: int = 16,
    *,
    steps: int = 40,
    budget: str | Budget | Sequence[str] | None = None,
    seed: int = 0,
) -> Shortlist:
    """Train a few candidates of a search a little, and choose the one to train for long.

    For tight budgets, where scores without training say little about networks of equal cost: half of the candidates are
    the best by score, the others the best of those that use nearly all of the budget, and the largest of uniform widths
    is among them that the search scored. All are trained for a quarter of the steps, and the best quarter of them, but
    at least two, from the start again for all steps. The signal on the validation samples of the search chooses.

    Args:
        result: What `autoprune.search` returned, under a budget that limits a cost. After a restart, get it by
            searching with ``resume=True``.
        train_fn: A `Recovery`, best the one to be used afterwards, or ``train_fn(model, steps)``, which trains a model
            in place. What it raises costs one candidate.
        k: Number of candidates, at least 2; all there are if there are fewer.
        steps: Steps of the longest training here; a tenth of those that the chosen network will get is plenty.
        budget: Of the candidates, by default that of the search. Only its limits on costs count: scores change.
            Networks whose latency was not measured count by the predicted one.
        seed: Of the trainings.

    Returns:
        The candidates with their scores, the best first: ``result.build(shortlist.best)`` builds it, untrained. Ctrl-C
        returns them as they are ordered by the trainings so far.

    Raises:
        FileFormatError: If `result` was loaded from disk, because the model and the samples are needed.
        InfeasibleBudgetError: If no pruned network is within the budget, or every training failed.
        ValueError: If the budget limits no cost, or a number is out of range.
        KeyboardInterrupt: If it comes before the end of the first training.

    Reference:
        Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016,
        arXiv:1502.07943, for halving (here quartering) with ever longer trainings.

    Example:
        >>> recipe = autoprune.Recovery(train, teacher=model)  # doctest: +SKIP
        >>> chosen = autoprune.shortlist(result, recipe).best  # doctest: +SKIP
        >>> autoprune.recover(result.build(chosen), recipe=recipe)  # doctest: +SKIP
    """
    if not isinstance(result, SearchResult):
        raise TypeError(f"result must be what autoprune.search returned, got {shown(result)}")
    builder = builder_of(result, "shortlist")
    training = training_by(train_fn, steps=True, inner=True)
    k = whole_number("k", k, 2)
    steps = whole_number("steps", steps, 1)
    seed = whole_number("seed", seed, 0, MOST_SEED)
    rounds = sorted({max(1, steps // KEEP), steps})
    if isinstance(train_fn, Recovery) and train_fn.steps_to > rounds[0]:
        raise ValueError(
            f"steps must be at least {KEEP * train_fn.steps_to}, because the first trainings take one of {KEEP} of "
            f"them, and the recipe trains steps_to={train_fn.steps_to} networks, got {steps}"
        )
    limits = _limits_of(result, budget)
    uniform = frozenset(result.outline.uniform) if result.outline else frozenset()
    rows = [Shortlisted(trial, trial.candidate in uniform) for trial in _chosen(result, limits, uniform, k)]
    if not rows:
        raise InfeasibleBudgetError("the budget is met by the dense model alone; search again, with more trials")
    context = builder.context
    measure = Measuring(context, builder.evaluator.build(np.zeros(len(context.space.sizes), dtype=np.int64)).eval())

    def made(trial: Trial, steps: int) -> nn.Module:
        zeroed = context.structure.edit(context.space.pruning(trial.candidate)).zeroed
        return trained(result.build(trial), zeroed, lambda module: training(module, seed, steps))

    try:
        for number, length in enumerate(rounds):
            _train(rows, length, len(rows) if number == 0 else max(2, len(rows) // KEEP), made, measure)
    except KeyboardInterrupt:
        rows.sort(key=lambda row: row.rank)
        if not rows[0].signals or rows[0].reason:
            raise
        log.warning("interrupted; candidates are ordered by the trainings so far")
    if rows[0].reason:
        longest = rounds[len(rows[0].signals) - 1]
        raise InfeasibleBudgetError(
            f"no candidate could be trained for {longest} steps; the first reason: {rows[0].reason}; try train_fn on "
            "result.build()"
        )
    return Shortlist(tuple(rows), tuple(rounds), next(iter(limits)), result.metric)


def _limits_of(result: SearchResult, budget: str | Budget | Sequence[str] | None) -> dict[str, float]:
    """Limits on costs of a budget, absolute, by default of that of the search.

    Raises:
        InfeasibleBudgetError: If no trial is within them; the message names the nearest one.
        ValueError: If there are none.
    """
    wanted = judged(result, result.budget if budget is None else budget)
    if not wanted.limits:
        raise ValueError(f"budget must limit a cost, so that there are networks of equal cost, got '{wanted}'")
    limits = dict(result.limits) if budget is None else wanted.resolve(result.dense.costs)
    best_of(result, Budget(wanted.limits), limits)
    return limits


def _train(
    rows: list[Shortlisted],
    steps: int,
    going: int,
    made: Callable[[Trial, int], nn.Module],
    measure: Measuring,
) -> None:
    """Train the first candidates of a list, in place, until a number of them did not fail; then sort it."""
    for i, row in enumerate(rows):
        if going and not row.reason:
            rows[i] = _told(row, steps, measure(partial(made, row.trial, steps), "validation"))
            going -= not rows[i].reason
    rows.sort(key=lambda row: row.rank)


def _chosen(
    result: SearchResult, limits: Mapping[str, float], uniform: Collection[tuple[int, ...]], most: int
) -> list[Trial]:
    """Choose trials within limits: the best by score, the best of those near a limit, and the largest uniform one."""
    known = {trial.candidate: trial for trial in reversed(result.trials) if any(trial.candidate)}
    within = [
        trial
        for trial in known.values()
        if trial.feasible and all(trial.upper_costs[name] <= limit for name, limit in limits.items())
    ]
    done = sorted((trial for trial in within if trial.status == OK), key=partial(rank_of, result))
    near = [trial for trial in done if any(trial.upper_costs[name] >= NEAR * limit for name, limit in limits.items())]
    first = done[: most // 2]
    first_cost = next(iter(limits))
    even = sorted((trial for trial in within if trial.candidate in uniform), key=lambda t: t.costs[first_cost])[-1:]
    found = {trial.id: trial for trial in (*first[:1], *even, *first[1:], *near, *done)}
    return list(found.values())[:most]


def _told(row: Shortlisted, steps: int, outcome: Measurement | Failure) -> Shortlisted:
    """Add what a training gave, and log it."""
    found = Evaluation.of(outcome)
    if isinstance(outcome, Failure) or found.metric is None or found.signal is None:
        reason = outcome.reason or "the score is not finite"
        log.info("trial %d, %d steps: %s", row.trial.id, steps, reason)
        return replace(row, reason=reason, scores=(*row.scores, math.nan), signals=(*row.signals, math.nan))
    log.info("trial %d, %d steps: %.4f (%.1f s)", row.trial.id, steps, found.metric, outcome.seconds)
    return replace(row, scores=(*row.scores, found.metric), signals=(*row.signals, found.signal))
