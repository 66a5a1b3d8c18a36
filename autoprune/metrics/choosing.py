"""Choice of a metric: a name, a loss or a user's metric becomes a judge that fits the data and the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoprune.arguments import naming, shown, why_no_function
from autoprune.data.batch import Batch, batch_size, pieces, targets, token_ids
from autoprune.data.subsets import Subsets
from autoprune.errors import DataError
from autoprune.metrics import language, scorers
from autoprune.metrics.judge import BoundForward, Judge, Parts
from autoprune.metrics.losses import SampleLoss, WholeLoss, label_out_of_range, name_of, require_classes, sample_loss
from autoprune.metrics.metric import METRICS, Metric
from autoprune.metrics.segmentation import mean_iou

MOST_DENSE_BYTES = 2 * 2**30
"""Most memory for the dense model's outputs of validation and test samples, where another signal can do without."""

SEQUENCES = 2
"""Sequences of tokens that a user's metric is tried on: each holds many values."""


def resolve_metric(metric: Any, subsets: Subsets, dense_forward: BoundForward) -> Judge:
    """Make a metric ready, and try it on the dense model so that a mistake shows before the search.

    ``"auto"`` is accuracy if the labels are classes of the outputs, the loss if they are classes of each position
    (segmentation), the mean squared error if they are floats shaped like the outputs, the loss of the next token if
    the outputs predict ``input_ids`` and there are no other labels, the loss if labels are classes of each token and
    the last dimension of the outputs holds the classes, the cosine if outputs are vectors of length 1, else
    agreement.

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
    if isinstance(metric, Metric) and token_ids(first) is not None:
        first = pieces(first, SEQUENCES)[0]
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
    if name == "auto" and synthetic and not scorers.are_directions(output):
        name, note = "agreement", "metric 'agreement' with the dense model was chosen because there is no data"
    elif name == "auto":
        name, note = _choose(outputs, batches, forward)
    else:
        name, note = ("loss" if name == "cross_entropy" else name), f"metric {name!r} was asked for"
        misfit = "" if name in ("agreement", "cosine", "relative_error") else _misfit(name, outputs, batches)
        if misfit and name == "loss" and not _misfit(name, outputs, batches, last=True):
            causal = language.is_language_model(outputs, batches, forward)
            misfit = "labels that are no tokens to foresee, for which there is metric='next_token'" if causal else ""
        if misfit:
            raise DataError(
                f"metric={name!r} needs {misfit}; give such data, or use metric='agreement', which needs no labels, "
                "or an autoprune.Metric"
            )
    match name:
        case "accuracy":
            note += "; the search is steered by cross-entropy, which ties less" + _note_of_chances(output, 1)
            scorer = partial(scorers.accuracy, scorers.are_chances(output, 1))
            return Judge(name, True, note, proportion=True, scorer=scorer)
        case "loss":
            classes = scorers.class_dimension(outputs, batches[0]) or 1
            note += _note_of_void(output.shape[classes], batches) + _note_of_chances(output, classes)
            scorer = partial(scorers.cross_entropy, classes, scorers.are_chances(output, classes))
            return Judge(name, False, note, scorer=scorer, parts=partial(scorers.labelled_positions, classes))
        case "miou":
            return Judge(name, True, note + _note_of_void(output.shape[1], batches), whole_set=mean_iou)
        case "mse":
            return Judge(name, False, note, scorer=scorers.mse)
        case "next_token":
            note += _note_of_chances(output, -1) + "; in nats, over tokens that are no padding"
            return _judge_next_token(note, output, batches)
        case "cosine":
            note += "; to the dense model's outputs"
            return Judge(name, True, note, True, scorer=scorers.cosine, signal_is_distortion=True)
    logits = output.ndim == 2 and output.shape[1] >= 2 and not _has_float_targets(batches[0])
    if name == "agreement" and logits:
        kind = scorers.kind_of(output, 1)
        taken = "logits" if kind == "logits" else "probabilities"
        note += f"; outputs of shape (n, {output.shape[1]}) are taken for {taken}: it is "
        note += "the share of samples with the dense model's top class, steered by KL(dense || pruned)"
        scorer = partial(scorers.agreement, kind)
        return Judge("agreement", True, note, True, True, scorer, signal_is_distortion=True)
    note += "; here that is 'relative_error'," if name == "agreement" else ";"
    note += " the squared difference to the dense model's outputs, relative to their mean square"
    # One scale for all samples: a sample whose outputs are near zero must not outweigh the others.
    scorer = partial(scorers.relative_error, float(output.float().square().mean()) or 1.0)
    return Judge("relative_error", False, note, True, scorer=scorer, signal_is_distortion=True)


def _judge_next_token(note: str, output: Tensor, batches: Sequence[Batch]) -> Judge:
    """Judge by the loss of the next token, steered by the divergence from the dense model where its outputs fit."""
    kind = scorers.kind_of(output, -1)
    loss = partial(language.next_token, kind != "logits")
    judge = Judge(
        "next_token",
        False,
        note,
        scorer=loss,
        parts=language.foreseen_tokens,
        distance=partial(scorers.divergence, -1, kind),
        labels_loss=loss,
    )
    held = sum(batch_size(batch) for batch in batches) * output[:1].nbytes
    if held > MOST_DENSE_BYTES:
        return replace(judge, note=f"{note}; it steers the search, too: the dense model's outputs take {held:,} bytes")
    return replace(
        judge,
        note=f"{note}; the search is steered by KL(dense || pruned) on the same tokens, which varies less",
        needs_dense=True,
        scorer=partial(language.next_token_by_divergence, kind != "logits"),
        signal_is_distortion=True,
    )


def _note_of_chances(output: Tensor, classes: int) -> str:
    return "; outputs are probabilities, whose logarithms count" if scorers.are_chances(output, classes) else ""


def _note_of_void(classes: int, batches: Sequence[Batch]) -> str:
    void = scorers.VOID
    seen = any(targets(batch).ndim > 1 and bool((targets(batch) == void).any()) for batch in batches)
    return f"; positions labelled {void} are left out" if seen and classes <= void else ""


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
    if not _misfit("loss", outputs, batches, last=True):
        return "loss", "metric 'loss' was chosen because the labels are classes of each token of the outputs"
    if any(targets(batch) is None for batch in batches):
        reason = "labels are missing in the validation or test data"
    else:
        reason = f"labels of {scorers.describe(targets(batches[0]))} do not fit outputs of "
        reason += scorers.describe(scorers.main_output(outputs))
        misfit = _misfit("loss", outputs, batches)
        if misfit.startswith("labels from"):
            reason = f"accuracy and loss need {misfit}"
    if scorers.are_directions(scorers.main_output(outputs)):
        return "cosine", f"metric 'cosine' was chosen because outputs are vectors of length 1, and {reason}"
    return "agreement", f"metric 'agreement' with the dense model was chosen because {reason}"


def _misfit(name: str, made: Any, batches: Sequence[Batch], last: bool = False) -> str:
    """Describe the labels or outputs that a metric needs and does not find; empty if all fit.

    Args:
        name: The metric.
        made: Outputs for the first batch.
        batches: Labelled.
        last: Whether the last dimension of the outputs holds the classes, of the loss alone.
    """
    if name == "next_token":
        return language.why_no_language_model(made, batches[0])
    outputs = scorers.main_output(made)
    if last and outputs.ndim > 2:
        outputs = outputs.movedim(-1, 1)
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
