"""Common parts of evaluators: cut candidates from a model, and score them on the samples of the search."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from autoprune.arguments import said
from autoprune.data.batch import Batch
from autoprune.data.sampling import seeded
from autoprune.evaluators.activation_cache.cache import ActivationCache
from autoprune.evaluators.activation_cache.candidate import Opener, Run
from autoprune.evaluators.activation_cache.limits import give_back
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.scoring.out_of_memory import fitting
from autoprune.metrics.judge import Weighing
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.structure.slicing.slicing import Edit, Slicer, build

Adapt = Callable[[nn.Module, Edit, Callable[[Batch], object]], None]

DENSE_BYTES = 256 * 2**20
"""Most memory for outputs of the dense model that only the distortion needs; it is measured on what fits."""


class Measuring:
    """Scores modules and compares them with the outputs of the dense model, which are computed once.

    Args:
        context: The samples, and the judge that scores them.
        dense: The dense model in evaluation mode, with buffers of its own.
        keep: Keep all of these outputs until `repeating` gives them once, or `forget` is called.
    """

    def __init__(self, context: Context, dense: nn.Module, keep: bool = False) -> None:
        self._context = context
        self._run_dense = fitting(bound_forward(context, dense))
        self._weighing: dict[str, Weighing | None] = {}
        self._outputs: dict[int, tuple[Tensor, float]] = {}
        self._spared = 0.0  # seconds of passes whose outputs the present measurement was given
        run = self._noted if keep else self._run_dense
        with seeded(0):
            self._dense: dict[str, tuple[Tensor | None, ...]] = {
                part: context.judge.dense_outputs(run, getattr(context.subsets, part), memory)
                for part, memory in (("validation", DENSE_BYTES), ("test", 0))
            }

    def __call__(self, make: Callable[[], nn.Module], part: str, chunk: slice | None = None) -> Measurement | Failure:
        """Make a module and score it on the batches `chunk`, all by default, of ``"validation"`` or ``"test"``."""
        return self.run(lambda: nullcontext(bound_forward(self._context, make().eval())), part, chunk)

    def run(
        self, opened: Callable[[], AbstractContextManager[Run]], part: str, chunk: slice | None = None
    ) -> Measurement | Failure:
        """Score what runs inside ``with opened() as run``, ``run(batch)`` giving outputs, in the same way."""
        started, self._spared = time.perf_counter(), 0.0
        rows = chunk or slice(None)
        judge = self._context.judge
        batches: Sequence[Batch] = getattr(self._context.subsets, part)[rows]
        try:
            with seeded(0), opened() as run:
                scores = judge.measure(fitting(run), batches, self._dense[part][rows], self._weigh(part, rows))
        except Exception as error:  # whatever a user's model or metric raises costs this candidate alone
            return Failure(said(error), time.perf_counter() - started)
        seconds = time.perf_counter() - started + self._spared
        signal, metric, distortion, weights = scores
        if not (np.isfinite(signal).all() and np.isfinite(metric).all()):
            bad = int((~(np.isfinite(signal) & np.isfinite(metric))).sum())
            return Failure(f"the score of {bad} of {len(signal)} samples is NaN or infinite", seconds)
        return Measurement(signal, metric, seconds, distortion, weights=weights)

    def repeating(self, run: Run) -> Run:
        """Wrap a forward of the dense model: for each batch it first gives the outputs that were computed anyway.

        Measurements of these count the time of the passes that they stand for: what an evaluation takes.
        """

        def repeated(batch: Batch) -> Any:
            if id(batch) not in self._outputs:
                return run(batch)
            outputs, seconds = self._outputs.pop(id(batch))
            self._spared += seconds
            return outputs.clone()

        return repeated

    def forget(self) -> None:
        """Forget outputs that `repeating` would give."""
        self._outputs.clear()

    def _noted(self, batch: Batch) -> Any:
        started = time.perf_counter()
        outputs = self._run_dense(batch)
        if isinstance(outputs, Tensor):  # others hold more than what is compared, such as caches of keys
            self._outputs[id(batch)] = outputs, time.perf_counter() - started
        return outputs

    def _weigh(self, part: str, rows: slice) -> Weighing | None:
        """Weights of the samples of some batches within the whole part; computed once a part."""
        if part not in self._weighing:
            batches = getattr(self._context.subsets, part)
            judge = self._context.judge
            self._weighing[part] = judge.weigh(self._run_dense, batches, self._dense[part])
        weighing = self._weighing[part]
        return None if weighing is None else weighing.of(rows)


class Adapted:
    """Scores and builds candidates that are cut from a model and then adapted in place.

    Args:
        context: With the model whose weights candidates inherit; it stays as it is.
        adapt: ``adapt(module, edit, run)`` changes what was cut before it is scored or delivered, by swapping
            parameters and not by writing to them, because parameters that do not shrink are shared. ``run(batch)`` runs
            the module on calibration data. The new values of a layer may depend on the edit of everything before it
            and on its inputs in these runs, and on nothing after it. The dense candidate is left as it is.
        reference: Module to compare outputs with, in evaluation mode, with buffers of its own; the dense candidate by
            default.
        share_bytes: Most memory for what candidates share, see `autoprune.evaluators.activation_cache.cache`; 0 for
            none, None for a limit that suits the size of the model.
        zeroed: Weights whose zeros `adapt` sets, so that nobody else has to rank their elements.
    """

    def __init__(
        self,
        context: Context,
        adapt: Adapt,
        reference: nn.Module | None = None,
        share_bytes: int | None = 0,
        zeroed: Collection[str] = (),
    ) -> None:
        self._context = context
        self._zeroed = frozenset(zeroed)
        self._adapt = adapt
        self._slicer = Slicer(context.model)
        self._held = b""  # the candidate that the skeleton is now
        dense = self._slicer.cut(Edit({}, {})).eval()  # cut, because the bare skeleton shares the model's buffers
        self._cache = ActivationCache(context, dense, share_bytes)
        self._measure = Measuring(context, reference or dense, keep=reference is None)

    def order(self, candidates: IntArray) -> IntArray:
        """Return the order of evaluation in which candidates, shape (n, d), share most; positions, shape (n,)."""
        try:
            order = self._cache.order([self._edit(candidate) for candidate in candidates])
        except Exception:  # a candidate that cannot be cut fails when it is scored, alone
            order = list(range(len(candidates)))
        return np.array(order, dtype=np.int64)

    def release(self) -> None:
        """Forget what candidates share, and the latest of them."""
        self._cache.store.clear()
        self._measure.forget()
        self._slicer.cut(Edit({}, {}))
        self._held = b""

    def rest(self) -> None:
        """Free the memory of the latest candidate; the next chunk of it would be cut and adapted again."""
        self._held = b""
        self._slicer.release()
        give_back(self._context.model)

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Score candidates, shape (n, d), on validation batches."""
        return [self._cache.score(partial(self._scored, candidate, chunk)) for candidate in candidates]

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a candidate, shape (d,), on the held-out samples; its calibration may be remembered."""
        return self._cache.score(lambda opener: self._measure.run(partial(self._running, candidate, opener), "test"))

    def score(self, module: nn.Module) -> Measurement | Failure:
        """Score any module on all validation batches, as candidates are."""
        return self._measure(lambda: module, "validation")

    def build(self, candidate: IntArray) -> nn.Module:
        """Return the module that is scored, with state of its own, in the training mode of the model."""
        with seeded(0):
            edit = self._edit(candidate)
            module = build(self._context.model, self._to_cut(edit))
            if candidate.any():
                self._adapt(module, edit, bound_forward(self._context, module))
            return module

    def _scored(self, candidate: IntArray, chunk: slice | None, opener: Opener) -> Measurement | Failure:
        return self._measure.run(partial(self._running, candidate, opener, chunk), "validation", chunk)

    @contextmanager
    def _running(self, candidate: IntArray, opener: Opener, chunk: slice | None = None) -> Iterator[Run]:
        """Cut and adapt a candidate; gives the function that runs it.

        Consecutive chunks of one candidate are adapted once, and each may resume. Until a cache is proven, each is
        adapted, because the comparison with a score without it has to cover the calibration.
        """
        edit = self._edit(candidate)
        further = chunk is not None and bool(chunk.start) and (self._cache.proven or not self._cache.on)
        if further and self._held == candidate.tobytes():
            module = self._slicer.skeleton.eval()
            with opener(edit, module) if candidate.any() else self._cache.alone(edit, module) as running:
                yield running.run
            return
        self.rest()
        module = self._slicer.cut(self._to_cut(edit))
        with opener(edit, module) if candidate.any() else self._cache.alone(edit, module) as running:
            if candidate.any():
                self._measure.forget()  # a search scores the dense candidate first; a worker may never do so
                running.calibrate(partial(self._adapt, module, edit))
            self._held = candidate.tobytes()
            module.eval()
            yield running.run if candidate.any() else self._measure.repeating(running.run)

    def _to_cut(self, edit: Edit) -> Edit:
        """The edit without the zeros that `adapt` sets."""
        left = {name: count for name, count in edit.zeroed.items() if name not in self._zeroed}
        return replace(edit, zeroed=left) if len(left) < len(edit.zeroed) else edit

    def _edit(self, candidate: IntArray) -> Edit:
        return self._context.structure.edit(self._context.space.pruning(candidate.tolist()))


def bound_forward(context: Context, module: nn.Module) -> Callable[[Batch], object]:
    """The forward of the context, of one module."""
    return lambda batch: context.forward(module, batch)
