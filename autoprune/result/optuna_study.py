"""Searches as studies of Optuna, which optuna-dashboard and Optuna's own plots show."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.arguments import is_number, is_whole, require_storage, said, shown
from autoprune.imports import quiet_optuna
from autoprune.protocols import FAILED, OK, PENDING, RACED, Dimension, SearchSpace
from autoprune.result.trials import Trial

if TYPE_CHECKING:
    import optuna

    from autoprune.result.search_result import SearchResult

RUN_DIR = "run_dir"
"""Attribute of a study: the run directory of its search, by which a resumed search finds it again."""
MOST_NAME = 400
"""Most characters of a name: databases keep 512, and a number may be added."""
STATES = {OK: "COMPLETE", RACED: "PRUNED", FAILED: "FAIL", PENDING: "RUNNING"}


@dataclass(frozen=True)
class Sought:
    """Properties of a search that its study states.

    Attributes:
        space: The space.
        limits: The limited costs, absolute.
        metric: Name of the metric.
        higher_is_better: Its direction.
        budget: As text.
    """

    space: SearchSpace
    limits: Mapping[str, float]
    metric: str
    higher_is_better: bool
    budget: str


def to_optuna(result: SearchResult, storage: Any = None, name: str | None = None) -> optuna.Study:
    """Make a study of a result, see `SearchResult.to_optuna`."""
    require_storage(storage)
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= MOST_NAME):
        raise ValueError(f"name must be text of up to {MOST_NAME} characters or None, got {shown(name)}")
    sought = Sought(result.space, result.limits, result.metric, result.higher_is_better, result.budget)
    study: optuna.Study = new_study(opened(storage), sought, name)
    add(study, sought, result.trials)
    return study


def opened(storage: Any) -> Any:
    """Open a storage of Optuna: a URL, an object, or None for one in memory.

    Raises:
        ValueError: If it is no storage, or cannot be opened.
    """
    with quiet_optuna() as optuna:
        try:
            found = optuna.storages.get_storage(storage)
            optuna.get_all_study_names(found)  # any object passes as a storage until it is used
            return found
        except Exception as error:  # of Optuna, SQLAlchemy or the driver of a database
            raise ValueError(
                "storage must be a storage of Optuna or its URL, such as 'sqlite:///runs/optuna.db' in a folder that "
                f"exists, got {shown(storage)}: {said(error)}"
            ) from error


def new_study(storage: Any, sought: Sought, name: str | None = None) -> Any:
    """Make an empty study that maximises or minimises the score, and minimises each limited cost.

    Args:
        storage: See `opened`.
        sought: The search.
        name: Name of the study; None for the budget and the time. A number is added to one that is taken.
    """
    directions = ["maximize" if sought.higher_is_better else "minimize", *["minimize"] * len(sought.limits)]
    name = name or time.strftime(f"{sought.budget}, %Y-%m-%d %H:%M:%S")
    with quiet_optuna() as optuna:
        taken = set(optuna.get_all_study_names(storage))
        names = [name, *(f"{name} ({number})" for number in range(2, len(taken) + 3))]
        free_name = next(one for one in names if one not in taken)
        study = optuna.create_study(storage=storage, study_name=free_name, directions=directions)
        study.set_metric_names([sought.metric, *sought.limits])
        for key, value in {"budget": sought.budget, **{f"limit {k}": v for k, v in sought.limits.items()}}.items():
            study.set_user_attr(key, value)
    return study


def add(study: optuna.Study, sought: Sought, trials: Sequence[Trial]) -> None:
    """Add trials to a study."""
    with quiet_optuna() as optuna:
        options = {dimension.name: _values(dimension) for dimension in sought.space.dimensions}
        distributions = {name: _distribution(optuna, values) for name, values in options.items()}
        for trial in trials:
            params = {name: values[i] for (name, values), i in zip(options.items(), trial.candidate, strict=True)}
            study.add_trial(_trial(optuna, sought, trial, params=params, distributions=distributions))


class Recorder:
    """Callback that adds the trials of a running search to a study: ``Execution(storage=...)``.

    Args:
        storage: See `opened`.
        sought: The search.
        run_dir: Its run directory, if it has one.
        resume: Continue the study of an earlier search in `run_dir`, if there is one.
    """

    def __init__(self, storage: Any, sought: Sought, run_dir: str | Path | None, resume: bool) -> None:
        self._sought = sought
        where = "" if run_dir is None else str(Path(run_dir).absolute())
        self._study = (_found(storage, where) if resume else None) or new_study(
            storage, sought, Path(where).name or None
        )
        if where:
            self._study.set_user_attr(RUN_DIR, where)
        self._known = {trial.user_attrs.get("trial") for trial in self._study.trials}

    def on_trial(self, trial: Trial) -> None:
        """Add a trial that the study does not have yet."""
        if trial.id not in self._known:
            self._known.add(trial.id)
            add(self._study, self._sought, [trial])

    def on_end(self, result: SearchResult) -> None:
        """Add what is known in the end: why it stopped, the numbers of the trials on the front, and the notes."""
        self._study.set_user_attr("stopped", result.stopped)
        self._study.set_user_attr("front", [trial.id for trial in result.front])
        self._study.set_user_attr("notes", list(result.notes))


def _found(storage: Any, run_dir: str) -> optuna.Study | None:
    """Find the latest study of a run directory."""
    with quiet_optuna() as optuna:
        named = [
            one.study_name for one in optuna.get_all_study_summaries(storage) if one.user_attrs.get(RUN_DIR) == run_dir
        ]
        return optuna.load_study(storage=storage, study_name=named[-1]) if named else None


def _trial(optuna: Any, sought: Sought, trial: Trial, **choice: Any) -> Any:
    """Make a trial of Optuna that begins now less its seconds: only the journal knows when it began."""
    attributes = {"trial": trial.id, "status": trial.status, "feasible": trial.feasible, "reason": trial.reason}
    attributes |= {name: value for name, value in trial.costs.items() if name not in sought.limits}
    values = [trial.score, *(trial.costs[name] for name in sought.limits)]
    made = optuna.trial.create_trial(
        state=optuna.trial.TrialState[STATES[trial.status]],
        values=values if trial.status == OK and not any(map(math.isnan, values)) else None,
        **choice,
        user_attrs={name: value for name, value in attributes.items() if value != ""},
        # Above 0 means over a limit to Optuna, which leaves such trials out of its Pareto front.
        system_attrs={"constraints": [trial.upper_costs[name] - limit for name, limit in sought.limits.items()]},
    )
    seconds = sum(one.seconds for one in trial.evaluations)
    made.datetime_start = (made.datetime_complete or datetime.now()) - timedelta(seconds=seconds)
    return made


def _distribution(optuna: Any, values: Sequence[Any]) -> Any:
    if isinstance(values[0], str):
        return optuna.distributions.CategoricalDistribution(values)
    kind = (
        optuna.distributions.IntDistribution if isinstance(values[0], int) else optuna.distributions.FloatDistribution
    )
    return kind(min(values), max(values))


def _values(dimension: Dimension) -> list[Any]:
    """Options of a dimension as numbers, so that plots have an axis, or as words where these are not distinct."""
    options = dimension.options
    if all(map(is_number, options)) and 1 < len(set(options)) == len(options):
        return [int(option) if all(map(is_whole, options)) else float(option) for option in options]
    words = [str(option) for option in options]
    return words if len(set(words)) == len(words) else [f"{i}: {word}" for i, word in enumerate(words)]
