"""Callbacks: code of the user that a search calls after each trial and at its end, such as a tracker's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from autoprune.arguments import shown, why_no_function
from autoprune.protocols import FAILED

if TYPE_CHECKING:
    from autoprune.result import SearchResult, Trial

METHODS = ("on_trial", "on_end")


class Callback(Protocol):
    """Follows a search: ``autoprune.Execution(callbacks=[...])``.

    It is called in the process and the thread of the search, which waits for it, and never on a worker. An error of a
    callback costs no trial: the first one is logged, and a note in the result counts them.
    """

    def on_trial(self, trial: Trial) -> None:
        """Take a finished trial: each one once, in the order of their numbers, failed ones included.

        Costs are those that it was proposed with, and nothing is scored on held-out data yet. A resumed search does not
        call again for the trials that were called for before; one that was killed may repeat the last of them.
        """
        ...

    def on_end(self, result: SearchResult) -> None:
        """Take the result, after the front was measured and scored on held-out data, also of an interrupted search."""
        ...


def require_callbacks(given: Any) -> tuple[Callback, ...]:
    """Check a list of callbacks.

    Raises:
        TypeError: If it is no list, or one of them lacks a method, or has one with other arguments.
    """
    rule = "callbacks must be a list of objects with the methods on_trial(trial) and on_end(result)"
    if not isinstance(given, list | tuple):
        raise TypeError(f"{rule}, got {shown(given)}")
    for one in given:
        for method in METHODS:
            if isinstance(one, type) or (why := why_no_function(getattr(one, method, None), arguments=1)):
                problem = "which is a class" if isinstance(one, type) else f"whose {method} is none: {why}"
                raise TypeError(f"{rule}, got {shown(one)}, {problem}")
    return tuple(given)


def numbers_of(trial: Trial) -> dict[str, float]:
    """Collect what a tracker can draw of a trial: score, signal, distortion, costs; without what was not measured."""
    found = {"score": trial.score, "signal": trial.signal, "distortion": trial.distortion}
    found |= {f"cost/{name}": float(value) for name, value in trial.costs.items()}
    found["failed"] = float(trial.status == FAILED)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def settings_of(result: SearchResult) -> dict[str, Any]:
    """Collect what a tracker can list of a search: its settings, the dense model and the best of the front."""
    found: dict[str, Any] = {name: getattr(result, name) for name in ("budget", "metric", "seed", "stopped")}
    found |= {"trials": len(result.trials), "front": len(result.front), "dimensions": len(result.space.sizes)}
    found |= {f"limit/{name}": limit for name, limit in result.limits.items()}
    return found | {f"dense/{name}": value for name, value in numbers_of(result.dense).items() if name != "failed"}
