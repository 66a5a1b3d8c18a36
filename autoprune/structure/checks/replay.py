"""Replay of a record with units removed: sliced (smaller tensors) or masked (dense tensors with removed units zeroed).

The two share no arithmetic on sizes: the sliced replay rewrites size arguments and indexes parameters, the masked one
runs every operation at its dense size and zeroes the removed units. If they agree, the labels are right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.protocols import IntArray
from autoprune.structure.branches.cut import Cut
from autoprune.structure.checks.float64 import widened
from autoprune.structure.labels import Propagation
from autoprune.structure.rules.registry import operation_of
from autoprune.structure.time_limit import look
from autoprune.structure.tracing.known_shapes import KnownShapes
from autoprune.structure.tracing.record import Op, Ref
from autoprune.structure.units import BoolArray, Units

log = logging.getLogger(__name__)


class Replay:
    """Replay of one record without the units where `keep` (units,) is False.

    Args:
        flow: The labels of the record.
        units: The units of the labels.
        keep: True for units that stay, bool, shape (units,).
        wide: Whether to compute in float64 where another floating-point type was recorded, so that the remaining
            rounding is far below any error.
        cuts: Branches that are left out.
    """

    def __init__(
        self,
        flow: Propagation,
        units: Units,
        keep: BoolArray,
        *,
        wide: bool = False,
        cuts: Collection[Cut] = (),
    ) -> None:
        self._exits = {cut.exit: cut for cut in cuts}
        self._gone = frozenset[int]().union(*(cut.ops for cut in cuts))
        self.flow = flow
        self.record = flow.record
        self.wide = wide
        self._alive: dict[int, list[IntArray | None]] = {}
        self._indices: dict[int, IntArray | None] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._rehearsed = KnownShapes()
        self._units = units
        self._keep = keep

    def alive(self, value: int) -> list[IntArray | None]:
        """Return the indices that stay along each dimension of a value; None where all do."""
        if value not in self._alive:
            self._alive[value] = [None if labels is None else self._stays(labels) for labels in self.flow.of(value)]
        return self._alive[value]

    def _stays(self, labels: IntArray) -> IntArray | None:
        if id(labels) not in self._indices:  # most values share the arrays of others
            index = self._units.alive(labels, len(labels), self._keep)
            self._indices[id(labels)] = None if len(index) == len(labels) else index
        return self._indices[id(labels)]

    def shrinks(self, value: int) -> bool:
        """Return whether a value shrinks along any dimension."""
        return any(index is not None for index in self.alive(value))

    def shape(self, value: int) -> tuple[int, ...]:
        """Return the shape of a value without the removed units."""
        if value not in self._shapes:
            dense = self.record.values[value].shape
            self._shapes[value] = tuple(
                size if index is None else len(index) for size, index in zip(dense, self.alive(value), strict=True)
            )
        return self._shapes[value]

    def slice(self, value: int, tensor: Tensor) -> Tensor:
        """Cut a dense tensor to the indices that stay."""
        for dim, index in enumerate(self.alive(value)):
            if index is not None:
                tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        return tensor

    def mask(self, value: int, tensor: Tensor) -> Tensor:
        """Zero the removed units in a dense tensor, in place if its elements are distinct, so that views see it."""
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
        """Run the record with sliced parameters and rewritten sizes, and return its outputs."""

        def run(op: Op, env: dict[int, Tensor]) -> Any:
            args = {**op.args, **resized_arguments(op, self)}
            self._rehearse(op, args, env)
            return _call(op, args, env, self.wide)

        return self._run(tensors, inputs, lambda i, shared: self._private(self.slice(i, shared), shared), run)

    def _rehearse(self, op: Op, args: Mapping[str, Any], env: Mapping[int, Tensor]) -> None:
        """Run an operation on the meta device first: real kernels may read past the end of sizes that do not fit."""
        require_consistent(op, env)
        if not op.inputs():
            return
        try:
            with self._rehearsed:
                _call(op, args, {value: env[value].to("meta") for value in op.inputs()}, self.wide)
        except Exception:  # either the sizes are wrong, or the operation needs values and fails at dense sizes, too
            values = self.record.values
            dense = {i: torch.empty(values[i].shape, dtype=values[i].dtype, device="meta") for i in op.inputs()}
            try:
                _call(op, op.args, dense, self.wide)
            except Exception as error:  # as above
                log.debug("%s runs on real values only: %s", op.where(), error)
                return
            raise

    def masked(self, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """Run the record dense, with every result masked and statistics over kept units only; return its outputs."""

        def run(op: Op, env: dict[int, Tensor]) -> Any:
            if operation_of(op).statistics and any(i is not None for value in op.inputs() for i in self.alive(value)):
                small = {value: self.slice(value, env[value]) for value in op.inputs()}
                out = _call(op, {**op.args, **resized_arguments(op, self)}, small, self.wide)
                spread = iter(op.results())
                return tree_map(
                    lambda leaf: self.scatter(next(spread), leaf) if isinstance(leaf, Tensor) else leaf, out
                )
            out = _call(op, op.args, env, self.wide)
            place = iter(op.results())
            return tree_map(lambda leaf: self.mask(next(place), leaf) if isinstance(leaf, Tensor) else leaf, out)

        return self._run(tensors, inputs, lambda i, shared: self.mask(i, self._private(shared, shared)), run)

    def prepared(
        self, tensors: Mapping[str, Tensor], inputs: list[Tensor], prepare: Callable[[int, Tensor], Tensor]
    ) -> list[Tensor]:
        """Run the record at its dense sizes, with tensors of the model replaced by `prepare`; return its outputs."""

        def start(i: int, shared: Tensor) -> Tensor:
            return self._private(prepare(i, shared), shared)

        return self._run(tensors, inputs, start, lambda op, env: _call(op, op.args, env, self.wide))

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
            """Copy a tensor from outside of the pass when it is first read, so that few copies exist at once."""
            value = self.record.values[i]
            if i in env or value.kind == "result":
                return
            if value.name:
                env[i] = prepare(i, tensors[value.name].detach())
            else:
                shared = given[i] if value.tensor is None else value.tensor
                env[i] = self._private(shared, shared)

        last = self._last_use()
        with torch.no_grad():
            for op in self.record.ops:
                look()
                cut = self._exits.get(op.index)
                if cut is not None and cut.result != cut.stream:
                    fetch(cut.stream)
                    env[cut.result] = env[cut.stream].clone() if cut.stream in env else self._zeros(cut.result, env)
                elif op.index not in self._gone:
                    for i in op.inputs():
                        fetch(i)
                    if self._gone and not all(i in env for i in op.inputs()):
                        continue  # nothing that is returned depends on it, only on what is left out
                    results = _tensors(run(op, env))
                    env.update(zip(op.results(), results, strict=True))
                for i in last.get(op.index, ()):
                    env.pop(i, None)
            for i in self.record.outputs:
                fetch(i)
        return [env[i] for i in self.record.outputs]

    def _zeros(self, value: int, env: Mapping[int, Tensor]) -> Tensor:
        """Make what is left of a sum of which every term is left out."""
        dtype = self.record.values[value].dtype
        device = next((tensor.device for tensor in env.values()), torch.device("cpu"))
        return torch.zeros(self.shape(value), dtype=widened(dtype) if self.wide else dtype, device=device)

    def _private(self, tensor: Tensor, shared: Tensor) -> Tensor:
        """Make a tensor that operations may write to from a shared one, wide if wanted."""
        wide: Tensor = widened(tensor) if self.wide else tensor
        return wide.clone() if wide is shared else wide

    def _last_use(self) -> dict[int, list[int]]:
        last: dict[int, int] = {}
        for op in self.record.ops:
            last.update(dict.fromkeys([*op.inputs(), *op.results()], op.index))
            if op.index in self._exits:
                last[self._exits[op.index].stream] = op.index
        for value in self.record.outputs:
            last.pop(value, None)
        out: dict[int, list[int]] = {}
        for value, index in last.items():
            out.setdefault(index, []).append(value)
        return out


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _filled(leaf: Any, env: Mapping[int, Tensor], wide: bool) -> Any:
    """Fill a recorded argument with tensors for its `Ref`s; arguments of operations nest in lists only."""
    if isinstance(leaf, Ref):
        return env[leaf.id]
    if isinstance(leaf, list | tuple):
        return [_filled(item, env, wide) for item in leaf]
    return widened(leaf) if wide and isinstance(leaf, torch.dtype) else leaf


def require_consistent(op: Op, env: Mapping[int, Tensor]) -> None:
    """Refuse sizes that neither the meta device nor the kernel checks, which would read past the end of a tensor.

    Raises:
        ValueError: If query, key and value of a fused attention do not match.
    """
    if op.name.startswith("_scaled_dot_product"):
        query, key, value = (env[op.args[name].id].shape for name in ("query", "key", "value"))
        grouped = query[1] % key[1] == 0 and key[1] == value[1]
        if query[0] != key[0] or query[-1] != key[-1] or key[:-1] != value[:-1] or not grouped:
            raise ValueError(f"{op.where()} got a query of shape {query}, a key {key} and a value {value}")


def _call(op: Op, args: Mapping[str, Any], env: Mapping[int, Tensor], wide: bool) -> Any:
    concrete = {name: _filled(leaf, env, wide) for name, leaf in args.items()}
    positional = [concrete.pop(a.name) for a in op.func._schema.arguments if not a.kwarg_only and a.name in concrete]
    if "device" in concrete:  # recorded on the meta device, run where the tensors are
        concrete["device"] = next((t.device for t in env.values()), torch.device("cpu"))
    if op.name in ("view", "_unsafe_view") and "size" in args:  # strides may differ from the recorded ones
        return positional[0].reshape(positional[1])
    return op.func(*positional, **concrete)


def resized_arguments(op: Op, replay: Replay) -> dict[str, Any]:
    """Compute the size arguments of an operation that follow the widths, by schema name."""
    resize = operation_of(op).resize
    return resize(op, replay) if resize else {}
