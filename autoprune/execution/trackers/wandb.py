"""Tracker for Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from autoprune.execution.callbacks import numbers_of, settings_of

if TYPE_CHECKING:
    from autoprune.result import SearchResult, Trial


@final
class WeightsAndBiases:
    """Writes a search to a run of Weights & Biases: a step for each trial, and settings and the front at the end.

    Where the program has a run already (``wandb.init()``), it writes to that, under its own step, and leaves it open.

    Args:
        project: Name of the project.
        **settings: Further arguments of ``wandb.init``, such as ``name``, ``dir``, ``mode="offline"``, or ``id`` with
            ``resume="allow"`` to continue the run of an interrupted search.

    Raises:
        ImportError: At the first trial, if wandb is missing.
    """

    def __init__(self, project: str = "autoprune", **settings: Any) -> None:
        self._settings = {"project": project, **settings}
        self._run: Any = None
        self._ours = True

    def on_trial(self, trial: Trial) -> None:
        """Log the numbers of a trial, with its number under ``trial``, which its charts have as their axis."""
        self._opened().log({"trial": trial.id, **numbers_of(trial)})

    def on_end(self, result: SearchResult) -> None:
        """Log the settings, and a table of the front; end the run, unless it is another's."""
        run = self._opened()
        run.config.update(settings_of(result), allow_val_change=True)
        import wandb

        names = ("score", *(f"cost/{name}" for name in result.dense.costs))
        rows = [[trial.id, *(numbers_of(trial).get(name) for name in names)] for trial in result.front]
        run.log({"front": wandb.Table(columns=["trial", *names], data=rows)})
        if self._ours:
            run.finish()
        self._run = None

    def _opened(self) -> Any:
        """Find or make the run, once for each search."""
        if self._run is None:
            try:
                import wandb
            except ImportError as error:
                raise ImportError("trackers.WeightsAndBiases() needs wandb; pip install wandb") from error
            self._ours = wandb.run is None
            self._run = wandb.init(**self._settings) if self._ours else wandb.run
            self._run.define_metric("trial")
            for name in ("score", "signal", "distortion", "cost/*", "failed"):
                self._run.define_metric(name, step_metric="trial")
        return self._run
