"""Result of a search: the front, the best under a budget, and methods to build, save and show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from autoprune.budget import Budget
from autoprune.pareto import Direction
from autoprune.protocols import SearchSpace
from autoprune.result import plots
from autoprune.result.additivity import Additivity, additivity_of
from autoprune.result.audit_report import Audit
from autoprune.result.builders import Builder, built
from autoprune.result.choosing import best_of, judged, why_none
from autoprune.result.from_journal import fields_from_journal
from autoprune.result.loading import load_fields
from autoprune.result.notebook import result_html
from autoprune.result.optuna_study import to_optuna
from autoprune.result.outline import Outline
from autoprune.result.saving import content_of, save_result
from autoprune.result.sensitivity import Sensitivity, sensitivity_of
from autoprune.result.tables import frame_of, front_table
from autoprune.result.trials import Trial

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from pandas import DataFrame


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
        outline: Layers of the model as functions of the widths, for reports; None in results of earlier versions.
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
    outline: Outline | None = None
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
        if budget is None:
            return best_of(self, self._wanted, {})
        wanted = judged(self, budget)
        return best_of(self, wanted, wanted.resolve(self.dense.costs))

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
        return judged(self, self.budget)

    def build(self, what: Trial | str | Budget | Sequence[str] | None = None) -> nn.Module:
        """Build a plain pruned module: of a trial, of the best within a budget, or of the best.

        It shares no state with the model, is in the same mode on the same device, and has the score of the trial.

        Raises:
            InfeasibleBudgetError: If no trial is within the budget.
            FileFormatError: If the result was loaded without a model, or without the weights of this trial.
        """
        return built(self._builder, what if isinstance(what, Trial) else self.best(what))

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
        return save_result(self, path, weights, replace)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary of everything but weights; NaN becomes null."""
        return content_of(self)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> SearchResult:
        """Read a saved result; with a dense `model` of the class that was pruned, its saved trials can be built.

        Where ``result.json`` is damaged, or was never written, the trials are read from the journal of the search in
        the same folder, see `from_journal`: the first note says so, and a damaged file is logged as a warning.

        Args:
            path: The folder of `save`, the ``run_dir`` of a search, or the file ``result.json``.
            model: Dense; comes back unchanged.

        Raises:
            FileNotFoundError: If there is neither a result nor a journal in `path`.
            FileFormatError: If the result is corrupted or foreign, and there is no journal, or that is corrupted, too.
        """
        return cls(**load_fields(path, model))

    @classmethod
    def from_journal(cls, run_dir: str | Path) -> SearchResult:
        """Read the trials of a search from its journal: while it runs, or after it was killed.

        It does not disturb the search. Trials that were proposed but not scored yet have the status ``"pending"``. The
        journal holds no intervals, no scores on held-out data, no costs measured at the end and no weights to build
        from. The first note gives the state of the search.

        Args:
            run_dir: The ``run_dir`` of a search.

        Raises:
            FileNotFoundError: If `run_dir` holds no journal.
            FileFormatError: If the journal is corrupted, foreign, or of a newer version.
        """
        return cls(**fields_from_journal(run_dir))

    def to_frame(self) -> DataFrame:
        """Make a pandas DataFrame of all trials, one row each: costs, scores, status, and one column a dimension.

        Rows that are not ``feasible`` are probes.

        Raises:
            ImportError: If pandas is missing.
        """
        return frame_of(self)

    def to_optuna(self, storage: Any = None, name: str | None = None) -> optuna.Study:
        """Make an Optuna study of all trials, for optuna-dashboard and Optuna's plots.

        It optimises the score and each limited cost. Trials over a limit break its constraints, and raced ones are
        pruned. Each has its number in the search under ``trial``; only the length of times is that of the search.

        Args:
            storage: An Optuna storage, or its URL, such as ``"sqlite:///runs/optuna.db"``; None keeps it in memory.
            name: Name of the study; None for the budget and the time. A number is added to one that is taken.

        Raises:
            TypeError: If `storage` is no storage.
            ValueError: If it cannot be opened, or `name` is no text, or too long.
        """
        return to_optuna(self, storage, name)

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

    def plot(self, path: str | Path | None = None, axes: Axes | None = None) -> Axes:
        """Draw score against the first limited cost: feasible trials, the front with intervals, the dense model.

        Args:
            path: File of the picture; its ending gives the format.
            axes: Axes of matplotlib to draw on; None makes a figure, which a notebook shows.

        Raises:
            ImportError: If matplotlib is missing.
        """
        return plots.plot_front(self, path, axes)

    def plot_layers(self, what: Trial | str | Budget | Sequence[str] | None = None, axes: Axes | None = None) -> Axes:
        """Draw what a network keeps of each dimension: of a trial, of the best within a budget, or of the best.

        Raises:
            InfeasibleBudgetError: If no trial is within the budget.
            ImportError: If matplotlib is missing.
        """
        return plots.plot_layers(self, what if isinstance(what, Trial) else self.best(what), axes)

    def plot_sensitivity(self, table: str = "distortion", axes: Axes | None = None) -> Axes:
        """Draw the `sensitivity` as a map: the loss of each option alone, as colour on a logarithmic scale.

        Raises:
            ValueError: If `table` is unknown.
            ImportError: If matplotlib is missing.
        """
        return plots.plot_sensitivity(self, table, axes)

    def plot_convergence(self, axes: Axes | None = None) -> Axes:
        """Draw the hypervolume of the front of score and limited costs after each trial, as a share of the final one.

        Raises:
            ImportError: If matplotlib is missing.
        """
        return plots.plot_convergence(self, axes)

    def _repr_html_(self) -> str:
        """Make the table of the front for notebooks."""
        return result_html(self, "" if self.front else why_none(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the text in IPython, in place of every field."""
        printer.text(str(self))

    def report(self, path: str | Path, candidates: bool = True) -> Path:
        """Write one web page with the front, all trials and every layer of each; it needs no network and no server.

        Args:
            path: The file, which is replaced; by convention it ends in ``.html``.
            candidates: Include the options of all trials; without, the page is smaller and has those of the front.

        Raises:
            OSError: If it cannot be written.
        """
        from autoprune.result.report import write_report

        return write_report(self, path, candidates)

    def __str__(self) -> str:
        return front_table(self, "" if self.front else why_none(self))
