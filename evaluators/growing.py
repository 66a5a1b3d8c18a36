"""Evaluation on more and more samples: with rungs, most candidates are scored on few."""

from __future__ import annotations

from typing import final

import numpy as np
from torch import nn

from autoprune.evaluators.protocol import Context, Evaluator, Expects, Orders, Tells
from autoprune.protocols import Failure, FloatArray, IntArray, Measurement


@final
class Growing:
    """Lets ``early_stopping=Rungs(3)`` stop candidates of any evaluator after some of the validation batches.

    A step is a batch: at a rung of k steps a candidate is scored on the first k batches, and dropped if it is behind.
    Races decide with a confidence, and need many samples for it; rungs take the best share whatever the noise, as
    EvoPress does with growing numbers of tokens.

    Args:
        evaluator: Scores candidates.

    Reference:
        Sieberling et al., "EvoPress", ICML 2025, arXiv:2410.14649, algorithm 1 (multi-step selection).
    """

    continues = False
    """Every rung scores from the first batch on."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._inner = evaluator

    def prepare(self, context: Context) -> None:
        """Prepare the evaluator."""
        self._inner.prepare(context)
        self._batches = len(context.subsets.validation)

    @property
    def steps(self) -> int:
        """Validation batches; after `prepare`."""
        return self._batches

    @property
    def identity(self) -> str:
        """Identity of the evaluator."""
        return f"Growing({getattr(self._inner, 'identity', type(self._inner).__name__)})"

    def on_the_way(self, candidate: IntArray, steps: int) -> Measurement | Failure:
        """Score a candidate, shape (d,), on the first `steps` batches."""
        return self._inner.evaluate(candidate[None], slice(0, steps))[0]

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Score candidates on validation batches."""
        return self._inner.evaluate(candidates, chunk)

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a candidate on the held-out samples."""
        return self._inner.test(candidate)

    def build(self, candidate: IntArray) -> nn.Module:
        """Build the module that the evaluator scores."""
        return self._inner.build(candidate)

    def expected_losses(self) -> tuple[FloatArray, ...] | None:
        """Expected loss of options, if the evaluator knows it."""
        return self._inner.expected_losses() if isinstance(self._inner, Expects) else None

    def notes(self) -> tuple[str, ...]:
        """Notes of the evaluator."""
        return self._inner.notes() if isinstance(self._inner, Tells) else ()

    def order(self, candidates: IntArray) -> IntArray:
        """Return the order of evaluation in which candidates share most."""
        return self._inner.order(candidates) if isinstance(self._inner, Orders) else np.arange(len(candidates))

    def release(self) -> None:
        """Forget what candidates share."""
        if isinstance(self._inner, Orders):
            self._inner.release()
