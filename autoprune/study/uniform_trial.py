"""Scores of a few ways to prune a model uniformly, on a few validation samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from autoprune.data.batch import Batch, batch_size, beginning, divisible, slice_batch
from autoprune.data.sampling import seeded
from autoprune.evaluators import Compensated, Context
from autoprune.evaluators.activation_cache.limits import give_back
from autoprune.evaluators.scoring.out_of_memory import fitting
from autoprune.evaluators.scoring.scorer import bound_forward
from autoprune.importance.calibration import affordable
from autoprune.metrics.constant import measure_constant
from autoprune.metrics.judge import Weighing
from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.slicing.slicing import Edit, Slicer

log = logging.getLogger(__name__)

FEWEST_SAMPLES = 64
MOST_SAMPLES = 1024
"""Validation samples of the check: all of a small model's, by default; fewer for a large one."""
RACED = 8
"""Fewest validation samples after which a way that is clearly worse than another is given up."""
RACED_FIRST = 4
"""The same of a large model, for what is worse by three standard errors."""


class UniformTrial:
    """Scores pruned networks on a few validation samples."""

    def __init__(self, context: Context) -> None:
        self._context = context
        most = affordable(context.structure, FEWEST_SAMPLES, MOST_SAMPLES)
        self._batches = tuple(beginning(context.subsets.validation, most))
        first = self._batches[0]
        self._large = most < MOST_SAMPLES
        if self._large and divisible(first) and batch_size(first) > RACED_FIRST:
            cuts = (0, RACED_FIRST, batch_size(first))
            self._batches = (*(slice_batch(first, *ends) for ends in pairwise(cuts)), *self._batches[1:])
        self.samples = sum(map(batch_size, self._batches))
        self._slicer = Slicer(context.model)
        dense = self._slicer.cut(Edit({}, {})).eval()
        self._run = fitting(bound_forward(context, dense))
        with seeded(0):
            self._dense = context.judge.dense_outputs(self._run, self._batches, 0)
            self._weighing = self._weighed(self._run)

    def _weighed(self, run: Callable[[Batch], object]) -> Weighing | None:
        """Weights of the samples, found once: else every measurement would run its module twice."""
        try:
            return self._context.judge.weigh(run, self._batches, self._dense)
        except Exception as error:  # of a user's metric; measurements raise it again, where it rules out a choice
            log.info("calibration check: %s: %s", type(error).__name__, error)
            return None

    def halfway(self) -> FloatArray | None:
        """Mean of the signals of the dense model and of a constant, its mean output, one value a sample.

        None where the dense model is no better than the constant.
        """
        try:
            with seeded(0), torch.no_grad():
                own, constant = measure_constant(
                    self._context.judge, self._run, self._batches, self._dense, self._weighing
                )
        except Exception as error:  # of a user's metric that needs more than one tensor, or of outputs of many shapes
            log.info("calibration check: no signal of a constant output: %s: %s", type(error).__name__, error)
            return None
        if not np.isfinite(constant.signal).all() or not better(own.signal, constant.signal, errors=2.0):
            return None
        middle: FloatArray = (own.signal + constant.signal) / 2
        return middle

    def measure(self, module: nn.Module, best: FloatArray | None = None) -> FloatArray:
        """Signal of a module, one value a sample; infinite where it cannot be scored.

        Args:
            module: In evaluation mode.
            best: Signals of another one: where this is worse by two standard errors on the first samples, a quarter but
                at least `RACED`, the others are left out; of a large model also by three on the first `RACED_FIRST`.
        """
        judge = self._context.judge
        run = fitting(bound_forward(self._context, module))
        signals = np.empty(0)
        with seeded(0):
            for part in self._parts(best is not None):
                weighing = None if self._weighing is None else self._weighing.of(part)
                found = judge.measure(run, self._batches[part], self._dense[part], weighing).signal
                signals = np.concatenate([signals, np.where(np.isfinite(found), found, np.inf)])
                errors = 2.0 if len(signals) >= RACED else 3.0
                if best is not None and len(best) > len(signals) and better(best, signals, errors):
                    break
        return signals

    def _parts(self, raced: bool) -> list[slice]:
        """Batches to score before it is asked whether more are needed, and the others."""
        judge = self._context.judge
        if raced and judge.per_sample and (judge.parts is None or self._weighing is not None):
            counts = np.cumsum([batch_size(batch) for batch in self._batches])
            looks = [max(RACED, self.samples / 4), *([RACED_FIRST] if self._large else [])]
            ends = {0, len(counts), *(min(int(np.searchsorted(counts, least)) + 1, len(counts)) for least in looks)}
            return [slice(*each) for each in pairwise(sorted(ends))]
        return [slice(None)]

    def told(self, signals: Mapping[str, FloatArray], between: str = "; ") -> str:
        """Means of signals, with their number where not all samples were scored."""
        return between.join(
            f"{name} {each.mean():.4g}" + (f" ({len(each)} samples)" if 1 < len(each) < self.samples else "")
            for name, each in signals.items()
        )

    def score(
        self, refit: Compensated, context: Context, candidate: IntArray, best: FloatArray | None = None
    ) -> FloatArray:
        """Signal of a candidate of the space of `context`, re-fitted; `best` as in `measure`."""
        edit = context.structure.edit(context.space.pruning(candidate.tolist()))
        try:
            module = self._slicer.cut(edit).eval()
            with seeded(0):
                refit.adapt(module, edit, bound_forward(context, module))
            return self.measure(module, best)
        except Exception as error:  # an error of a user's model or metric rules out this choice alone
            log.info("calibration check: %s: %s", type(error).__name__, error)
            return np.full(1, np.inf)
        finally:
            self._slicer.release()
            refit.forget()
            give_back(context.model)


def better(a: FloatArray, b: FloatArray, errors: float = 1.0) -> bool:
    """Return whether signal a is lower than b by more than this number of standard errors of the paired difference.

    Where one has fewer samples, on these.
    """
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        return float(a.mean()) < float(b.mean())
    common = min(len(a), len(b))
    gain = b[:common] - a[:common]
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return bool(gain.mean() > errors * error and gain.mean() > 0)
