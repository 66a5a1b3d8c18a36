"""Record the ATen operations of one forward pass, with the module that ran each and how long each tensor lived.

One pass under a ``TorchDispatchMode`` sees every operation with concrete shapes, whatever Python did to get there. The
pass runs on the meta device, where it costs neither memory nor arithmetic; a model that cannot run there is traced on
its real values. The user's model is never run: a copy that shares its tensors is.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.errors import UnsupportedModelError
from autoprune.structure.foreseen import foresee, stand_in
from autoprune.structure.record import Foreseen, Forward, Inputs, ModuleCall, Op, Record, Ref, Value
from autoprune.structure.skeleton import Call, call_with, skeleton

log = logging.getLogger(__name__)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    forward: Forward,
    further: Sequence[Inputs] = (),
    *,
    values: bool = False,
    foreseen: Foreseen | None = None,
) -> Record:
    """Run `forward` once on each example, on the meta device if possible, and record what it did.

    Args:
        model: Any module; it is not run itself and stays as it is.
        args: Positional example inputs; tensors may be nested in lists, tuples and dicts.
        kwargs: Keyword example inputs.
        forward: Runs a model on these inputs and returns the outputs that matter.
        further: More examples, which take other branches.
        values: Run on the real values: the operations are then those of the device.
        foreseen: With `values`, operations that are not computed, to save their time; of an earlier pass.
    """
    examples = [(args, kwargs), *further]
    if values:
        return _trace(model, examples, forward, meta=False, foreseen=foreseen)
    try:
        record = _trace(model, examples, forward, meta=True)
        # Made behind our back, as the index tensor of x[:, [0, 2]] is: its values are needed and are lost.
        lost = [v for v in record.values if v.kind == "constant" and v.tensor is not None and v.tensor.is_meta]
        if not lost:
            return record
        log.info("tracing on the meta device lost %d constants; tracing on real values", len(lost))
    except Exception as error:  # a model may do anything that the meta device cannot, such as read a value
        log.info("tracing on the meta device failed (%s); tracing on real values", error)
    return _trace(model, examples, forward, meta=False)


def _trace(
    model: nn.Module,
    examples: Sequence[Inputs],
    forward: Forward,
    *,
    meta: bool,
    foreseen: Foreseen | None = None,
) -> Record:
    copied = skeleton(model).eval()
    move: dict[int, Tensor] = {}

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in move:
            # A product with a tensor that requires a gradient is folded into one of matrices, even in inference.
            parameter = isinstance(leaf, nn.Parameter)
            private = leaf.detach().requires_grad_(leaf.requires_grad) if parameter else leaf.detach().clone()
            move[id(leaf)] = leaf.detach().to("meta") if meta else private
        return move[id(leaf)]

    originals = dict(_named_tensors(copied))
    tensors = {name: moved(tensor) for name, tensor in originals.items()}
    moved_examples = [tree_map(moved, (args, dict(kwargs))) for args, kwargs in examples]
    recorder = _Recorder(foreseen or {})
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kind = "parameter" if isinstance(originals[name], nn.Parameter) else "buffer"
            recorder.add(tensor, kind, name, born=-1)
    leaves = [leaf for leaf in tree_leaves(moved_examples) if isinstance(leaf, Tensor)]
    record = recorder.record
    record.inputs = [recorder.add(leaf, "input", "", born=-1) for leaf in leaves]
    record.batch = next((leaf.shape[0] for leaf in leaves if leaf.ndim), 1)
    record.device = "meta" if meta else str(leaves[0].device if leaves else "cpu")
    state = {f"model.{name}": tensor for name, tensor in tensors.items()}
    outputs = []
    with _module_paths(copied, recorder):
        for moved_args, moved_kwargs in moved_examples:
            outputs.append(call_with(Call(copied, forward), state, moved_args, moved_kwargs, recorder))
            record.first = record.first or len(record.ops)
    record.foreseen = recorder.foreseeable()
    out = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not out:
        raise UnsupportedModelError(
            f"model must return at least one tensor, got {type(outputs[0]).__name__}; pass forward= to return one"
        )
    record.outputs = [recorder.lookup(leaf) for leaf in out]
    for value in record.values:
        value.died = min(value.died, len(record.ops))
    for i in record.outputs:
        record.values[i].died = len(record.ops)
    return record


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@contextmanager
def _module_paths(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    names = {id(module): name for name, module in model.named_modules()}
    record, starts = recorder.record, list[int]()

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            recorder.path.append(names[id(module)])
            starts.append(len(record.ops))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if id(module) in names and recorder.path:
            inputs, outputs = tree_map(recorder.known, ((args, kwargs), output))
            record.calls.append(ModuleCall(recorder.path.pop(), starts.pop(), len(record.ops), inputs, outputs))

    # On each module: what PyTorch notes of a hook on all modules that wants keyword arguments outlives its removal.
    handles = [module.register_forward_hook(leave, with_kwargs=True) for module in model.modules()]
    handles.append(register_module_forward_pre_hook(enter))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    def __init__(self, foreseen: Foreseen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.record = Record()
        self.foreseen = foreseen
        self._learned: dict[torch._ops.OpOverload, tuple[bool, ...] | None] = {}
        self.path: list[str] = []
        self._ids: dict[int, int] = {}
        self._alive: dict[int, Any] = {}

    def add(self, tensor: Tensor, kind: str, name: str, born: int, base: int | None = None) -> int:
        """Give `tensor` an identity that lasts as long as Python keeps the object."""
        record = self.record
        index = len(record.values)
        keep = tensor if kind == "constant" else None
        shape = tuple(tensor.shape)
        base = index if base is None else base
        strides = tuple(tensor.stride()) if tensor.layout == torch.strided else ()
        record.values.append(Value(shape, tensor.dtype, kind, name, base, born, 2**62, keep, strides))
        key = id(tensor)
        self._ids[key] = index

        def forget(_: Any) -> None:
            record.values[index].died = len(record.ops)
            if self._ids.get(key) == index:  # Python may have given the address to another tensor already
                del self._ids[key]

        self._alive[index] = weakref.ref(tensor, forget)
        return index

    def lookup(self, tensor: Tensor) -> int:
        index = self._ids.get(id(tensor))
        return self.add(tensor, "constant", "", born=-1) if index is None else index

    def known(self, leaf: Any) -> Any:
        """The `Ref` of a tensor that the pass has met; anything else as it is."""
        return Ref(self._ids[id(leaf)]) if isinstance(leaf, Tensor) and id(leaf) in self._ids else leaf

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        reshaped = torch.Tag.inplace_view in func.tags  # transpose_ and the like: the same object, other dimensions
        bound = _bind(func, args, kwargs)
        refs = {name: tree_map(self._ref, value) for name, value in bound.items()}
        storages = {
            t.untyped_storage()._cdata: self.lookup(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        out = self._run(func, args, kwargs)
        born = len(self.record.ops)

        def result(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in read and not reshaped:
                return Ref(self.lookup(leaf))  # in place: the same value, with the same labels
            owner = storages.get(leaf.untyped_storage()._cdata)
            base = None if owner is None else self.record.values[owner].base
            return Ref(self.add(leaf, "result", "", born, base))

        outputs = tree_map(result, out)
        self.record.ops.append(Op(born, func, refs, outputs, self.path[-1] if self.path else ""))
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in self.foreseen:
            return stand_in(func, args, kwargs, self.foreseen[func])
        out = func(*args, **kwargs)
        known = func not in self._learned or self._learned[func] is not None
        if known and self._learned.setdefault(func, found := foresee(func, args, kwargs, out)) != found:
            self._learned[func] = None
        return out

    def foreseeable(self) -> Foreseen:
        """Operations that returned what the meta device says, each time; none if values decided anything."""
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if any(reads.intersection(func.tags) for func in self._learned):
            return {}
        return {func: empty for func, empty in self._learned.items() if empty is not None}

    def _ref(self, leaf: Any) -> Any:
        return Ref(self.lookup(leaf)) if isinstance(leaf, Tensor) else leaf


def _bind(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of an operation by its schema name, defaults filled in."""
    bound = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound
