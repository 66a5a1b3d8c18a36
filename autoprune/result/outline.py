"""Outline of the model that was searched: its layers as functions of the widths, and what stays, for reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Size = tuple[int, tuple[tuple[int, int], ...]]
"""Constant part of a size, and columns of `Outline.columns` with the share of each of their units."""
Term = tuple[float, tuple[int, ...]]
"""Constant factor of a product, and the places in `Outline.sizes` that it multiplies."""

OUTLINE = "outline"
"""Entry of a journal and of a saved result that holds it."""
OUTLINE_FORM = {
    "model": str,
    "columns": [[object]],
    "branches": int,
    "rules": [[object]],
    "sizes": [[object]],
    "layers": [
        {"name": str, "kind": str, "width": ([object], None), "flops": [[object]], "params": [[object]]}
        | {"heads?": ([object], None)},
    ],
    "heads": [{"name": str, "size": [object]}],
    "stays": [{"reason": str, "tensors": [str], "more": int, "params_share": float, "remedy": str}],
    "uniform": [[int]],
    "latency?": ({"rest": [float], "layers": [[float]], "trials": [int]}, None),
}


@dataclass(frozen=True)
class Layer:
    """Module of the model with its costs.

    Attributes:
        name: The module; empty for the model itself.
        kind: Its class.
        width: Number of its output features; None if it has no parameters or multiplies nothing.
        flops: Products that add up to its multiply-accumulates of one sample.
        params: Products that add up to the elements of its parameters, those that it shares with others left out.
        heads: Number of its attention heads; units of groups with several heads each share keys and values.
    """

    name: str
    kind: str
    width: Size | None
    flops: tuple[Term, ...]
    params: tuple[Term, ...]
    heads: Size | None = None


@dataclass(frozen=True)
class Heads:
    """Number of attention heads that a module keeps in Python, where the layers do not tell it.

    Attributes:
        name: The module and its attribute.
        size: The number.
    """

    name: str
    size: Size


@dataclass(frozen=True)
class Stays:
    """Parameters that cannot shrink along some dimension, all for one reason.

    Attributes:
        reason: The reason, in words.
        tensors: The first of the parameters, in forward order.
        more: Number of further ones.
        params_share: Share of the dense model's parameters in the slices that stay, in [0, 1].
        remedy: Advice to the user; empty where there is none.
    """

    reason: str
    tensors: tuple[str, ...]
    more: int
    params_share: float
    remedy: str


@dataclass(frozen=True)
class LayerTimes:
    """Predicted latency of each layer, in the dense model and in the trials of a front.

    Attributes:
        trials: Numbers of the trials; the dense model is before them as -1.
        layers: Milliseconds for each of `trials`, by layer in the order of `Outline.layers`.
        rest: Milliseconds of everything else for each of `trials`: additions between layers, Python, launches.
    """

    trials: tuple[int, ...]
    layers: tuple[tuple[float, ...], ...]
    rest: tuple[float, ...]


@dataclass(frozen=True)
class Outline:
    """Layers of a model, so that a report needs neither the model nor its structure.

    Attributes:
        model: Its class.
        columns: Name and dense width of each group, then each branch with 1.
        branches: Number of the columns that are branches, at the end.
        rules: Steps that set to 0 what lies in a dropped branch, see `autoprune.structure.branches.branch.Presence`.
        sizes: Sizes that products multiply; the first is 1.
        layers: In forward order.
        heads: Numbers of attention heads that no layer has.
        stays: What cannot shrink, the largest share of the parameters first.
        uniform: Candidates that prune every dimension alike, as the search began with.
        latency: Latency by layer; None where there is no latency table, or it does not know the layers.
    """

    model: str
    columns: tuple[tuple[str, int], ...]
    branches: int
    rules: tuple[tuple[str, int, tuple[int, ...]], ...]
    sizes: tuple[Size, ...]
    layers: tuple[Layer, ...]
    heads: tuple[Heads, ...]
    stays: tuple[Stays, ...]
    uniform: tuple[tuple[int, ...], ...]
    latency: LayerTimes | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outline:
        """Restore what `to_json` wrote."""
        return cls(
            model=data["model"],
            columns=tuple((str(name), int(size)) for name, size in data["columns"]),
            branches=data["branches"],
            rules=tuple((str(kind), int(to), tuple(map(int, of))) for kind, to, of in data["rules"]),
            sizes=tuple(map(_size, data["sizes"])),
            layers=tuple(
                Layer(
                    layer["name"],
                    layer["kind"],
                    None if layer["width"] is None else _size(layer["width"]),
                    tuple(map(_term, layer["flops"])),
                    tuple(map(_term, layer["params"])),
                    _size(layer["heads"]) if layer.get("heads") else None,
                )
                for layer in data["layers"]
            ),
            heads=tuple(Heads(each["name"], _size(each["size"])) for each in data["heads"]),
            stays=tuple(Stays(**{**each, "tensors": tuple(each["tensors"])}) for each in data["stays"]),
            uniform=tuple(tuple(map(int, candidate)) for candidate in data["uniform"]),
            latency=_times(data["latency"]) if data.get("latency") else None,
        )


def _times(data: Any) -> LayerTimes:
    return LayerTimes(tuple(data["trials"]), tuple(map(tuple, data["layers"])), tuple(data["rest"]))


def _size(data: Any) -> Size:
    fixed, shares = data
    return int(fixed), tuple((int(column), int(each)) for column, each in shares)


def _term(data: Any) -> Term:
    coefficient, rows = data
    return float(coefficient), tuple(map(int, rows))
