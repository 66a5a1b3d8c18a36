"""The interfaces between the parts, and the plain data that crosses them.

A *candidate* is a vector of option indices, int64, shape (d,): entry i picks one of ``sizes[i]`` options of dimension
i, and option 0 is dense. Every objective is minimised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

OK = "ok"
RACED = "raced"
FAILED = "failed"


@dataclass(frozen=True)
class Dimension:
    """One choice that a search makes.

    Attributes:
        name: What is chosen for, for example the group ``"layer1.0.conv1"``.
        options: The meaning of each option, option 0 dense; for channels the number of units kept, falling.
        ordered: Whether later options remove more, so that steps along the options are meaningful.
    """

    name: str
    options: tuple[Any, ...]
    ordered: bool = True


@dataclass(frozen=True)
class Pruning:
    """What to remove from a model, independent of the space it came from.

    Attributes:
        kept: Unit indices that stay, ascending, for each group that loses units; other groups stay whole.
        zeroed: How many elements of each parameter are set to zero, those of least magnitude first: among the elements
            that stay, where units go too.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    zeroed: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class SearchSpace(Protocol):
    """Dimensions with their options, and what a candidate means for the model."""

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The dimensions, in the order of a candidate's entries."""
        ...

    @property
    def sizes(self) -> IntArray:
        """Number of options of each dimension, shape (d,)."""
        ...

    def canonical(self, candidates: IntArray) -> IntArray:
        """Set entries made irrelevant by others to 0; shape (n, d) in and out. Idempotent."""
        ...

    def decode(self, candidate: Sequence[int]) -> dict[str, Any]:
        """Turn option indices, shape (d,), into ``{dimension name: option}``."""
        ...

    def pruning(self, candidate: Sequence[int]) -> Pruning:
        """Say which units of which groups a candidate keeps, and how many elements of which parameters it zeroes."""
        ...

    def widths(self, candidates: IntArray) -> FloatArray:
        """Units kept in each group of the structure, shape (n, groups), for candidates of shape (n, d)."""
        ...

    def zeroed(self, candidates: IntArray) -> FloatArray:
        """Elements of parameters set to zero, shape (n,), for candidates of shape (n, d)."""
        ...

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which ``from_json`` of the same class restores an equal space."""
        ...

    def describe(self) -> str:
        """One line for people: how many dimensions, options and candidates."""
        ...


@dataclass(frozen=True)
class Evaluations:
    """Rows of what was measured, in arrival order.

    Attributes:
        candidates: Shape (n, d), int64.
        objectives: Shape (n, m), lower is better: the search signal, then the limited costs. NaN where failed.
        stderr: Standard error of each objective, shape (n, m); 0 for exact costs.
        samples: Samples that the signal was averaged over, shape (n,), int64.
        status: ``"ok"``, ``"raced"`` (stopped early: carries its estimate) or ``"failed"``, length n.
        reasons: Why a row failed, else the empty string, length n.
        distortion: How far the outputs are from those of the dense model, mean over samples, shape (n,): KL divergence
            in nats or relative squared difference. What dimensions cost in this adds up better than the signal does.
            NaN where it was not measured.
        acceptable: Whether the metric meets the limits of the search on the score, shape (n,), bool; by default all do.
    """

    candidates: IntArray
    objectives: FloatArray
    stderr: FloatArray
    samples: IntArray
    status: tuple[str, ...]
    reasons: tuple[str, ...]
    distortion: FloatArray = None  # type: ignore[assignment]  # filled in below
    acceptable: NDArray[np.bool_] = None  # type: ignore[assignment]  # as above

    def __post_init__(self) -> None:
        n = len(self.candidates)
        if self.distortion is None:
            object.__setattr__(self, "distortion", np.full(n, np.nan))
        if self.acceptable is None:
            object.__setattr__(self, "acceptable", np.ones(n, dtype=np.bool_))
        lengths = ((len(self.status),), (len(self.reasons),))
        rows = (self.samples.shape, self.distortion.shape, self.acceptable.shape, *lengths)
        shapes = (self.objectives.shape, self.stderr.shape, *rows)
        if self.objectives.ndim != 2 or shapes != (self.objectives.shape, self.objectives.shape, *5 * ((n,),)):
            raise ValueError(f"evaluations need {n} rows in every field, got {shapes}")

    def __len__(self) -> int:
        return len(self.candidates)


class Optimizer(Protocol):
    """Proposes candidates and learns from their evaluations. Knows a `Problem`, never a model.

    A proposal depends only on the seed, on what was told and on what is pending, so that a history can be told in
    bulk, in any order, and the search goes on from there.
    """

    def ask(self, n: int) -> IntArray:
        """Return up to `n` new candidates, int64, shape (<= n, d). An empty array ends the search.

        All are feasible, but for probes: candidates that change at most one dimension of the dense model may be over a
        limit, to learn what that dimension costs in score.
        """
        ...

    def tell(self, evaluations: Evaluations) -> None:
        """Learn from `evaluations`, which may come late, in any order, or as a whole history at once."""
        ...


@runtime_checkable
class Explains(Protocol):
    """An optimizer that says what it is doing; none has to."""

    @property
    def phase(self) -> str:
        """What the last candidates asked for were meant for, in a word or two."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What it did and how it decided, in plain words, for the result."""
        ...


@runtime_checkable
class Pends(Protocol):
    """An optimizer that can be told what an earlier process asked for; else a resumed search may propose it again."""

    def pend(self, candidates: IntArray) -> None:
        """Take candidates, shape (n, d), as proposed already, with their evaluations still to come."""
        ...


@dataclass(frozen=True)
class Measurement:
    """What one evaluation of one candidate saw.

    Attributes:
        signal: The quantity that steers the search, one value a sample, lower is better, float64, shape (n,). The mean
            over the whole set is the value of the set.
        metric: The user's metric in its own direction: one value a sample, shape (n,), or shape (1,) for a metric of
            the whole set.
        seconds: Wall time of the evaluation.
        distortion: How far the outputs are from those of the dense model, one value a sample, for as many samples as
            dense outputs are kept of, the same for every candidate; empty where it was not measured. See `Evaluations`.
        raced: Why the evaluation ended early: after the first n samples, or on the way through a training; empty if it
            did not.
        steps: Training steps after which it was made on the way through a training; 0 for one of what is built.
        rungs: What was measured earlier on that way, in order.
        weights: How much each sample counts where the score of a set is a quotient, such as a loss with ignored
            labels: its part of the denominator, with a mean of 1 over the whole set, shape (n,); empty where all count
            the same.
    """

    signal: FloatArray
    metric: FloatArray
    seconds: float
    distortion: FloatArray = field(default_factory=lambda: np.empty(0))
    raced: str = ""
    steps: int = 0
    rungs: tuple[Measurement, ...] = ()
    weights: FloatArray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Failure:
    """Why a candidate could not be evaluated; costs one trial, never the run."""

    reason: str
    seconds: float = 0.0
