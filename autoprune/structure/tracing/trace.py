"""Record the ATen operations of one forward pass, with the module that ran each and how long each tensor lived.

One pass under a ``TorchDispatchMode`` sees every operation with concrete shapes, independent of the Python code that
calls it. The pass runs on the meta device, where it costs neither memory nor arithmetic; a model that cannot run there
is traced on its real values. The user's model is never run, only a copy that shares its tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autoprune.data.batch import divisible
from autoprune.errors import UnsupportedModelError
from autoprune.structure.containers import tensors_in
from autoprune.structure.example import Example
from autoprune.structure.slicing.skeleton import ForwardModule, call_with, skeleton
from autoprune.structure.tracing.record import Foreseen, Record
from autoprune.structure.tracing.recorder import Recorder, module_paths
from autoprune.structure.tracing.training_branches import follow_training

log = logging.getLogger(__name__)


def trace(
    example: Example,
    *,
    values: bool = False,
    foreseen: Foreseen | None = None,
    training: bool = False,
) -> Record:
    """Run every call of an example once, on the meta device if possible, and record its operations.

    Args:
        example: Its model is not run itself and stays as it is.
        values: Run on the real values: the operations are then those of the device.
        foreseen: With `values`, operations that are not computed, to save their time; of an earlier pass.
        training: Also record the additional operations of a pass in training mode.
    """
    if values:
        return _trace(example, meta=False, decomposed=False, foreseen=foreseen)
    if any(leaf.layout != torch.strided for leaf in tensors_in(example.inputs, objects=True)):
        # On the meta device a sparse tensor stores nothing.
        return _trace(example, meta=False, training=training)
    try:
        record = _trace(example, meta=True, training=training)
        # Made outside of the record, like the index tensor of x[:, [0, 2]]: its values are needed and are lost.
        met = record.values[: record.met]
        lost = [v for v in met if v.kind == "constant" and v.tensor is not None and v.tensor.is_meta]
        if not any(v.tensor.numel() for v in lost if v.tensor is not None):  # a cache that is still empty has no values
            for value in lost:
                value.tensor = torch.empty(value.shape, dtype=value.dtype, device=_device_of(example.model))
            return record
        log.info("tracing on the meta device lost %d constants; tracing on real values", len(lost))
    except Exception as error:  # a model may do anything that the meta device cannot, such as read a value
        log.info("tracing on the meta device failed (%s); tracing on real values", error)
    return _trace(example, meta=False, training=training)


def _trace(
    example: Example,
    *,
    meta: bool,
    decomposed: bool = True,
    foreseen: Foreseen | None = None,
    training: bool = False,
) -> Record:
    call = ForwardModule(skeleton(example.model).eval(), example.forward)
    move: dict[int, Tensor] = {}

    def moved(leaf: Tensor) -> Tensor:
        if id(leaf) not in move:
            # A product with a tensor that requires a gradient is folded into one of matrices, even in inference.
            parameter = isinstance(leaf, nn.Parameter)
            private = leaf.detach().requires_grad_(leaf.requires_grad) if parameter else leaf.detach().clone()
            move[id(leaf)] = leaf.detach().to("meta") if meta else private
        return move[id(leaf)]

    originals = dict(_named_tensors(call.model))
    tensors = {name: moved(tensor) for name, tensor in originals.items()}
    inputs = example.mapped(moved).inputs
    recorder = Recorder(foreseen or {})
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kind = "parameter" if isinstance(originals[name], nn.Parameter) else "buffer"
            recorder.add(tensor, kind, name, born=-1)
    leaves = tensors_in(inputs, objects=True)
    record = recorder.record
    record.inputs = [recorder.add(leaf, "input", "", born=-1) for leaf in leaves]
    own = [leaf for leaf in tensors_in(inputs[0], objects=True) if leaf.ndim]
    record.batch = len(own[0]) if own and divisible((*own, None)) else 1
    record.device = "meta" if meta else str(leaves[0].device if leaves else "cpu")
    state = {f"model.{name}": tensor for name, tensor in tensors.items()}
    outputs = []
    with module_paths(call.model, recorder):
        for one in inputs:
            outputs.append(call_with(call, state, one, recorder, decomposed=decomposed))
            record.first = record.first or len(record.ops)
    record.foreseen = recorder.foreseeable()
    out = tensors_in(outputs)
    if not out:
        raise UnsupportedModelError(
            f"model must return at least one tensor, got {type(outputs[0]).__name__}; return one with "
            "autoprune.Call(forward=...)"
        )
    record.outputs = [recorder.lookup(leaf) for leaf in out]
    for value in record.values:
        value.died = min(value.died, len(record.ops))
    for i in record.outputs:
        record.values[i].died = len(record.ops)
    record.met = len(record.values)
    if training:
        follow_training(recorder, call, state, inputs[0])
    return record


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for _, tensor in _named_tensors(model)), torch.device("cpu"))


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
