"""Counts of what runs: operations, and multiply-accumulates by PyTorch with the gaps of its counter filled."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    """Counts the operations that get through to it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, queries, channels = query
    return 2 * batch * heads * queries * key[2] * (channels + value[3])


def _grouped_flops(rows: Shape, experts: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return (
        2 * rows[0] * experts[1] * experts[2]
    )  # each row meets one expert: (rows, inputs), (experts, inputs, outputs)


def _distance_flops(rows: Shape, others: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(rows) * others[-2]


def _triangular_flops(matrices: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return math.prod(out_shape) * matrices[-1]


UNCOUNTED = {
    torch.ops.aten.linalg_solve_triangular: _triangular_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
    torch.ops.aten._cdist_forward: _distance_flops,
}
"""Operations that `FlopCounterMode` takes for free."""


@contextmanager
def decomposed() -> Iterator[None]:
    """Runs recurrent and encoder layers as operations that can be counted, not as one fused kernel."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    enabled, *_ = torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(enabled)
        torch.backends.mha.set_fastpath_enabled(fused)


def counted_macs(model: nn.Module, forward: Callable[[nn.Module], Any]) -> int:
    """Multiply-accumulates of one ``forward(model)``, over all samples."""
    # The counter's module tracker fails on views of parameters that need gradients.
    model = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad(), decomposed(), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        forward(model)
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True)
class Reach:
    """Share of the multiply-accumulates that goes when every group keeps as few units as it may, in [0, 1].

    Attributes:
        whole: Of the model.
        body: Of the model without its language model head; embeddings cost none. Equal to `whole` if it has no head.
    """

    whole: float
    body: float


def reach(model: nn.Module, narrowest: nn.Module, forward: Callable[[nn.Module], Any]) -> Reach:
    """Compare a model with the narrowest that can be built of it, both counted."""
    (dense, head), (least, least_head) = (
        (counted_macs(m, forward), _head_macs(m, forward)) for m in (model, narrowest)
    )
    return Reach(1 - least / dense, 1 - (least - least_head) / (dense - head))


def _head_macs(model: nn.Module, forward: Callable[[nn.Module], Any]) -> int:
    """Multiply-accumulates of the layer that makes logits of words, by definition; 0 where there is none."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        return 0
    rows = []
    handle = head.register_forward_hook(lambda module, _, logits: rows.append(logits.shape[:-1].numel()))
    try:
        with torch.no_grad():
            forward(model)
    finally:
        handle.remove()
    return sum(rows) * head.weight.numel()
