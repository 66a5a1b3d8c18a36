"""Outline of the model of a study, which its journal and its result keep for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from autoprune.costs.structural import predicted_widths
from autoprune.inspection import FrozenPart, what_stays
from autoprune.result.outline import Heads, Layer, LayerTimes, Outline, Size, Stays
from autoprune.result.trials import Trial
from autoprune.structure.structure import Attribute, Structure
from autoprune.structure.units import AffineSize
from autoprune.study.start import candidates_of, starts_of
from autoprune.study.study import Study

_TENSORS = 12
"""Most parameters that are named for each reason."""
_DIGITS = 6
"""Decimals of milliseconds, to a nanosecond."""


def outline_of(study: Study) -> Outline:
    """Describe the layers of the model that a study searches."""
    structure = study.context.structure
    kinds = {name: type(module).__name__ for name, module in study.context.model.named_modules()}
    branches = structure.presence.branches
    return Outline(
        model=type(study.context.model).__name__,
        columns=(*((group.name, group.size) for group in structure.groups), *((b.name, 1) for b in branches)),
        branches=len(branches),
        rules=tuple((kind, to, tuple(of)) for kind, to, of in structure.presence.rules),
        sizes=tuple(_size_of_row(row.tolist()) for row in structure.terms.sizes),
        layers=_layers(structure, kinds),
        heads=_heads(structure),
        stays=tuple(map(_stays, what_stays(structure, study.context.model))),
        uniform=_uniform(study),
    )


def timed(outline: Outline, study: Study, dense: Trial, front: Sequence[Trial]) -> Outline:
    """Add the latency of each layer in the dense model and in the trials of a front, where a table knows the layers.

    Operations of a module that is no layer count as those of the rest.
    """
    if study.latency is None:
        return outline
    trials = (dense, *front)
    candidates = np.array([trial.candidate for trial in trials], dtype=np.int64)
    widths = predicted_widths(study.context.structure.presence, study.context.space, candidates)
    ms = study.latency.by_module(widths)
    names = [layer.name for layer in outline.layers]
    if not ms.keys() & set(filter(None, names)):
        return outline
    nothing = np.zeros(len(trials))
    layers = np.stack([ms.pop(name, nothing) if name else nothing for name in names], axis=1)
    rest = np.sum(list(ms.values()), axis=0)
    return replace(
        outline,
        latency=LayerTimes(
            trials=tuple(trial.id for trial in trials),
            layers=tuple(tuple(round(value, _DIGITS) for value in row) for row in layers.tolist()),
            rest=tuple(round(value, _DIGITS) for value in rest.tolist()),
        ),
    )


def _layers(structure: Structure, kinds: Mapping[str, str]) -> tuple[Layer, ...]:
    batch = structure.terms.batch
    return tuple(
        Layer(
            name=layer.name,
            kind=kinds.get(layer.name, ""),
            width=None if layer.width is None else _size(layer.width),
            flops=tuple((coefficient / batch, _rows(rows)) for coefficient, rows in layer.macs),
            params=tuple((coefficient, _rows(rows)) for coefficient, rows in layer.params),
            heads=None if layer.heads is None else _size(layer.heads),
        )
        for layer in structure.terms.layers
    )


def _heads(structure: Structure) -> tuple[Heads, ...]:
    columns = {group.name: i for i, group in enumerate(structure.groups)}
    told = {layer.name for layer in structure.terms.layers if layer.heads is not None}

    def size(attribute: Attribute) -> Size:
        frozen = sum(each * dense for name, each, dense in attribute.shares if name not in columns)
        moving = tuple((columns[name], each) for name, each, _ in attribute.shares if name in columns)
        return attribute.fixed + frozen, moving

    return tuple(
        Heads(f"{attribute.module}.{attribute.path}".lstrip("."), size(attribute))
        for attribute in structure.attributes
        if "head" in attribute.path and "dim" not in attribute.path and attribute.module not in told
    )


def _stays(part: FrozenPart) -> Stays:
    more = max(0, len(part.tensors) - _TENSORS)
    return Stays(part.reason, part.tensors[:_TENSORS], more, part.params_share, part.remedy)


def _uniform(study: Study) -> tuple[tuple[int, ...], ...]:
    """Uniform candidates among the first proposals, which come after those of the user, without the dense one."""
    given = starts_of(study.request.start.candidates)
    first = sum(len(candidates_of(item, study.context.space)) for item in given)
    seeds = study.problem.seeds[first:]
    return tuple(tuple(candidate) for candidate in seeds[np.any(seeds, axis=1)].tolist())


def _size(size: AffineSize) -> Size:
    return size.fixed, tuple((int(group), int(each)) for group, each in size.shares)


def _size_of_row(row: list[int]) -> Size:
    return row[0], tuple((column, each) for column, each in enumerate(row[1:]) if each)


def _rows(rows: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(row) for row in rows if row)  # row 0 is the constant 1
