"""Latency of pruned models, predicted from what their operations and some whole networks were measured to take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, final

import numpy as np

from autoprune.costs.grids import Table
from autoprune.costs.parts import Part, part_values
from autoprune.errors import RecipeError
from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.structure import Structure

FORMAT = "autoprune-latency"
VERSION = 1
UNITS = {"ms": "milliseconds of one forward pass of the whole batch", "ratio": "of the dense network's time"}

_TOWARDS_ONE_FACTOR = 0.2  # expected error of a network over how far factors of kinds are expected to be apart
_ALIGNED = 8  # kernels compute channels in blocks of as many, or of a multiple; what is left over costs more in a whole
_SURE = 0.8  # share of networks that the upper limit is to hold for; what is offered is measured
_FOLDS = 3


@dataclass(frozen=True)
class Setting:
    """What latencies hold for.

    Attributes:
        model: Class of the model.
        inputs: Type and shape of each input tensor, such as ``"float32 1x3x32x32"``.
        batch: Samples of one forward pass.
        device: ``"cpu"`` or ``"cuda"``.
        machine: Name of the processor or GPU.
        threads: Threads of PyTorch.
        runtime: What runs the model: as `autoprune.profile` takes it, or a name of the user's.
        versions: Of Python, PyTorch, autoprune and the runtime.
        date: When it was measured, UTC.
    """

    model: str
    inputs: tuple[str, ...]
    batch: int
    device: str
    machine: str
    threads: int
    runtime: str
    versions: Mapping[str, str]
    date: str

    def elsewhere(self, here: Setting) -> list[str]:
        """What differs `here` in what times depend on, as ``"threads 1, here 2"``."""
        names = ("device", "machine", "threads", "runtime")
        found = [
            f"{n} {getattr(self, n)}, here {getattr(here, n)}" for n in names if getattr(self, n) != getattr(here, n)
        ]
        if self.runtime == here.runtime and self.runtime_version != here.runtime_version:
            found.append(f"{self.library} {self.runtime_version or 'of no version'}, here {here.runtime_version}")
        return found

    @property
    def library(self) -> str:
        """The runtime without its provider."""
        return self.runtime.partition(":")[0]

    @property
    def runtime_version(self) -> str:
        """Version of the runtime, empty if it is not known."""
        return self.versions.get(self.library, "")


@dataclass(frozen=True)
class Evidence:
    """Whole networks that were measured, each against the dense one in the same run.

    Attributes:
        widths: Units kept in each group, shape (m, groups).
        ratio: Their time over the dense network's, shape (m,).
        uncertainty: How far the 95 % interval of each reaches, as a fraction of it, shape (m,).
    """

    widths: IntArray
    ratio: FloatArray
    uncertainty: FloatArray


@dataclass(frozen=True)
class Correction:
    """What turns times of parts into the time of the whole: fitted to whole networks.

    How good it is, is said by fits to two thirds of the networks that predict the last third, each third in turn.

    Attributes:
        constant_ms: What every network takes: Python, launches, and what has no part.
        factors: What the parts of each kind are multiplied by; running alone, they find all they read in the cache.
        median_error: Median of the distance of predicted / measured from 1.
        p95_error: 95th percentile of it.
        spearman: Rank correlation of predicted and measured.
        margin: By how much predictions must be raised so that four of five networks take no longer, as a fraction.
        networks: Number of networks.
    """

    constant_ms: float
    factors: Mapping[str, float]
    median_error: float
    p95_error: float
    spearman: float
    margin: float
    networks: int


@final
@dataclass(frozen=True, eq=False)
class Latency:
    """A latency model of one network on one machine; measured by `autoprune.profile`.

    Attributes:
        setting: What it holds for.
        dense_ms: Milliseconds of the dense network.
        groups: Name and size of every group of the network's structure.
        tables: Measured times of families of operations.
        parts: Which operations the network runs, and their sizes as functions of the widths.
        evidence: Whole networks that were measured.
        correction: From the parts to the whole.
        notes: What was left out, and how noisy the machine was, in plain words.
    """

    setting: Setting
    dense_ms: float
    groups: tuple[tuple[str, int], ...]
    tables: tuple[Table, ...]
    parts: tuple[Part, ...]
    evidence: Evidence
    correction: Correction = None  # type: ignore[assignment]  # fitted below if not given
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.correction is None:
            object.__setattr__(self, "correction", self._fit())

    def predict(self, widths: FloatArray) -> FloatArray:
        """Milliseconds of the whole network for the batch, shape (n,), at widths (n, groups)."""
        kinds = self.by_kind(widths)
        total = np.full(len(widths), self.correction.constant_ms)
        for kind, ms in kinds.items():
            total += self.correction.factors[kind] * ms
        return total

    def right_edges(self, multiples: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """For each group its widths, ascending, beyond which the next wider ones take noticeably more time.

        All other groups are dense. Noticeably is half of what a unit costs on average.

        Args:
            multiples: What the width of each group is a multiple of, length (groups,).
        """
        sizes = np.array([size for _, size in self.groups], dtype=np.float64)
        found = {}
        for g, ((name, size), multiple) in enumerate(zip(self.groups, multiples, strict=True)):
            own = np.arange(multiple, size + 1, multiple)
            widths = np.tile(sizes, (len(own), 1))
            widths[:, g] = own
            ms = self.predict(widths)
            least_wider = np.append(np.minimum.accumulate(ms[::-1])[::-1][1:], np.inf)
            noticeable = max(0.5 * (ms[-1] - ms[0]) / max(len(own) - 1, 1), 0.0)
            found[name] = tuple(own[least_wider > ms + noticeable].tolist())
        return found

    def by_kind(self, widths: FloatArray) -> dict[str, FloatArray]:
        """Sums of measured parts by kind, uncorrected, in milliseconds, shape (n,) each.

        Those that have a size that is no multiple of 8 are a kind of their own.
        """
        values = part_values(self.parts, widths)
        whole = {size: value % _ALIGNED == 0 for size, value in values.items()}
        places: dict[tuple[tuple[int, ...], int, Any], _Place] = {}
        kinds: dict[str, FloatArray] = {}
        for part in self.parts:
            table = self._by_key.get(part.family)
            if table is None:
                continue
            keys = [(axis, table.aligned, size) for axis, size in zip(table.axes, part.sizes, strict=True)]
            for axis, aligned, size in keys:
                if (axis, aligned, size) not in places:
                    places[axis, aligned, size] = _place(axis, aligned, values[size])
            ms = part.count * _interpolate(table, [places[key] for key in keys])
            aligned = np.logical_and.reduce([whole[size] for size in part.sizes], axis=0) | np.zeros(len(widths), bool)
            for kind, rows in ((table.kind, aligned), (f"unaligned {table.kind}", ~aligned)):
                kinds[kind] = kinds.get(kind, np.zeros(len(widths))) + np.where(rows, ms, 0.0)
        return kinds

    @cached_property
    def _by_key(self) -> dict[str, Table]:
        return {table.key: table for table in self.tables}

    def refitted(self, widths: IntArray, ratio: FloatArray, uncertainty: FloatArray) -> Latency:
        """The same model with more whole networks, widths (m, groups), added to what it is fitted to."""
        old = self.evidence
        evidence = Evidence(
            np.concatenate([old.widths, widths]),
            np.concatenate([old.ratio, ratio]),
            np.concatenate([old.uncertainty, uncertainty]),
        )
        return replace(self, evidence=evidence, correction=None)  # type: ignore[arg-type]  # fitted anew

    def _fit(self) -> Correction:
        """Least squares of relative errors with factors of at least 0, held near the best common factor."""
        seen = self.evidence
        kinds = self.by_kind(seen.widths.astype(np.float64))
        measured = seen.ratio * self.dense_ms
        columns = np.stack([np.ones(len(measured)), *kinds.values()], axis=1) / measured[:, None]
        weights = 1 / np.maximum(seen.uncertainty, 0.01)
        weights = weights / np.median(weights)
        constant, *factors = _factors(columns, weights).tolist()
        predicted = np.empty(len(measured))  # over measured, by fits to others
        for fold in range(_FOLDS):
            rows = np.arange(len(measured)) % _FOLDS == fold
            predicted[rows] = columns[rows] @ _factors(columns[~rows], weights[~rows])
        errors = np.abs(predicted - 1)
        return Correction(
            constant_ms=constant,
            factors=dict(zip(kinds, factors, strict=True)),
            median_error=float(np.median(errors)),
            p95_error=float(np.quantile(errors, 0.95)),
            spearman=_spearman(predicted * measured, measured),
            margin=max(float(np.quantile(1 / predicted - 1, _SURE)), 0.0),
            networks=len(measured),
        )

    def require_match(self, structure: Structure, batch: int, model: str) -> None:
        """Refuse another model or batch size.

        Raises:
            ValueError: If they are others; names what differs.
        """
        differing = []
        if batch != self.setting.batch:
            differing.append(f"its batch size is {self.setting.batch}, and cost_batch is {batch}")
        if model != self.setting.model:
            differing.append(f"its model is {self.setting.model}, and this is {model}")
        here = tuple((group.name, group.size) for group in structure.groups)
        if here != self.groups:
            own, other = dict(self.groups), dict(here)
            names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
            shown = ", ".join(f"{n} ({own.get(n, 'none')} units, here {other.get(n, 'none')})" for n in names[:3])
            differing.append(f"its groups differ in {shown or 'their order'}" + ("..." if len(names) > 3 else ""))
        if differing:
            raise ValueError(
                f"latency must be a table of this model at this batch size, but {'; '.join(differing)}; "
                "measure again with autoprune.profile"
            )

    def save(self, path: str | Path) -> Path:
        """Write a portable JSON table; an existing file is replaced."""
        path = Path(path)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Latency:
        """Read what `save` wrote, here or on another machine.

        Raises:
            FileNotFoundError: If there is no such file.
            RecipeError: If it is damaged, foreign, or of a newer version.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"latency must be a file written by autoprune profile, got {path}: no such file")
        try:
            data = json.loads(file.read_text())
            if data["format"] != FORMAT or data["version"] != VERSION:
                raise ValueError(f"format {data['format']!r} version {data['version']!r}")
            return cls.from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"{file} is not a latency table of autoprune, or is damaged: {error!r}") from error

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with everything that a prediction needs."""
        seen = self.evidence
        return {
            "format": FORMAT,
            "version": VERSION,
            "units": UNITS,
            "setting": {**asdict(self.setting), "inputs": list(self.setting.inputs)},
            "dense_ms": self.dense_ms,
            "notes": list(self.notes),
            "correction": _nan_to_none(asdict(self.correction)),
            "groups": [list(group) for group in self.groups],
            "parts": [
                {"family": part.family, "count": part.count, "sizes": [[f, list(map(list, s))] for f, s in part.sizes]}
                for part in self.parts
            ],
            "tables": [
                {
                    "family": table.key,
                    "kind": table.kind,
                    "axes": [list(axis) for axis in table.axes],
                    "aligned": table.aligned,
                    "ms": table.ms.tolist(),
                    "low": table.low.tolist(),
                    "high": table.high.tolist(),
                }
                for table in self.tables
            ],
            "networks": {
                "widths": seen.widths.tolist(),
                "ratio": seen.ratio.tolist(),
                "uncertainty": seen.uncertainty.tolist(),
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Latency:
        """Restore what `to_json` wrote."""
        seen, correction = data["networks"], _none_to_nan(data["correction"])
        return cls(
            setting=Setting(**{**data["setting"], "inputs": tuple(data["setting"]["inputs"])}),
            dense_ms=data["dense_ms"],
            groups=tuple((str(name), int(size)) for name, size in data["groups"]),
            tables=tuple(
                Table(
                    t["family"],
                    t["kind"],
                    tuple(tuple(axis) for axis in t["axes"]),
                    np.array(t["ms"], dtype=np.float64),
                    np.array(t["low"], dtype=np.float64),
                    np.array(t["high"], dtype=np.float64),
                    t.get("aligned", 1),
                )
                for t in data["tables"]
            ),
            parts=tuple(
                Part(p["family"], tuple((f, tuple((g, each) for g, each in s)) for f, s in p["sizes"]), p["count"])
                for p in data["parts"]
            ),
            evidence=Evidence(
                np.array(seen["widths"], dtype=np.int64),
                np.array(seen["ratio"], dtype=np.float64),
                np.array(seen["uncertainty"], dtype=np.float64),
            ),
            correction=Correction(**correction),
            notes=tuple(data["notes"]),
        )

    def __str__(self) -> str:
        where, how = self.setting, self.correction
        return (
            f"{where.model}, batch {where.batch}: {self.dense_ms:.4g} ms dense on {where.machine} ({where.device}, "
            f"{where.threads} threads, {where.runtime} {where.runtime_version}); predictions are off "
            f"by {how.median_error:.1%} on the median and by {how.p95_error:.1%} at the 95th percentile of "
            f"{how.networks} networks, each by a fit without it (rank correlation {how.spearman:.3f})"
        )


_Place = tuple[IntArray, IntArray, FloatArray]
"""Which points of an axis values lie between, and where between them, in [0, 1]."""


def _place(axis: Sequence[int], aligned: int, values: FloatArray) -> _Place:
    """Between points that are multiples of `aligned` for values that are, and between the others for the others."""
    points = np.array(axis, dtype=np.int64)
    left, right = np.zeros((2, len(values)), dtype=np.int64)
    t: FloatArray = np.zeros(len(values))
    for kind in (True, False):
        rows = np.flatnonzero((values % aligned == 0) == kind)
        own = np.flatnonzero((points % aligned == 0) == kind)
        own = own if len(own) else np.arange(len(points))
        after = np.clip(np.searchsorted(points[own], values[rows], side="right"), 1, max(len(own) - 1, 1))
        left[rows], right[rows] = own[after - 1], own[np.minimum(after, len(own) - 1)]
        gaps = np.maximum(points[right[rows]] - points[left[rows]], 1)
        t[rows] = np.clip((values[rows] - points[left[rows]]) / gaps, 0.0, 1.0)
    return left, right, t


def _interpolate(table: Table, places: Sequence[_Place]) -> FloatArray | float:
    """Multilinear interpolation, shape (n,); a number for an operation of constant size."""
    if not places:
        return float(table.ms)
    total: FloatArray = np.zeros(len(places[0][0]))
    for corner in product((0, 1), repeat=len(places)):
        weight: FloatArray = np.ones(len(total))
        index = []
        for up, (left, right, t) in zip(corner, places, strict=True):
            weight = weight * (t if up else 1 - t)
            index.append(right if up else left)
        total += weight * table.ms[tuple(index)]
    return total


def _factors(columns: FloatArray, weights: FloatArray) -> FloatArray:
    """Factors of at least 0 for columns (m, 1 + kinds) whose sums should be 1: a constant, then one for each kind."""
    from scipy.optimize import nnls

    common = np.stack([columns[:, 0], columns[:, 1:].sum(axis=1)], axis=1) * weights[:, None]
    constant, factor = nnls(common, weights)[0]
    # Rows that ask for the common factor: heard where a kind is small in all networks, so that noise would decide.
    hold = np.diag([0.0, *[_TOWARDS_ONE_FACTOR] * (columns.shape[1] - 1)])
    wanted = hold @ np.array([constant, *[factor] * (columns.shape[1] - 1)])
    solved: FloatArray = nnls(np.concatenate([columns * weights[:, None], hold]), np.concatenate([weights, wanted]))[0]
    return solved


def _spearman(a: FloatArray, b: FloatArray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if len(a) > 2 else math.nan


def _nan_to_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _none_to_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in values.items()}
