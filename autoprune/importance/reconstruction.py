"""Reconstruction error: the part of the next layers' outputs that removed units contribute, on the dense model."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.data.batch import beginning
from autoprune.importance.calibration import Calibration, private_copy
from autoprune.importance.criteria import input_dim, readers
from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.structure import Structure

SAMPLES = 32
MOST_VALUES = 2**24
"""Most values of one layer's output that are used of a batch, 64 MiB: a language model's logits are far more."""

Removal = tuple[str, Sequence[IntArray]]
"""A group, and the units of it that each option removes."""


def reconstruction_errors(calibration: Calibration, removals: Sequence[Removal]) -> list[FloatArray | None]:
    """Compute the squared error of the layers that read a group, relative to their energy, summed over the layers.

    Exact, with all cross terms between units: the units that an option removes in addition to the one before pass
    through the layer alone and are added up, so all options of a growing removal cost one forward pass together. Biases
    are left out on both sides. It covers ungrouped convolutions and linear layers that the model calls.

    Args:
        calibration: The first `SAMPLES` samples of it are used.
        removals: Groups with the units that each option removes.

    Returns:
        For each removal the error of each option, shape (options,), finite, at least 0, not always monotone, because
        units may cancel each other; None where no layer reads the group.
    """
    copied = private_copy(calibration.model)
    axes, read = readers(copied, calibration.structure), reads(copied, calibration.structure)
    energies: dict[str, float] = defaultdict(float)
    errors: dict[tuple[str, int], FloatArray] = {}

    def watch(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = next(iter((*args, *kwargs.values())))
            if x.ndim < module.get_parameter("weight").ndim or not len(x):
                return  # without a dimension of samples
            x = x[: max(1, MOST_VALUES // _part(module)(x[:1]).numel())]
            energies[layer] += _energy(_part(module)(x))
            for i, (group, options) in enumerate(removals):
                if group in read[layer]:
                    inputs = [read[layer][group][units].reshape(-1) for units in options]
                    errors[layer, i] = errors.get((layer, i), 0.0) + _errors(module, x, axes[layer], inputs)

        return hook

    handles = [copied.get_submodule(n).register_forward_pre_hook(watch(n), with_kwargs=True) for n in read]
    with torch.no_grad():
        for batch in beginning(calibration.batches, SAMPLES):
            calibration.forward(copied, batch)
    for handle in handles:
        handle.remove()
    found: list[FloatArray | None] = [None] * len(removals)
    for (layer, i), error in errors.items():
        if 0 < energies[layer] < np.inf and np.isfinite(error).all():
            relative = error / energies[layer]
            known = found[i]
            found[i] = relative if known is None else known + relative
    return found


def reads(model: nn.Module, structure: Structure) -> dict[str, dict[str, IntArray]]:
    """Find the inputs that every unit owns, shape (units, members), for each layer and each group that it reads.

    It covers ungrouped convolutions, transposed ones too, and linear layers.
    """
    found: dict[str, dict[str, IntArray]] = defaultdict(dict)
    layers = readers(model, structure)
    for group in structure.groups:
        for slot in group.slots:
            name, _, key = slot.tensor.rpartition(".")
            if name in layers and key == "weight":
                module = model.get_submodule(name)
                ours = type(module).__module__.startswith("torch.nn.modules.")  # a subclass may compute something else
                if ours and slot.dim == input_dim(module):
                    found[name][group.name] = slot.indices
    return dict(found)


def _errors(module: nn.Module, x: Tensor, axis: int, options: Sequence[IntArray]) -> FloatArray:
    """Energy of the contribution of each option's inputs to the output of a layer, shape (options,)."""
    total = torch.zeros((), device=x.device)
    seen = np.zeros(0, dtype=np.int64)
    energies = []
    for inputs in options:
        if not np.isin(seen, inputs).all():
            total = torch.zeros((), device=x.device)
            seen = seen[:0]
        new = torch.from_numpy(np.setdiff1d(inputs, seen)).to(x.device)
        if len(new):
            total = total + _part(module, new)(x.index_select(axis, new))
        energies.append(_energy(total))
        seen = inputs
    return np.array(energies)


def _part(module: nn.Module, inputs: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Make the forward of a layer without its bias and hooks, for some of its inputs only."""
    part = copy.copy(module)
    weight = module.get_parameter("weight")
    dim = input_dim(module)
    assert dim is not None
    part.__dict__["_parameters"] = {
        "weight": weight if inputs is None else weight.index_select(dim, inputs),
        "bias": None,
    }
    return part.forward


def _energy(output: Tensor) -> float:
    return float(torch.linalg.vector_norm(output.float()).double().square())
