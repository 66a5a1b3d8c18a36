"""Allocations of one call, by PyTorch's own counters."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

MEASURABLE = ("cpu", "cuda")
"""Types of devices whose allocations can be measured."""


@dataclass(frozen=True)
class Allocation:
    """Allocations of a call.

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
        """`tops` without the results of the call."""
        return tuple(top - self.kept for top in self.tops)


def allocation_of(call: Callable[[], Any], device: torch.device) -> Allocation:
    """Run a call under ``torch.inference_mode``, and note what it allocates on a device.

    It counts tensors and scratch memory from PyTorch's allocator: on the CPU by its profiler, on CUDA by
    ``torch.cuda.max_memory_allocated``, after a first call for the memory that libraries keep permanently. It leaves
    out memory that a library takes from the system by itself.

    On CUDA this resets PyTorch's peak of allocated memory (``reset_peak_memory_stats``), which cannot be undone: a
    program that reads the peak afterwards does not see earlier allocations.

    Raises:
        ValueError: If the device is neither a CPU nor CUDA, or a profiler runs already on a CPU.
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
    """Measure by the older of PyTorch's profilers: the newer one writes to the terminal unless permanently silenced.

    The older one also takes an eighth of the time. It may be removed one day, so nothing else here depends on it.
    """
    from torch._C._autograd import _profiler_enabled

    if _profiler_enabled():
        raise ValueError(
            "memory cannot be measured while a profiler runs on this thread; profile something else, or limit another "
            "cost than memory"
        )
    events = _profiled(call, memory=True)
    return _summary([event.cpu_memory_usage() for event in events if str(event.kind()) == "memory_alloc"])


def operations_of(call: Callable[[], Any]) -> list[str]:
    """Names of the operations that a call runs, those inside others too, as ``"aten::add_"``; empty under a profiler.

    A dispatch mode sees others: while one is active, PyTorch does not write into its own results.
    """
    from torch._C._autograd import _profiler_enabled

    if _profiler_enabled():
        return []
    return [str(event.name()) for event in _profiled(call, memory=False) if str(event.kind()) == "push"]


def _profiled(call: Callable[[], Any], *, memory: bool) -> list[Any]:
    from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
    from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

    config = ProfilerConfig(
        ProfilerState.CPU,
        report_input_shapes=False,
        profile_memory=memory,
        with_stack=False,
        with_flops=False,
        with_modules=False,
        experimental_config=_ExperimentalConfig(),
    )
    collects = gc.isenabled()
    gc.disable()  # memory of earlier calls that it frees meanwhile would count as released by this one
    _enable_profiler_legacy(config)
    try:
        results = call()
    finally:
        threads = _disable_profiler_legacy()
        if collects:
            gc.enable()
    del results
    return [event for events in threads for event in events]


def _summary(changes: Sequence[int]) -> Allocation:
    totals = list(accumulate(changes, initial=0))
    signs = "".join("+" if size > 0 else "-" for size in changes)
    tops = [total for total, here, after in zip(totals, "+" + signs, signs + "-", strict=True) if here + after == "+-"]
    return Allocation(signs, tuple(tops), totals[-1])
