"""Choice of the best trial within a budget, and the reason where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autoprune.budget import Budget
from autoprune.errors import InfeasibleBudgetError
from autoprune.protocols import OK
from autoprune.result.trials import Trial, note_of_failures, note_of_probes

if TYPE_CHECKING:
    from autoprune.result.search_result import SearchResult


def judged(result: SearchResult, budget: str | Budget | Sequence[str]) -> Budget:
    """Read a budget, and check it against the metric and the costs of a result.

    Raises:
        BudgetError: If it cannot be read, or limits an unknown cost or another metric.
    """
    return Budget.parse(budget).judged_by(result.metric, result.direction, result.dense.costs)


def best_of(result: SearchResult, wanted: Budget, limits: Mapping[str, float]) -> Trial:
    """Find the best trial within a budget, see `SearchResult.best`.

    Args:
        result: Of a search.
        wanted: The budget.
        limits: Its limits on costs, absolute; none for the budget of the search, which feasible trials meet.

    Raises:
        InfeasibleBudgetError: If no trial is within it; the message names the nearest one.
    """
    done = [trial for trial in result.trials if trial.status == OK and trial.feasible]
    if not done:
        raise InfeasibleBudgetError(f"no trial succeeded, so there is no best; {why_none(result)}")
    measured = {name for trial in done for name in trial.predicted} & {*limits, *result.limits}
    done = [trial for trial in done if measured <= trial.predicted.keys()]
    worst = wanted.worst_score(result.dense.score, result.direction)
    within = [trial for trial in done if _excess(result, trial, limits, worst) <= 0]
    if not within:
        nearest = min(done, key=lambda trial: (_excess(result, trial, limits, worst), *rank_of(result, trial)))
        costs = ", ".join(f"{name} {nearest.costs[name]:.6g}" for name in limits or result.limits)
        kind = "measured trials" if measured else "trials"
        raise InfeasibleBudgetError(
            f"budget '{wanted}' is met by none of {len(done)} {kind}; the nearest is trial {nearest.id} with "
            f"{costs}, {result.metric} {nearest.score:.4f}; search again under this budget"
        )
    if worst is None:
        return min(within, key=lambda trial: rank_of(result, trial))
    first = next(iter(limits or result.limits))
    return min(within, key=lambda trial: (trial.costs[first], *rank_of(result, trial)))


def why_none(result: SearchResult) -> str:
    """Reason why no trial is on the front: the commonest failure, measured costs, or too few trials."""
    if failed := note_of_failures(result.trials):
        return failed
    if missed := [trial for trial in result.trials if trial.predicted and not trial.feasible]:
        over = min(_excess(result, trial, result.limits, None) for trial in missed)
        return (
            f"{len(missed)} networks predicted to be within the limits were measured to be over, the nearest by "
            f"{over:.1%}; search again, with more trials or a looser limit"
        )
    return "; ".join(("the search ended too early", *note_of_probes(result.trials)))


def rank_of(result: SearchResult, trial: Trial) -> tuple[float, ...]:
    """Key that sorts trials from the best to the worst: by score, then by signal, then by costs."""
    return (result.direction.key(trial.score), trial.signal, *trial.costs.values())


def _excess(result: SearchResult, trial: Trial, limits: Mapping[str, float], worst: float | None) -> float:
    """Excess of a trial over limits on costs, as a fraction, or on the score; 0 or less if it meets them."""
    misses = [trial.upper_costs[name] / limit - 1 for name, limit in limits.items()]
    if worst is not None:
        misses.append(result.direction.worse_by(trial.score, worst))
    return max(misses, default=0.0)
