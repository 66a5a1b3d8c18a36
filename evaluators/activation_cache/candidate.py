"""Candidates that run: each for one ``with`` block, on its own or resuming from the passes of earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from autoprune.data.batch import Batch, Forward
from autoprune.evaluators.activation_cache.calibrated import Before
from autoprune.evaluators.activation_cache.digests import WHOLE
from autoprune.evaluators.activation_cache.entries import Entries
from autoprune.evaluators.activation_cache.passes import CALIBRATION, CannotResumeError, Pass, Place, Resume
from autoprune.evaluators.activation_cache.shared import Shared
from autoprune.evaluators.scoring.out_of_memory import is_out_of_memory
from autoprune.structure.slicing.slicing import Edit

Run = Callable[[Batch], Any]


class Running(Protocol):
    """A candidate that runs."""

    def calibrate(self, adapt: Callable[[Run], None]) -> None:
        """Adapt the module of the candidate, before it is scored; ``adapt(run)`` may run it on calibration data."""
        ...

    def run(self, batch: Batch) -> Any:
        """Run the module of the candidate on a batch."""
        ...


Opener = Callable[[Edit, nn.Module], AbstractContextManager[Running]]
"""``open(edit, module)``: the candidate that was cut by `edit` and is now `module`, for a ``with`` block."""


class Alone:
    """A candidate that computes everything itself.

    Args:
        forward: Runs a model on a batch.
        module: The module of the candidate.
    """

    def __init__(self, forward: Forward, module: nn.Module) -> None:
        self._forward, self._module = forward, module

    def calibrate(self, adapt: Callable[[Run], None]) -> None:
        """Adapt the module."""
        adapt(self.run)

    def run(self, batch: Batch) -> Any:
        """Run the module on a batch."""
        return self._forward(self._module, batch)


class Resuming:
    """A candidate whose passes resume from those of earlier ones, inside its ``with`` block.

    Args:
        shared: The cached outputs.
        edit: The edit that the candidate was cut by.
        module: Its module; only passes of the skeleton resume.

    Attributes:
        resumed: True once a pass used cached outputs.
    """

    def __init__(self, shared: Shared, edit: Edit, module: nn.Module) -> None:
        self._shared = shared
        self._alone = Alone(shared.model.forward, module)
        self._is_skeleton = module is shared.model.module
        digests = shared.plan.digests(edit)
        self._dropped = frozenset(edit.dropped)
        self._digest = digests[WHOLE]
        self._entries = Entries(shared.store, shared.plan, shared.samples, digests)
        self._known = shared.calibrated.known(self._digest)
        self._before: Before | None = None  # the tensors at the first pass of the calibration
        self._calibration: Resume | None = None  # where its passes resume
        self._open = False
        self.resumed = False

    def __enter__(self) -> Resuming:
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False

    def calibrate(self, adapt: Callable[[Run], None]) -> None:
        """Adapt the module; parts of it that did not run get the tensors that an earlier calibration left in them."""
        adapt(self.run)
        shared = self._shared
        if self._before is None or not shared.on:
            return
        if self._known is not None:
            shared.calibrated.restore(self._known)
            return
        hidden: frozenset[str] = frozenset()
        inherited = {}
        if self._calibration is not None:
            cut, kept = self._calibration
            assert kept.state is not None
            hidden, inherited = cut.hidden, kept.state
        state = shared.calibrated.changed(self._before, hidden, inherited)
        shared.calibrated.remember(self._digest, state)
        self._entries.complete(state, shared.batches(CALIBRATION))

    def run(self, batch: Batch) -> Any:
        """Run the module on a batch; None for calibration data if the result of the calibration is known.

        Where memory runs out, sharing ends: the cache may be the reason, and a batch that is divided cannot resume.

        Raises:
            RuntimeError: Outside the ``with`` block, or if the candidate has to be scored again without the cache.
        """
        if not self._open:
            raise RuntimeError("run must be called inside the with block of its candidate, and that has ended")
        place = self._shared.place(batch)
        if place is None or not (self._shared.on and self._is_skeleton):
            return self._alone.run(batch)
        try:
            return self._run(batch, place)
        except Exception as error:  # torch has several types for too little memory; all else is raised again
            if not is_out_of_memory(error):
                raise
            self._shared.stop("memory ran out")
            if not self.resumed:
                raise
        raise RuntimeError("a shared evaluation has to begin again")

    def _run(self, batch: Batch, place: Place) -> Any:
        calibrates = place.part == CALIBRATION
        if calibrates and self._before is None:
            self._before = self._shared.calibrated.before()
            self._calibration = self._entries.last_for_calibration() if self._known is None else None
        if calibrates and self._known is not None:
            self.resumed = True
            return None
        resume = self._calibration if calibrates else self._entries.last_for_batch(place)
        self.resumed |= resume is not None  # before it runs: a placeholder may raise before the cut
        own = Pass(self._shared.plan, place, resume, self._entries.keep, self._dropped)
        try:
            outputs = self._shared.model.run(own, batch)
        finally:
            if own.fault is not None:
                self._shared.stop(own.fault)
        if own.fault is not None and resume is not None:
            raise CannotResumeError(own.fault)
        return outputs
