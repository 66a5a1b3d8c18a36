"""Honest timing: calls interleaved with a reference, so that a machine that drifts or is shared cancels out.

A block of a few repeats of each call is timed between two blocks of the reference, in rounds whose order is shuffled.
The measurement of a block is its ratio to the mean of the two: a slower machine slows both. The median over rounds is
robust to single blocks that another program disturbed; a bootstrap over rounds gives its interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from autoprune.costs.latency.allocator import keeping_freed_memory
from autoprune.protocols import FloatArray

Call = Callable[[], Any]

NOISY = 0.05
"""A median whose 95 % interval is wider than this on either side, as a fraction of it, is reported as noisy."""

Over = Callable[[], bool]
"""``over()`` returns whether the time for measuring is over."""

_OUTLIER = 6.0  # scaled median absolute deviations from the median
_RESAMPLES = 200
_BLOCKS_PER_REFERENCE = 6
_MOST_REPEATS = 10_000
_LEAST_ROUNDS = 5
_WARM = 3  # calls before a block, if it has as many


class TimeOverError(TimeoutError):
    """The time for measuring was over; earlier measurements are kept."""


def never() -> bool:
    """Return False: there is no limit on time."""
    return False


@dataclass(frozen=True)
class Repeated:
    """Call that repeats another several times, for calls that are short compared with the overhead of a call."""

    call: Call
    times: int

    def __call__(self) -> Any:
        """Run all of them."""
        return self.call()


class Clock(Protocol):
    """Times a call; a protocol so that tests need no real time."""

    def seconds(self, call: Call, repeats: int) -> float:
        """Time `repeats` calls in a row, in seconds, with all work that they started."""
        ...


class CpuClock:
    """Clock of the CPU: with one thread the time that it ran, without that of other programs; else wall time.

    Torch's number of threads is read when the clock is made.

    Args:
        elsewhere: Whether work is done outside of the calling thread even if there is one.
    """

    def __init__(self, elsewhere: bool = False) -> None:
        alone = torch.get_num_threads() == 1 and not elsewhere
        self._now = time.thread_time if alone else time.perf_counter

    def seconds(self, call: Call, repeats: int) -> float:
        """Seconds of `repeats` calls."""
        began = self._now()
        for _ in range(repeats):
            call()
        return self._now() - began


class CudaClock:
    """Clock by two events on a GPU's stream, which is idle when the first is recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, call: Call, repeats: int) -> float:
        """Seconds of `repeats` calls, launches included where they are slower than the kernels."""
        with torch.cuda.device(self._device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch
            torch.cuda.synchronize()
            begin.record()
            for _ in range(repeats):
                call()
            end.record()
            torch.cuda.synchronize()
            return float(begin.elapsed_time(end)) / 1e3


def clock_for(device: torch.device, elsewhere: bool = False) -> Clock:
    """Make the clock of a device; `elsewhere` as in `CpuClock`.

    Raises:
        ValueError: If the device is neither a CPU nor a CUDA GPU.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"latency is measured on 'cpu' or 'cuda', got {str(device)!r}; pass costs= with your own")
    return CudaClock(device) if device.type == "cuda" else CpuClock(elsewhere)


@dataclass(frozen=True)
class Timing:
    """Time of a call.

    Attributes:
        ms: Milliseconds of one call, at the speed that the reference had on the median.
        ratio: Median of its time over that of the reference.
        low: Lower end of the 95 % interval of `ratio`, by bootstrap over rounds.
        high: Its upper end.
        rounds: Blocks that were timed.
        outliers: Blocks more than 6 scaled median absolute deviations off; they count like all others.
    """

    ms: float
    ratio: float
    low: float
    high: float
    rounds: int
    outliers: int

    @property
    def uncertainty(self) -> float:
        """Distance of the interval's farther end from the median, as a fraction of the median."""
        return max(self.high - self.ratio, self.ratio - self.low) / self.ratio


@dataclass(frozen=True)
class Effort:
    """Time to spend on each call of a comparison, and the precision that is enough.

    Attributes:
        rounds: Blocks of each call; 5 are enough where they took longer than `most_seconds` in all.
        most_rounds: Blocks of a call whose interval stays wider than `tolerance` on either side.
        tolerance: Fraction of the median.
        block_seconds: Least time of a block; a shorter call is repeated.
        most_seconds: A call whose blocks took longer than this in all gets no more of them.
    """

    rounds: int = 9
    most_rounds: int = 27
    tolerance: float = 0.02
    block_seconds: float = 1e-3
    most_seconds: float = np.inf


USUAL = Effort()


@keeping_freed_memory()
def compare(
    calls: Sequence[Call],
    reference: Call,
    clock: Clock,
    effort: Effort = USUAL,
    *,
    seed: int = 0,
    over: Over = never,
) -> list[Timing]:
    """Time calls against a reference in one interleaved run.

    Meanwhile the C library keeps freed memory, so that times do not depend on earlier runs; see
    `autoprune.costs.latency.allocator`.

    Args:
        calls: Calls to time.
        reference: Call that every other one is compared with.
        clock: Takes the time.
        effort: Rounds, and the length of blocks.
        seed: Orders the calls within rounds, so that periodic disturbances hit all alike, and draws the resamples.
        over: Checked between calls and rounds: once it returns True, 5 rounds are enough.

    Returns:
        One timing for each call, in their order.

    Raises:
        TimeOverError: If time was over before each call had 5 blocks.
    """
    rng = np.random.default_rng(seed)
    repeats = []
    for call in calls:
        if over():
            raise TimeOverError
        repeats.append(_warm_up(call, clock, effort.block_seconds))
    steps = _warm_up(reference, clock, effort.block_seconds)
    ratios: list[list[float]] = [[] for _ in calls]
    spent = [0.0] * len(calls)
    references: list[float] = []
    found: list[Timing | None] = [None] * len(calls)
    waiting = list(range(len(calls)))
    done = 0
    while waiting:
        before = _block(reference, steps, clock)
        order = rng.permutation(waiting).tolist()
        for start in range(0, len(order), _BLOCKS_PER_REFERENCE):
            some = order[start : start + _BLOCKS_PER_REFERENCE]
            taken = [_block(calls[i], repeats[i], clock) for i in some]
            after = _block(reference, steps, clock)
            for i, seconds in zip(some, taken, strict=True):
                ratios[i].append(2 * seconds / (before + after))
                spent[i] += seconds * repeats[i]
            references.append(after)
            before = after
        done += 1
        speed = float(np.median(references))
        ended = over()
        if ended and done < _LEAST_ROUNDS:
            raise TimeOverError
        last = ended or done >= effort.most_rounds
        due = done >= effort.rounds and done % 3 == 0
        for i in list(waiting):
            enough = done >= min(effort.rounds, _LEAST_ROUNDS) and spent[i] >= effort.most_seconds
            if last or due or enough:
                found[i] = _timing(np.array(ratios[i]), speed, rng)
            if last or enough or (due and _timing_of(found[i]).uncertainty <= effort.tolerance):
                waiting.remove(i)
    return [_timing_of(timing) for timing in found]


def _timing_of(timing: Timing | None) -> Timing:
    assert timing is not None
    return timing


def _block(call: Call, repeats: int, clock: Clock) -> float:
    """Seconds of one call in a row of repeats, after up to three that are not timed.

    Earlier calls have emptied the caches: the processor's, and that of oneDNN, which keeps 1,024 kernels, fewer than a
    few dozen networks run. A network that had to compile its kernels again took up to twice its time. One call is not
    enough for networks of a few milliseconds: among twelve others, pruned networks looked 4 % faster relative to the
    dense one, which needs longer to warm up, than alone with it; after three calls they are within 1 %.
    """
    for _ in range(min(_WARM, repeats)):
        call()
    return clock.seconds(call, repeats) / repeats


def _warm_up(call: Call, clock: Clock, block_seconds: float) -> int:
    """Run a call until its memory and kernels are ready, and return the number of repeats in a block."""
    clock.seconds(call, 1)
    seconds = clock.seconds(call, 2) / 2
    if seconds < block_seconds / 10:
        seconds = clock.seconds(call, 10) / 10
    return int(np.clip(np.ceil(block_seconds / max(seconds, 1e-9)), 1, _MOST_REPEATS))


def _timing(ratios: FloatArray, reference_seconds: float, rng: np.random.Generator) -> Timing:
    median = float(np.median(ratios))
    resampled = np.median(rng.choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    away = np.abs(ratios - median)
    spread = 1.4826 * float(np.median(away))
    outliers = int((away > _OUTLIER * spread).sum()) if spread > 0 else 0
    return Timing(1e3 * reference_seconds * median, median, low, high, len(ratios), outliers)


def note_of_noise(timings: Sequence[Timing]) -> str:
    """Note in plain words how noisy timings are; empty where they are not."""
    noisy = sum(timing.uncertainty > NOISY for timing in timings)
    blocks, outliers = sum(timing.rounds for timing in timings), sum(timing.outliers for timing in timings)
    said = []
    if noisy:
        worst = max(timing.uncertainty for timing in timings)
        said.append(
            f"the machine is noisy: {noisy} of {len(timings)} medians are known to no better than {NOISY:.0%} (worst "
            f"{worst:.0%}), and their intervals say so; close other programs and measure again"
        )
    if outliers:
        said.append(f"{outliers} of {blocks} blocks were outliers; they count like all others")
    return "; ".join(said)
