"""Shared computation: candidates that agree up to some module compute everything up to it once.

The cache holds outputs of whole modules, for each batch. Its key is a digest of everything that the model has read
before: the slices of parameters and the sizes of modules. A candidate resumes at the last module whose output is
cached; modules before it return placeholders on the meta device, which hold a shape but no values, so that a mistake
raises instead of scoring wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from torch import nn

from autoprune.arguments import whole_number
from autoprune.evaluators.activation_cache.candidate import Alone, Opener, Resuming, Running
from autoprune.evaluators.activation_cache.limits import room_beside
from autoprune.evaluators.activation_cache.resume_points import Cut
from autoprune.evaluators.activation_cache.shared import Shared
from autoprune.evaluators.activation_cache.store import Store
from autoprune.evaluators.protocol import Context
from autoprune.protocols import Failure, Measurement
from autoprune.structure.slicing.slicing import Edit

Outcome = Measurement | Failure


def checked_bytes(share_bytes: int | None) -> int | None:
    """Check the memory limit given to an evaluator; None for a limit by the size of the model.

    Raises:
        ValueError: If it is negative.
    """
    return None if share_bytes is None else whole_number("share_bytes", share_bytes, 0, why=", which shares nothing")


class ActivationCache:
    """Runs candidates cut from one skeleton; each resumes from the cached outputs of earlier ones.

    Every cut is rehearsed on the dense model. The first score of a resumed pass is computed again without the cache,
    and so is every score that fails. If anything differs, sharing ends with a warning.

    One candidate at a time, because all are cut from the same skeleton. Caches in other threads are not disturbed:
    the calls of the skeleton's own modules are intercepted, during its passes, and nothing of PyTorch is replaced.

    Args:
        context: With the dense model.
        module: The skeleton that candidates are cut from, dense now.
        memory_bytes: Most memory for outputs, by default `room_beside` the model; statistics, a few values a channel,
            are not counted.

    Attributes:
        proven: True once a score was the same without the cache.

    Example:
        ::

            with cache.candidate(edit, module) as running:
                running.calibrate(lambda run: adapt(module, edit, run))
                outputs = [running.run(batch) for batch in context.subsets.validation]
    """

    def __init__(self, context: Context, module: nn.Module, memory_bytes: int | None) -> None:
        self._forward = context.forward
        self._shared = Shared.of(context, module, room_beside(context.model) if memory_bytes is None else memory_bytes)
        self.proven = False

    @property
    def on(self) -> bool:
        """False if nothing can be shared, or sharing was found to change a score."""
        return self._shared.on

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Resume points whose outputs are kept."""
        return self._shared.plan.cuts

    @property
    def store(self) -> Store:
        """The cached outputs."""
        return self._shared.store

    def order(self, edits: Sequence[Edit]) -> list[int]:
        """Return the order in which candidates share most with the one before, as positions; note what they share."""
        digests = [self._shared.plan.digests(edit) for edit in edits]
        for each in digests:
            for cut in self.cuts:
                self.store.ask(cut.name, each[cut.name])
        return sorted(range(len(edits)), key=lambda i: (*digests[i].values(), i))

    def candidate(self, edit: Edit, module: nn.Module) -> Resuming:
        """Return the candidate that was cut by `edit` and is now `module`, for a ``with`` block."""
        return Resuming(self._shared, edit, module)

    def alone(self, _: Edit, module: nn.Module) -> AbstractContextManager[Running]:
        """Return a candidate that computes everything itself, for a ``with`` block."""
        return nullcontext(Alone(self._forward, module))

    def score(self, measure: Callable[[Opener], Outcome]) -> Outcome:
        """Score a candidate, with sharing unless that was found to change a score.

        Args:
            measure: Opens the candidate with what it is given, and scores it. Called again, without sharing, where
                that has to be compared.
        """
        if not self.on:
            return measure(self.alone)
        opened: list[Resuming] = []

        def opener(edit: Edit, module: nn.Module) -> Resuming:
            opened.append(self.candidate(edit, module))
            return opened[-1]

        outcome = measure(opener)
        failed = isinstance(outcome, Failure)
        resumed = any(candidate.resumed for candidate in opened)
        if not resumed or (self.proven and not failed):
            return outcome
        if failed:
            self.store.clear()  # for want of memory, perhaps
        plain = measure(self.alone)
        if failed and isinstance(plain, Failure):
            return plain
        if _same(outcome, plain):
            self.proven = True
        else:
            reason = f"a shared evaluation gave {outcome}, and {plain} without" if failed else "scores differ"
            self._shared.stop(reason)
        return plain


def _same(a: Outcome, b: Outcome) -> bool:
    if isinstance(a, Failure) or isinstance(b, Failure):
        return False
    pairs = ((a.signal, b.signal), (a.metric, b.metric), (a.distortion, b.distortion))
    return all(np.array_equal(x, y) for x, y in pairs)
