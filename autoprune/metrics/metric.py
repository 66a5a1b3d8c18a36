"""Metrics: the user's metric that judges candidates, and the finer signal that steers the search.

Accuracy on a few hundred samples ties too often to steer a search, so optimizers see a smooth per-sample signal, lower
is better, while the metric judges in its own direction; both are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from autoprune.arguments import flag, naming, shown, why_no_function
from autoprune.data.batch import Batch, Lent, batch_size, fresh, targets, tensors
from autoprune.data.subsets import Subsets
from autoprune.errors import DataError
from autoprune.metrics import language, scorers
from autoprune.metrics.losses import SampleLoss, WholeLoss, label_out_of_range, name_of, require_classes, sample_loss
from autoprune.metrics.segmentation import mean_iou
from autoprune.metrics.statistics import standard_error
from autoprune.pareto import Direction
from autoprune.protocols import FloatArray

BoundForward: TypeAlias = Callable[[Batch], Any]
# (outputs, batch, dense outputs) -> (signal, metric), one value a sample each
Scorer: TypeAlias = Callable[[Any, Batch, Tensor | None], tuple[Tensor, Tensor]]

# (outputs, batch) -> (values that a sample's signal is the mean of, its part of the denominator), one a sample each
Parts: TypeAlias = Callable[[Any, Batch], tuple[Tensor, Tensor]]

MetricName = Literal[
    "accuracy",
    "agreement",
    "auto",
    "cosine",
    "cross_entropy",
    "loss",
    "miou",
    "mse",
    "next_token",
    "relative_error",
]
METRICS = get_args(MetricName)

MOST_DENSE_BYTES = 2 * 2**30
"""Most memory for the dense model's outputs of validation and test samples, where another signal can do without."""


@dataclass(frozen=True)
class Metric:
    """Measure of a model given by the user.

    Attributes:
        fn: ``fn(outputs, batch)`` gives one value a sample, a tensor of shape (n,). With ``per_sample=False``,
            ``fn(forward, batches)`` gives one number for the whole set, and ``forward(batch)`` the outputs.
        higher_is_better: The direction of the values.
        per_sample: Whether `fn` scores samples one by one; only then can bad candidates be stopped early.
        name: Name in results; the name of `fn` if empty.
        needs_dense: Whether `fn` takes the outputs of the dense model as a third argument:
            ``fn(outputs, batch, dense)`` with its main output for the same samples, a tensor (n, ...); with
            ``per_sample=False``, ``fn(forward, batches, dense)`` with one such tensor for each batch.
    """

    fn: Callable[..., Any]
    higher_is_better: bool
    per_sample: bool = True
    name: str = ""
    needs_dense: bool = False

    def __post_init__(self) -> None:
        for name in ("higher_is_better", "per_sample", "needs_dense"):
            flag(name, getattr(self, name))
        if not isinstance(self.name, str):
            raise TypeError(f"name must be text, got {shown(self.name)}")
        dense = ", dense" * self.needs_dense
        if why := why_no_function(self.fn, 3 if self.needs_dense else 2):
            raise TypeError(
                f"fn must be a function fn(outputs, batch{dense}), or fn(forward, batches{dense}) with "
                f"per_sample=False, {why}"
            )
        object.__setattr__(self, "name", self.name or name_of(self.fn))


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


def resolve_metric(metric: Any, subsets: Subsets, dense_forward: BoundForward) -> Judge:
    """Make a metric ready, and try it on the dense model so that a mistake shows before the search.

    ``"auto"`` is accuracy if the labels are classes of the outputs, the loss if they are classes of each position
    (segmentation), the mean squared error if they are floats shaped like the outputs, the loss of the next token if
    the outputs predict ``input_ids`` and there are no other labels, else agreement.

    Args:
        metric: A name from `METRICS`, a `Metric`, or a loss like ``nn.MSELoss()`` or ``F.cross_entropy``, called with
            (outputs, targets).
        subsets: The data of the search.
        dense_forward: Gives the outputs of the dense model for a batch.

    Raises:
        ValueError: If the metric is unknown or returns something of the wrong form.
        DataError: If the metric does not fit the labels or the outputs.
    """
    first = subsets.validation[0]
    with torch.no_grad():
        outputs = dense_forward(first)
    labelled = (*subsets.validation, *subsets.test)
    if not isinstance(metric, Metric) and scorers.main_output(outputs).is_complex():
        got = scorers.describe(scorers.main_output(outputs))
        raise DataError(
            f"the model's output must be real to be scored by {shown(metric)}, got {got}; select another with "
            "autoprune.Call(outputs=...), or pass an autoprune.Metric"
        )
    if isinstance(metric, Metric):
        judge = _judge_metric(metric)
    elif isinstance(metric, str) and metric in METRICS:
        judge = _judge_name(metric, outputs, labelled, subsets.synthetic, dense_forward)
    elif isinstance(metric, type):
        raise ValueError(f"metric must be a loss ready to be called, such as {metric.__name__}(), got {shown(metric)}")
    elif callable(metric):
        if why := why_no_function(metric, 2):
            raise TypeError(f"metric must be a loss of (outputs, targets), {why}; pass an autoprune.Metric for others")
        _require_labels(name_of(metric), labelled)
        require_classes(metric, outputs, labelled)
        with naming(f"metric {name_of(metric)!r} must score the outputs of the dense model"):
            judge = _judge_loss(metric, outputs, labelled)
    else:
        raise ValueError(f"metric must be one of {list(METRICS)}, a loss or an autoprune.Metric, got {shown(metric)}")
    if judge.per_sample:
        rows = len(scorers.main_output(outputs)) if scorers.main_output(outputs).ndim else 0
        if not isinstance(metric, Metric) and rows < batch_size(first):
            raise DataError(
                f"the model must return at least one row for each sample to be scored by {judge.name!r}, got {rows} "
                f"for {batch_size(first)} samples; select with autoprune.Call(outputs=...) or Call(forward=...), or "
                "pass a Metric of the whole set"
            )
        with naming(f"metric {judge.name!r} must score the outputs of the dense model"):
            judge.score_batch(outputs, first, scorers.main_output(outputs) if judge.needs_dense else None)
    if judge.parts is not None:
        judge.parts(outputs, first)
    return replace(judge, distance=judge.distance or scorers.distance_of(outputs, first))


class Summary(NamedTuple):
    """Mean over samples, its standard error and its 95 % interval; NaN for a single value."""

    mean: float
    stderr: float
    interval: tuple[float, float]


def summary(values: FloatArray, proportion: bool | None = None, weights: FloatArray | None = None) -> Summary:
    """Average a metric over samples.

    Args:
        values: One value a sample, shape (n,), or a single one for a metric of the whole set.
        proportion: Whether values are 0 or 1, for which the interval is Wilson's in place of the normal one; None
            decides by the values.
        weights: Weight of each sample, with a mean of 1, where the mean is a quotient; None or empty where all count
            the same.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    mean = float(values.mean())
    if n == 1:
        return Summary(mean, float("nan"), (float("nan"), float("nan")))
    stderr = standard_error(values, weights)
    if proportion is None:
        proportion = bool(np.isin(values, (0, 1)).all())
    if not proportion:
        return Summary(mean, stderr, (mean - 1.96 * stderr, mean + 1.96 * stderr))
    from scipy.stats import binomtest

    interval = binomtest(int(values.sum()), n).proportion_ci(method="wilson")
    return Summary(mean, stderr, (float(interval.low), float(interval.high)))


def _judge_metric(metric: Metric) -> Judge:
    note = f"metric {metric.name!r} was given"
    judge = Judge(metric.name, metric.higher_is_better, note, metric.needs_dense)
    if not metric.per_sample:
        return replace(judge, whole_set=metric.fn)
    scorer = partial(scorers.user_metric, metric.name, metric.fn, judge.direction, metric.needs_dense)
    return replace(judge, proportion=None, scorer=scorer)


def _judge_loss(loss: Callable[..., Any], outputs: Any, batches: Sequence[Batch]) -> Judge:
    """Judge by a loss: by samples where these give its value of the set, else by the whole set."""
    name = name_of(loss)
    found, how = sample_loss(loss, outputs, batches)
    note = f"loss {name!r} was given{how}"
    if found is None:
        return Judge(name, False, note, whole_set=WholeLoss(loss))
    return Judge(name, False, note, scorer=found, parts=_parts_of(found), total=found.total)


def _parts_of(loss: SampleLoss) -> Parts | None:
    return None if loss.own is None else loss.parts


def _judge_name(name: str, outputs: Any, batches: Sequence[Batch], synthetic: bool, forward: BoundForward) -> Judge:
    output = scorers.main_output(outputs)
    if name == "auto" and synthetic:
        name, note = "agreement", "metric 'agreement' with the dense model was chosen because there is no data"
    elif name == "auto":
        name, note = _choose(outputs, batches, forward)
    else:
        name, note = ("loss" if name == "cross_entropy" else name), f"metric {name!r} was asked for"
        misfit = "" if name in ("agreement", "cosine", "relative_error") else _misfit(name, outputs, batches)
        if misfit:
            raise DataError(
                f"metric={name!r} needs {misfit}; give such data, or use metric='agreement', which needs no labels, "
                "or an autoprune.Metric"
            )
    match name:
        case "accuracy":
            note += "; the search is steered by cross-entropy, which ties less"
            return Judge(name, True, note, proportion=True, scorer=scorers.accuracy)
        case "loss":
            note += _note_of_void(output, batches)
            return Judge(name, False, note, scorer=scorers.cross_entropy, parts=scorers.labelled_positions)
        case "miou":
            return Judge(name, True, note + _note_of_void(output, batches), whole_set=mean_iou)
        case "mse":
            return Judge(name, False, note, scorer=scorers.mse)
        case "next_token":
            note += "; in nats, over tokens that are no padding"
            return _judge_next_token(note, output, batches)
        case "cosine":
            note += "; to the dense model's outputs"
            return Judge(name, True, note, True, scorer=scorers.cosine, signal_is_distortion=True)
    logits = output.ndim == 2 and output.shape[1] >= 2 and not _has_float_targets(batches[0])
    if name == "agreement" and logits:
        note += f"; outputs of shape (n, {output.shape[1]}) are taken for logits: it is "
        note += "the share of samples with the dense model's top class, steered by KL(dense || pruned)"
        return Judge("agreement", True, note, True, True, scorers.agreement, signal_is_distortion=True)
    note += "; the squared difference to the dense model's outputs, relative to their mean square"
    # One scale for all samples: a sample whose outputs are near zero must not outweigh the others.
    scorer = partial(scorers.relative_error, float(output.float().square().mean()) or 1.0)
    return Judge("relative_error", False, note, True, scorer=scorer, signal_is_distortion=True)


def _judge_next_token(note: str, output: Tensor, batches: Sequence[Batch]) -> Judge:
    """Judge by the loss of the next token, steered by the divergence from the dense model where its outputs fit."""
    judge = Judge(
        "next_token",
        False,
        note,
        scorer=language.next_token,
        parts=language.foreseen_tokens,
        distance=partial(scorers.divergence, -1),
        labels_loss=language.next_token,
    )
    held = sum(batch_size(batch) for batch in batches) * output[:1].nbytes
    if held > MOST_DENSE_BYTES:
        return replace(judge, note=f"{note}; it steers the search, too: the dense model's outputs take {held:,} bytes")
    return replace(
        judge,
        note=f"{note}; the search is steered by KL(dense || pruned) on the same tokens, which varies less",
        needs_dense=True,
        scorer=language.next_token_by_divergence,
        signal_is_distortion=True,
    )


def _note_of_void(output: Tensor, batches: Sequence[Batch]) -> str:
    void = scorers.VOID
    seen = any(targets(batch).ndim > 1 and bool((targets(batch) == void).any()) for batch in batches)
    return f"; positions labelled {void} are left out" if seen and output.shape[1] <= void else ""


def _choose(outputs: Any, batches: Sequence[Batch], forward: BoundForward) -> tuple[str, str]:
    """Choose the metric of ``"auto"``, with the reason."""
    reasons = {
        "accuracy": "the labels are classes of the outputs",
        "loss": "the labels are classes of each position of the outputs",
        "mse": "the targets are floats shaped like the outputs",
    }
    for name, reason in reasons.items():
        if not _misfit(name, outputs, batches):
            return name, f"metric {name!r} was chosen because {reason}"
    if language.is_language_model(outputs, batches, forward):
        return "next_token", "metric 'next_token' was chosen because the outputs foresee input_ids"
    if any(targets(batch) is None for batch in batches):
        reason = "labels are missing in the validation or test data"
    else:
        reason = f"labels of {scorers.describe(targets(batches[0]))} do not fit outputs of "
        reason += scorers.describe(scorers.main_output(outputs))
        misfit = _misfit("loss", outputs, batches)
        if misfit.startswith("labels from"):
            reason = f"accuracy and loss need {misfit}"
    return "agreement", f"metric 'agreement' with the dense model was chosen because {reason}"


def _misfit(name: str, made: Any, batches: Sequence[Batch]) -> str:
    """Describe the labels or outputs that a metric needs and does not find; empty if all fit."""
    if name == "next_token":
        return language.why_no_language_model(made, batches[0])
    outputs = scorers.main_output(made)
    labels = [targets(batch) for batch in batches]
    if not all(isinstance(label, Tensor) for label in labels):
        return "labels, but batches without any were found in the validation or test data"
    got = f"got {scorers.describe(labels[0])}"
    first = labels[0]
    if name == "mse":
        fits = first.is_floating_point() and scorers.align(outputs, first).shape == first.shape
        return "" if fits else f"float targets shaped like the outputs {tuple(outputs.shape)}, {got}"
    if outputs.ndim < 2 or outputs.shape[1] < 2 or (name == "accuracy" and outputs.ndim > 2):
        return f"outputs of shape (n, classes), got {scorers.describe(outputs)}"
    shape = (len(outputs), *outputs.shape[2:])
    shaped = first.ndim == outputs.ndim - 1 and len(first) == len(outputs) if name == "miou" else first.shape == shape
    if first.is_floating_point() or not shaped:
        return f"integer class labels of shape {shape}, {got}"
    # Checked here because a label out of range on a GPU ends the process, not the trial.
    classes = outputs.shape[1]
    left_out = None if name == "accuracy" else scorers.NO_LABEL
    return label_out_of_range([scorers.known_labels(label, classes) for label in labels], classes, left_out)


def _require_labels(name: str, batches: Sequence[Batch]) -> None:
    if any(targets(batch) is None for batch in batches):
        raise DataError(
            f"metric={name!r} needs labels, but batches without any were found in the validation or test data; "
            "give (x, y) batches, or use metric='agreement', which needs no labels"
        )


def _has_float_targets(batch: Batch) -> bool:
    label = targets(batch)
    return isinstance(label, Tensor) and label.is_floating_point()
