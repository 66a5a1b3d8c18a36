"""Measure the latency of a model on this machine: its operations at many sizes, and some whole pruned networks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from autoprune.arguments import MOST_SEED, pointing, whole_number
from autoprune.costs.latency.allocator import keeping_freed_memory
from autoprune.costs.latency.correction import Evidence
from autoprune.costs.latency.grids import Bench, measure_tables
from autoprune.costs.latency.model import Latency
from autoprune.costs.latency.progress_file import Progress
from autoprune.costs.latency.setting import setting_of
from autoprune.costs.latency.tables import Table
from autoprune.costs.latency.timing import (
    Clock,
    Effort,
    Over,
    TimeOverError,
    Timing,
    clock_for,
    compare,
    never,
    note_of_noise,
)
from autoprune.costs.operations.parts import draw_widths, prefixes
from autoprune.costs.operations.runtimes import TORCH, Runtime, runtime_of
from autoprune.data.sampling import seeded
from autoprune.files.access import as_path
from autoprune.protocols import IntArray
from autoprune.structure.analysis import analyse, require_prunable, require_supported
from autoprune.structure.call import PLACES, CallOrInputs, call_of, example_of
from autoprune.structure.example import Example
from autoprune.structure.given import unwrap
from autoprune.structure.slicing.slicing import build
from autoprune.structure.structure import Structure

log = logging.getLogger(__name__)

NETWORKS = 36
"""Whole networks that the correction is fitted to and cross-validated on."""

MOST_NETWORKS = 10_000

FEWEST_NETWORKS = 6
"""Least number of networks, so that a fit to some can be judged on others."""

_DENSE = Effort(rounds=6, most_rounds=18, tolerance=0.01, block_seconds=2e-3, most_seconds=0.3)
_WHOLE = Effort(rounds=9, most_rounds=60, tolerance=0.01, block_seconds=1e-2, most_seconds=2.0)
_PASSES = 5  # of the dense network, to see what the allocator costs
_SLOWED = 1.2  # slow-down by it from which on there is a note
_AT_ONCE = 12  # networks that exist at once
_ALIGNED_EVERY = 4  # one of this number of networks has multiples of 8 as widths, which random ones never have all


@pointing(PLACES)
def profile(
    model: nn.Module,
    example: CallOrInputs | None = None,
    *,
    batch: int | None = None,
    networks: int = NETWORKS,
    seed: int = 0,
    path: str | Path | None = None,
    runtime: str = TORCH,
) -> Latency:
    """Measure how long a model and its pruned versions take here, as a table that `autoprune.search` takes.

    Times are taken on the model's device, with PyTorch's current number of threads, in the memory format of the model.
    The model comes back unchanged.

    Args:
        model: Any module that runs on the inputs.
        example: A tensor, a tuple or a dict of inputs; None for the example that the model carries. Repeated or cut to
            `batch` samples. In a list of these the first is timed; the others cover further branches. Or a `Call` of
            such inputs, as in `autoprune.search`.
        batch: Samples of one forward pass; None for the ``cost_batch`` of the example, which is 1 if not given.
        networks: Whole networks to measure, at least 6.
        seed: Draws their widths.
        path: File of the table. Measurements are kept next to it meanwhile, and an interrupted run continues.
        runtime: ``"torch"``; or ``"onnxruntime"``, on the CPU, for networks exported to ONNX, with
            ``"onnxruntime:CUDAExecutionProvider"`` for another provider. A search with the table measures its result
            under the same runtime.

    Raises:
        ImportError: If the libraries of the runtime are not installed.
        OSError: If no table can be written to `path`.
        ValueError: If there are no inputs, `batch` or `networks` is too small, the device has no clock, or the runtime
            is unknown.
        NothingToPruneError: If nothing can be removed from the model; says why.
        UnsupportedModelError: If it is scripted, quantised or on several devices, or runs other operations once it is
            pruned.

    Example:
        >>> autoprune.profile(model, torch.randn(1, 3, 32, 32), path="table.json")  # doctest: +SKIP
    """
    call = call_of(example)
    batch = call.cost_batch if batch is None else whole_number("batch", batch, 1)
    networks = whole_number(
        "networks", networks, FEWEST_NETWORKS, MOST_NETWORKS, why=", to fit to some and judge on others"
    )
    seed = whole_number("seed", seed, 0, MOST_SEED)
    runtime_of(runtime)  # mistakes must show before minutes of measuring
    if path is not None:
        _require_writable(as_path(path))
    model = unwrap(model)
    require_supported(model)
    timed = example_of(model, call)
    structure = analyse(_of_two(timed), checks=call.checks, rewrite=call.rewrite)
    return profile_structure(timed.resized(batch), structure, networks=networks, seed=seed, path=path, runtime=runtime)


def _of_two(example: Example) -> Example:
    """Every call with two samples; as it is where its inputs cannot be cut by samples."""
    calls = [replace(example, args=args, kwargs=kwargs, further=()) for args, kwargs in example.inputs]
    first, *further = [call.resized(2) if call.divisible else call for call in calls]
    return replace(first, further=[inputs for call in further for inputs in call.inputs])


def _require_writable(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file to write the table to, got the folder {path}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"path must lie in a folder that exists, got {path}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"path must lie in a folder that can be written, got {path}")


@seeded(0)  # operations run on noise, and a model may draw some itself
def profile_structure(
    example: Example,
    structure: Structure,
    *,
    networks: int = NETWORKS,
    seed: int = 0,
    path: str | Path | None = None,
    clock: Clock | None = None,
    runtime: str = TORCH,
    over: Over = never,
) -> Latency:
    """Profile a model that is traced already.

    Args:
        example: The model, with inputs of the batch size that is timed.
        structure: What can be removed from it.
        networks: Whole networks to measure.
        seed: Draws their widths.
        path: File of the table.
        clock: Replaces that of the device.
        runtime: As in `profile`.
        over: Once it returns True, the table is made of the measurements so far, if these are all operations and 6
            networks.

    Raises:
        TimeOverError: If there are fewer; says how many.
    """
    require_prunable(structure)
    runs = runtime_of(runtime)
    device = next(example.model.parameters()).device
    clock = clock or clock_for(device, runs.elsewhere)
    example = example.on(device)
    setting = setting_of(example, runs)
    bench = Bench(clock, runs.yardstick(device), over=over)
    families, parts = runs.parts(example, structure, seed)
    widths = _networks(structure, networks, seed)
    progress = Progress(path, setting, parts, widths, bench)
    tables: list[Table] | None = None
    cut_short = ""
    try:
        tables = measure_tables(families, bench)
        dense = build(example.model, structure.edit(prefixes(structure, structure.sizes))).eval()
        call = runs.network(example.of(dense))
        if not progress.dense_ms:
            (timing,) = bench.compare([call], _DENSE)
            progress.dense_ms = timing.ratio * bench.reference_ms
        _measure_networks(example, structure, widths, runs, call, clock, progress, over)
    except TimeOverError as error:
        cut_short = (
            f"{len(bench.known)} of {len(families)} kinds of operations and {len(progress.networks)} of {len(widths)} "
            "networks were measured"
        )
        if tables is None or len(progress.networks) < FEWEST_NETWORKS:
            raise TimeOverError(cut_short) from error
        widths = widths[: len(progress.networks)]
    ratio, uncertainty = np.array(progress.networks, dtype=np.float64).T
    left_out = sorted({family.key for family in families} - {table.key for table in tables})
    notes = [note_of_noise([*bench.timings, *progress.timings])]
    notes += [f"time was over when {cut_short}"] if cut_short else [note_on_memory(call, clock)]
    notes += [f"{len(left_out)} kinds of operations could not be run alone: {left_out[0]}..."] if left_out else []
    latency = Latency(
        setting=setting,
        dense_ms=progress.dense_ms,
        groups=tuple((group.name, group.size) for group in structure.groups),
        tables=tuple(tables),
        parts=tuple(parts),
        evidence=Evidence(widths, ratio, uncertainty),
        notes=tuple(note for note in notes if note),
        branches=tuple(b.name for b in structure.branches) if any(part.branch >= 0 for part in parts) else (),
    )
    if path is not None:
        latency.save(path)
        progress.remove()
    return latency


def note_on_memory(dense: Callable[[], Any], clock: Clock) -> str:
    """Note on how much slower a network is in a process that returns memory to the system; empty if it hardly is."""

    def ms() -> float:
        clock.seconds(dense, 2)
        return 1e3 * float(np.median([clock.seconds(dense, 1) for _ in range(_PASSES)]))

    with keeping_freed_memory():
        kept = ms()
    usual = ms()
    if usual < _SLOWED * kept:
        return ""
    return (
        f"the dense network takes {kept:.4g} ms where the C library keeps freed memory, as while it is measured, and "
        f"{usual:.4g} ms where it does not: run it with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 in the "
        "environment, or with an allocator such as jemalloc"
    )


def _networks(structure: Structure, n: int, seed: int) -> IntArray:
    """Widths (n, groups) of the networks to measure: the dense one first."""
    widths = draw_widths(structure, n, np.random.default_rng(seed))
    widths[::_ALIGNED_EVERY] = _aligned(structure, widths[::_ALIGNED_EVERY])
    widths[0] = structure.sizes
    return widths


def _aligned(structure: Structure, widths: IntArray) -> IntArray:
    """Round widths (n, groups) to the nearest multiples of 8, in groups that have two or more of them."""
    multiples = np.lcm([group.multiple for group in structure.groups], 8)
    nearest = np.maximum(np.rint(widths / multiples).astype(np.int64), 1) * multiples
    return np.where(structure.sizes >= 2 * multiples, np.minimum(nearest, structure.sizes), widths)


def time_networks(
    calls: Sequence[Callable[[], Any]], dense: Callable[[], Any], clock: Clock, over: Over = never
) -> list[Timing]:
    """Time whole networks against the dense one in one interleaved run.

    Blocks are long enough for several passes of a small network: between single passes, threads fall asleep and the
    data of other networks fills the caches, which costs small networks more than large ones.
    """
    return compare(calls, dense, clock, _WHOLE, over=over)


def _measure_networks(
    example: Example,
    structure: Structure,
    widths: IntArray,
    runtime: Runtime,
    dense: Callable[[], Any],
    clock: Clock,
    progress: Progress,
    over: Over,
) -> None:
    """Time networks (m, groups) that `progress` does not hold yet.

    Raises:
        TimeOverError: If time was over before; `progress` has those measured until then.
    """
    for start in range(len(progress.networks), len(widths), _AT_ONCE):
        some = widths[start : start + _AT_ONCE]
        modules = [build(example.model, structure.edit(prefixes(structure, row))).eval() for row in some]
        calls = [runtime.network(example.of(module)) for module in modules]
        timings = time_networks(calls, dense, clock, over)
        progress.timings += timings
        progress.networks += [(timing.ratio, timing.uncertainty) for timing in timings]
        progress.save()
        log.info("latency of whole networks: %d of %d measured", start + len(some), len(widths))
