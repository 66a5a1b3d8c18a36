"""Per-sample scores: each function turns (outputs, batch, dense outputs) into (signal, metric), shape (n,) both.

The signal steers the search, lower is better; the metric is for users, in its own direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.arguments import shown
from autoprune.data.batch import Batch, batch_size, fresh, targets, tensors, token_ids
from autoprune.errors import DataError
from autoprune.pareto import Direction

NO_LABEL = -100  # torch's default ignore_index
VOID = 255  # value of unlabelled positions in segmentation data
LEAST_CHANCE = 1e-8  # what counts as a probability of zero, whose logarithm is infinite
MANY = 8  # outputs between 0 and 1 that are as many, or more, are taken for probabilities whatever their sum is
_AT_ONCE = 2**22  # logits whose chances are summed up at a time: in double precision they take more than the logits
_SUM = 1e-2  # largest error of a sum of probabilities in half precision
_LENGTH = 5e-3  # the same of a length

Kind = Literal["logits", "shares", "chances"]
"""Meaning of outputs: logits, probabilities that sum to 1, or one of each class alone, as sigmoids give."""

Distance: TypeAlias = Callable[[Any, Any], Tensor]
"""Distance of (outputs, dense outputs), one value a sample, shape (n,); 0 where they agree."""


def main_output(outputs: Any) -> Tensor:
    """Find the tensor that metrics use: ``"logits"`` where outputs have it, else the first tensor.

    Raises:
        DataError: If there is no tensor.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if isinstance(logits, Tensor):
        return logits
    for tensor in tensors(outputs):
        return tensor
    raise DataError(
        f"the model must return a tensor, or a tuple, list or dict that holds one, got {describe(outputs)}; "
        "give autoprune.Call(forward=...), a function (model, batch) that returns the tensor to judge"
    )


def accuracy(chances: bool, outputs: Any, batch: Batch, dense: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and whether the top class is the label; `chances` says whether outputs are probabilities."""
    output = _main(outputs)
    labels = targets(batch).long()
    return F.cross_entropy(logits_of(output, chances), labels, reduction="none"), output.argmax(1) == labels


def cross_entropy(
    classes: int, chances: bool, outputs: Any, batch: Batch, dense: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy averaged over the labelled positions of a sample, in nats, twice.

    `classes` is their dimension; `chances` says whether outputs are probabilities.
    """
    logits = logits_of(_main(outputs).movedim(classes, 1), chances)
    labels = known_labels(targets(batch), logits.shape[1])
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=NO_LABEL).reshape(len(labels), -1)
    loss = losses.sum(1) / (labels != NO_LABEL).reshape(len(labels), -1).sum(1).clamp(min=1)
    return loss, loss


def labelled_positions(classes: int, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Number of labelled positions of each sample, shape (n,), twice: the denominators of `cross_entropy`."""
    labels = known_labels(targets(batch), main_output(outputs).shape[classes])
    count = (labels != NO_LABEL).reshape(len(labels), -1).sum(1).double()
    return count, count


def known_labels(labels: Tensor, classes: int) -> Tensor:
    """Labels as int64, with `NO_LABEL` where the labels of positions are 255, unless that is a class."""
    labels = labels.long()
    return labels.masked_fill(labels == VOID, NO_LABEL) if labels.ndim > 1 and classes <= VOID else labels


def mse(outputs: Any, batch: Batch, dense: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared error averaged over the outputs of a sample, twice."""
    target = targets(batch)
    error = sample_means((align(_main(outputs), target) - target).square())
    return error, error


def agreement(kind: Kind, outputs: Any, batch: Batch, dense: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(dense || pruned) in nats, and whether both have the same top class; `kind` as in `divergence`."""
    return divergence(1, kind, outputs, dense), _main(outputs).argmax(1) == _main(dense).argmax(1)


def relative_error(scale: float, outputs: Any, batch: Batch, dense: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared difference to the dense outputs, averaged over the outputs of a sample and divided by `scale`, twice."""
    error = squared_difference(scale, outputs, dense)
    return error, error


def cosine(outputs: Any, batch: Batch, dense: Tensor | None) -> tuple[Tensor, Tensor]:
    """One minus the cosine to the dense outputs, and that cosine.

    For outputs (n, positions, features) it is the mean over the positions that are no padding; for others, the cosine
    of all outputs of a sample.
    """
    ours, theirs = _main(outputs), _main(dense)
    if ours.ndim == 3:
        similar = F.cosine_similarity(ours, theirs, dim=2)
        kept = unpadded(batch, ours)
        similar = (similar * kept).sum(1) / kept.sum(1).clamp(min=1)
    else:
        similar = F.cosine_similarity(ours.reshape(len(ours), -1), theirs.reshape(len(ours), -1), dim=1)
    return 1 - similar, similar


def unpadded(batch: Batch, outputs: Tensor) -> Tensor:
    """Mask of the positions (n, positions) of outputs that are no padding by ``attention_mask``; all without it."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == outputs.shape[:2]:
        return mask.to(outputs.device) != 0
    return torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device)


def divergence(classes: int, kind: Kind, outputs: Any, dense: Any) -> Tensor:
    """KL(dense || pruned) in nats along the dimension `classes`, averaged over positions, shape (n,).

    `kind` is that of the dense outputs, the same for all batches. Classes that do not exclude each other have one
    divergence each, between two outcomes; their sum counts, which sees a change of all of them by the same factor.
    """
    ours, theirs = _main(outputs), _main(dense)
    if kind == "chances":
        sides = [_log(theirs) - _log(ours), _log(1 - theirs) - _log(1 - ours)]
        return sample_means((theirs * sides[0] + (1 - theirs) * sides[1]).sum(classes))
    logits, reference = (logits_of(each, kind == "shares").log_softmax(classes) for each in (ours, theirs))
    return sample_means(F.kl_div(logits, reference, reduction="none", log_target=True).sum(classes))


def are_chances(output: Tensor, classes: int) -> bool:
    """Return whether outputs of the dense model are probabilities, as a softmax or sigmoids give."""
    return kind_of(output, classes) != "logits"


def kind_of(output: Tensor, classes: int) -> Kind:
    """Find out what outputs of the dense model are.

    They are probabilities if all lie between 0 and 1, and along the dimension `classes` they sum to 1, or there are
    many of them.
    """
    found: Kind = "logits"
    for part in (output[:1], output):  # mostly, one sample tells
        if not len(part) or (found := _kind_of(part, classes)) == "logits":
            break
    return found


def _kind_of(output: Tensor, classes: int) -> Kind:
    output = output.detach()
    if not bool(((output >= 0) & (output <= 1)).all()):
        return "logits"
    if bool(((output.float().sum(classes) - 1).abs() <= _SUM).all()):
        return "shares"
    return "chances" if output.shape[classes] >= MANY else "logits"


def are_directions(output: Tensor) -> bool:
    """Return whether outputs (n, features) all have a length of 1, as embeddings often do, and are no probabilities."""
    if output.ndim != 2 or not len(output) or output.shape[1] < 2:
        return False
    rows = output.detach().float()
    unit = bool(((rows.norm(dim=1) - 1).abs() <= _LENGTH).all())
    return unit and not bool(((rows.sum(1) - 1).abs() <= _SUM).all())


def logits_of(output: Tensor, chances: bool) -> Tensor:
    """Return logits: the logarithms of outputs that are probabilities, others as they are."""
    return _log(output) if chances else output


def _log(chances: Tensor) -> Tensor:
    chances = chances.to(torch.promote_types(chances.dtype, torch.float32))  # half precision has no number as small
    return chances.clamp(min=LEAST_CHANCE).log()


def squared_difference(scale: float, outputs: Any, dense: Any) -> Tensor:
    """Squared difference, averaged over the outputs of a sample and divided by `scale`, shape (n,)."""
    return sample_means((_main(outputs) - _main(dense)).square()) / scale


def distance_of(outputs: Any, batch: Batch) -> Distance | None:
    """Choose the distance to dense outputs like these; None where no output has a row for each sample.

    It is the KL divergence where the outputs are logits or probabilities: the labels are classes of the samples or of
    each position (dimension 1 holds the classes, or the last one, as in language models), or there are none and the
    outputs have two dimensions and are no vectors of length 1, or are the ``"logits"`` of each position, shape (n,
    positions, classes), or are of this shape for token ids of shape (n, positions) that are all below the number of
    classes. Else it is the squared difference relative to the mean square of the outputs, on one scale for all samples:
    one whose outputs are near zero must not outweigh the others.
    """
    if next(tensors(outputs), None) is None:
        return None
    output = main_output(outputs)
    if output.ndim == 0 or len(output) != batch_size(batch) or not output.is_floating_point():
        return None
    classes = class_dimension(outputs, batch)
    if classes is not None:
        return partial(divergence, classes, kind_of(output, classes))
    return partial(squared_difference, float(output.float().square().mean()) or 1.0)


def sampled_loss(outputs: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
    """Loss whose gradients have the curvature of the distance to the dense outputs, and the number of draws in it.

    If the outputs are logits, it is the cross-entropy of a label drawn from them for every sample or position; else
    their product with normal noise, of variance 2 over the sum of squares of the whole batch's mean sample.

    Args:
        outputs: Outputs of the dense model, with gradients.
        batch: Distinguishes logits from other outputs, see `distance_of`; labels are not used.
        generator: On the CPU.
    """
    output = _main(outputs)
    classes = class_dimension(outputs, batch)
    if classes is None:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return (noise_scale(output) * noise * output).sum(), len(output)
    return drawn_cross_entropy(output, classes, generator)


def noise_scale(output: Tensor) -> float:
    """Standard deviation of the noise that stands for draws around outputs that are no logits."""
    return float((2 / max(float(output.detach().square().sum()) / len(output), 1e-30)) ** 0.5)


def drawn_cross_entropy(output: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Cross-entropy of labels drawn from the outputs at every position, summed, and the number of positions.

    One label each along `classes`; where these do not exclude each other, yes or no for every class.
    """
    kind = kind_of(output, classes)
    rows = output.movedim(classes, -1).flatten(0, -2)
    if kind == "chances":
        yes = torch.rand(rows.shape, dtype=torch.float64, generator=generator).to(rows.device) < rows.detach()
        return -_log(torch.where(yes, rows, 1 - rows)).sum(), len(rows)
    logits = logits_of(rows, kind == "shares").log_softmax(-1)
    lots = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator).to(logits.device)
    few = max(1, _AT_ONCE // logits.shape[1])
    parts = zip(torch.split(logits.detach(), few), torch.split(lots, few), strict=True)
    return -logits.gather(1, torch.cat([_drawn(part, lot) for part, lot in parts])).sum(), len(logits)


def _drawn(logits: Tensor, lots: Tensor) -> Tensor:
    """Classes drawn by numbers in [0, 1), shape (n, 1); `multinomial` draws a number for each class."""
    chances = logits.exp().double().cumsum(-1)
    return torch.searchsorted(chances, lots * chances[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)


def class_dimension(outputs: Any, batch: Batch) -> int | None:
    """Dimension of the main output that holds the classes, 1 or -1; None if it does not count as logits.

    Where labels fit both ways, it is the last one if there is a token for each label.
    """
    output, label = main_output(outputs), targets(batch)
    ids = token_ids(batch)
    of_tokens = ids is not None and isinstance(label, Tensor) and label.shape == ids.shape
    for dim in (-1, 1) if of_tokens else (1, -1):
        if output.ndim < 2 or output.shape[dim] < 2:
            continue
        positions = [size for i, size in enumerate(output.shape) if i != dim % output.ndim]
        if isinstance(label, Tensor):
            logits = not label.is_floating_point() and list(label.shape) == positions
        elif dim == -1 and output.ndim == 3:
            logits = isinstance(outputs, Mapping) or _are_of_tokens(output, batch)
        else:
            logits = output.ndim == 2 and not are_directions(output)
        if logits:
            return dim
    return None


def _are_of_tokens(output: Tensor, batch: Batch) -> bool:
    """Return whether outputs have a value for each word of a vocabulary at every token of the batch."""
    ids = token_ids(batch)
    return ids is not None and output.shape[:2] == ids.shape and 0 <= int(ids.min()) <= int(ids.max()) < output.shape[2]


def user_metric(
    name: str,
    fn: Callable[..., Any],
    direction: Direction,
    asks_dense: bool,
    outputs: Any,
    batch: Batch,
    dense: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute a user's values, turned to lower-is-better and as they are."""
    values = fn(outputs, fresh(batch), fresh(dense)) if asks_dense else fn(outputs, fresh(batch))
    if not isinstance(values, Tensor) or values.is_complex() or values.shape != (batch_size(batch),):
        raise ValueError(
            f"metric {name!r} must return a tensor of shape ({batch_size(batch)},), one value a sample, got "
            f"{describe(values)}; or score the whole set with per_sample=False"
        )
    values = values.cpu().double()
    return direction.key(values), values


def align(output: Tensor, target: Tensor) -> Tensor:
    """Drop or add a last dimension of one if that is the only difference between outputs and targets."""
    if output.ndim == target.ndim + 1 and output.shape[-1] == 1:
        return output.squeeze(-1)
    return output.unsqueeze(-1) if output.ndim == target.ndim - 1 else output


def describe(value: Any) -> str:
    """Describe a value for a message: dtype and shape of a tensor, never its contents."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)


def _main(outputs: Any) -> Tensor:
    """Return the main output in at least single precision."""
    output = main_output(outputs)
    return output.to(torch.promote_types(output.dtype, torch.float32))


def sample_means(values: Tensor) -> Tensor:
    """Average over all but the first dimension, shape (n,)."""
    return values.reshape(len(values), -1).mean(1)
