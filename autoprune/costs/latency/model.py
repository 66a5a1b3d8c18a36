"""Latency of pruned models, predicted from measured times of their operations and of some whole networks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np

from autoprune.costs.latency.correction import Correction, Evidence, fit
from autoprune.costs.latency.setting import Setting
from autoprune.costs.latency.tables import Place, Table, interpolate, place
from autoprune.costs.operations.parts import Part, part_values
from autoprune.data.batch import Batch, inputs, tensors
from autoprune.files.access import MIB, write_json
from autoprune.files.formats import Format
from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.structure import Structure

FORMAT = Format("autoprune-latency", 1, "a latency table")
UNITS = {"ms": "milliseconds of one forward pass of the whole batch", "ratio": "of the dense network's time"}

MOST_BYTES = 256 * MIB
"""Largest size of the file of a table."""

_FORM = {
    "setting": {
        **dict.fromkeys(("model", "device", "machine", "runtime", "date"), str),
        **dict.fromkeys(("batch", "threads"), int),
        "inputs": [str],
        "versions": {str: str},
    },
    "dense_ms": float,
    "notes": [str],
    "correction": {
        **dict.fromkeys(("constant_ms", "median_error", "p95_error", "margin"), float),
        "spearman": (float, None),
        "factors": {str: float},
        "networks": int,
    },
    "groups": [[(str, int)]],
    "branches?": [str],
    "parts": [{"family": str, "count": int, "sizes": [[(int, [[int]])]], "branch?": int, "modules?": [str]}],
    "tables": [
        {"family": str, "kind": str, "axes": [[int]], "aligned?": int} | dict.fromkeys(("ms", "low", "high"), object)
    ],
    "networks": {"widths": [[int]], "ratio": [float], "uncertainty": [float]},
}
_ALIGNED = 8  # kernels compute channels in blocks of this number, or of a multiple; a remainder costs more in a whole


@final
@dataclass(frozen=True, eq=False)
class Latency:
    """Latency model of one network on one machine; measured by `autoprune.profile`.

    Attributes:
        setting: The conditions that it holds for.
        dense_ms: Milliseconds of the dense network.
        groups: Name and size of every group of the network's structure.
        tables: Measured times of families of operations.
        parts: Operations of the network, with their sizes as functions of the widths.
        evidence: Whole networks that were measured.
        correction: From the parts to the whole.
        notes: Omitted operations, and the noise of the machine, in plain words.
        branches: Branches of the structure whose operations are known; none where the runtime does not tell.
    """

    setting: Setting
    dense_ms: float
    groups: tuple[tuple[str, int], ...]
    tables: tuple[Table, ...]
    parts: tuple[Part, ...]
    evidence: Evidence
    correction: Correction = None  # type: ignore[assignment]  # fitted below if not given
    notes: tuple[str, ...] = field(default=())
    branches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.correction is None:
            seen = self.evidence
            kinds = self.by_kind(seen.widths.astype(np.float64))
            object.__setattr__(self, "correction", fit(kinds, seen.ratio * self.dense_ms, seen.uncertainty))

    def predict(self, widths: FloatArray) -> FloatArray:
        """Milliseconds of the whole network for the batch, shape (n,), at widths (n, groups).

        Columns of branches may follow: 1 where one is kept, and 0 where it or one around it is dropped.

        Raises:
            ValueError: If a branch is dropped and it is not known which operations vanish with it.
        """
        kinds = self.by_kind(widths)
        total = np.full(len(widths), self.correction.constant_ms)
        for kind, ms in kinds.items():
            total += self.correction.factors[kind] * ms
        return total

    def right_edges(self, multiples: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Widths of each group, ascending, beyond which the next wider ones take noticeably more time.

        All other groups are dense. Noticeable is half of the average time of a unit.

        Args:
            multiples: Number that the width of each group is a multiple of, length (groups,).
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

        Parts with a size that is no multiple of 8 are a separate kind.
        """
        kinds: dict[str, FloatArray] = {}
        for _, kind, ms in self._timed(widths):
            kinds[kind] = kinds.get(kind, 0.0) + ms
        return kinds

    def by_module(self, widths: FloatArray) -> dict[str, FloatArray]:
        """Milliseconds of the operations of each module, as predicted, shape (n,) each, at widths as in `predict`.

        They add up to `predict`: the empty name has what belongs to the whole network or to no known module.
        """
        found = {"": np.full(len(widths), self.correction.constant_ms)}
        for part, kind, ms in self._timed(widths):
            each = self.correction.factors[kind] * ms / part.count
            for name in part.modules or ("",) * part.count:
                found[name] = found.get(name, 0.0) + each
        return found

    def _timed(self, widths: FloatArray) -> Iterator[tuple[Part, str, FloatArray]]:
        """Parts with kinds and uncorrected times, shape (n,): each once for aligned sizes, and once for others."""
        present = self._present(widths)
        values = part_values(self.parts, widths)
        whole = {size: value % _ALIGNED == 0 for size, value in values.items()}
        places: dict[tuple[tuple[int, ...], int, Any], Place] = {}
        for part in self.parts:
            table = self._by_key.get(part.family)
            if table is None:
                continue
            keys = [(axis, table.aligned, size) for axis, size in zip(table.axes, part.sizes, strict=True)]
            for axis, aligned, size in keys:
                if (axis, aligned, size) not in places:
                    places[axis, aligned, size] = place(axis, aligned, values[size])
            ms = part.count * interpolate(table, [places[key] for key in keys])
            if part.branch >= 0 and present is not None:
                ms = ms * present[:, part.branch]
            aligned = np.logical_and.reduce([whole[size] for size in part.sizes], axis=0) | np.zeros(len(widths), bool)
            for kind, rows in ((table.kind, aligned), (f"unaligned {table.kind}", ~aligned)):
                yield part, kind, np.where(rows, ms, 0.0)

    def _present(self, widths: FloatArray) -> FloatArray | None:
        """Columns of branches; None where all are kept."""
        present = widths[:, len(self.groups) :]
        if present.all():
            return None
        if present.shape[1] != len(self.branches):
            raise ValueError(
                f"latency must know the operations of {present.shape[1]} branches to predict networks without some, "
                f"and this table, of the runtime {self.setting.runtime}, knows those of {len(self.branches)}; measure "
                "again with autoprune.profile and runtime='torch', or limit another cost"
            )
        return present

    @cached_property
    def _by_key(self) -> dict[str, Table]:
        return {table.key: table for table in self.tables}

    def refitted(self, widths: IntArray, ratio: FloatArray, uncertainty: FloatArray) -> Latency:
        """Fit the model again with more whole networks, widths as in `predict`, added to its evidence."""
        old = self.evidence
        columns = max(old.widths.shape[1], widths.shape[1])
        padded = [np.pad(w, ((0, 0), (0, columns - w.shape[1])), constant_values=1) for w in (old.widths, widths)]
        evidence = Evidence(
            np.concatenate(padded),
            np.concatenate([old.ratio, ratio]),
            np.concatenate([old.uncertainty, uncertainty]),
        )
        return replace(self, evidence=evidence, correction=None)  # type: ignore[arg-type]  # fitted again

    def require_match(self, structure: Structure, batch: int, model: str, example: Batch = None) -> None:
        """Refuse another model, batch size or size of inputs.

        Args:
            structure: Of the model to predict latencies of.
            batch: Samples of a pass to predict.
            model: Its class.
            example: Input of the model with this number of samples; None if a function of the user's makes the inputs.

        Raises:
            ValueError: If they are others; names what differs.
        """
        differing = []
        same = ""
        if batch != self.setting.batch:
            differing.append(f"its batch size is {self.setting.batch}, and cost_batch is {batch}")
        if model != self.setting.model:
            differing.append(f"its model is {self.setting.model}, and this is {model}")
        here = tuple((group.name, group.size) for group in structure.groups)
        if here != self.groups:
            own = dict(self.groups)
            other = dict(here)
            names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
            shown = ", ".join(f"{n} ({own.get(n, 'none')} units, here {other.get(n, 'none')})" for n in names[:3])
            differing.append(f"its groups differ in {shown or 'their order'}" + ("..." if len(names) > 3 else ""))
            same = ", with the same example= as here"
        if not differing and example is not None:
            own = Counter(given.partition(" ")[2] for given in self.setting.inputs)
            needed, all_here = map(_shapes, (inputs(example), example))
            if own - all_here and needed - own:  # either may count tensors that the other omits, such as targets
                differing.append(f"its inputs are {', '.join(own)}, and these are {', '.join(needed)}")
        if differing:
            raise ValueError(
                f"latency_ms must be a table of this model at this batch size, but {'; '.join(differing)}; "
                f"measure again with autoprune.profile{same}"
            )

    def save(self, path: str | Path) -> Path:
        """Write a portable JSON table; an existing file is replaced as a whole.

        Raises:
            OSError: If it cannot be written; says why.
        """
        return write_json(path, self.to_json(), indent=1)

    @classmethod
    def load(cls, path: str | Path) -> Latency:
        """Read what `save` wrote, here or on another machine.

        Raises:
            FileNotFoundError: If there is no such file.
            FileFormatError: If it is damaged, foreign, or of another version.
        """
        way_out = "measure again with autoprune profile"
        expected = "latency_ms must be a file written by autoprune profile"
        data = FORMAT.read_json(path, expected, way_out, MOST_BYTES, _FORM)
        with FORMAT.reading(path, way_out):
            found = cls.from_json(data)
            found._require_sound()
        return found

    def _require_sound(self) -> None:
        """Refuse tables and evidence whose shapes do not match, and figures that are no times."""
        seen = self.evidence
        dense = np.ones((1, seen.widths.shape[1] if len(seen.widths) else len(self.groups)))
        dense[0, : len(self.groups)] = [size for _, size in self.groups]
        widths = np.concatenate([dense, seen.widths]) if len(seen.widths) else dense
        whole = all(
            grid.shape == tuple(map(len, t.axes)) for t in self.tables for grid in (t.ms, t.low, t.high)
        ) and all(of.shape == (len(seen.widths),) for of in (seen.ratio, seen.uncertainty))
        ms = np.array([*self.predict(widths), self.dense_ms, *seen.ratio]) if whole else np.zeros(1)
        if not (np.isfinite(ms).all() and (ms > 0).all()):
            raise ValueError("its numbers do not fit together")

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary with everything that a prediction needs."""
        seen = self.evidence
        return {
            **FORMAT.stamp(),
            "units": UNITS,
            "setting": {**asdict(self.setting), "inputs": list(self.setting.inputs)},
            "dense_ms": self.dense_ms,
            "notes": list(self.notes),
            "correction": _nan_to_none(asdict(self.correction)),
            "groups": [list(group) for group in self.groups],
            "parts": [
                {
                    "family": part.family,
                    "count": part.count,
                    "sizes": [[f, list(map(list, s))] for f, s in part.sizes],
                    "branch": part.branch,
                    "modules": list(part.modules),
                }
                for part in self.parts
            ],
            "branches": list(self.branches),
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
        seen = data["networks"]
        correction = _none_to_nan(data["correction"])
        return cls(
            setting=Setting(**{**data["setting"], "inputs": tuple(data["setting"]["inputs"])}),
            dense_ms=float(data["dense_ms"]),
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
                Part(
                    p["family"],
                    tuple((f, tuple((g, each) for g, each in s)) for f, s in p["sizes"]),
                    p["count"],
                    p.get("branch", -1),
                    tuple(p.get("modules", ())),
                )
                for p in data["parts"]
            ),
            branches=tuple(data.get("branches", ())),
            evidence=Evidence(
                np.array(seen["widths"], dtype=np.int64),
                np.array(seen["ratio"], dtype=np.float64),
                np.array(seen["uncertainty"], dtype=np.float64),
            ),
            correction=Correction(**{**correction, "networks": int(correction["networks"])}),
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


def _shapes(batch: Batch) -> Counter[str]:
    return Counter("x".join(map(str, given.shape)) for given in tensors(batch))


def _nan_to_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _none_to_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in values.items()}
