"""What identifies a run: what must agree for it to be resumed, and what should."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from autoprune.data import fingerprint
from autoprune.execution import Executor
from autoprune.protocols import Optimizer
from autoprune.racing import Racing
from autoprune.result.trials import Trial
from autoprune.rungs import Rungs
from autoprune.study import Study

log = logging.getLogger(__name__)

MUST_AGREE = ("model", "weights", "space", "data", "budget", "limits", "costs", "metric", "seed", "evaluator")
"""What scores and proposals are a function of."""

SHOULD_AGREE = ("versions", "threads", "device", "optimizer", "racing")
"""What may change scores in their last digits, or what is proposed next."""

_SHOWN = 60  # characters; longer values, such as whole spaces, are only said to differ


def identity_of(
    study: Study,
    dense: Trial,
    seed: int,
    trials: int | str,
    optimizer: Optimizer,
    executor: Executor,
    racing: Racing | Rungs | None,
) -> dict[str, Any]:
    """What the journal keeps of a run, JSON-ready."""
    context = study.context
    return {
        "budget": str(study.budget),
        "limits": dict(study.limits),
        # As predicted, so that those of another function or table show; a peak of memory may differ with the threads.
        "costs": {name: dense.costs[name] for name in study.limits if name != "memory_bytes"},
        "seed": seed,
        "trials": trials,
        "metric": context.judge.name,
        "higher_is_better": context.judge.higher_is_better,
        "space": context.space.to_json(),
        "dense": dense.to_json(),
        "data": context.subsets.fingerprint,
        "model": type(context.model).__qualname__,
        "weights": fingerprint(context.model.state_dict()),
        "evaluator": getattr(study.evaluator, "identity", type(study.evaluator).__name__),
        "optimizer": type(optimizer).__name__,
        "racing": None if racing is None else asdict(racing),
        "notes": list(study.notes),
        "executor": executor.name,
        "threads": executor.threads or torch.get_num_threads(),
        "device": str(next(context.model.parameters()).device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def require_same(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what the journal says of a run with what is about to go on with it.

    Raises:
        ValueError: If the model, space, data, budget, metric, seed or evaluator differ; names those that do.
    """
    changed = _differences(SHOULD_AGREE, recorded, now)
    if differing := _differences(MUST_AGREE, recorded, now):
        hint = f" (changed too, and perhaps the cause: {', '.join(changed)})" if changed else ""
        raise ValueError(
            f"run_dir must hold the same search to be resumed, but it differs in {', '.join(differing)}{hint}; pass "
            "what it was started with, or another run_dir"
        )
    for difference in changed:
        log.warning("the search is resumed with other %s; scores or proposals may differ slightly", difference)


def _differences(names: tuple[str, ...], recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names that differ, with what was and is where that is short."""
    found = []
    for name in names:
        before, after = recorded.get(name, now[name]), now[name]  # what an older version did not note may agree
        if before != after:
            short = max(len(str(before)), len(str(after))) <= _SHOWN and name != "weights"
            found.append(f"{name} ({before} before, {after} now)" if short else name)
    return found
