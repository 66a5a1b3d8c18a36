"""Tracker for MLflow."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, final

from autoprune.execution.callbacks import numbers_of, settings_of

if TYPE_CHECKING:
    from autoprune.result import SearchResult, Trial


@final
class MLflow:
    """Writes a search to an MLflow run: a step for each trial, and the settings and the result at the end.

    Where the program has an active run (``with mlflow.start_run():``), it writes to that and leaves it open. Otherwise
    it makes a run, and ends it. The package ``mlflow-skinny`` is enough.

    Args:
        experiment: Name of the experiment, made if missing.
        tracking_uri: Address of the server, or a folder or database; None for the one that MLflow is set to.
        run_name: Name of the run; None for one that MLflow makes up.
        run_id: An existing run to continue, that of an interrupted search for example; see the attribute.

    Attributes:
        run_id: The run that it writes to; empty before the first trial.

    Raises:
        ImportError: At the first trial, if MLflow is missing.
    """

    def __init__(
        self,
        experiment: str = "autoprune",
        *,
        tracking_uri: str | None = None,
        run_name: str | None = None,
        run_id: str = "",
    ) -> None:
        self.run_id = run_id
        self._experiment = experiment
        self._tracking_uri = tracking_uri
        self._run_name = run_name
        self._client: Any = None
        self._ours = True

    def on_trial(self, trial: Trial) -> None:
        """Log the numbers of a trial, with its number as the step."""
        client = self._opened()
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, trial.id) for name, value in numbers_of(trial).items()]
        client.log_batch(self.run_id, metrics=metrics)

    def on_end(self, result: SearchResult) -> None:
        """Log the settings as parameters, and the result as JSON and as text; end the run, unless it is another's."""
        client = self._opened()
        from mlflow.entities import Param

        params = [Param(name, str(value)) for name, value in settings_of(result).items()]
        client.log_batch(self.run_id, params=params)
        client.log_dict(self.run_id, result.to_json(), "result.json")
        client.log_text(self.run_id, f"{result}\n", "result.txt")
        if self._ours:
            client.set_terminated(self.run_id, "KILLED" if result.stopped == "interrupted" else "FINISHED")
        self._client = None  # a further search begins a run of its own

    def _opened(self) -> Any:
        """Find or make the run, once for each search."""
        if self._client is not None:
            return self._client
        try:
            import mlflow
        except ImportError as error:
            raise ImportError("trackers.MLflow() needs MLflow; pip install mlflow-skinny") from error
        client = mlflow.MlflowClient(self._tracking_uri)
        active = mlflow.active_run() if self._tracking_uri is None else None
        if active is not None:
            self.run_id = active.info.run_id
            self._ours = False
        elif self.run_id and client.get_run(self.run_id).info.status != "FINISHED":
            client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = client.create_run(self._experiment_id(client), run_name=self._run_name).info.run_id
        self._client = client
        return client

    def _experiment_id(self, client: Any) -> str:
        found = client.get_experiment_by_name(self._experiment)
        return str(client.create_experiment(self._experiment) if found is None else found.experiment_id)
