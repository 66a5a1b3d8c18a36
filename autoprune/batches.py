"""What a batch is: its samples, its inputs and its targets.

A batch is what a loader yields: a tensor (inputs without labels), a tuple or list whose last entry is the target (a
single entry is an input without labels), or a mapping whose ``"labels"`` or ``"label"`` entry is the target and whose
other entries are keyword inputs. Entries may nest tensors in mappings, lists, tuples and named tuples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.errors import DataError

Batch: TypeAlias = Any
LABEL_KEYS = ("labels", "label")


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in a nested structure, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(value)


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Rebuild nested mappings, lists and tuples with `fn` applied to every leaf.

    A list or tuple without any tensor is a leaf: it holds something for each sample, like names, or a setting.
    """
    if isinstance(tree, Mapping):
        # A copy keeps the class, so that `batch.input_ids` goes on working in a user's forward.
        rebuilt = copy.copy(tree) if isinstance(tree, MutableMapping) else dict(tree)
        for key, value in tree.items():
            rebuilt[key] = map_leaves(fn, value)
        return rebuilt
    if isinstance(tree, list | tuple) and any(True for _ in tensors(tree)):
        values = [map_leaves(fn, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return fn(tree)


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Rebuild a nested structure with `fn` applied to its tensors; everything else passes through."""
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def batch_size(batch: Batch) -> int:
    """Number of samples in a batch: the leading size of its first tensor that has dimensions.

    Raises:
        DataError: If the batch holds no such tensor.
    """
    for tensor in tensors(batch):
        if tensor.ndim:
            return len(tensor)
    raise DataError(
        f"a batch must be a tensor, or a tuple, list or dict that holds tensors, got {type(batch).__name__}; "
        "convert the samples to tensors in the dataset or in the collate_fn of the loader"
    )


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Samples `start` to `stop` of a batch; tensors are views.

    Tensors, arrays and tensor-free lists as long as the batch are sliced, everything else passes through.
    """
    size = batch_size(batch)

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim == 0:
            return leaf
        long = isinstance(leaf, Tensor | np.ndarray | list | tuple) and len(leaf) == size
        return leaf[start:stop] if long else leaf

    return map_leaves(cut, batch)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with its tensors on `device`."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


@dataclass(frozen=True)
class Shell:
    """The containers of a batch, apart from the tensors in them, which code that knows fewer containers can then see.

    What traces and exports models looks into dicts, lists and tuples, and would take the tensors in other mappings,
    such as those of Hugging Face tokenizers, for constants.
    """

    batch: Batch

    def filled(self, given: Sequence[Tensor]) -> Batch:
        """The batch with other tensors, as many as it holds."""
        left = iter(given)
        return map_tensors(lambda _: next(left), self.batch)


def opened(batch: Batch) -> tuple[Any, ...]:
    """Positional inputs for a forward that `closing` made: a shell and the tensors in it."""
    return (Shell(batch), *tensors(batch))


def closing(forward: Callable[[nn.Module, Batch], Any]) -> Callable[..., Any]:
    """A forward that takes what `opened` gives in place of the batch."""
    return lambda model, shell, *given: forward(model, shell.filled(given))


def inputs(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of the model in a batch, without the target."""
    if isinstance(batch, Mapping):
        return (), {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    if isinstance(batch, list | tuple):
        return tuple(batch[:-1] if len(batch) > 1 else batch), {}
    return (batch,), {}


def targets(batch: Batch) -> Any:
    """The target in a batch, a tensor as a rule, or None where there is none."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    return batch[-1] if isinstance(batch, list | tuple) and len(batch) > 1 else None


def default_forward(model: nn.Module, batch: Batch) -> Any:
    """Call the model with the inputs of a batch."""
    args, kwargs = inputs(batch)
    return model(*args, **kwargs)
