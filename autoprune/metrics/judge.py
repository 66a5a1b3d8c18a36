"""Judge of candidates: the user's metric, and the finer signal that steers the search.

Accuracy on a few hundred samples ties too often to steer a search, so optimizers see a smooth per-sample signal, lower
is better, while the metric judges in its own direction; both are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from autoprune.data.batch import Batch, Lent, batch_size, fresh, tensors
from autoprune.errors import DataError
from autoprune.metrics import scorers
from autoprune.pareto import Direction
from autoprune.protocols import FloatArray

BoundForward: TypeAlias = Callable[[Batch], Any]
# (outputs, batch, dense outputs) -> (signal, metric), one value a sample each
Scorer: TypeAlias = Callable[[Any, Batch, Tensor | None], tuple[Tensor, Tensor]]

# (outputs, batch) -> (values that a sample's signal is the mean of, its part of the denominator), one a sample each
Parts: TypeAlias = Callable[[Any, Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Judge:
    """Metric prepared for one model and its data. Pickles when the user's function does.

    Attributes:
        name: Name of the metric in results.
        higher_is_better: The direction of the metric; the signal is always lower-is-better.
        note: The metric chosen and the reason, in plain words.
        needs_dense: Whether scoring compares with the outputs of the dense model.
        proportion: Whether values are 0 or 1; None if only the values can tell.
        scorer: Scores samples one by one; None for a metric of the whole set.
        whole_set: ``whole_set(forward, batches)`` scores all at once; None for a per-sample metric.
        distance: Distance of outputs to dense ones, the distortion; None where there is no such measure.
        parts: Weight of each sample in the value of a set, where they differ; None where all count the same.
        total: Whether that value is a sum and no mean.
        signal_is_distortion: Whether the signal is the distance of outputs to dense ones.
        labels_loss: Loss on labels for trainings, lower is better, as a `scorer` that needs no dense outputs; None
            where the metric has none with a useful gradient.
    """

    name: str
    higher_is_better: bool
    note: str
    needs_dense: bool = False
    proportion: bool | None = False
    scorer: Scorer | None = None
    whole_set: Callable[..., Any] | None = None
    distance: scorers.Distance | None = None
    parts: Parts | None = None
    total: bool = False
    signal_is_distortion: bool = False
    labels_loss: Scorer | None = None

    @property
    def direction(self) -> Direction:
        """Direction of the metric."""
        return Direction(self.higher_is_better)

    @property
    def per_sample(self) -> bool:
        """True if samples are scored one by one."""
        return self.scorer is not None

    def dense_outputs(
        self, forward: BoundForward, batches: Sequence[Batch], memory_bytes: int = 0
    ) -> tuple[Tensor | None, ...]:
        """Compute the outputs of the dense model for the samples of each batch, to be kept.

        All outputs where scores compare with them, which no limit may change. Else, for the distortion, those of the
        first samples that fit into `memory_bytes`, the same for every candidate; None for the batches after them.
        """
        if self.needs_dense:
            with torch.no_grad():
                return tuple(scorers.main_output(forward(batch)) for batch in batches)
        kept: list[Tensor | None] = []
        for batch in batches:
            output = None
            if memory_bytes > 0 and self.distance is not None:
                with torch.no_grad():
                    whole = scorers.main_output(forward(batch))
                fit = min(len(whole), memory_bytes // max(whole[:1].nbytes, 1))
                output = whole[:fit].clone() if fit else None  # a view would keep the whole alive
                memory_bytes = memory_bytes - whole[:fit].nbytes if fit == len(whole) else 0
            kept.append(output)
        return tuple(kept)

    def score_batch(self, outputs: Any, batch: Batch, dense: Tensor | None = None) -> tuple[FloatArray, FloatArray]:
        """Signal and metric of the samples of a batch, float64, shape (n,) each; `dense` as in `dense_outputs`."""
        if self.scorer is None:
            raise ValueError(f"metric {self.name!r} scores the whole set at once; use score_set or measure")
        with torch.no_grad():
            signal, metric = self.scorer(outputs, batch, dense)
        return signal.cpu().double().numpy(), metric.cpu().double().numpy()

    def weigh(
        self, forward: BoundForward, batches: Sequence[Batch], dense: Sequence[Tensor | None] | None = None
    ) -> Weighing | None:
        """Compute the weight of each sample of a set, to be kept; None where all count the same.

        Args:
            forward: Gives outputs of the form that is scored, such as those of the dense model.
            batches: The whole set.
            dense: The entries of `dense_outputs`, which are not computed again.

        Raises:
            DataError: If no sample counts at all.
        """
        if self.parts is None:
            return None
        found = []
        with torch.no_grad():
            for batch, kept in zip(batches, dense or [None] * len(batches), strict=True):
                outputs = kept if kept is not None and len(kept) == batch_size(batch) else forward(batch)
                found.append([part.cpu().double().numpy() for part in self.parts(outputs, batch)])
        samples = sum(len(counts) for counts, _ in found)
        mass = float(sum(masses.sum() for _, masses in found))
        if not mass > 0:
            raise DataError(f"metric {self.name!r} needs labels that count, but all of {samples} samples are ignored")
        each = samples if self.total else samples / mass
        return Weighing(
            tuple(counts * each for counts, _ in found), tuple(masses * (samples / mass) for _, masses in found)
        )

    def score_set(self, forward: BoundForward, batches: Sequence[Batch], dense: Sequence[Tensor | None] = ()) -> float:
        """Compute a metric of the whole set, in its own direction."""
        if self.whole_set is None:
            raise ValueError(f"metric {self.name!r} scores samples one by one; use score_batch or measure")
        lent = Lent(batches)
        with torch.no_grad():
            further = ([fresh(output) for output in dense],) if self.needs_dense else ()
            value = self.whole_set(lambda batch: forward(lent.original(batch)), lent, *further)
        try:
            if np.iscomplexobj(value.cpu() if isinstance(value, Tensor) else value):
                raise ValueError("it is complex")
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"metric {self.name!r} must return one number for the whole set, got {scorers.describe(value)}; "
                "average over the batches, or set per_sample=True"
            ) from error

    def measure(
        self,
        forward: BoundForward,
        batches: Sequence[Batch],
        dense: Sequence[Tensor | None],
        weighing: Weighing | None = None,
    ) -> Scores:
        """Measure signal, metric and distortion over batches.

        Args:
            forward: Gives the outputs of the model under test for a batch.
            batches: Samples to score on.
            dense: The entries of `dense_outputs` for `batches`.
            weighing: Result of `weigh` for these batches; None takes them for a whole set.
        """
        watched = _Watched(forward, self.distance, dict(zip(map(id, batches), dense, strict=True)))
        if not self.per_sample:
            value = np.array([self.score_set(watched, batches, dense)])
            return Scores(self.direction.key(value), value, watched.distortion())
        run = forward if self.signal_is_distortion else watched
        weighing = weighing or self.weigh(forward, batches)
        with torch.no_grad():
            scores = [self.score_batch(run(batch), batch, d) for batch, d in zip(batches, dense, strict=True)]
        signal, metric = (np.concatenate(part) for part in zip(*scores, strict=True))
        weights = np.empty(0)
        if weighing is not None:
            scale, weights = (np.concatenate(part) for part in weighing)
            signal, metric = signal * scale, metric * scale
        return Scores(signal, metric, signal if self.signal_is_distortion else watched.distortion(), weights)


class Weighing(NamedTuple):
    """Weights of samples in the value of a set, float64 of shape (n,) for each of its batches.

    Attributes:
        scale: Factor of the value of each sample, so that the mean over the set is the value of the set.
        weights: The parts of the denominator, with a mean of 1 over the set, which standard errors need.
    """

    scale: tuple[FloatArray, ...]
    weights: tuple[FloatArray, ...]

    def of(self, rows: slice) -> Weighing:
        """Select some of the batches."""
        return Weighing(self.scale[rows], self.weights[rows])


class Scores(NamedTuple):
    """Measurements of a judge, float64.

    Attributes:
        signal: Steers the search, lower is better: one value a sample, or a single one for the whole set. Their mean
            over the set is the value of the set.
        metric: In its own direction, as many values.
        distortion: Distance to the dense outputs, one value for each sample with kept dense outputs; may be empty.
        weights: Weight of each sample, as in `Weighing`; empty where all count the same.
    """

    signal: FloatArray
    metric: FloatArray
    distortion: FloatArray
    weights: FloatArray = np.empty(0)


class _Watched:
    """Forward that compares its outputs with the dense ones.

    So a metric of the whole set, which may call it in any way, needs no second pass. Where a batch is missing or its
    outputs do not compare, the candidate has no distortion: candidates must be compared on the same samples.
    """

    def __init__(
        self, forward: BoundForward, distance: scorers.Distance | None, dense: Mapping[int, Tensor | None]
    ) -> None:
        self._forward = forward
        self._distance = distance
        self._dense = {key: output for key, output in dense.items() if output is not None}
        self._seen: dict[int, Tensor] = {}

    def __call__(self, batch: Batch) -> Any:
        outputs = self._forward(batch)
        dense = self._dense.get(id(batch))
        if self._distance is not None and dense is not None and next(tensors(outputs), None) is not None:
            output = scorers.main_output(outputs)[: len(dense)]
            if output.shape == dense.shape:  # outputs may change their shape with the candidate, as boxes do
                self._seen[id(batch)] = self._distance(output, dense)
        return outputs

    def distortion(self) -> FloatArray:
        """Return one value for each sample with kept dense outputs, or none."""
        if not self._dense or self._seen.keys() != self._dense.keys():
            return np.empty(0)
        return torch.cat([self._seen[key].double() for key in self._dense]).cpu().numpy()
