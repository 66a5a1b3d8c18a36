"""Keep the weights of a large model in a file that the system reads when it needs them, and not in memory.

A search needs the weights of the user's model, and its result needs them as they were, even if the user trains on. For
small models a copy is made at once. Large ones are borrowed during the search, unless code of the user's gets at them,
and written to an unnamed file at its end, which goes with the result: pages of it come into memory when a network is
built, and leave it when it is short.
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
from autoprune.evaluators.room import LARGE_BYTES, give_back, is_large
from autoprune.structure.adapters import refresh_flat_weights
from autoprune.structure.skeleton import skeleton
from autoprune.structure.slicing import Edit, build, owners

log = logging.getLogger(__name__)

_ALIGNMENT = 64  # of PyTorch's own memory: kernels may take other ways where it is less
_SMALL = 2**16  # tensors that are not worth it


@runtime_checkable
class Holds(Protocol):
    """An evaluator that holds large tensors between evaluations."""

    def held(self) -> list[Tensor]:
        """What it holds, of which `Tensor.data` may be replaced by the same values."""
        ...


def own_copy(model: nn.Module, borrow: bool = True) -> nn.Module:
    """A copy of a model with tensors of its own; parameters of a large one may `borrow` their memory until `settle`."""
    if not (borrow and is_large(model)):
        return build(model, Edit({}, {}))
    copied, made = skeleton(model), dict[int, Tensor]()
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
    """Give what `own_copy` returned memory of its own, and move what the evaluator holds out of memory, too."""
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
    """Whether a tensor is a block of the machine's memory."""
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
