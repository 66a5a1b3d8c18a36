"""Batches: their samples, inputs and targets.

A batch is what a loader yields: a tensor (inputs without labels), a tuple or list whose last entry is the target (a
single entry is an input without labels; inputs of several arguments may lie in a tuple or mapping of their own: ``((x,
t), y)``), or a mapping whose ``"labels"`` or ``"label"`` entry, or the one that
``Data(labels=)`` names, is the target and whose other entries are keyword inputs. Entries may nest tensors in mappings,
lists, tuples and named tuples.

A batch is cut by samples where a part will do. One of graphs is not: its edges number its nodes, so that it is used
as a whole (see `divisible`), and its samples are those of its target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.arguments import shown
from autoprune.errors import DataError

Batch: TypeAlias = Any

Forward = Callable[[nn.Module, Batch], Any]
"""``forward(model, batch)``: runs a model on a batch and returns the outputs that matter."""

LABEL_KEYS = ("labels", "label")


def tensors(tree: Any) -> Iterator[Tensor]:
    """Tensors in a nested structure, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(value)


def map_leaves(fn: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool] = lambda _: False) -> Any:
    """Rebuild nested mappings, lists and tuples with `fn` applied to every leaf.

    A list or tuple without any tensor is a leaf: it holds one entry a sample, such as names, or a setting. So is
    what `is_leaf` says.
    """
    if is_leaf(tree):
        return fn(tree)
    if isinstance(tree, Mapping):
        # A copy keeps the class, so that `batch.input_ids` still works in a user's forward.
        rebuilt = copy.copy(tree) if isinstance(tree, MutableMapping) else dict(tree)
        for key, value in tree.items():
            rebuilt[key] = map_leaves(fn, value, is_leaf)
        return rebuilt
    if isinstance(tree, list | tuple) and any(True for _ in tensors(tree)):
        values = [map_leaves(fn, value, is_leaf) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return fn(tree)


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Rebuild a nested structure with `fn` applied to its tensors; everything else passes through."""
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def batch_size(batch: Batch) -> int:
    """Number of samples in a batch: the leading size of its first tensor that has dimensions.

    Of a batch that is not `divisible` that of its target, where it has one.

    Raises:
        DataError: If the batch holds no such tensor.
    """
    size, target = _leading(batch), targets(batch)
    return len(target) if isinstance(target, Tensor) and target.ndim and not divisible(batch) else size


def divisible(batch: Batch) -> bool:
    """Return whether a batch can be cut by samples.

    It cannot where a tensor has another leading size than the first, and holds whole numbers, which may be numbers of
    rows in another, lies in a list, or is the target: so do the edges of graphs, the offsets of bags, and boxes in
    images. Other floats with another leading size count as shared by all samples, and so does any tensor with a leading
    size of 1.
    """
    size, target = _leading(batch), targets(batch)
    listed = batch if isinstance(batch, list | tuple) else ()
    entries = batch.values() if isinstance(batch, Mapping) else listed
    if isinstance(target, Tensor) and _apart(target, size, listed=True):
        return False
    return not any(_apart(entry, size, listed=False) for entry in entries)


def _apart(tree: Any, size: int, listed: bool) -> bool:
    """Return whether an entry holds a tensor whose rows are no samples, and that others may depend on."""
    if isinstance(tree, Tensor):
        shared = tree.is_floating_point() or tree.is_complex() or tree.dtype == torch.bool
        return tree.ndim > 0 and len(tree) not in (1, size) and (listed or not shared)
    if isinstance(tree, Mapping):
        return any(_apart(value, size, listed) for value in tree.values())
    if isinstance(tree, list | tuple) and not _one_each(tree, size):
        return any(_apart(value, size, listed=True) for value in tree)
    return False


def _one_each(tree: Any, size: int) -> bool:
    """Return whether an entry is a list with a mapping for each sample, such as the targets of detectors."""
    return isinstance(tree, list) and len(tree) == size and all(isinstance(entry, Mapping) for entry in tree)


def _leading(batch: Batch) -> int:
    for tensor in tensors(batch):
        if tensor.ndim:
            return len(tensor)
    raise DataError(
        f"a batch must be a tensor, or a tuple, list or dict that holds tensors, got {type(batch).__name__}; "
        "convert the samples to tensors in the dataset or in the collate_fn of the loader"
    )


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Samples `start` to `stop` of a batch; tensors are views.

    Tensors, arrays, tensor-free lists and lists of mappings as long as the batch are sliced, everything else passes
    through.

    Raises:
        DataError: If the batch is not `divisible`.
    """
    size = _leading(batch)
    if not divisible(batch):
        raise DataError(
            f"a batch must hold one row for each sample to be cut, got tensors of {[*map(_shape, tensors(batch))]}; "
            "use smaller batches"
        )

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim == 0:
            return leaf
        long = isinstance(leaf, Tensor | np.ndarray | list | tuple) and len(leaf) == size
        return leaf[start:stop] if long else leaf

    return map_leaves(cut, batch, lambda tree: _one_each(tree, size))


def pieces(batch: Batch, most: int) -> list[Batch]:
    """Divide a batch into parts of at most `most` samples; it stays whole where it is no larger, or cannot be cut."""
    size = batch_size(batch)
    if size <= most or not divisible(batch):
        return [batch]
    return [slice_batch(batch, start, start + most) for start in range(0, size, most)]


def beginning(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """Take the first `samples` samples of batches; a batch that cannot be cut is taken or left as a whole."""
    found: list[Batch] = []
    for batch in batches:
        if samples > 0:
            found.append(pieces(batch, samples)[0])
            samples -= batch_size(found[-1])
    return found


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def fresh(batch: Batch) -> Batch:
    """Copy a batch with its containers, tensors and arrays, so that its reader may write to it."""
    return map_leaves(_own, batch)


def _own(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    if isinstance(leaf, list | tuple):  # without tensors, but it may hold arrays
        values = [fresh(value) for value in leaf]
        return type(leaf)(*values) if hasattr(leaf, "_fields") else type(leaf)(values)
    return copy.copy(leaf) if isinstance(leaf, np.ndarray | set | bytearray) else leaf


@dataclass(frozen=True)
class Guarded:
    """Forward that gets a copy of each batch: a model may normalise its input in place.

    It always copies, because writes through NumPy or ``.data`` leave no trace and some depend on the candidate. A copy
    costs one reading and writing of the inputs. Timed runs use `plain`.

    Attributes:
        plain: Runs a model on a batch.
    """

    plain: Forward

    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        """Return the outputs of the model for the batch, which stays as it is."""
        return self.plain(model, fresh(batch))


class Lent(Sequence[Batch]):
    """Batches that are returned as copies, one at a time.

    Args:
        batches: Stay as they are.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._lent: dict[int, Batch] = {}

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """A copy of a batch, or of each in a slice."""
        if isinstance(index, slice):
            return [self._lend(batch) for batch in self._batches[index]]
        return self._lend(self._batches[index])

    def _lend(self, batch: Batch) -> Batch:
        lent = fresh(batch)
        self._lent[id(lent)] = batch
        return lent

    def original(self, batch: Batch) -> Batch:
        """Return the original of a copy, unless the copy was changed since; else the given batch.

        The address of a copy may belong to another batch by now, so contents decide.
        """
        known = self._lent.get(id(batch))
        return batch if known is None or not same(known, batch) else known


def same(one: Any, other: Any) -> bool:
    """Return whether nested structures hold equal values."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and same([*one], [*other]) and same([*one.values()], [*other.values()])
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one is other or bool(one == other)


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move the tensors of a batch to `device`."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


def of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """Turn the inputs of one call into a batch: keyword inputs as a dict, one input as it is, several plus None.

    None stands in place of the target. ``forward(model, batch)`` gets such a batch where example inputs replace data.
    """
    if kwargs:
        return dict(kwargs)
    return args[0] if len(args) == 1 else (*args, None)


def on_call(forward: Forward) -> Callable[..., Any]:
    """Wrap a forward of batches to take the inputs of a call."""
    return lambda model, *args, **kwargs: forward(model, of_call(args, kwargs))


class Labelled(dict[str, Any]):
    """A dict batch whose target is under a key of the user's choice, ``label_key``."""

    label_key: str


def labelled(batch: Batch, key: str) -> Batch:
    """Copy a dict batch whose target is its entry under `key`.

    Raises:
        DataError: If it is no dict, or has no such entry.
    """
    if not isinstance(batch, Mapping) or key not in batch:
        found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(f"labels={shown(key)} must be a key of every batch, which has to be a dict, got {found!r:.200}")
    marked: Any = Labelled(batch) if isinstance(batch, dict) and type(batch) is dict else copy.copy(batch)
    marked.label_key = key
    return marked


def like_labelled(batch: Batch, other: Batch) -> Batch:
    """The batch with its target under the key that `labelled` gave another, if it did.

    Raises:
        DataError: If it has no such entry.
    """
    key = _own_key(other)
    return batch if key is None else labelled(batch, key)


def _own_key(batch: Batch) -> str | None:
    own = getattr(batch, "label_key", None)
    return own if isinstance(own, str) else None


def _label_keys(batch: Mapping[str, Any]) -> tuple[str, ...]:
    own = _own_key(batch)
    return LABEL_KEYS if own is None else (own,)


def inputs(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs of the model in a batch, without the target."""
    if isinstance(batch, Mapping):
        keys = _label_keys(batch)
        return (), {key: value for key, value in batch.items() if key not in keys}
    if isinstance(batch, list | tuple):
        return tuple(batch[:-1] if len(batch) > 1 else batch), {}
    return (batch,), {}


def targets(batch: Batch) -> Any:
    """The target in a batch, a tensor as a rule, or None where there is none."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in _label_keys(batch) if key in batch), None)
    return batch[-1] if isinstance(batch, list | tuple) and len(batch) > 1 else None


def default_forward(model: nn.Module, batch: Batch) -> Any:
    """Call the model with the inputs of a batch; a model of transformers that keeps keys and values does not do so.

    Of a batch ``((x, t), y)`` or ``({"x": x, "t": t}, y)`` a model whose forward takes several arguments gets these. An
    encoder with a decoder, of transformers, decodes the labels where the batch has no inputs of the decoder.
    """
    args, kwargs = inputs(batch)
    kwargs = kwargs | _decoded(model, kwargs, targets(batch))
    if len(args) == 1 and isinstance(args[0], Mapping | list | tuple) and not _takes(model, args, kwargs):
        spread = ((), dict(args[0])) if isinstance(args[0], Mapping) else (tuple(args[0]), {})
        args, kwargs = spread if _takes(model, *spread) else (args, kwargs)
    if "use_cache" not in kwargs and _keeps_a_cache(model):
        kwargs = {**kwargs, "use_cache": False}  # nothing is generated: the cache would only take memory
    return model(*args, **kwargs)


def _decoded(model: nn.Module, kwargs: Mapping[str, Any], labels: Any) -> dict[str, Any]:
    """Inputs of the decoder where a model of transformers makes them from labels: these, shifted right by one."""
    config: Any = getattr(model, "config", None)
    given = any(key.startswith("decoder_input") for key in kwargs)
    if given or getattr(config, "is_encoder_decoder", None) is not True or not isinstance(labels, Tensor):
        return {}
    if labels.ndim != 2 or labels.is_floating_point() or "decoder_input_ids" not in signature(model.forward).parameters:
        return {}
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if callable(prepare):
        return {"decoder_input_ids": prepare(labels=labels)}
    first = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    shifted = torch.cat([first, labels[:, :-1]], 1)
    return {"decoder_input_ids": shifted.masked_fill(shifted < 0, config.pad_token_id)}


def _takes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the forward of a model has parameters for these arguments."""
    try:
        signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # they do not fit, or there is no signature
        return False
    return True


def _keeps_a_cache(model: nn.Module) -> bool:
    """Return whether a model of transformers keeps keys and values unless it is told not to."""
    asked = getattr(getattr(model, "config", None), "use_cache", None) is True
    return asked and "use_cache" in signature(model.forward).parameters


def token_ids(batch: Batch) -> Tensor | None:
    """The tokens in a batch: ``input_ids``, or else its first input of whole numbers, shape (n, positions)."""
    args, kwargs = inputs(batch)
    named = kwargs.get("input_ids")
    first = None if isinstance(batch, Mapping) else next(tensors(args), None)
    found = named if named is not None else first
    if not isinstance(found, Tensor) or found.ndim != 2 or found.is_floating_point() or found.dtype == torch.bool:
        return None
    return found
