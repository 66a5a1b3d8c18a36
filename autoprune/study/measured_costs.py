"""Costs that are measured: the table of latencies and the peak of memory, as far as a search needs them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from autoprune.budget import Budget
from autoprune.costs import Latency
from autoprune.costs.latency.profile import profile_structure
from autoprune.costs.latency.timing import TimeOverError
from autoprune.costs.memory.peak import PeakMemory, measure_memory
from autoprune.costs.operations.allocations import MEASURABLE
from autoprune.errors import UnsupportedModelError
from autoprune.files.access import make_folder
from autoprune.search_spaces import Settings, needs_latency
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.study.convergence import Deadline
from autoprune.study.inputs import Inputs
from autoprune.study.request import Request
from autoprune.study.study import TIMED

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredCosts:
    """Predictors of the costs that are measured.

    Attributes:
        priced: The call that they are measured on, if any is.
        latency: Predicts latencies; None if nothing needs them, or the user gives a function.
        memory: Predicts the peak of memory; None if it is not limited, or cannot be measured.
        notes: Their accuracy, or the reason why there is none, in plain words.
    """

    priced: Example
    latency: Latency | None
    memory: PeakMemory | None
    notes: tuple[str, ...]


def measure_costs(
    request: Request, budget: Budget, settings: Settings, inputs: Inputs, structure: Structure, deadline: Deadline
) -> MeasuredCosts:
    """Measure the costs that the budget limits, or that the space needs.

    Raises:
        TimeoutError: If the time was over before there was a table of latencies that is needed.
        ValueError: If the table given is of another model or batch.
    """
    limited = {limit.name for limit in budget.limits}
    needed = needs_latency(settings) or not limited.isdisjoint(TIMED)
    priced = Example.of_batch(inputs.model, inputs.stated, inputs.forward)
    if needed or request.latency is not None or "memory_bytes" in limited:
        priced = priced.resized(request.example.cost_batch, "cost_batch")
    latency = _latency_of(request, needed, structure, priced, deadline)
    memory, without = _memory_of("memory_bytes" in limited, structure, priced)
    notes = [] if latency is None else [f"latency: {latency}", *latency.notes]
    if memory is not None:
        notes.append(f"memory_bytes: {memory}")
    return MeasuredCosts(priced, latency, memory, (*notes, *without))


def _latency_of(
    request: Request, needed: bool, structure: Structure, example: Example, deadline: Deadline
) -> Latency | None:
    """Return the table given, that of the resumed run, or one measured now if it is `needed`.

    Unless the model is called with batches as they are, the table may be of inputs of other sizes.
    """
    given = request.latency
    if given is None and ("latency_ms" in request.cost_functions or not needed):
        return None
    kept = None if request.execution.run_dir is None else Path(request.execution.run_dir) / "latency.json"
    if given is None and kept is not None and kept.exists():
        given = kept
    if given is None:
        return _measured(structure, example, kept, deadline)
    found = given if isinstance(given, Latency) else Latency.load(given)
    try:
        batch = example.batch if request.example.forward is None else None
        found.require_match(structure, example.samples, type(example.model).__name__, batch)
    except ValueError as error:
        if given != kept:
            raise
        raise ValueError(f"run_dir holds {kept} of an earlier search: {error}, or pass another run_dir") from error
    return found


def _measured(structure: Structure, example: Example, kept: Path | None, deadline: Deadline) -> Latency:
    if kept is not None:
        make_folder(kept.parent, "run_dir")
    name = type(example.model).__name__
    log.info("measuring latencies of %s; autoprune.profile measures once for many searches", name)
    try:
        return profile_structure(example, structure, path=kept, over=lambda: deadline.passed)
    except TimeOverError as error:
        there = f" what was measured is kept in {kept}.partial, and resume=True goes on from there;" if kept else ""
        raise TimeoutError(
            f"max_seconds={deadline.seconds:g} was over before latencies were measured: {error};{there} give more "
            "time, or a table that autoprune.profile measured once"
        ) from error


def _memory_of(limited: bool, structure: Structure, example: Example) -> tuple[PeakMemory | None, list[str]]:
    """Make the predictor of peak memory if the budget limits it, or a note with the reason why there is none."""
    if not limited:
        return None, []
    device = next(example.model.parameters()).device.type
    why = "" if device in MEASURABLE else f"on {device} it cannot be measured"
    if not why:
        try:
            return measure_memory(example, structure), []
        except UnsupportedModelError as error:
            why = str(error)
    return None, [f"memory_bytes is weights and tensors alone, without what operations allocate while they run: {why}"]
