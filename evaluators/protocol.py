"""What an evaluator promises, and what it gets to work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from autoprune.batches import Batch
from autoprune.data import Subsets
from autoprune.metrics import Judge
from autoprune.protocols import Failure, IntArray, Measurement, SearchSpace
from autoprune.structure.structure import Structure

Forward = Callable[[nn.Module, Batch], Any]
"""``forward(model, batch)``: the outputs of a model for a batch."""


@dataclass(frozen=True)
class Context:
    """Everything that a worker holds.

    Attributes:
        model: The dense model. Nobody changes it.
        structure: What can be removed from it.
        space: What candidates mean.
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


class Evaluator(Protocol):
    """Scores candidates. Pickles before `prepare`, which runs once on each worker.

    Of one that learns something, two properties are read after `prepare`: ``notes``, a tuple of sentences for the
    result, and ``identity``, a string that a resumed search must find again; by default the name of the class.
    """

    def prepare(self, context: Context) -> None:
        """Keep what scoring needs; the model of the context stays untouched."""
        ...

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Score candidates, shape (n, d), on the validation batches of `chunk`, all by default; never raises for one.

        Racing asks for one batch after the other, so what was made for a candidate is worth keeping for its next chunk.
        Two calls agree bit for bit. A candidate that raises, runs out of memory or scores NaN is a `Failure`.
        """
        ...

    def build(self, candidate: IntArray) -> nn.Module:
        """The module that `evaluate` scores for a candidate, shape (d,); shares no state with the model."""
        ...

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a candidate, shape (d,), on the held-out samples, which no other method touches."""
        ...


@runtime_checkable
class Trains(Protocol):
    """An evaluator that trains every candidate, and can score it on the way; none has to."""

    @property
    def steps(self) -> int:
        """Steps of a whole training."""
        ...

    @property
    def continues(self) -> bool:
        """Whether a training goes on from where it was scored last; else every score needs one from the start."""
        ...

    def on_the_way(self, candidate: IntArray, steps: int) -> Measurement | Failure:
        """Score a candidate, shape (d,), on all validation batches after the first so many steps of its training.

        What `evaluate` gives does not depend on whether this was called before.
        """
        ...


@runtime_checkable
class Orders(Protocol):
    """An evaluator that is faster when related candidates follow each other; none has to be."""

    def order(self, candidates: IntArray) -> IntArray:
        """The order in which to evaluate candidates, shape (n, d), as positions, shape (n,): neighbours are related.

        Depends on the candidates alone. Several workers do well to take consecutive parts of it.
        """
        ...

    def release(self) -> None:
        """Let go of what is kept for candidates to come, because none will; it may still be used."""
        ...
