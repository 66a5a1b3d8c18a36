"""What one call allocates, as PyTorch's own counters see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MEASURABLE = ("cpu", "cuda")
"""Types of devices whose allocations can be seen."""


@dataclass(frozen=True)
class Allocation:
    """What a call took.

    Attributes:
        pattern: A sign for each allocation (+) and release (-), in order; empty where only the peak is counted.
        tops: Bytes more than before the call at each local maximum; at least one.
        kept: Bytes more than before when the call returned: its results.
    """

    pattern: str
    tops: tuple[int, ...]
    kept: int

    @property
    def peak(self) -> int:
        """Most bytes at once, beyond those of before the call."""
        return max(self.tops)

    @property
    def scratch(self) -> tuple[int, ...]:
        """`tops` without what the call kept."""
        return tuple(top - self.kept for top in self.tops)


def allocation_of(call: Callable[[], Any], device: torch.device) -> Allocation:
    """Run a call under ``torch.inference_mode``, and note what it allocates on a device.

    Seen are tensors and scratch that come from PyTorch's allocator: on the CPU by its profiler, on CUDA by
    ``torch.cuda.max_memory_allocated``, after a call that makes what libraries keep for good. Not seen is what a
    library takes from the system by itself.

    Raises:
        ValueError: If the device is neither a CPU nor CUDA.
    """
    with torch.inference_mode():
        if device.type == "cuda":
            return _on_cuda(call, device)
        if device.type == "cpu":
            return _on_cpu(call)
    raise ValueError(f"memory can be measured on cpu and cuda, got a model on {device}; move it with model.to('cpu')")


def _on_cuda(call: Callable[[], Any], device: torch.device) -> Allocation:
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    torch.cuda.synchronize(device)
    top, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    del results
    return Allocation("", (top - before,), after - before)


def _on_cpu(call: Callable[[], Any]) -> Allocation:
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    events = profiler.profiler.kineto_results.events()
    del results
    seen = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    return _summary([size for *_, size in seen if size])


def _summary(changes: Sequence[int]) -> Allocation:
    totals = list(accumulate(changes, initial=0))
    signs = "".join("+" if size > 0 else "-" for size in changes)
    tops = [total for total, here, after in zip(totals, "+" + signs, signs + "-", strict=True) if here + after == "+-"]
    return Allocation(signs, tuple(tops), totals[-1])


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that the profiler writes to the terminal; it reads the variable when it first starts."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]
