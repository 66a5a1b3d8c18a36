"""Propagation of labels over a record, which finds the indices of tensor dimensions that must be removed together.

The rule of each operation gives the labels of its results, those that it joins and those that it freezes. Propagation
leaves no state on the record, so that the choices at ambiguous sites can be tried in milliseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from autoprune.structure.labels import Dims, Propagation
from autoprune.structure.rules import operation_of, rule_of
from autoprune.structure.time_limit import look
from autoprune.structure.tracing.record import Op, Record

log = logging.getLogger(__name__)


def propagate(record: Record, choices: Mapping[int, int] | None = None) -> Propagation:
    """Apply the rule of every operation in turn, then freeze the labels of the outputs."""
    flow = Propagation(record, choices or {})
    ran = (*record.ops, *record.training)
    ends = (*record.outputs, *record.training_ends)
    flow.read = frozenset((*(value for op in ran for value in op.inputs()), *ends))
    flow.scores = attention_scores(record)
    for i, known in enumerate(record.values):
        if known.name and i not in flow.read:
            flow.labels[i] = [None] * len(known.shape)  # it is not known what may be removed, so all of it stays
    for op in ran:
        look()
        apply = rule_of(op)
        results = _without_rule(flow, op, "has no rule") if apply is None else _apply(flow, op, apply)
        read = set(op.inputs())
        for value, dims in zip(op.results(), results, strict=True):
            if value not in read:  # a value returned in place keeps the labels that it has
                flow.labels[value] = dims
    for value in record.outputs:
        for labels in flow.of(value):
            flow.freeze(None, labels, "returned by the model")
    for value in record.training_ends:
        for labels in flow.of(value):
            flow.freeze(None, labels, "returned by the model in training")
    flow.propagated = len(flow.edges)
    return flow


def _apply(flow: Propagation, op: Op, apply: Callable[[Propagation, Op], list[Dims]]) -> list[Dims]:
    """Apply a rule; one that fails for its operation freezes all labels of the operation."""
    try:
        results = apply(flow, op)
    except Exception as error:  # an operation may come in forms that its rule was not written for
        log.warning("the rule of %s failed (%r); what it touches stays", op.where(), error)
        return _without_rule(flow, op, "is not understood")
    for value, dims in zip(op.results(), results, strict=True):
        sizes = [None if labels is None else len(labels) for labels in dims]
        shape = flow.record.values[value].shape
        if len(sizes) != len(shape) or any(n not in (None, size) for n, size in zip(sizes, shape, strict=True)):
            log.warning("the rule of %s gave labels %s for shape %s; what it touches stays", op.where(), sizes, shape)
            return _without_rule(flow, op, "is not understood")
    return results


def _without_rule(flow: Propagation, op: Op, why: str) -> list[Dims]:
    for value in op.inputs():
        for labels in flow.of(value):
            flow.freeze(op, labels, f"{op.where()} {why}")
    return [[None] * len(flow.record.values[value].shape) for value in op.results()]


def attention_scores(record: Record) -> frozenset[int]:
    """Find batched products of two activations that reach a softmax through elementwise operations and views only.

    Removing a part of the contracted dimension would change the scale by its size, usually 1 / sqrt(d).
    """
    weights = {i for i, value in enumerate(record.values) if value.name}
    for op in record.ops:
        if weights.issuperset(op.inputs()):
            weights.update(op.results())
    normalised: set[int] = set()
    products = []
    for op in reversed(record.ops):
        if op.name in ("_softmax", "_safe_softmax", "softmax"):
            normalised.update(op.inputs())
        elif normalised.isdisjoint(op.results()):
            continue
        elif op.name in ("bmm", "baddbmm"):
            if weights.isdisjoint(op.inputs()[-2:]):  # a layer on a sequence is a batched product, too
                products.append(op.index)
        elif operation_of(op).passes or torch.Tag.pointwise in op.func.tags:
            normalised.update(op.inputs())
    return frozenset(products)
