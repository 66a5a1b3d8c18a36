"""Rank the units of a group by importance.

A criterion gets every parameter slice that is removed with a unit, and returns one score a unit, higher more important.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autoprune.arguments import naming, shown
from autoprune.data.batch import targets, to_device
from autoprune.importance.calibration import Calibration, private_copy
from autoprune.importance.database.build import layer_database
from autoprune.importance.gradients import distortion_gradients, loss_gradients
from autoprune.protocols import IntArray
from autoprune.structure.structure import Structure
from autoprune.structure.units import Group

if TYPE_CHECKING:
    from autoprune.importance.unit_products import UnitProducts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupTensors:
    """Input of a criterion: everything that is removed with each unit of a group.

    Attributes:
        name: The group.
        weights: Parameter slices, float, each of shape (units, elements).
        gradients: Gradients of the same slices, or empty if the criterion did not ask for them.
        scales: Slices of normalisation weights only, each of shape (units, elements).
        activations: Statistics of the units in the inputs of each layer that reads them, or empty if not asked for.
        generator: For criteria that draw.
        ranks: Place of each unit in the order in which a layer database removes them, shape (units,), alone; or empty.
    """

    name: str
    weights: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    activations: tuple[Activation, ...]
    generator: torch.Generator
    ranks: tuple[Tensor, ...] = ()

    @property
    def units(self) -> int:
        """Number of units."""
        return self.weights[0].shape[0]


@dataclass(frozen=True)
class Activation:
    """Statistics of units in the inputs of one layer that reads them, over samples and positions.

    Attributes:
        mean_magnitude: Mean absolute value, shape (units, members).
        variance: Variance, shape (units, members).
        column_norm: Squared norm of the layer's weights on each input, shape (units, members).
        mean_square: Mean square, shape (units, members).
    """

    mean_magnitude: Tensor
    variance: Tensor
    column_norm: Tensor
    mean_square: Tensor


Criterion = Callable[[GroupTensors], Tensor]
"""Importance of each unit, shape (units,); higher is kept longer."""


def l1(group: GroupTensors) -> Tensor:
    """Sum of absolute weights.

    Reference:
        Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710; here over all coupled slices.
    """
    return torch.stack([weight.abs().sum(1) for weight in group.weights]).sum(0)


def l2(group: GroupTensors) -> Tensor:
    """Euclidean norm of all coupled weights.

    Reference:
        Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv:2301.12900.
    """
    return torch.stack([weight.square().sum(1) for weight in group.weights]).sum(0).sqrt()


def bn_scale(group: GroupTensors) -> Tensor:
    """Sum of absolute normalisation scales.

    Reference:
        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, arXiv:1708.06519.
    """
    return torch.stack([scale.abs().sum(1) for scale in group.scales]).sum(0)


def taylor(group: GroupTensors) -> Tensor:
    """First-order estimate of the squared change of the loss, summed over the weights of a unit.

    Without labels, it is the change of the distortion, whose own gradient is zero: its curvature is the expected square
    of gradients towards outputs drawn from the model's distribution, see
    `autoprune.importance.gradients.distortion_gradients`.

    Reference:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv:1906.10771. Without
        labels: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, arXiv:1801.05787.
    """
    pairs = zip(group.weights, group.gradients, strict=True)
    return torch.stack([(weight * gradient).square().sum(1) for weight, gradient in pairs]).sum(0)


def activation_mean(group: GroupTensors) -> Tensor:
    """Mean magnitude of the activations that the next layers read.

    Reference:
        Hu et al., "Network Trimming", 2016, arXiv:1607.03250, which counts zeros where this averages magnitudes.
    """
    return torch.stack([a.mean_magnitude.sum(1) for a in group.activations]).sum(0)


def fluctuation(group: GroupTensors) -> Tensor:
    """Variance of the activations that the next layers read, weighted by the squared norm of their weights.

    A constant activation can be folded into a bias, so its removal costs little.

    Reference:
        An et al., "Fluctuation-based Adaptive Structured Pruning", AAAI 2024, arXiv:2312.11983.
    """
    return torch.stack([(a.variance * a.column_norm).sum(1) for a in group.activations]).sum(0)


def contribution(group: GroupTensors) -> Tensor:
    """Mean square of the activations that the next layers read, weighted by the squared norm of their weights.

    It is the change of the outputs of these layers without the unit, apart from cancellation by others. It suits layers
    without a bias or batch norm after them, as in most language models, where the mean cannot be corrected.

    Reference:
        Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), ICLR 2024,
        arXiv:2306.11695, for single weights; here summed over all weights that read a unit, in squares.
    """
    return torch.stack([(a.mean_square * a.column_norm).sum(1) for a in group.activations]).sum(0)


def obs(group: GroupTensors) -> Tensor:
    """Order of removal in a layer database: each step removes the unit that costs least after a re-fit of the others.

    Reference:
        Optimal brain surgeon over all layers that read a unit, weighted by the curvature of the loss, see
        `autoprune.importance.database.downdates.remove_greedily`.
    """
    return group.ranks[0]


def random(group: GroupTensors) -> Tensor:
    """Random order: the baseline that every criterion must beat."""
    return torch.rand(group.units, generator=group.generator)


CRITERIA: dict[str, Criterion] = {
    function.__name__: function
    for function in (l1, l2, bn_scale, taylor, activation_mean, fluctuation, contribution, obs, random)
}
_READS = {
    "bn_scale": "scales",
    "taylor": "gradients",
    "activation_mean": "activations",
    "fluctuation": "activations",
    "contribution": "activations",
    "obs": "ranks",
}


def rank_units(calibration: Calibration, criterion: str | Criterion, seed: int = 0) -> dict[str, tuple[int, ...]]:
    """Order the units of every group by falling importance; arguments and errors are those of `score_units`."""
    return order_units(score_units(calibration, criterion, seed))


def order_units(scores: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Units of every group by falling score; ties go to the earlier unit."""
    return {name: tuple(torch.argsort(each, descending=True, stable=True).tolist()) for name, each in scores.items()}


def score_units(calibration: Calibration, criterion: str | Criterion, seed: int = 0) -> dict[str, Tensor]:
    """Score the units of every group by one criterion; see `score_units_by`."""
    return score_units_by(calibration, [criterion], seed)[0]


def score_units_by(
    calibration: Calibration,
    criteria: Sequence[str | Criterion],
    seed: int = 0,
    level: int = logging.WARNING,
    observing: Callable[[Calibration], UnitProducts] | None = None,
) -> list[dict[str, Tensor]]:
    """Score the units of every group by each criterion, shape (units,) each, higher more important.

    Criteria with the same inputs share a pass over the batches.

    Args:
        calibration: Its batches are for criteria that use activations or gradients.
        criteria: Names in `CRITERIA`, or callables, which get everything; gradients only where there are labels.
        seed: For criteria that draw.
        level: Level of the log line that names groups without the inputs of a criterion, where l2 is used.
        observing: Makes an observer of the pass for gradients, if activations are read and there are no labels.

    Raises:
        ValueError: If the name is unknown, or a callable returns the wrong shape or NaN.
    """
    for criterion in criteria:
        if isinstance(criterion, str) and criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {sorted(CRITERIA)} or a callable, got {shown(criterion)}")
    reads = {_READS.get(each, "") if isinstance(each, str) else "everything" for each in criteria}
    labelled = all(isinstance(targets(batch), Tensor) for batch in calibration.batches)
    slopes = "gradients" in reads or ("everything" in reads and labelled)
    watched = not reads.isdisjoint(("activations", "everything"))
    gradients: Mapping[str, Tensor] = {}
    activations: Mapping[str, Sequence[Activation]] = {}
    if slopes and watched and not any(isinstance(targets(batch), Tensor) for batch in calibration.batches):
        device = next(calibration.model.parameters()).device
        placed = [to_device(batch, device) for batch in calibration.batches]
        copied = calibration.of(private_copy(calibration.model)).on(placed)
        products = None if observing is None else observing(copied)
        watching = nullcontext() if products is None else products.observing()
        with _observed(copied) as sums, watching:  # the pass for gradients shows activations, too
            gradients = distortion_gradients(copied, seed, products)
        activations = _activations(copied, sums)
    else:
        gradients = loss_gradients(calibration, seed) if slopes else {}
        activations = activation_statistics(calibration) if watched else {}
    tables = layer_database(calibration).tables if "ranks" in reads else {}
    ranks = {name: table.ranks for name, table in tables.items()}
    generators = [torch.Generator().manual_seed(seed) for _ in criteria]
    scores: list[dict[str, Tensor]] = [{} for _ in criteria]
    blind: list[list[str]] = [[] for _ in criteria]
    modules, parameters = dict(calibration.model.named_modules()), dict(calibration.model.named_parameters())
    for group in calibration.structure.groups:
        tensors = _tensors(parameters, modules, group, gradients, activations.get(group.name, ()), generators[0])
        if group.name in ranks:
            tensors = replace(tensors, ranks=(ranks[group.name],))
        for i, criterion in enumerate(criteria):
            lacking = _lacks(criterion, tensors)
            if lacking:
                blind[i].append(group.name)
            scores[i][group.name] = _scored("l2" if lacking else criterion, replace(tensors, generator=generators[i]))
    for criterion, names in zip(criteria, blind, strict=True):
        if names:
            some = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            said = f"{_READS[str(criterion)]} of {some} ({len(names)} of {len(scores[0])} groups)"
            log.log(level, "criterion %r finds no %s; their units are ranked by l2", criterion, said)
    return scores


def _lacks(criterion: str | Criterion, tensors: GroupTensors) -> bool:
    """Return whether a group has nothing of what a criterion reads."""
    reads = _READS.get(criterion) if isinstance(criterion, str) else None
    return reads is not None and not getattr(tensors, reads)


def _scored(criterion: str | Criterion, group: GroupTensors) -> Tensor:
    """Score the units of a group, and check what comes back."""
    score = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    with naming(f"criterion must score group {group.name!r}"):
        values = score(group)
    if not isinstance(values, Tensor):
        raise TypeError(f"criterion must return a tensor of {group.units} scores, got {shown(values)}")
    if values.is_complex() or values.shape != (group.units,) or not torch.isfinite(values).all():
        raise ValueError(
            f"criterion must return {group.units} finite scores for group {group.name!r}, "
            f"got shape {tuple(values.shape)}{'' if torch.isfinite(values).all() else ' with NaN or infinity'}"
        )
    return values


def _tensors(
    parameters: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    group: Group,
    gradients: Mapping[str, Tensor],
    activations: Sequence[Activation],
    generator: torch.Generator,
) -> GroupTensors:
    weights = []
    slopes = []
    scales = []
    for slot in group.slots:
        if slot.tensor not in parameters:
            continue
        weight = _slice(parameters[slot.tensor].detach(), slot.dim, slot.indices)
        weights.append(weight)
        if gradients:
            slopes.append(_slice(gradients[slot.tensor], slot.dim, slot.indices))
        owner, _, key = slot.tensor.rpartition(".")
        if key == "weight" and isinstance(modules[owner], _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            scales.append(weight)
    return GroupTensors(group.name, tuple(weights), tuple(slopes), tuple(scales), tuple(activations), generator)


def _slice(tensor: Tensor, dim: int, indices: IntArray) -> Tensor:
    """Rows of a tensor along `dim`, gathered for each unit: shape (units, elements), float32 on the CPU."""
    rows = tensor.float().movedim(dim, 0).flatten(1) if tensor.ndim > 1 else tensor.float().unsqueeze(1)
    picked = rows.index_select(0, torch.from_numpy(indices.reshape(-1)).to(tensor.device))
    return picked.reshape(indices.shape[0], -1).cpu()


def activation_statistics(calibration: Calibration) -> dict[str, list[Activation]]:
    """Collect statistics of the inputs of every ungrouped convolution and linear layer that reads a group."""
    copied = calibration.of(private_copy(calibration.model))
    device = next(calibration.model.parameters()).device
    with _observed(copied) as sums, torch.no_grad():
        for batch in calibration.batches:
            calibration.forward(copied.model, to_device(batch, device))
    return _activations(copied, sums)


@contextmanager
def _observed(calibration: Calibration) -> Iterator[dict[str, list[Tensor]]]:
    """Add up moments of what layers read while the model runs; shape (channels,) each, and the number of values."""
    model = calibration.model
    sums: dict[str, list[Tensor]] = {}

    def watch(name: str, axis: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter((*args, *kwargs.values())))  # some models pass inputs by name
            wide = x.detach().double()
            others = [dim for dim in range(x.ndim) if dim != axis % x.ndim]
            if not others:  # else `sum` takes no dimensions for all of them
                wide, others = wide[None], [0]
            count = torch.tensor(float(x.numel() // max(x.shape[axis], 1)))
            new = [wide.abs().sum(others), wide.sum(others), wide.square().sum(others), count]
            old = sums.get(name)
            sums[name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

        return hook

    watched = readers(model, calibration.structure)
    handles = [
        model.get_submodule(n).register_forward_pre_hook(watch(n, axis), with_kwargs=True)
        for n, axis in watched.items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _activations(calibration: Calibration, sums: Mapping[str, list[Tensor]]) -> dict[str, list[Activation]]:
    """Statistics of the units of each group in each layer that reads it, from what was added up."""
    out: dict[str, list[Activation]] = {}
    model = calibration.model
    for group in calibration.structure.groups:
        for slot in group.slots:
            name, _, key = slot.tensor.rpartition(".")
            if key == "weight" and name in sums and slot.dim == input_dim(model.get_submodule(name)):
                weight = model.get_submodule(name).get_parameter("weight")
                out.setdefault(group.name, []).append(_activation(sums[name], weight, slot.dim, slot.indices))
    return out


def _activation(sums: list[Tensor], weight: Tensor, dim: int, indices: IntArray) -> Activation:
    magnitude, total, square, count = (part.cpu() for part in sums)
    mean = total / count
    index = torch.from_numpy(indices)
    norm = weight.detach().double().movedim(dim, 0).flatten(1).square().sum(1).cpu()
    return Activation(
        (magnitude / count)[index], (square / count - mean.square())[index], norm[index], (square / count)[index]
    )


def readers(model: nn.Module, structure: Structure) -> dict[str, int]:
    """Find the layers whose inputs are units: name, and the axis of their input that holds the channels."""
    found = {}
    for name, module in model.named_modules():
        if f"{name}.weight" in structure.units_of and input_dim(module) is not None:
            found[name] = -1 if isinstance(module, nn.Linear) else 1
    return found


def input_dim(module: nn.Module) -> int | None:
    """Dimension of the weight that meets the input, for ungrouped convolutions and linear layers; None for others."""
    if isinstance(module, nn.Linear):
        return 1
    if isinstance(module, _ConvNd) and module.groups == 1:
        return 0 if isinstance(module, _ConvTransposeNd) else 1
    return None
