"""Interfaces between the parts, and the plain data that crosses them.

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
PENDING = "pending"


@dataclass(frozen=True)
class Dimension:
    """One choice that a search makes.

    Attributes:
        name: Name of the group or weight, for example ``"layer1.0.conv1"``.
        options: The meaning of each option, option 0 dense; for channels the number of units kept, falling.
        ordered: Whether later options remove more, so that steps along the options are meaningful.
    """

    name: str
    options: tuple[Any, ...]
    ordered: bool = True


@dataclass(frozen=True)
class Pruning:
    """Units and elements to remove from a model, independent of the space they came from.

    Attributes:
        kept: Unit indices that stay, ascending, for each group that loses units; other groups stay whole.
        zeroed: Number of elements of each parameter that are set to zero, those of least magnitude first: among the
            elements that stay, where units are removed too.
        dropped: Names of the residual branches that are removed as a whole, with every group inside them.
        patterns: Pattern of the zeros of a parameter, such as ``"2:4"`` or ``"4x4"``; others are single elements.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    zeroed: Mapping[str, int] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    patterns: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class SearchSpace(Protocol):
    """Dimensions with their options, and the meaning of a candidate for the model."""

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
        """Return the units of groups that a candidate keeps, and the numbers of elements that it sets to zero."""
        ...

    def widths(self, candidates: IntArray) -> FloatArray:
        """Units kept in each group of the structure, shape (n, groups), for candidates of shape (n, d)."""
        ...

    def zeroed(self, candidates: IntArray) -> FloatArray:
        """Elements of parameters set to zero, shape (n,), for candidates of shape (n, d)."""
        ...

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which ``from_json``, a class method, restores an equal space.

        Its ``"type"`` is the name that `autoprune.register_space` was called with.
        """
        ...

    def describe(self) -> str:
        """Describe it in one line for people: the numbers of dimensions, options and candidates."""
        ...


@runtime_checkable
class ChoosesWidths(Protocol):
    """Optional protocol: spaces in which each dimension chooses the width of one group, or keeps or drops a part.

    Costs of candidates that differ in one entry are then computed far faster.
    """

    @property
    def choices(self) -> tuple[IntArray, FloatArray]:
        """Position of each dimension's group in the structure, (d,), and units kept by each option, padded, (d, most).

        No two dimensions choose for the same group. The position is -1 where a dimension keeps or drops a part, and the
        units there count for nothing.
        """
        ...


@runtime_checkable
class Silences(Protocol):
    """Optional protocol: spaces that remove whole parts of a model, in which the widths of groups no longer matter."""

    def silenced(self, candidates: IntArray) -> NDArray[np.bool_]:
        """Mark the groups that lie inside a dropped part, bool, shape (n, groups), for candidates of shape (n, d)."""
        ...


@runtime_checkable
class SetsZeros(Protocol):
    """Optional protocol: spaces that set elements of weights to zero."""

    @property
    def zeroed_weights(self) -> tuple[str, ...]:
        """Names of the weights, each once."""
        ...

    def zeros_by_weight(self, candidates: IntArray) -> IntArray:
        """Elements of each of them that are set to zero, shape (n, weights), for candidates of shape (n, d)."""
        ...


@dataclass(frozen=True)
class Evaluations:
    """Rows of measurements, in arrival order.

    Attributes:
        candidates: Shape (n, d), int64.
        objectives: Shape (n, m), lower is better: the search signal, then the limited costs. NaN where failed.
        stderr: Standard error of each objective, shape (n, m); 0 for exact costs.
        samples: Samples that the signal was averaged over, shape (n,), int64.
        status: ``"ok"``, ``"raced"`` (stopped early: carries its estimate) or ``"failed"``, length n.
        reasons: Reason of each failed row, else the empty string, length n.
        distortion: Distance of the outputs to those of the dense model, mean over samples, shape (n,): KL divergence in
            nats or relative squared difference. It adds up better over dimensions than the signal does. NaN where it
            was not measured.
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

    A proposal depends only on the seed, on the evaluations told and on the pending candidates, so that a history can be
    told in bulk, in any order, and the search continues from there.
    """

    def ask(self, n: int) -> IntArray:
        """Return up to `n` new candidates, int64, shape (<= n, d). An empty array ends the search.

        All are feasible, except probes: candidates that change at most one dimension of the dense model may be over a
        limit, to measure the loss of that dimension.
        """
        ...

    def tell(self, evaluations: Evaluations) -> None:
        """Learn from `evaluations`, which may come late, in any order, or as a whole history at once."""
        ...


@runtime_checkable
class Explains(Protocol):
    """Optional protocol: optimizers that explain their proposals."""

    @property
    def phase(self) -> str:
        """Purpose of the last candidates asked for, in a word or two."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Explanation of its decisions, in plain words, for the result."""
        ...


@runtime_checkable
class Pends(Protocol):
    """Optional protocol: optimizers that can be told of pending candidates; others may propose these again."""

    def pend(self, candidates: IntArray) -> None:
        """Take candidates, shape (n, d), as proposed already, with their evaluations still to come."""
        ...


@dataclass(frozen=True)
class Measurement:
    """Measurement of one candidate in one evaluation.

    Attributes:
        signal: The quantity that steers the search, one value a sample, lower is better, float64, shape (n,). The mean
            over the whole set is the value of the set.
        metric: The user's metric in its own direction: one value a sample, shape (n,), or shape (1,) for a metric of
            the whole set.
        seconds: Wall time of the evaluation.
        distortion: Distance of the outputs to those of the dense model, one value for each sample with kept dense
            outputs, the same for every candidate; empty where it was not measured. See `Evaluations`.
        raced: Reason why the evaluation ended early: after the first n samples, or at a rung of a training; empty if it
            did not.
        steps: Training steps after which it was made, at a rung; 0 for one of the module that is built.
        rungs: Measurements at earlier rungs of the same training, in order.
        weights: Weight of each sample where the score of a set is a quotient, such as a loss with ignored labels: its
            part of the denominator, with a mean of 1 over the whole set, shape (n,); empty where all count the same.
        control: Of an evaluation that ended early, the measurement of a similar candidate on all samples, from whose
            mean the difference on those scored estimates its own; None where the dense model serves.
    """

    signal: FloatArray
    metric: FloatArray
    seconds: float
    distortion: FloatArray = field(default_factory=lambda: np.empty(0))
    raced: str = ""
    steps: int = 0
    rungs: tuple[Measurement, ...] = ()
    weights: FloatArray = field(default_factory=lambda: np.empty(0))
    control: Measurement | None = None

    @property
    def status(self) -> str:
        """Status of a trial with this outcome: ``"ok"`` or ``"raced"``."""
        return RACED if self.raced else OK

    @property
    def reason(self) -> str:
        """Reason why the candidate was dropped early; empty if it was not."""
        return self.raced

    @property
    def stages(self) -> tuple[Measurement, ...]:
        """All measurements of the candidate, in order: at the rungs of its training, and this one."""
        return (*self.rungs, self)


@dataclass(frozen=True)
class Failure:
    """Failed evaluation of a candidate, with the reason; costs one trial, never the run."""

    reason: str
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """Status of a trial with this outcome: ``"failed"``."""
        return FAILED

    @property
    def stages(self) -> tuple[Failure, ...]:
        """The failure alone: what was measured before it does not count."""
        return (self,)
