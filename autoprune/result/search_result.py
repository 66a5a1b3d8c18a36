"""Result of a search: the front, the best under a budget, and methods to build, save and show it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from autoprune.arguments import flag, one_of
from autoprune.budget import Budget
from autoprune.errors import FileFormatError, InfeasibleBudgetError
from autoprune.files.access import as_path, shortened
from autoprune.pareto import Direction
from autoprune.protocols import OK, SearchSpace
from autoprune.result.additivity import Additivity, additivity_of
from autoprune.result.audit_report import Audit
from autoprune.result.builders import Builder, SavedWeights
from autoprune.result.recipe import warn_of_dense_config
from autoprune.result.saving import (
    FORMAT,
    RESULT,
    files_of,
    read_result,
    reading,
    require_consistent,
    write_result,
)
from autoprune.result.sensitivity import Sensitivity, sensitivity_of
from autoprune.result.tables import data_frame, front_table
from autoprune.result.trials import Trial, note_of_failures, note_of_probes
from autoprune.search_spaces import space_from_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_PLAIN = ("budget", "metric", "higher_is_better", "stopped", "seconds", "seed")


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a search.

    Attributes:
        trials: All trials in the order proposed.
        front: Feasible trials that no other dominates in score and limited costs, by the first limited cost.
        dense: The unpruned model, scored on the same samples.
        space: Gives candidates their meaning.
        limits: The limited costs, absolute, in the order of the budget. After a search under score limits alone, the
            minimised cost, with that of the dense model.
        budget: The budget as text.
        metric: Name of the metric.
        higher_is_better: Its direction.
        notes: Decisions about data, metric and model, in plain words.
        stopped: Reason why the search ended: ``"trials"``, ``"converged"`` (see `notes`), ``"time"``,
            ``"interrupted"``, ``"exhausted"``, ``"refused"`` (the optimizer proposed an invalid candidate; see
            `notes`), or ``"unfinished"`` when it was read from the journal of a run that continues or was killed.
        seconds: Wall time of the search.
        seed: Its seed.
        audit: Reliability of its scores, from `autoprune.audit`; None before.
    """

    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    dense: Trial
    space: SearchSpace
    limits: Mapping[str, float]
    budget: str
    metric: str
    higher_is_better: bool
    notes: tuple[str, ...]
    stopped: str
    seconds: float
    seed: int
    audit: Audit | None = None
    _builder: Builder | None = field(default=None, repr=False, compare=False)

    def best(self, budget: str | Budget | Sequence[str] | None = None) -> Trial:
        """Find the best trial by validation score within a budget, by default that of the search.

        Only trials within the limits of the search count, even if `budget` is wider: the others were probes. Equal
        scores go to the better signal, then to the lower cost. If the budget limits the score, this is the cheapest
        trial that meets it, by the first cost that the budget limits too, else by the first of the search. If a cost
        that this budget or that of the search limits was measured on some networks, only those count, because the
        predictions of the others may be off. A measured time is within a limit if the upper end of its interval is.

        Raises:
            BudgetError: If the budget cannot be read, or limits an unknown cost or another metric.
            InfeasibleBudgetError: If no trial is within it; the message names the nearest one.
        """
        done = [trial for trial in self.trials if trial.status == OK and trial.feasible]
        if not done:
            raise InfeasibleBudgetError(f"no trial succeeded, so there is no best; {self._why_none()}")
        wanted = self._wanted if budget is None else self._judged(budget)
        limits = wanted.resolve(self.dense.costs) if budget is not None else {}
        measured = {name for trial in done for name in trial.predicted} & {*limits, *self.limits}
        done = [trial for trial in done if measured <= trial.predicted.keys()]
        worst = wanted.worst_score(self.dense.score, self.direction)
        within = [t for t in done if self._excess(t, limits, worst) <= 0]
        if not within:
            nearest = min(done, key=lambda t: (self._excess(t, limits, worst), *self._rank(t)))
            costs = ", ".join(f"{name} {nearest.costs[name]:.6g}" for name in limits or self.limits)
            kind = "measured trials" if measured else "trials"
            raise InfeasibleBudgetError(
                f"budget '{wanted}' is met by none of {len(done)} {kind}; the nearest is trial {nearest.id} with "
                f"{costs}, {self.metric} {nearest.score:.4f}; search again under this budget"
            )
        if worst is None:
            return min(within, key=self._rank)
        first = next(iter(limits or self.limits))
        return min(within, key=lambda t: (t.costs[first], *self._rank(t)))

    @property
    def worst_score(self) -> float | None:
        """Worst validation score that the budget of the search allows; None if it limits costs alone."""
        return self._wanted.worst_score(self.dense.score, self.direction)

    @property
    def direction(self) -> Direction:
        """Direction of the metric."""
        return Direction(self.higher_is_better)

    @cached_property
    def _wanted(self) -> Budget:
        """Budget of the search, read once."""
        return self._judged(self.budget)

    def _judged(self, budget: str | Budget | Sequence[str]) -> Budget:
        return Budget.parse(budget).judged_by(self.metric, self.direction, self.dense.costs)

    def _rank(self, trial: Trial) -> tuple[float, ...]:
        return (self.direction.key(trial.score), trial.signal, *trial.costs.values())

    def _excess(self, trial: Trial, limits: Mapping[str, float], worst: float | None) -> float:
        """Excess of a trial over limits on costs, as a fraction, or on the score; 0 or less if it meets them."""
        misses = [trial.upper_costs[name] / limit - 1 for name, limit in limits.items()]
        if worst is not None:
            misses.append(self.direction.worse_by(trial.score, worst))
        return max(misses, default=0.0)

    def _why_none(self) -> str:
        """Reason why no trial is on the front: the commonest failure, measured costs, or too few trials."""
        if failed := note_of_failures(self.trials):
            return failed
        if missed := [trial for trial in self.trials if trial.predicted and not trial.feasible]:
            over = min(self._excess(trial, self.limits, None) for trial in missed)
            return (
                f"{len(missed)} networks predicted to be within the limits were measured to be over, the nearest by "
                f"{over:.1%}; search again, with more trials or a looser limit"
            )
        return "; ".join(("the search ended too early", *note_of_probes(self.trials)))

    def build(self, what: Trial | str | Budget | Sequence[str] | None = None) -> nn.Module:
        """Build a plain pruned module: of a trial, of the best within a budget, or of the best.

        It shares no state with the model, is in the same mode on the same device, and has the score of the trial.

        Raises:
            InfeasibleBudgetError: If no trial is within the budget.
            FileFormatError: If the result was loaded without a model, or without the weights of this trial.
        """
        module = self._built(what if isinstance(what, Trial) else self.best(what))
        warn_of_dense_config(module)
        return module

    def _built(self, trial: Trial) -> nn.Module:
        if self._builder is None:
            raise FileFormatError("build needs the model; load the result with SearchResult.load(path, model=model)")
        return self._builder.build(trial)

    def save(self, path: str | Path, weights: str = "front", replace: bool = False) -> Path:
        """Write the result to a folder: ``result.json``, and a safetensors file for each trial that keeps its weights.

        Tensors that several of them have in common, those of the dense model that no re-fit changed, are written once,
        to a file ``dense-*.safetensors``; each trial still builds to the last bit. Keep the folder together;
        ``autoprune.save(result.build(trial), path)`` writes a model that needs no other file.

        ``result.json`` is written last and holds a hash of each file, so that no other weights are taken for those of a
        trial. Weights of an earlier save in the folder are deleted afterwards; a process killed before leaves the
        earlier save as it was.

        Args:
            path: The folder; made if missing.
            weights: ``"front"``, ``"best"`` or ``"none"``.
            replace: Replace another result in the folder.

        Raises:
            ValueError: If `weights` is unknown.
            FileExistsError: If the folder holds a result already and `replace` is false, or it is a file.
            OSError: If it cannot be written; an earlier result in it is as it was.
        """
        one_of("weights", weights, ("best", "front", "none"))
        replace = flag("replace", replace)
        folder = as_path(path)
        if (folder.exists() and not folder.is_dir()) or (not replace and (folder / RESULT).exists()):
            raise FileExistsError(
                f"path must be a folder without a result in it, got {shortened(folder)}; pass another path, or "
                "replace=True to put this result in the place of that one"
            )
        kept = self.front if weights == "front" else ()
        if weights == "best" and self.front:
            kept = (self.best(),)
        shared = self._builder.shared(kept) if self._builder is not None and len(kept) > 1 else None
        write_result(folder, self.to_json(), kept, self._built, shared)
        return folder

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary of everything but weights; NaN becomes null."""
        return {
            **FORMAT.stamp(),
            **{name: getattr(self, name) for name in _PLAIN},
            "notes": list(self.notes),
            "limits": dict(self.limits),
            "space": self.space.to_json(),
            "dense": self.dense.to_json(),
            "trials": [trial.to_json() for trial in self.trials],
            "front": [trial.id for trial in self.front],
            "audit": None if self.audit is None else self.audit.to_json(),
        }

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> SearchResult:
        """Read a saved result; with a dense `model` of the class that was pruned, its saved trials can be built.

        Raises:
            FileNotFoundError: If there is no result in `path`.
            FileFormatError: If it is corrupted or foreign.
        """
        folder = as_path(path)
        file = folder / RESULT if folder.is_dir() else folder
        if not file.exists():
            raise FileNotFoundError(
                f"path must be a folder written by result.save, got {shortened(folder)}: no {RESULT} there"
            )
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a dense nn.Module of the class that was pruned, got {type(model).__name__}")
        data = read_result(file)
        with reading(file):
            return cls._from_json(data, SavedWeights(file.parent, model, files_of(data)))

    @classmethod
    def _from_json(cls, data: Mapping[str, Any], builder: Builder | None) -> SearchResult:
        trials = tuple(Trial.from_json(trial) for trial in data["trials"])
        dense = Trial.from_json(data["dense"])
        space = space_from_json(data["space"])
        require_consistent(trials, dense, space.sizes.tolist(), data)
        by_id = {trial.id: trial for trial in trials}
        return cls(
            trials=trials,
            front=tuple(by_id[i] for i in data["front"]),
            dense=dense,
            space=space,
            notes=tuple(data["notes"]),
            _builder=builder,
            limits=data["limits"],
            audit=Audit.from_json(data["audit"]) if data.get("audit") else None,
            **{name: data[name] for name in _PLAIN},
        )

    def to_frame(self) -> DataFrame:
        """Make a pandas DataFrame of all trials, one row each: costs, scores, status, and one column a dimension.

        Rows that are not ``feasible`` are probes.

        Raises:
            ImportError: If pandas is missing.
        """
        front = {trial.id for trial in self.front}
        trials = self.trials
        plain = ("signal", "distortion", "test_score", "status", "feasible", "reason")
        predicted = dict.fromkeys(name for trial in trials for name in trial.predicted)
        columns: dict[str, Sequence[Any]] = {
            "trial": [trial.id for trial in trials],
            **{name: [trial.costs.get(name, math.nan) for trial in trials] for name in self.dense.costs},
            **{f"predicted_{name}": [trial.predicted.get(name, math.nan) for trial in trials] for name in predicted},
            "score": [trial.score for trial in trials],
            "low": [trial.interval[0] for trial in trials],
            "high": [trial.interval[1] for trial in trials],
            **{name: [getattr(trial, name) for trial in trials] for name in plain},
            "front": [trial.id in front for trial in trials],
            **{d.name: [trial.decoded[d.name] for trial in trials] for d in self.space.dimensions},
        }
        return data_frame(columns, "result.to_frame()")

    def sensitivity(self, table: str = "distortion") -> Sensitivity:
        """Collect the loss of each option alone, from the trials that change one dimension of the dense model.

        Args:
            table: ``"distortion"``, the distance to the outputs of the dense model, which adds up best over dimensions
                (arXiv:2308.10438), ``"signal"`` or ``"metric"``.

        Raises:
            ValueError: If `table` is unknown.
        """
        return sensitivity_of(self, table)

    def additivity(self) -> Additivity:
        """Compare the losses of whole candidates with sums of those of single dimensions: R2, slope, Spearman.

        It uses the feasible, fully evaluated trials that change at least two dimensions and whose every option was also
        measured alone; NaN for tables with fewer than 5 of them.

        Raises:
            ValueError: If there are fewer than 5 such trials for every table; names options not measured alone.
        """
        return additivity_of(self)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw score against the first limited cost: feasible trials, the front with intervals, the dense model.

        Args:
            path: File of the picture; its ending gives the format.

        Raises:
            ImportError: If matplotlib is missing.
        """
        from autoprune.result.plots import plot_front

        return plot_front(self, path)

    def __str__(self) -> str:
        return front_table(self, "" if self.front else self._why_none())
