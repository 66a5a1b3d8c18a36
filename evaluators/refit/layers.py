"""Layers that a re-fit changes, with the inputs of each in the dense model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.importance.calibration import Calibration
from autoprune.importance.moments import Moments
from autoprune.importance.reading import Reader, matrix_of, watch
from autoprune.structure.slicing.slicing import Edit

DEFAULT_RIDGE = 1e-2
"""Ridge where no sample can be held out."""


@dataclass
class Layer:
    """Weight that reads units, with the moments of its inputs.

    Attributes:
        reader: The weight.
        moments: Of its inputs, with the padding of convolutions and without that of batches; one object for weights
            that read the same values.
        bias: The parameter that is added to its output, or None.
        normalised: Whether batch norm reads its output, and so subtracts any constant.
        ridge: How strongly the fit is held to the inherited weights; infinite where no fit does better on held-out
            samples.
        rows: Number of rows that it reads of all samples, as estimated from a few.
    """

    reader: Reader
    moments: Moments
    bias: str | None = None
    normalised: bool = False
    ridge: float = DEFAULT_RIDGE
    rows: int = 0


def take(calibration: Calibration, layers: Mapping[Reader, Layer]) -> None:
    """Add what the layers read to their moments."""
    firsts = firsts_of(layers)

    def see(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        if reader in firsts:
            for rows in parts():
                layers[reader].moments.add(rows)

    watch(calibration, see)


def firsts_of(layers: Mapping[Reader, Layer]) -> dict[Reader, list[Layer]]:
    """The first reader of each of the moments, with all layers that share them."""
    sharing: dict[int, list[Layer]] = defaultdict(list)
    for layer in layers.values():
        sharing[id(layer.moments)].append(layer)
    return {each[0].reader: each for each in sharing.values()}


def shift_bias(module: nn.Module, model: nn.Module, edit: Edit, reader: Reader, bias: str, mean: Tensor) -> Tensor:
    """Bias that makes up for the mean change of what is multiplied.

    Args:
        module: The network as edited, with the new weight.
        model: The dense one.
        edit: The edit.
        reader: The weight.
        bias: Name of its bias.
        mean: Of its inputs in the dense model, float64, shape (columns,).

    Returns:
        A new value of the bias.
    """
    dense = model.get_parameter(reader.name).detach()
    whole = matrix_of(dense, reader)
    left = edit.slices.get(reader.name, {}).get(1 - reader.dim, np.arange(dense.shape[1 - reader.dim]))
    places = np.flatnonzero((left >= reader.start) & (left < reader.start + reader.outputs))
    rows = torch.from_numpy(left[places] - reader.start).to(dense.device)
    into = torch.from_numpy(places).to(dense.device)
    value = module.get_parameter(reader.name).detach()
    matrix = value.flatten(1) if reader.dim else value.T
    kept = columns_kept(reader, model, edit)
    lost = whole[rows].double() @ mean - matrix[into].double() @ (mean if kept is None else mean[kept])
    shifted = module.get_parameter(bias).detach().clone()
    shifted[into] = (shifted[into].double() + lost).to(shifted.dtype)
    return shifted


def columns_kept(reader: Reader, model: nn.Module, edit: Edit) -> Tensor | None:
    """Columns that stay, int64, shape (k,); None where all do."""
    slices = edit.slices.get(reader.name, {})
    if reader.dim not in slices:
        return None
    parameter = model.get_parameter(reader.name)
    columns = np.arange(reader.columns).reshape(parameter.shape[reader.dim], -1)[slices[reader.dim]].ravel()
    return torch.from_numpy(columns).to(parameter.device)
