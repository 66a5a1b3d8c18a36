"""Scores of a network in training on samples that it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch, Forward
from autoprune.data.sampling import seeded
from autoprune.errors import DataError
from autoprune.evaluators.scoring.out_of_memory import fitting
from autoprune.metrics.judge import Judge, Scores
from autoprune.metrics.summary import Summary, summary


class HeldOut:
    """Scores modules on validation and test samples, each in evaluation mode, which is undone.

    Args:
        judge: The metric.
        forward: Runs a module on a batch.
        batches: By part: ``"validation"``, ``"test"``; none of them has to be there.
        dense: The dense model in evaluation mode; its outputs are kept where the metric compares with them.

    Raises:
        DataError: If the metric needs the dense model, and there is none.
    """

    def __init__(
        self, judge: Judge, forward: Forward, batches: Mapping[str, Sequence[Batch]], dense: nn.Module | None
    ) -> None:
        if judge.needs_dense and dense is None and batches:
            raise DataError(
                f"metric {judge.name!r} compares with the dense model, but there is no teacher; pass teacher=, or "
                "labels and a metric on them"
            )
        self._judge, self._forward, self._batches = judge, forward, batches
        self._dense: dict[str, Sequence[Tensor | None]] = {
            part: [None] * len(some)
            if dense is None
            else judge.dense_outputs(fitting(partial(forward, dense)), list(some))
            for part, some in batches.items()
        }

    @property
    def part(self) -> str:
        """Part that the receipt reports: the test samples where there are any."""
        return next((part for part in ("test", "validation") if part in self._batches), "")

    @property
    def validates(self) -> bool:
        """True if there are validation samples."""
        return "validation" in self._batches

    def signal(self, module: nn.Module) -> float:
        """Mean signal on validation samples, lower is better; infinite where it is not finite."""
        value = float(self._measure(module, "validation").signal.mean())
        return value if math.isfinite(value) else math.inf

    def score(self, module: nn.Module | None) -> Summary | None:
        """Mean of the metric with its interval; None without a module or samples."""
        if module is None or not self.part:
            return None
        scores = self._measure(module, self.part)
        return summary(scores.metric, self._judge.proportion, scores.weights)

    def _measure(self, module: nn.Module, part: str) -> Scores:
        modes = [(each, each.training) for each in module.modules()]
        try:
            with seeded(0), torch.no_grad():
                run = fitting(partial(self._forward, module.eval()))
                return self._judge.measure(run, self._batches[part], self._dense[part])
        finally:
            for each, mode in modes:
                each.training = mode
