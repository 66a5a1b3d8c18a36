"""Run a record again with units removed: truly (sliced tensors) or apparently (dense tensors, removed units masked).

The two share no arithmetic on sizes: the sliced replay rewrites size arguments and indexes parameters, the masked one
runs every operation at its dense size and zeroes what is gone. Where they agree, the labels are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.protocols import IntArray
from autoprune.structure.propagate import INNER, Propagation
from autoprune.structure.record import Op, Ref
from autoprune.structure.strides import contiguous_strides, strided_steps
from autoprune.structure.units import BoolArray, Units

STATISTICS = frozenset(
    (
        *("native_layer_norm", "layer_norm", "native_group_norm", "group_norm", "_fused_rms_norm", "rms_norm"),
        *("_softmax", "softmax", "_safe_softmax", "_log_softmax", "cumsum", "logcumsumexp", "argmax", "argmin"),
        *("mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp"),
        *("prod", "max", "min", "any", "all", "_weight_norm_interface", "_weight_norm"),
    )
)
"""Operations whose value depends on how many units there are; a masked replay runs them over kept units only."""


class Replay:
    """One record, with the units where `keep` (units,) is False gone.

    Args:
        flow: The labels of the record.
        units: The units of the labels.
        keep: Which units stay, bool, shape (units,).
    """

    def __init__(self, flow: Propagation, units: Units, keep: BoolArray) -> None:
        self.flow = flow
        self.record = flow.record
        self._alive: dict[int, list[IntArray | None]] = {}
        self._units = units
        self._keep = keep

    def alive(self, value: int) -> list[IntArray | None]:
        """Indices that stay along each dimension of a value; None where all do."""
        if value not in self._alive:
            shape = self.record.values[value].shape
            kept = [
                self._units.alive(labels, size, self._keep)
                for labels, size in zip(self.flow.of(value), shape, strict=True)
            ]
            self._alive[value] = [
                None if len(index) == size else index for index, size in zip(kept, shape, strict=True)
            ]
        return self._alive[value]

    def shrinks(self, value: int) -> bool:
        """Whether a value loses anything."""
        return any(index is not None for index in self.alive(value))

    def shape(self, value: int) -> tuple[int, ...]:
        """Shape of a value once the units are gone."""
        dense = self.record.values[value].shape
        return tuple(
            size if index is None else len(index) for size, index in zip(dense, self.alive(value), strict=True)
        )

    def slice(self, value: int, tensor: Tensor) -> Tensor:
        """Index a dense tensor down to what stays."""
        for dim, index in enumerate(self.alive(value)):
            if index is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        return tensor

    def mask(self, value: int, tensor: Tensor) -> Tensor:
        """Zero what is gone in a dense tensor, in place where its elements are distinct, so that views see it."""
        overlapping = any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
        for dim, index in enumerate(self.alive(value)):
            if index is not None:
                hole = torch.zeros(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
                hole[torch.from_numpy(index).to(tensor.device)] = True
                shape = [-1 if axis == dim else 1 for axis in range(tensor.ndim)]
                gone = ~hole.view(shape)
                tensor = tensor.masked_fill(gone, 0) if overlapping else tensor.masked_fill_(gone, 0)
        return tensor

    def scatter(self, value: int, tensor: Tensor) -> Tensor:
        """Spread a sliced tensor over the dense shape, zero elsewhere."""
        for dim, index in enumerate(self.alive(value)):
            if index is not None:
                shape = list(tensor.shape)
                shape[dim] = self.record.values[value].shape[dim]
                dense = tensor.new_zeros(shape)
                tensor = dense.index_copy(dim, torch.from_numpy(index).to(tensor.device), tensor)
        return tensor

    def sliced(self, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """Outputs of the record run with sliced parameters and rewritten sizes."""

        def run(op: Op, env: dict[int, Tensor]) -> Any:
            return _call(op, {**op.args, **resized_arguments(op, self)}, env)

        return self._run(tensors, inputs, self.slice, run)

    def masked(self, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """Outputs of the record run dense, with every result masked; statistics over kept units only."""

        def run(op: Op, env: dict[int, Tensor]) -> Any:
            if op.name in STATISTICS and any(i is not None for value in op.inputs() for i in self.alive(value)):
                small = {value: self.slice(value, env[value]) for value in op.inputs()}
                out = _call(op, {**op.args, **resized_arguments(op, self)}, small)
                spread = iter(op.results())
                return tree_map(
                    lambda leaf: self.scatter(next(spread), leaf) if isinstance(leaf, Tensor) else leaf, out
                )
            out = _call(op, op.args, env)
            place = iter(op.results())
            return tree_map(lambda leaf: self.mask(next(place), leaf) if isinstance(leaf, Tensor) else leaf, out)

        return self._run(tensors, inputs, self.mask, run)

    def prepared(
        self, tensors: Mapping[str, Tensor], inputs: list[Tensor], prepare: Callable[[int, Tensor], Tensor]
    ) -> list[Tensor]:
        """Outputs of the record run at its dense sizes, with every tensor that it starts from changed by `prepare`."""
        return self._run(tensors, inputs, prepare, lambda op, env: _call(op, op.args, env))

    def _run(
        self,
        tensors: Mapping[str, Tensor],
        inputs: list[Tensor],
        prepare: Callable[[int, Tensor], Tensor],
        run: Callable[[Op, dict[int, Tensor]], Any],
    ) -> list[Tensor]:
        env: dict[int, Tensor] = {}
        given = dict(zip(self.record.inputs, inputs, strict=True))

        def fetch(i: int) -> None:
            """Copy a tensor that the pass did not make when it is first read, so that few copies exist at once."""
            value = self.record.values[i]
            if i in env or value.kind == "result":
                return
            if value.name:
                env[i] = prepare(i, tensors[value.name].detach().clone())
            else:
                env[i] = (given[i] if value.tensor is None else value.tensor).clone()

        last = self._last_use()
        with torch.no_grad():
            for op in self.record.ops:
                for i in op.inputs():
                    fetch(i)
                results = [leaf for leaf in tree_leaves(run(op, env)) if isinstance(leaf, Tensor)]
                env.update(zip(op.results(), results, strict=True))
                for i in last.get(op.index, ()):
                    env.pop(i, None)
            for i in self.record.outputs:
                fetch(i)
        return [env[i] for i in self.record.outputs]

    def _last_use(self) -> dict[int, list[int]]:
        last: dict[int, int] = {}
        for op in self.record.ops:
            last.update(dict.fromkeys([*op.inputs(), *op.results()], op.index))
        for value in self.record.outputs:
            last.pop(value, None)
        out: dict[int, list[int]] = {}
        for value, index in last.items():
            out.setdefault(index, []).append(value)
        return out


def _call(op: Op, args: Mapping[str, Any], env: Mapping[int, Tensor]) -> Any:
    concrete = tree_map(lambda leaf: env[leaf.id] if isinstance(leaf, Ref) else leaf, dict(args))
    positional = [concrete.pop(a.name) for a in op.func._schema.arguments if not a.kwarg_only and a.name in concrete]
    if "device" in concrete:  # recorded on the meta device, run where the tensors are
        concrete["device"] = next((t.device for t in env.values()), torch.device("cpu"))
    if op.name in ("view", "_unsafe_view"):  # strides may differ from the recorded ones
        return positional[0].reshape(positional[1])
    return op.func(*positional, **concrete)


Resize = Callable[[Op, Replay], dict[str, Any]]


def resized_arguments(op: Op, replay: Replay) -> dict[str, Any]:
    """Size arguments of an operation that follow the widths, by schema name."""
    resize = RESIZE.get(op.name)
    return resize(op, replay) if resize else {}


def _view(op: Op, replay: Replay) -> dict[str, Any]:
    name = next(n for n in ("size", "shape") if n in op.args)
    return {name: list(replay.shape(op.results()[0]))}


def _repeat(op: Op, replay: Replay) -> dict[str, Any]:
    new, old = replay.shape(op.results()[0]), replay.shape(op.args["self"].id)
    lead = (1,) * (len(new) - len(old))
    return {"repeats": [wide // narrow for wide, narrow in zip(new, (*lead, *old), strict=True)]}


def _as_strided(op: Op, replay: Replay) -> dict[str, Any]:
    """Strides that follow the sizes: in elements, each is so many steps along one dimension of the source."""
    source, shape = op.args["self"].id, replay.shape(op.results()[0])
    if not replay.shrinks(source):
        return {}
    steps = strided_steps(replay.record, op)
    if steps is None:
        return {"size": list(shape), "stride": list(contiguous_strides(shape))}
    strides = contiguous_strides(replay.shape(source))
    return {"size": list(shape), "stride": [1 if dim is None else count * strides[dim] for dim, count in steps]}


def _split(op: Op, replay: Replay) -> dict[str, Any]:
    sizes = [replay.shape(value)[op.args.get("dim", 0)] for value in op.results()]
    name = "split_sizes" if "split_sizes" in op.args else "split_size"
    return {name: sizes if name == "split_sizes" or isinstance(op.args[name], list) else sizes[0]}


def _slice(op: Op, replay: Replay) -> dict[str, Any]:
    index = replay.alive(op.args["self"].id)[op.args["dim"]]
    if index is None:
        return {}
    size = replay.record.values[op.args["self"].id].shape[op.args["dim"]]
    begin, end, _ = slice(op.args.get("start"), op.args.get("end")).indices(size)
    return {"start": int((index < begin).sum()), "end": int((index < end).sum())}


def _select(op: Op, replay: Replay) -> dict[str, Any]:
    index = replay.alive(op.args["self"].id)[op.args["dim"]]
    return {} if index is None else {"index": int(np.searchsorted(index, op.args["index"]))}


def _groups(op: Op, replay: Replay) -> dict[str, Any]:
    return {"groups": kept_groups(op, replay.flow, replay.shape(op.args["input"].id)[1])}


def kept_groups(op: Op, flow: Propagation, channels: int) -> int:
    """Groups of a grouped convolution or group norm whose input keeps `channels` channels."""
    name = "groups" if "groups" in op.args else "group"
    value = flow.record.values[op.args["input"].id]
    per_group = value.shape[1] // op.args[name]
    inner = flow.sites.get(op.index) == INNER or op.args[name] == 1
    return int(op.args[name]) if inner else channels // per_group


def _group_norm(op: Op, replay: Replay) -> dict[str, Any]:
    shape = replay.shape(op.args["input"].id)
    return {"N": shape[0], "C": shape[1], "group": kept_groups(op, replay.flow, shape[1])}


def _layer_norm(op: Op, replay: Replay) -> dict[str, Any]:
    return {"normalized_shape": list(replay.shape(op.args["input"].id)[-len(op.args["normalized_shape"]) :])}


RESIZE: dict[str, Resize] = {
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "view_copy", "_reshape_alias", "expand", "expand_copy"], _view),
    **dict.fromkeys(["zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"], _view),
    **dict.fromkeys(["rand", "randn"], _view),
    **dict.fromkeys(["split", "split_with_sizes", "unsafe_split", "split_copy"], _split),
    **dict.fromkeys(["as_strided", "as_strided_"], _as_strided),
    "repeat": _repeat,
    "slice": _slice,
    "select": _select,
    "convolution": _groups,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
}
