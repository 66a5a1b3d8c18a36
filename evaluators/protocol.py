"""Protocol of evaluators, and the context that they work in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from autoprune.data.batch import Forward
from autoprune.data.subsets import Subsets
from autoprune.importance.calibration import Calibration
from autoprune.metrics.judge import Judge
from autoprune.protocols import Failure, FloatArray, IntArray, Measurement, SearchSpace
from autoprune.structure.structure import Structure


@dataclass(frozen=True)
class Context:
    """Context of an evaluator: everything that a worker holds.

    Attributes:
        model: The dense model. Nobody changes it.
        structure: What can be removed from it.
        space: Gives candidates their meaning.
        subsets: The samples of the search, on the model's device.
        judge: The metric, and the signal that steers the search.
        forward: Runs a model on a batch.
    """

    model: nn.Module
    structure: Structure
    space: SearchSpace
    subsets: Subsets
    judge: Judge
    forward: Forward

    @property
    def calibration(self) -> Calibration:
        """The dense model on the calibration samples."""
        return Calibration(self.model, self.structure, self.subsets.calibration, self.forward)


class Evaluator(Protocol):
    """Scores candidates. Pickles before `prepare`, which runs once on each worker.

    An optional property is read after `prepare`, for evaluators that learn something: ``identity``, a string that a
    resumed search must find again; by default the name of the class.
    """

    def prepare(self, context: Context) -> None:
        """Set up scoring; the model of the context stays untouched."""
        ...

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Score candidates, shape (n, d), on the validation batches of `chunk`, all by default; never raises for one.

        Racing asks for one batch after the other, so keep the module of a candidate for its next chunk.
        Two calls agree bit for bit. A candidate that raises, runs out of memory or scores NaN is a `Failure`.
        """
        ...

    def build(self, candidate: IntArray) -> nn.Module:
        """Return the module that `evaluate` scores for a candidate, shape (d,); it shares no state with the model."""
        ...

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a candidate, shape (d,), on the held-out samples, which no other method touches."""
        ...


@runtime_checkable
class Tells(Protocol):
    """Optional protocol: evaluators that have something to say in the result once they are prepared."""

    def notes(self) -> tuple[str, ...]:
        """Return sentences for the result. Asked once a search, not on workers, so it may evaluate."""
        ...


@runtime_checkable
class Expects(Protocol):
    """Optional protocol: evaluators that know the loss of options before any candidate is scored."""

    def expected_losses(self) -> tuple[FloatArray, ...] | None:
        """Return the expected loss of each option of each dimension alone, as ``Problem.prior``; None if unknown.

        Asked once a search, after `Evaluator.prepare`; it is the prior of ``prior="auto"`` and ``prior="database"``.
        """
        ...


@runtime_checkable
class Trains(Protocol):
    """Optional protocol: evaluators that train every candidate, and can score it before the training is complete."""

    @property
    def steps(self) -> int:
        """Steps of a whole training."""
        ...

    @property
    def continues(self) -> bool:
        """True if a training continues from where it was last scored; else every score needs one from the start."""
        ...

    def on_the_way(self, candidate: IntArray, steps: int) -> Measurement | Failure:
        """Score a candidate, shape (d,), on all validation batches after the first `steps` steps of its training.

        The result of `evaluate` does not depend on whether this was called before.
        """
        ...


@runtime_checkable
class Rests(Protocol):
    """Optional protocol: evaluators that keep the module of the latest candidate for its next chunk."""

    def rest(self) -> None:
        """Free the memory of the latest candidate, which is complete; what candidates share stays."""
        ...


@runtime_checkable
class Orders(Protocol):
    """Optional protocol: evaluators that are faster when related candidates follow each other."""

    def order(self, candidates: IntArray) -> IntArray:
        """Return an order of candidates, shape (n, d), with related ones next to each other: positions, shape (n,).

        Depends on the candidates alone. Several workers do well to take consecutive parts of it.
        """
        ...

    def release(self) -> None:
        """Free the memory that is kept for later candidates; the evaluator may still be used."""
        ...
