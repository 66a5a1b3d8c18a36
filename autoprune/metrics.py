"""What candidates are judged by: the user's metric, and the finer signal that steers the search.

Accuracy on a few hundred samples ties too often to steer a search, so optimizers see a smooth per-sample signal, lower
is better, while the metric judges in its own direction; both are recorded.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from autoprune import scorers
from autoprune.batches import Batch, Lent, targets, tensors
from autoprune.data import Subsets
from autoprune.errors import DataError
from autoprune.protocols import FloatArray

Forward: TypeAlias = Callable[[Batch], Any]
# (outputs, batch, dense outputs) -> (signal, metric), one value a sample each
Scorer: TypeAlias = Callable[[Any, Batch, Tensor | None], tuple[Tensor, Tensor]]

METRICS = ("accuracy", "agreement", "auto", "cross_entropy", "loss", "mse")


@dataclass(frozen=True)
class Metric:
    """A user's own measure of a model.

    Attributes:
        fn: ``fn(outputs, batch)`` gives one value a sample, a tensor of shape (n,). With ``per_sample=False``,
            ``fn(forward, batches)`` gives one number for the whole set, and ``forward(batch)`` the outputs.
        higher_is_better: The direction of the values.
        per_sample: Whether `fn` scores samples one by one; only then can bad candidates be stopped early.
        name: What results call it; the name of `fn` if empty.
    """

    fn: Callable[..., Any]
    higher_is_better: bool
    per_sample: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or _name(self.fn))


@dataclass(frozen=True)
class Judge:
    """A metric made ready for one model and its data. Pickles when the user's function does.

    Attributes:
        name: What results call the metric.
        higher_is_better: The direction of the metric; the signal is always lower-is-better.
        note: Which metric was chosen and why, in plain words.
        needs_dense: Whether scoring compares with the outputs of the dense model: then the signal is the distortion.
        proportion: Whether values are 0 or 1; None if only the values can tell.
        scorer: Scores samples one by one; None for a metric of the whole set.
        whole_set: ``whole_set(forward, batches)`` scores all at once; None for a per-sample metric.
        distance: How far outputs are from dense ones, the distortion; None where there is no such measure.
    """

    name: str
    higher_is_better: bool
    note: str
    needs_dense: bool = False
    proportion: bool | None = False
    scorer: Scorer | None = None
    whole_set: Callable[..., Any] | None = None
    distance: scorers.Distance | None = None

    @property
    def per_sample(self) -> bool:
        """Whether samples are scored one by one."""
        return self.scorer is not None

    def dense_outputs(
        self, forward: Forward, batches: Sequence[Batch], memory_bytes: int = 0
    ) -> tuple[Tensor | None, ...]:
        """What the dense model gives for the samples of each batch, to be computed once and kept.

        All of it where scores compare with it, which no limit may change. Else, for the distortion, the first samples
        that fit into `memory_bytes`, the same for every candidate; None for the batches behind them.
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

    def score_set(self, forward: Forward, batches: Sequence[Batch]) -> float:
        """A metric of the whole set, in its own direction."""
        if self.whole_set is None:
            raise ValueError(f"metric {self.name!r} scores samples one by one; use score_batch or measure")
        lent = Lent(batches)
        with torch.no_grad():
            value = self.whole_set(lambda batch: forward(lent.original(batch)), lent)
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"metric {self.name!r} must return one number for the whole set, got {scorers.describe(value)}; "
                "average over the batches, or set per_sample=True"
            ) from error

    def measure(self, forward: Forward, batches: Sequence[Batch], dense: Sequence[Tensor | None]) -> Scores:
        """Signal, metric and distortion over batches.

        Args:
            forward: Gives the outputs of the model under test for a batch.
            batches: What to score on.
            dense: The entries of `dense_outputs` for `batches`.
        """
        watched = _Watched(forward, self.distance, dict(zip(map(id, batches), dense, strict=True)))
        if not self.per_sample:
            value = np.array([self.score_set(watched, batches)])
            return Scores((-value if self.higher_is_better else value), value, watched.distortion())
        run = forward if self.needs_dense else watched
        with torch.no_grad():
            scores = [self.score_batch(run(batch), batch, d) for batch, d in zip(batches, dense, strict=True)]
        signal, metric = (np.concatenate(part) for part in zip(*scores, strict=True))
        return Scores(signal, metric, signal if self.needs_dense else watched.distortion())


class Scores(NamedTuple):
    """What a judge measures, float64.

    Attributes:
        signal: What steers the search, lower is better: one value a sample, or a single one for the whole set.
        metric: In its own direction, as many values.
        distortion: Distance to the dense outputs, one value for each sample that these were kept of; may be empty.
    """

    signal: FloatArray
    metric: FloatArray
    distortion: FloatArray


class _Watched:
    """A forward that compares outputs with the dense ones as they pass by.

    So a metric of the whole set, which calls it as it likes, costs no second pass. Where a batch is missing or its
    outputs do not compare, nothing is said of the candidate at all: candidates must be seen on equal samples.
    """

    def __init__(self, forward: Forward, distance: scorers.Distance | None, dense: Mapping[int, Tensor | None]) -> None:
        self._forward = forward
        self._distance = distance
        self._dense = {key: output for key, output in dense.items() if output is not None}
        self._seen: dict[int, Tensor] = {}

    def __call__(self, batch: Batch) -> Any:
        outputs, dense = self._forward(batch), self._dense.get(id(batch))
        if self._distance is not None and dense is not None and next(tensors(outputs), None) is not None:
            output = scorers.main_output(outputs)[: len(dense)]
            if output.shape == dense.shape:  # outputs may change their shape with the candidate, as boxes do
                self._seen[id(batch)] = self._distance(output, dense)
        return outputs

    def distortion(self) -> FloatArray:
        """One value for each sample that dense outputs were kept of, or none."""
        if not self._dense or self._seen.keys() != self._dense.keys():
            return np.empty(0)
        return torch.cat([self._seen[key].double() for key in self._dense]).cpu().numpy()


def resolve_metric(metric: Any, subsets: Subsets, dense_forward: Forward) -> Judge:
    """Make a metric ready, and try it on the dense model so that a mistake shows before the search.

    ``"auto"`` is accuracy if the labels are classes of the outputs, the loss if they are classes of each position
    (segmentation), the mean squared error if they are floats shaped like the outputs, else agreement.

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
    if isinstance(metric, Metric):
        judge = _judge_metric(metric)
    elif isinstance(metric, str) and metric in METRICS:
        judge = _judge_name(metric, scorers.main_output(outputs), labelled, subsets.synthetic)
    elif callable(metric):
        _require_labels(_name(metric), labelled)
        judge = _judge_loss(metric)
    else:
        raise ValueError(f"metric must be one of {list(METRICS)}, a loss or an autoprune.Metric, got {metric!r}")
    if judge.per_sample:
        judge.score_batch(outputs, first, scorers.main_output(outputs) if judge.needs_dense else None)
    return replace(judge, distance=scorers.distance_of(outputs, first))


class Summary(NamedTuple):
    """Mean over samples, its standard error and its 95 % interval; NaN where a single value cannot tell."""

    mean: float
    stderr: float
    interval: tuple[float, float]


def summary(values: FloatArray, proportion: bool | None = None) -> Summary:
    """Average a metric over samples.

    Args:
        values: One value a sample, shape (n,), or a single one for a metric of the whole set.
        proportion: Whether values are 0 or 1, which asks for the Wilson interval in place of the normal one; None
            looks at the values.
    """
    values = np.asarray(values, np.float64)
    n, mean = len(values), float(values.mean())
    if n == 1:
        return Summary(mean, float("nan"), (float("nan"), float("nan")))
    stderr = float(values.std(ddof=1)) / n**0.5
    if proportion is None:
        proportion = bool(np.isin(values, (0, 1)).all())
    if not proportion:
        return Summary(mean, stderr, (mean - 1.96 * stderr, mean + 1.96 * stderr))
    from scipy.stats import binomtest

    interval = binomtest(int(values.sum()), n).proportion_ci(method="wilson")
    return Summary(mean, stderr, (float(interval.low), float(interval.high)))


def _judge_metric(metric: Metric) -> Judge:
    note = f"metric {metric.name!r} was given"
    if not metric.per_sample:
        return Judge(metric.name, metric.higher_is_better, note, whole_set=metric.fn)
    scorer = partial(scorers.user_metric, metric.name, metric.fn, metric.higher_is_better)
    return Judge(metric.name, metric.higher_is_better, note, proportion=None, scorer=scorer)


def _judge_loss(loss: Callable[..., Any]) -> Judge:
    """Judge by a loss, asked for one value a sample where it can give that."""
    name, each = _name(loss), loss
    if isinstance(loss, nn.Module):
        each = copy.deepcopy(loss)
        if hasattr(each, "reduction"):
            each.reduction = "none"  # type: ignore[assignment]  # a module's attributes count as tensors
    elif "reduction" in inspect.signature(loss).parameters:
        each = partial(loss, reduction="none")
    return Judge(name, False, f"loss {name!r} was given", scorer=partial(scorers.user_loss, name, each))


def _judge_name(name: str, outputs: Tensor, batches: Sequence[Batch], synthetic: bool) -> Judge:
    if name == "auto" and synthetic:
        name, note = "agreement", "metric 'agreement' with the dense model was chosen because there is no data"
    elif name == "auto":
        name, note = _choose(outputs, batches)
    else:
        name, note = ("loss" if name == "cross_entropy" else name), f"metric {name!r} was asked for"
        misfit = "" if name == "agreement" else _misfit(name, outputs, batches)
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
            return Judge(name, False, note, scorer=scorers.cross_entropy)
        case "mse":
            return Judge(name, False, note, scorer=scorers.mse)
    if outputs.ndim == 2 and outputs.shape[1] >= 2 and not _has_float_targets(batches[0]):
        note += f"; outputs of shape (n, {outputs.shape[1]}) are taken for logits: it is "
        note += "the share of samples with the dense model's top class, steered by KL(dense || pruned)"
        return Judge("agreement", True, note, needs_dense=True, proportion=True, scorer=scorers.agreement)
    note += "; the squared difference to the dense model's outputs, relative to their mean square"
    # One scale for all samples: a sample whose outputs are near zero must not outweigh the others.
    scale = float(outputs.float().square().mean()) or 1.0
    return Judge("relative_error", False, note, needs_dense=True, scorer=partial(scorers.relative_error, scale))


def _choose(outputs: Tensor, batches: Sequence[Batch]) -> tuple[str, str]:
    """The metric that ``"auto"`` stands for, and the reason."""
    reasons = {
        "accuracy": "the labels are classes of the outputs",
        "loss": "the labels are classes of each position of the outputs",
        "mse": "the targets are floats shaped like the outputs",
    }
    for name, reason in reasons.items():
        if not _misfit(name, outputs, batches):
            return name, f"metric {name!r} was chosen because {reason}"
    if any(targets(batch) is None for batch in batches):
        reason = "labels are missing in the validation or test data"
    else:
        reason = f"labels of {scorers.describe(targets(batches[0]))} do not fit outputs of {scorers.describe(outputs)}"
    return "agreement", f"metric 'agreement' with the dense model was chosen because {reason}"


def _misfit(name: str, outputs: Tensor, batches: Sequence[Batch]) -> str:
    """What a metric needs of labels and outputs but does not find; empty if all is well."""
    labels = [targets(batch) for batch in batches]
    if not all(isinstance(label, Tensor) for label in labels):
        return "labels, but batches without any were found in the validation or test data"
    got, first = f"got {scorers.describe(labels[0])}", labels[0]
    if name == "mse":
        fits = first.is_floating_point() and scorers.align(outputs, first).shape == first.shape
        return "" if fits else f"float targets shaped like the outputs {tuple(outputs.shape)}, {got}"
    if outputs.ndim < 2 or outputs.shape[1] < 2 or (name == "accuracy" and outputs.ndim > 2):
        return f"outputs of shape (n, classes), got {scorers.describe(outputs)}"
    shape = (len(outputs), *outputs.shape[2:])
    if first.is_floating_point() or first.shape != shape:
        return f"integer class labels of shape {shape}, {got}"
    # Checked here because a label out of range on a GPU ends the process, not the trial.
    classes = outputs.shape[1]
    for label in map(Tensor.long, labels):
        bad = label[((label < 0) | (label >= classes)) & ((label != scorers.NO_LABEL) | (name == "accuracy"))]
        if len(bad):
            return f"labels from 0 to {classes - 1}, the classes of the outputs, got {int(bad[0])}"
    return ""


def _require_labels(name: str, batches: Sequence[Batch]) -> None:
    if any(targets(batch) is None for batch in batches):
        raise DataError(
            f"metric={name!r} needs labels, but batches without any were found in the validation or test data; "
            "give (x, y) batches, or use metric='agreement', which needs no labels"
        )


def _has_float_targets(batch: Batch) -> bool:
    label = targets(batch)
    return isinstance(label, Tensor) and label.is_floating_point()


def _name(fn: Any) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))
