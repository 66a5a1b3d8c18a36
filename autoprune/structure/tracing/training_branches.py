"""Operations that only training runs, such as those of auxiliary heads.

They join and freeze labels as others do, so that a built model trains; costs and checks of values are of evaluation.
Layers that are merely random or update statistics in training run as in evaluation: dropout and batch norm.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from autoprune.structure.containers import tensors_in
from autoprune.structure.slicing.skeleton import ForwardModule, call_with
from autoprune.structure.tracing.record import Inputs, Op, Record, Ref
from autoprune.structure.tracing.recorder import Recorder, module_paths

DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.alpha_dropout),
)


class _WithoutDropout(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = {**kwargs, "dropout_p": 0.0} if len(args) <= 4 else kwargs
        return func(*args, **kwargs)


def run_in_training(
    call: ForwardModule,
    state: Mapping[str, Tensor],
    inputs: Inputs,
    mode: AbstractContextManager[Any] | None = None,
) -> list[Tensor]:
    """Run a private copy in training mode, without random layers, and return its output tensors."""
    call.train()
    for module in call.model.modules():
        if isinstance(module, _NormBase | _DropoutNd):
            module.eval()
        elif isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            module.dropout = 0.0
    with _WithoutDropout():
        return tensors_in(call_with(call, state, inputs, mode, decomposed=True))


def follow_training(recorder: Recorder, call: ForwardModule, state: Mapping[str, Tensor], inputs: Inputs) -> None:
    """Add the additional operations of a pass in training mode; if it fails, note the reason in the record."""
    record = recorder.record
    operations, calls = len(record.ops), len(record.calls)
    outputs: list[int] = []
    try:
        with module_paths(call.model, recorder):
            made = run_in_training(call, state, inputs, recorder)
        outputs = [recorder.lookup(leaf) for leaf in made]
    except Exception as error:  # it may want targets, or real values
        record.untrained = f"{type(error).__name__}: {error}".partition("\n")[0][:160]
    ran = record.ops[operations:]
    del record.ops[operations:], record.calls[calls:]
    for value in record.values:
        value.died = min(value.died, operations)
    if not record.untrained:
        _keep_what_differs(recorder, ran, outputs)


def _keep_what_differs(recorder: Recorder, ran: list[Op], outputs: list[int]) -> None:
    """Identify training operations with recorded ones of the same arguments, and their results likewise.

    The pass ends in what it returns and in what it leaves for later, such as the loss of a router in an attribute. What
    nothing keeps is no end: fused attention in half precision computes weights that it then drops.
    """
    record = recorder.record
    waiting: dict[tuple[Any, str], deque[Op]] = defaultdict(deque)
    places: dict[tuple[str, str], deque[int]] = defaultdict(deque)
    for op in record.ops[: record.first]:
        waiting[op.func, repr(op.args)].append(op)
        places[op.module, op.name].append(op.index)
    known: dict[int, int] = {}
    for op in ran:
        args = tree_map(lambda leaf: Ref(known.get(leaf.id, leaf.id)) if isinstance(leaf, Ref) else leaf, op.args)
        place = places[op.module, op.name]
        like = place.popleft() if place else None
        if same := waiting[op.func, repr(args)]:
            known.update(zip(op.results(), same.popleft().results(), strict=True))
            continue
        own = replace(op, index=len(record.ops) + len(record.training), args=args)
        if _touches_floats(record, own):
            record.training.append(own)
            if like is not None:
                record.twins[own.index] = like
    read = {value for op in record.training for value in op.inputs()}
    made = (value for op in record.training for value in op.results())
    ends = [value for value in made if value not in read and recorder.lives(value)]
    record.trained = [known.get(value, value) for value in outputs]
    record.training_ends = [
        value
        for value in dict.fromkeys((*record.trained, *ends))
        if value not in record.outputs and record.values[value].kind == "result"
    ]


def _touches_floats(record: Record, op: Op) -> bool:
    """Return whether labels may pass through an operation: counters, indices and masks alone have none."""
    dtypes = [record.values[value].dtype for value in (*op.inputs(), *op.results())]
    return any(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)
