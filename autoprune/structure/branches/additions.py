"""Additions of a branch to the stream that it starts from, ``x + f(x)``, found among the operations of a pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autoprune.structure.branches.dataflow import Dataflow
from autoprune.structure.rules.registry import operation_of
from autoprune.structure.tracing.record import Op, Ref

STEPS_BACK = 6
"""Most steps from the stream at an addition back to a value that the branch may start from."""


@dataclass(frozen=True)
class Addition:
    """Sum of a stream and a branch.

    Attributes:
        op: The addition.
        result: Its value.
        stream: The value that stays without the branch.
        branch: The value that is added to it.
        region: Operations that serve nothing but the branch.
        inside: The larger branch that it is a term of, if it is one: its addition, and the value added there.
    """

    op: int
    result: int
    stream: int
    branch: int
    region: frozenset[int]
    inside: tuple[int, int] | None = None

    @property
    def key(self) -> tuple[int, int]:
        """The addition and the value added, which tell it from all others."""
        return self.op, self.branch


def find_additions(flow: Dataflow) -> list[Addition]:
    """Find the additions of a branch to its own input, and of terms inside such branches, in forward order."""
    found: dict[int, Addition] = {}
    for op in flow.record.ops:
        if op.index not in flow.live:
            continue
        for stream, branch in terms_of(flow, op):
            region = flow.region(op.index, branch)
            if region and _starts_from(flow, found, op.index, stream, region):
                found[op.index] = Addition(op.index, op.results()[0], stream, branch, region)
                break
    terms = [term for addition in found.values() for term in _terms_inside(flow, addition)]
    return sorted((*found.values(), *terms), key=lambda addition: addition.key)


def terms_of(flow: Dataflow, op: Op) -> list[tuple[int, int]]:
    """Return the two values that an operation adds, either first; none unless each alone could be the sum."""
    terms = op.args.get("self"), op.args.get("other")
    if op.name not in ("add", "add_") or not all(isinstance(term, Ref) for term in terms):
        return []
    a, b = (term.id for term in terms if isinstance(term, Ref))
    values = flow.record.values
    result = values[op.results()[0]]
    alike = {i for i in (a, b) if (values[i].shape, values[i].dtype) == (result.shape, result.dtype)}
    if a == b or not result.dtype.is_floating_point:
        return []
    plain = op.args.get("alpha", 1) == 1
    return [(x, f) for x, f in ((a, b), (b, a)) if x in alike and (plain or x == a)]


def is_passage(op: Op) -> bool:
    """Return whether an operation rearranges, casts or drops at random what it reads first."""
    return operation_of(op).passes or op.name in ("t", "detach", "dropout", "native_dropout", "to", "expand_as")


def step_back(flow: Dataflow, found: dict[int, Addition], value: int, before: int) -> tuple[int, int] | None:
    """Follow the stream one step back from a value, and return the value there and the operation it is read by."""
    sources = flow.sources(value, before)
    if len(sources) != 1:
        return None
    op = flow.record.ops[sources[0]]
    if op.index in found and found[op.index].result == value:
        return found[op.index].stream, op.index
    if is_passage(op) and op.inputs():
        return op.inputs()[0], op.index
    return None


def _starts_from(flow: Dataflow, found: dict[int, Addition], at: int, stream: int, region: frozenset[int]) -> bool:
    """Return whether a branch depends on the stream that it is added to, here or a few additions before."""
    values = [stream]
    place: tuple[int, int] | None = (stream, at)
    while place is not None and len(values) <= STEPS_BACK:
        place = step_back(flow, found, *place)
        if place is not None:
            values.append(place[0])
    last = values[-1] if place is None else place[0]
    earliest = min(flow.sources(last, at), default=0)
    return flow.reaches(values, region, earliest)


def _terms_inside(flow: Dataflow, addition: Addition) -> list[Addition]:
    """Find the terms of a branch that is itself a sum of parts that serve nothing else, such as attention and MLP."""
    value = addition.branch
    before = addition.op
    while True:
        sources = flow.sources(value, before)
        if len(sources) != 1 or sources[0] not in addition.region:
            return []
        op = flow.record.ops[sources[0]]
        terms = [(x, f, flow.region(op.index, f)) for x, f in terms_of(flow, op)]
        if len(terms) == 2 and all(region for *_, region in terms):
            result = op.results()[0]
            found = [Addition(op.index, result, x, f, region, addition.key) for x, f, region in terms]
            return [more for term in found for more in (term, *_terms_inside(flow, term))]
        if not is_passage(op) or torch.Tag.pointwise in op.func.tags or not op.inputs():
            return []
        value = op.inputs()[0]
        before = op.index
