"""Measure a model on this machine: its operations at many sizes, and some whole pruned networks."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.costs.grids import Bench, Points, measure_tables
from autoprune.costs.latency import Evidence, Latency, Setting
from autoprune.costs.parts import draw_widths, prefixes
from autoprune.costs.returned import selecting
from autoprune.costs.runtimes import TORCH, Runtime, runtime_of
from autoprune.costs.timing import Clock, Timing, clock_for, compare, note_of_noise
from autoprune.protocols import IntArray
from autoprune.sources import seeded
from autoprune.structure.analysis import analyse, require_supported
from autoprune.structure.examples import ExampleInputs, examples_of, unwrap
from autoprune.structure.slicing import build
from autoprune.structure.structure import Structure
from autoprune.structure.trace import Forward

log = logging.getLogger(__name__)

NETWORKS = 36
"""Whole networks that the correction is fitted to, and judged on by leaving some out."""

_AT_ONCE = 12  # networks that exist at once
_ALIGNED_EVERY = 4  # of the networks drawn, one has widths that are multiples of 8, as random ones never do throughout


def profile(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    batch: int = 1,
    forward: Forward | None = None,
    outputs: Any = None,
    networks: int = NETWORKS,
    seed: int = 0,
    path: str | Path | None = None,
    runtime: str = TORCH,
) -> Latency:
    """Measure how long a model and its pruned versions take here, as a table that `autoprune.search` takes.

    On the model's device, with PyTorch's current number of threads, in the memory format of the model. The model comes
    back unchanged.

    Args:
        model: Any module that runs on the inputs.
        example_inputs: A tensor, a tuple or a dict of inputs; None for the example that the model carries. Repeated or
            cut to `batch` samples.
        batch: Samples of one forward pass.
        forward: ``forward(model, *args, **kwargs)`` where calling the model is not enough.
        outputs: Which outputs matter, as in `autoprune.search`.
        networks: Whole networks to measure.
        seed: Draws their widths.
        path: Where to save the table. What is measured is kept beside it meanwhile, and an interrupted run goes on.
        runtime: What runs the model: ``"torch"``; or ``"onnxruntime"``, on the CPU, for networks exported to ONNX, with
            ``"onnxruntime:CUDAExecutionProvider"`` for another provider. A search that takes the table measures the
            networks that it offers under the same.

    Raises:
        ImportError: If the libraries of the runtime are not installed.
        ValueError: If there are no inputs, `batch` or `networks` is too small, the device has no clock, or the runtime
            is unknown.
        UnsupportedModelError: If the model cannot be pruned, or runs other operations once it is.

    Example:
        >>> autoprune.profile(model, torch.randn(1, 3, 32, 32), path="table.json")  # doctest: +SKIP
    """
    model = unwrap(model)
    require_supported(model)
    (args, kwargs), *_ = examples_of(model, example_inputs)
    run = selecting(forward, outputs)
    structure = analyse(model, *with_batch(args, kwargs, 2), forward=run)
    return profile_structure(
        model, structure, args, kwargs, run, batch=batch, networks=networks, seed=seed, path=path, runtime=runtime
    )


def with_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any], n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs with `n` samples: those of the given ones, over and over; what does not hold samples stays."""
    leaves = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor) and leaf.ndim]
    if not leaves:
        raise ValueError("example_inputs must hold a tensor with a dimension for samples, got none")
    size = len(leaves[0])

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != size:
            return leaf
        return leaf[torch.arange(n, device=leaf.device) % size]

    resized_args, resized_kwargs = tree_map(resized, (args, dict(kwargs)))
    return resized_args, resized_kwargs


@seeded(0)  # operations run on noise, and a model may draw some itself
def profile_structure(
    model: nn.Module,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Forward,
    *,
    batch: int,
    networks: int = NETWORKS,
    seed: int = 0,
    path: str | Path | None = None,
    clock: Clock | None = None,
    runtime: str = TORCH,
) -> Latency:
    """`profile` for a model that is traced already; `clock` stands in for that of the device."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if networks < 6:
        raise ValueError(f"networks must be at least 6, to fit to some and judge on others, got {networks}")
    runs = runtime_of(runtime)
    device = next(model.parameters()).device
    clock = clock or clock_for(device, runs.elsewhere)
    args, kwargs = tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, with_batch(args, kwargs, batch)
    )
    setting = setting_of(model, args, kwargs, batch, runs)
    bench = Bench(clock, runs.yardstick(device))
    progress = _Progress(path, setting, bench)
    families, parts = runs.parts(model, structure, args, kwargs, run, seed)
    counts = [sum(part.count for part in parts if part.family == family.key) for family in families]
    tables = measure_tables(families, counts, bench)
    dense = build(model, structure.edit(prefixes(structure, structure.sizes))).eval()
    call = runs.network(dense, run, args, kwargs)
    if not progress.dense_ms:
        (timing,) = bench.compare([call], tolerance=0.01, block_seconds=2e-3)
        progress.dense_ms = timing.ratio * bench.reference_ms
    widths = draw_widths(structure, networks, np.random.default_rng(seed))
    widths[::_ALIGNED_EVERY] = _aligned(structure, widths[::_ALIGNED_EVERY])
    widths[0] = structure.sizes
    _measure_networks(model, structure, widths, lambda m: runs.network(m, run, args, kwargs), call, clock, progress)
    ratio, uncertainty = np.array(progress.networks, dtype=np.float64).T
    left_out = sorted({family.key for family in families} - {table.key for table in tables})
    notes = [note_of_noise([*bench.timings, *progress.timings])]
    notes += [f"{len(left_out)} kinds of operations could not be run alone: {left_out[0]}..."] if left_out else []
    latency = Latency(
        setting=setting,
        dense_ms=progress.dense_ms,
        groups=tuple((group.name, group.size) for group in structure.groups),
        tables=tuple(tables),
        parts=tuple(parts),
        evidence=Evidence(widths, ratio, uncertainty),
        notes=tuple(note for note in notes if note),
    )
    if path is not None:
        latency.save(path)
        progress.remove()
    return latency


def _aligned(structure: Structure, widths: IntArray) -> IntArray:
    """The nearest widths (n, groups) that are multiples of 8, in groups that have two or more of them."""
    multiples = np.lcm([group.multiple for group in structure.groups], 8)
    nearest = np.maximum(np.rint(widths / multiples).astype(np.int64), 1) * multiples
    return np.where(structure.sizes >= 2 * multiples, np.minimum(nearest, structure.sizes), widths)


def time_networks(calls: Sequence[Callable[[], Any]], dense: Callable[[], Any], clock: Clock) -> list[Timing]:
    """Time whole networks against the dense one in one interleaved run.

    Blocks are long enough for several passes of a small network: between single passes, threads fall asleep and others'
    data fills the caches, which costs small networks more than large ones.
    """
    return compare(calls, dense, clock, rounds=9, most_rounds=60, tolerance=0.01, block_seconds=1e-2, most_seconds=2.0)


def _measure_networks(
    model: nn.Module,
    structure: Structure,
    widths: IntArray,
    make: Callable[[nn.Module], Callable[[], Any]],
    dense: Callable[[], Any],
    clock: Clock,
    progress: _Progress,
) -> None:
    """Time networks (m, groups) that `progress` does not hold yet."""
    for start in range(len(progress.networks), len(widths), _AT_ONCE):
        some = widths[start : start + _AT_ONCE]
        calls = [make(build(model, structure.edit(prefixes(structure, row))).eval()) for row in some]
        timings = time_networks(calls, dense, clock)
        progress.timings += timings
        progress.networks += [(timing.ratio, timing.uncertainty) for timing in timings]
        progress.save()
        log.info("latency of whole networks: %d of %d measured", start + len(some), len(widths))


class _Progress:
    """What is measured so far, kept in a file beside the table."""

    def __init__(self, path: str | Path | None, setting: Setting, bench: Bench) -> None:
        self._file = None if path is None else Path(f"{path}.partial")
        self._setting = setting
        self._bench = bench
        self.dense_ms = 0.0
        self.networks: list[tuple[float, float]] = []
        self.timings: list[Timing] = []
        bench.save = self.save
        if self._file is not None and self._file.exists():
            self._read(self._file)

    def save(self) -> None:
        """Write everything; a kill leaves the old file or the new one."""
        if self._file is None:
            return
        known = {key: [[list(at), *ms] for at, ms in points.items()] for key, points in self._bench.known.items()}
        data = {
            "setting": self._identity(),
            "reference_ms": self._bench.reference_ms,
            "dense_ms": self.dense_ms,
            "networks": self.networks,
            "known": known,
        }
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(data))
        fresh.replace(self._file)

    def remove(self) -> None:
        """Drop the file, because the table is complete."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _identity(self) -> list[Any]:
        own = self._setting
        where = [own.device, own.machine, own.threads, own.runtime, dict(own.versions)]
        return [own.model, list(own.inputs), own.batch, *where]

    def _read(self, file: Path) -> None:
        data = json.loads(file.read_text())
        if data["setting"] != self._identity():
            log.warning("%s is of another model, machine, runtime or setting, and is replaced", file)
            return
        points: dict[str, Points] = {
            key: {tuple(at): (ms, low, high) for at, ms, low, high in rows} for key, rows in data["known"].items()
        }
        self._bench.known.update(points)
        self._bench.reference_ms = data["reference_ms"]
        self.dense_ms = data["dense_ms"]
        self.networks = [tuple(row) for row in data["networks"]]
        log.info("going on with %s: %d families measured already", file, len(points))


def setting_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int, runtime: Runtime
) -> Setting:
    """What latencies measured here and now hold for."""
    from autoprune import __version__

    device = next(model.parameters()).device
    inputs = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    return Setting(
        model=type(model).__name__,
        inputs=tuple(f"{str(x.dtype).removeprefix('torch.')} {'x'.join(map(str, x.shape))}" for x in inputs),
        batch=batch,
        device=device.type,
        machine=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        threads=torch.get_num_threads(),
        runtime=runtime.name,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "autoprune": __version__,
            **runtime.versions,
        },
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
