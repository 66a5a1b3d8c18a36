"""Shared tensors of the networks of a front: the dense tensors that they are cut from are stored once.

A pruned network holds many tensors of the dense model, whole or cut by its recipe: all but the re-fitted ones. A folder
of such networks holds these dense tensors in one file, and each network leaves out the tensors that its recipe cuts
from them. Loading is exact, because only tensors that are equal to the last bit are left out.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.files.tensor_file import HASH, content_hash, read_tensors, require_whole, write_tensors

FORMAT = "autoprune-dense"
FILES = "dense-*.safetensors"
"""Names of the files of dense tensors in a folder."""

Slices = Mapping[str, Mapping[str, list[int]]]
"""Indices that stay along each dimension, of each tensor, as a recipe holds them."""


class SharedTensors:
    """Finds tensors that need not be written for each network, and collects the dense tensors to write.

    Args:
        dense: The model that was pruned.
        slices: Slices of every network to be written. A dense tensor is stored if it takes less space than all tensors
            that are cut from it.
    """

    def __init__(self, dense: nn.Module, slices: Iterable[Slices]) -> None:
        self._state = dense.state_dict()
        self._first = first_names(dense)
        cut: Counter[str] = Counter()
        for own in slices:
            cut.update({name: _elements(tensor, own.get(name, {})) for name, tensor in self._state.items()})
        self._worthwhile = {name for name, tensor in self._state.items() if cut[name] > tensor.numel()}
        self.needed: dict[str, Tensor] = {}
        self.file_name = f"dense-{secrets.token_hex(4)}.safetensors"  # of no earlier save, which may be in the folder

    def write(self, folder: Path) -> None:
        """Write the dense tensors that networks in the folder refer to, if there are any."""
        if self.needed:
            metadata = {"format": FORMAT, HASH: content_hash(self.needed, FORMAT)}
            write_tensors(folder / self.file_name, self.needed, metadata)

    def leave_out(self, state: Mapping[str, Tensor], slices: Slices) -> dict[str, str]:
        """Map each tensor of a network that its slices cut from the dense model unchanged to the dense tensor.

        Args:
            state: The network's state dictionary.
            slices: Its recipe's.
        """
        found = {}
        for name, tensor in state.items():
            first = self._first.get(name, "")
            if first not in self._worthwhile:
                continue
            if _same_bits(tensor, cut_from(self._state[first], slices.get(first, {}))):
                found[name] = first
                self.needed[first] = self._state[first]
        return found


def first_names(model: nn.Module) -> dict[str, str]:
    """Map each name in the state dictionary to the first name of the same tensor, which differs for tied ones."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def cut_from(dense: Tensor, dims: Mapping[str, list[int]]) -> Tensor:
    """Cut a dense tensor to the indices that stay along each dimension that shrinks."""
    for dim, index in dims.items():
        dense = dense.index_select(int(dim), torch.from_numpy(np.asarray(index, dtype=np.int64)).to(dense.device))
    return dense


def restored(
    folder: Path, source: str, left_out: Mapping[str, str], slices: Slices, most_bytes: int
) -> dict[str, Tensor]:
    """Restore the tensors that a network left out, from the dense tensors in the file `source` of its folder.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is damaged.
        ValueError: If it lies elsewhere, or holds other tensors.
    """
    if Path(source).name != source:
        raise ValueError(f"dense tensors are in {source!r:.60}, which is no file of its folder")
    expected = "the networks of a saved front need the dense tensors of the same result; copy its folder as a whole:"
    metadata, tensors = read_tensors(folder / source, expected, most_bytes)
    require_whole(metadata, FORMAT, tensors)
    if missing := sorted(set(left_out.values()) - tensors.keys()):
        raise ValueError(f"{source} lacks {missing[0]!r:.60}")
    return {name: cut_from(tensors[first], slices.get(first, {})) for name, first in left_out.items()}


def _elements(tensor: Tensor, dims: Mapping[str, Any]) -> int:
    shape = list(tensor.shape)
    for dim, index in dims.items():
        shape[int(dim)] = len(index)
    return int(np.prod(shape, dtype=np.int64))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are equal down to the sign of zeros."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    raw = [each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (a, b)]
    return torch.equal(raw[0], raw[1])
