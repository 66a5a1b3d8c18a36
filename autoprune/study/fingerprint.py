"""Identity of a run: settings that must agree for it to be resumed, and settings that should."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from autoprune.costs import CostFunction
from autoprune.data.subsets import fingerprint
from autoprune.evaluators import Supernet
from autoprune.execution import Executor
from autoprune.protocols import IntArray, Optimizer
from autoprune.result.trials import Trial
from autoprune.study.study import Study
from autoprune.study.user_code import digest_of, forward_of, settings_of

log = logging.getLogger(__name__)

MUST_AGREE = (
    "model",
    "weights",
    "space",
    "data",
    "budget",
    "limits",
    "costs",
    "metric",
    "higher_is_better",
    "seed",
    "evaluator",
)
"""Settings that scores and proposals are a function of."""

HANDED_IN = ("settings", "code")
"""Further ones, kept as dictionaries: settings of the evaluator, and digests of the user's functions."""

SHOULD_AGREE = ("versions", "threads", "device", "optimizer", "racing")
"""Settings that may change the last digits of scores, or the next proposals."""

MEASURED = ("memory_bytes", "latency_ms", "ms_per_sample")
"""Costs that may differ under another number of threads, or with a table that was corrected since."""

_DRIFT = 1e-2  # by which scores may differ under other threads or versions, relative
_ROUNDING = 1e-9  # by which a cost may differ with the number of candidates that it is asked for at once
_SHOWN = 60  # characters; longer values, such as whole spaces, are only said to differ


def identity_of(study: Study, dense: Trial, optimizer: Optimizer, executor: Executor) -> dict[str, Any]:
    """Identity of a run for the journal, JSON-ready."""
    context = study.context
    return {
        "budget": str(study.budget),
        "limits": dict(study.limits),
        # As predicted, so that those of another function or table show; a peak of memory may differ with the threads.
        "costs": {name: dense.costs[name] for name in study.limits if name != "memory_bytes"},
        "seed": study.request.seed,
        "trials": study.request.trials,
        "metric": context.judge.name,
        "higher_is_better": context.judge.higher_is_better,
        "space": context.space.to_json(),
        "dense": dense.to_json(),
        "data": context.subsets.fingerprint,
        "model": type(context.model).__qualname__,
        "weights": fingerprint(context.model.state_dict()),
        "evaluator": getattr(study.evaluator, "identity", type(study.evaluator).__name__),
        "settings": _settings_of(study.fresh),
        "code": _code_of(study),
        "optimizer": type(optimizer).__name__,
        "racing": None if study.racing is None else asdict(study.racing),
        "notes": list(study.notes),
        "executor": executor.name,
        "threads": executor.threads or torch.get_num_threads(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": str(next(context.model.parameters()).device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def _settings_of(evaluator: Any, prefix: str = "") -> dict[str, str]:
    """Settings of an evaluator of autoprune, with those of its start; empty for others, which may hold anything."""
    if not type(evaluator).__module__.startswith("autoprune.") or isinstance(evaluator, Supernet):
        return {}  # weights of a supernet are compared already
    found = settings_of(evaluator)
    start = found.pop("start", None) and vars(evaluator)["_start"]
    named = {f"{prefix}{name} of {type(evaluator).__name__}": value for name, value in found.items()}
    if start is None:
        return named
    return {**named, "start of FineTune": type(start).__name__, **_settings_of(start, "start: ")}


def _code_of(study: Study) -> dict[str, str]:
    """Digests of the functions that the user passed, and of the forward."""
    given = {f"{name}=": digest_of(value) for name, value in study.request.functions.items()}
    evaluator = type(study.fresh)
    return {
        **given,
        "the forward of the model": forward_of(study.context.model),
        f"the code of {evaluator.__name__}": digest_of(evaluator),
    }


def require_same(
    recorded: Mapping[str, Any], now: Mapping[str, Any], others: Sequence[str] = (), anyway: bool = False
) -> list[str]:
    """Compare the identity in the journal with that of the search that resumes it.

    Args:
        recorded: Identity in the journal.
        now: Identity of this search.
        others: Further differences that were found.
        anyway: Continue in spite of them, with a warning; not in another space, where the journal has no meaning.

    Returns:
        Differences in settings that must agree; empty unless `anyway`.

    Raises:
        ValueError: If the model, space, data, budget, metric, seed, evaluator, or a function of the user's differ;
            names those that do.
    """
    changed = _differences(SHOULD_AGREE, recorded, now)
    differing = _differences(MUST_AGREE, recorded, now) + _inner_differences(recorded, now)
    differing += [*_dense_differences(recorded, now), *others]
    if differing and (not anyway or recorded.get("space") != now["space"]):
        hint = f" (changed too, and perhaps the cause: {', '.join(changed)})" if changed else ""
        way_out = "pass what it was started with, or another run_dir"
        if not anyway:
            way_out += "; resume='anyway' (--resume-anyway) goes on all the same, with trials that may not compare"
        raise ValueError(
            f"run_dir must hold the same search to be resumed, but it differs in {', '.join(differing)}{hint}; "
            f"{way_out}"
        )
    for difference in changed:
        log.warning("the search is resumed with other %s; scores or proposals may differ slightly", difference)
    if differing:
        log.warning("the search is resumed although it differs in %s", ", ".join(differing))
    return differing


def _inner_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings and functions that differ, by name; code only within one version of Python, as bytecode differs."""
    found = []
    for kind in HANDED_IN:
        before = recorded.get(kind, {})
        after = now[kind]
        if kind == "code" and _python(recorded) != _python(now):
            continue
        for name in before.keys() & after.keys():  # a version may know more settings than the one before
            if before[name] != after[name]:
                short = kind == "settings" and max(len(before[name]), len(after[name])) < _SHOWN
                found.append(f"{name} ({before[name]} before, {after[name]} now)" if short else name)
    return sorted(found)


def _python(identity: Mapping[str, Any]) -> list[str]:
    return str(identity.get("versions", {}).get("python", "")).split(".")[:2]


def _dense_differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences in the score of the dense model; to the last bit on the same machine, versions and threads."""
    before = _scores(recorded.get("dense"))
    after = _scores(now["dense"])
    alike = all(recorded.get(name) == now[name] for name in ("threads", "device", "versions", "machine"))
    slack = 0.0 if alike and now["device"] == "cpu" else _DRIFT
    return [
        f"the {name} of the dense model ({before[name]:.9g} before, {after[name]:.9g} now)"
        for name in before
        if name in after and abs(before[name] - after[name]) > slack * max(abs(before[name]), abs(after[name]))
    ]


def _scores(dense: Any) -> dict[str, float]:
    if not isinstance(dense, Mapping):
        return {}
    last = (dense.get("evaluations") or [{}])[-1]
    found = {"score": dense.get("score"), "signal": dense.get("signal"), "distortion": last.get("distortion")}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def cost_differences(costs: Mapping[str, CostFunction], candidates: IntArray, recorded: Sequence[Any]) -> list[str]:
    """Costs that differ from the journal for its candidates, (n, d)."""
    found = []
    for name, cost in costs.items():
        pairs = [(i, row[name]) for i, row in enumerate(recorded) if name in row]
        if name not in MEASURED and pairs:
            rows = [i for i, _ in pairs]
            before = np.array([value for _, value in pairs])
            after = cost(candidates[rows])
            if not np.allclose(after, before, rtol=_ROUNDING, atol=0):
                i = int(np.abs(after - before).argmax())
                found.append(f"{name} of {candidates[rows[i]].tolist()} ({before[i]:.9g} before, {after[i]:.9g} now)")
    return found


def _differences(names: tuple[str, ...], recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names that differ, with the values before and now where these are short."""
    found = []
    for name in names:
        before, after = recorded.get(name, now[name]), now[name]  # entries that an older version lacks count as equal
        if before != after:
            short = max(len(str(before)), len(str(after))) <= _SHOWN and name != "weights"
            found.append(f"{name} ({before} before, {after} now)" if short else name)
    return found
