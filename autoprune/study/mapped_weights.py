"""Weights of a large model in a memory-mapped file that the system reads on demand.

A search needs the weights of the user's model, and its result needs them as they were, even if the user trains it
further. Small models are copied at once. Large ones share memory during the search, unless code of the user can reach
them, and are written to an unnamed file at its end, which lives as long as the result: its pages come into memory when
a network is built, and are dropped when memory is short.
"""

from __future__ import annotations

import logging
import mmap
import tempfile
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from autoprune.evaluators import Orders
from autoprune.evaluators.activation_cache.limits import LARGE_BYTES, give_back, is_large
from autoprune.structure.owners import owners
from autoprune.structure.slicing.adapters import refresh_flat_weights
from autoprune.structure.slicing.skeleton import skeleton
from autoprune.structure.slicing.slicing import Edit, build

log = logging.getLogger(__name__)

_ALIGNMENT = 64  # of PyTorch's own memory: kernels may run other code where it is less
_SMALL = 2**16  # smaller tensors stay in memory


@runtime_checkable
class Holds(Protocol):
    """Optional protocol: evaluators that hold large tensors between evaluations."""

    def held(self) -> list[Tensor]:
        """Tensors that it holds, whose `Tensor.data` may be replaced by the same values."""
        ...


def own_copy(model: nn.Module, borrow: bool = True) -> nn.Module:
    """Copy a model with its tensors; with `borrow`, the parameters of a large one share memory until `settle`."""
    if not (borrow and is_large(model)):
        return build(model, Edit({}, {}))
    copied = skeleton(model)
    made = dict[int, Tensor]()
    for owner in list(owners(copied)):
        tensor = owner.tensor
        if id(tensor) not in made:
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad) if parameter else tensor.clone()
        owner.holder[owner.key] = made[id(tensor)]
    for module in copied.modules():
        refresh_flat_weights(module)
    return copied


def settle(model: nn.Module, evaluator: object) -> None:
    """Separate the parameters shared by `own_copy`; large ones and tensors of the evaluator move to a file."""
    if isinstance(evaluator, Orders):
        evaluator.release()
    parameters = list(model.parameters())
    borrowed = is_large(model)
    tensors = [*(parameters if borrowed else []), *(evaluator.held() if isinstance(evaluator, Holds) else [])]
    stored = [tensor for tensor in tensors if _storable(tensor)]
    if sum(tensor.nbytes for tensor in stored) >= LARGE_BYTES:
        try:
            _to_file(stored)
        except OSError as error:  # a full disk, or none to write to
            log.info("weights stay in memory: %s", error)
            stored = []
    else:
        stored = []
    done = {id(tensor) for tensor in stored}
    for parameter in parameters if borrowed else ():
        if id(parameter) not in done:
            parameter.data = parameter.data.clone()
    give_back(model)


def _storable(tensor: Tensor) -> bool:
    """Return whether a tensor is a large enough block of main memory."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and tensor.nbytes >= _SMALL and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)


def _to_file(tensors: Sequence[Tensor]) -> None:
    """Point tensors to their values in a file without a name.

    Raises:
        OSError: If it cannot be written; all are as they were then.
    """
    places = []
    with tempfile.TemporaryFile(prefix="autoprune-") as file:
        for tensor in tensors:
            values = tensor.detach().clone()  # one block, its dimensions in the same order
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            places.append((file.tell(), values.stride()))
            file.write(torch.empty(0, dtype=torch.uint8).set_(values.untyped_storage()).numpy().data)
            del values
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a write stays in this process
    for tensor, (offset, strides) in zip(tensors, places, strict=True):
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        tensor.data = flat.as_strided(tensor.shape, strides)
