"""Losses of users: scored sample by sample, so that the samples together give the loss of the set.

A loss that averages is a quotient: class weights, ignored labels and padding make some samples count more than others,
and the mean of samples is another number. So each sample's part of the numerator and of the denominator is found by
calling the loss, with its own reduction, on each sample alone. A loss that is no such quotient is called on the whole
set.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.data.batch import Batch, batch_size, fresh, slice_batch, targets
from autoprune.errors import DataError
from autoprune.metrics.scorers import NO_LABEL, describe, main_output, sample_means

_ROUNDING = 1e-3  # relative, between a loss of a batch and that computed from its samples; float32 is far more precise
_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
_AT_ONCE_BYTES = 2**30  # outputs of a whole set that are held for one call of a loss


@dataclass(frozen=True)
class SampleLoss:
    """Loss with a value for each sample, and the rule that combines these to the value of a set.

    Attributes:
        name: For messages.
        values: ``values(outputs, targets)`` gives values of shape (n, ...), or of a single sample a scalar.
        own: ``own(outputs, targets)`` with the reduction that the user chose, a scalar; None where all samples count
            the same.
        total: Whether that reduction adds up and does not average.
    """

    name: str
    values: Callable[..., Any]
    own: Callable[..., Any] | None = None
    total: bool = False

    def __call__(self, outputs: Any, batch: Batch, dense: Tensor | None) -> tuple[Tensor, Tensor]:
        """Average the values over all but the first dimension, shape (n,), twice."""
        means = sample_means(self.each(main_output(outputs), batch))
        return means, means

    def each(self, output: Tensor, batch: Batch) -> Tensor:
        """Compute values of shape (n, ...)."""
        values = _called(self.values, output, targets(batch))
        samples = batch_size(batch)
        if not isinstance(values, Tensor) or values.is_complex() or values.ndim == 0 or len(values) != samples:
            raise ValueError(
                f"loss {self.name!r} must give one value a sample, shape (n, ...) with n = {batch_size(batch)}, got "
                f"{describe(values)}; take a reduction argument, or use autoprune.Metric(..., per_sample=False)"
            )
        return values

    def parts(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Number of values of each sample and its part of the denominator, float64, shape (n,) each.

        They depend on the targets alone; `outputs` only have to have the right form.
        """
        output = main_output(outputs)
        values = self.each(output, batch).double().reshape(batch_size(batch), -1)
        counts = torch.full((len(values),), float(values.shape[1]), dtype=torch.float64)
        if self.own is None:
            return counts, counts
        if self.total:
            return counts, torch.ones_like(counts)
        parts = [self._part(output, batch, i, values) for i in range(len(values))]
        return counts, torch.tensor(parts, dtype=torch.float64)

    def _part(self, output: Tensor, batch: Batch, i: int, values: Tensor) -> float:
        """Denominator of sample i: its sum over its mean."""
        assert self.own is not None
        target = _sample(targets(batch), i)
        total = float(values[i].sum())
        for row in (i, (i + 1) % len(values)):  # a sample without any loss does not show its denominator
            one = output[row : row + 1]
            if row != i:
                total = float(_called(self.values, one, target).double().sum())
            mean = float(_called(self.own, one, target))
            if total != 0 and mean != 0 and math.isfinite(mean):
                return total / mean
            if math.isnan(mean):
                return 0.0  # nothing of it counts
        return float(values.shape[1])


@dataclass(frozen=True)
class SingleSamples:
    """Calls a loss without a reduction on one sample at a time."""

    loss: Callable[..., Any]

    def __call__(self, output: Tensor, target: Any) -> Tensor:
        """Values of shape (n,)."""
        return torch.stack([_called(self.loss, output[i : i + 1], _sample(target, i)) for i in range(len(output))])


@dataclass(frozen=True)
class WholeLoss:
    """Calls a loss on all samples at once, because its value of a set is no mean of values of samples."""

    loss: Callable[..., Any]

    def __call__(self, forward: Callable[[Batch], Any], batches: Sequence[Batch]) -> float:
        """Call it once where the outputs fit into 1 GiB; else average over batches, weighted by their samples."""
        outputs: list[Tensor] = []
        wanted: list[Any] = []
        done: list[tuple[float, int]] = []
        for batch in batches:
            output = main_output(forward(batch))
            if not _fits(outputs, wanted, output, targets(batch)):
                done.append(self._of(outputs, wanted))
                outputs = []
                wanted = []
            outputs.append(output)
            wanted.append(targets(batch))
        done.append(self._of(outputs, wanted))
        return sum(value * n for value, n in done) / sum(n for _, n in done)

    def _of(self, outputs: list[Tensor], wanted: list[Any]) -> tuple[float, int]:
        output = torch.cat(outputs)
        target = torch.cat(wanted) if len(wanted) > 1 else wanted[0]
        return float(_called(self.loss, output, target)), len(output)


def sample_loss(loss: Callable[..., Any], outputs: Any, batches: Sequence[Batch]) -> tuple[SampleLoss | None, str]:
    """Split a loss into values of samples, if these give its value of batches.

    Args:
        loss: ``loss(outputs, targets)``: a module with a ``reduction``, a function that takes one, or any other.
        outputs: Of the dense model for the first batch.
        batches: With targets; those as large as the first are tried with its outputs.

    Returns:
        The loss of samples, or None if it has to be called on the whole set; and the reason in words.

    Raises:
        ValueError: If the loss returns no number.
    """
    name, output = name_of(loss), main_output(outputs)
    tried = [batch for batch in batches if batch_size(batch) == batch_size(batches[0])]
    reduction, reduced = _reduced(loss)
    if reduction is not None:
        own = "mean" if reduction == "none" else reduction
        whole = reduced(own)
        found = SampleLoss(name, reduced("none"), reduced(own), own == "sum")
    else:
        value = _called(loss, output, targets(batches[0]))
        if isinstance(value, Tensor) and value.ndim and len(value) == len(output):
            return SampleLoss(name, loss), "; its values were averaged over each sample"
        if not isinstance(value, Tensor | float | int) or (isinstance(value, Tensor) and value.numel() != 1):
            raise ValueError(
                f"loss {name!r} must return one number, or one value a sample, shape (n, ...), got {describe(value)}; "
                "use autoprune.Metric for anything else"
            )
        whole = loss
        found = SampleLoss(name, SingleSamples(loss))
    try:
        if all(_agrees(found, whole, output, batch) for batch in tried):
            return found, ""
    except Exception as error:  # a user's loss may raise anything for a single sample, and then needs the whole set
        return None, f"; it cannot score single samples ({type(error).__name__}), so the whole set is scored at once"
    return None, "; its value of a batch is no mean of values of samples, so the whole set is scored at once"


def require_classes(loss: Callable[..., Any], outputs: Any, batches: Sequence[Batch]) -> None:
    """Refuse labels that a cross-entropy of PyTorch has no class for: on a GPU these end the process.

    Raises:
        DataError: Names the first one.
    """
    inner = loss.func if isinstance(loss, partial) else loss
    keywords = loss.keywords if isinstance(loss, partial) else {}
    settings = vars(inner) if isinstance(inner, nn.Module) else keywords
    output = main_output(outputs)
    if output.ndim < 2 or not (isinstance(inner, _OF_CLASSES) or inner in (F.cross_entropy, F.nll_loss)):
        return
    labels = [
        label for batch in batches if isinstance(label := targets(batch), Tensor) and not label.is_floating_point()
    ]
    misfit = label_out_of_range(labels, output.shape[1], settings.get("ignore_index", NO_LABEL))
    if misfit:
        raise DataError(
            f"metric={name_of(loss)!r} needs {misfit}; mend them, or name what to leave out as ignore_index"
        )


def label_out_of_range(labels: Sequence[Tensor], classes: int, left_out: int | None) -> str:
    """Describe valid labels and the first invalid one; empty where all are classes."""
    for label in labels:
        bad = label[((label < 0) | (label >= classes)) & (label != left_out if left_out is not None else True)]
        if len(bad):
            return f"labels from 0 to {classes - 1}, the classes of the outputs, got {int(bad[0])}"
    return ""


def name_of(fn: Any) -> str:
    """Name of a loss or a metric in results."""
    inner = fn.func if isinstance(fn, partial) else fn
    return str(getattr(inner, "__name__", type(inner).__name__))


def _reduced(loss: Callable[..., Any]) -> tuple[str | None, Callable[[str], Callable[..., Any]]]:
    """Reduction of a loss, if it has one, and a function that makes the same loss with another."""

    def module(reduction: str) -> Callable[..., Any]:
        copied = copy.deepcopy(loss)
        copied.reduction = reduction  # type: ignore[attr-defined]  # checked below
        return copied

    if isinstance(loss, nn.Module):
        own = getattr(loss, "reduction", None)
        return (own if isinstance(own, str) else None), module
    try:
        parameter = inspect.signature(loss).parameters.get("reduction")
    except (TypeError, ValueError):  # a builtin without a signature
        parameter = None
    own = None if parameter is None or not isinstance(parameter.default, str) else parameter.default
    return own, lambda reduction: partial(loss, reduction=reduction)


def _agrees(found: SampleLoss, whole: Callable[..., Any], output: Tensor, batch: Batch) -> bool:
    """Return whether the values of samples give the loss of a batch."""
    said = float(_called(whole, output, targets(batch)))
    counts, parts = found.parts(output, batch)
    if not parts.any():
        return math.isnan(said)  # nothing of this batch counts
    values = sample_means(found.each(output, batch)).cpu().double()
    total = float((values * counts).sum())
    told = total
    if not found.total:
        told /= float(counts.sum() if found.own is None else parts.sum())
    return math.isclose(told, said, rel_tol=_ROUNDING, abs_tol=1e-6) or (math.isnan(told) and math.isnan(said))


def _called(loss: Callable[..., Any], output: Tensor, target: Any) -> Any:
    if isinstance(loss, nn.Module):
        loss.to(output.device)  # class weights live in the loss
    with torch.no_grad():
        return loss(output, fresh(target))  # which it may write to


def _sample(target: Any, i: int) -> Any:
    return target[i : i + 1] if isinstance(target, Tensor) else slice_batch(target, i, i + 1)


def _fits(outputs: Sequence[Tensor], wanted: Sequence[Any], output: Tensor, target: Any) -> bool:
    if not outputs:
        return True
    if not isinstance(target, Tensor) or target.shape[1:] != wanted[0].shape[1:]:
        return False
    held = sum(each.nbytes for each in outputs) + output.nbytes
    return output.shape[1:] == outputs[0].shape[1:] and held <= _AT_ONCE_BYTES
