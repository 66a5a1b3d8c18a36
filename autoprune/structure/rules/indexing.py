"""Rules for operations that look positions up: indexed dimensions must stay, the others pass."""

from __future__ import annotations

from autoprune.structure.labels import Dims, Labels, Propagation
from autoprune.structure.rules.products import argument, dims_of
from autoprune.structure.rules.registry import Product, rule
from autoprune.structure.tracing.record import Op, Record, Ref


def _stay(flow: Propagation, op: Op, labels: Labels) -> None:
    flow.freeze(op, labels, f"indexed by position in {op.where()}")


def _shape(flow: Propagation, value: int) -> tuple[int, ...]:
    return flow.record.values[value].shape


@rule("embedding")
def embedding(flow: Propagation, op: Op) -> list[Dims]:
    """Look rows up: the rows stay, the columns pass."""
    rows, columns = flow.of(op.args["weight"].id)
    flow.freeze(op, rows, f"looked up by index in {op.where()}")
    return [[None] * len(flow.of(op.args["indices"].id)) + [columns]]


def _weighted_bags(record: Record, op: Op) -> list[Product]:
    """Count a bag, which multiplies only if each entry has a separate weight."""
    if not isinstance(op.args.get("per_sample_weights"), Ref):
        return []
    return [(1, [*dims_of(record, argument(op, "indices")), (argument(op, "weight"), 1)])]


@rule("_embedding_bag", "_embedding_bag_forward_only", "embedding_bag", macs=_weighted_bags)
def embedding_bag(flow: Propagation, op: Op) -> list[Dims]:
    """Look rows up and reduce each bag: the rows stay, the columns pass."""
    rows, columns = flow.of(op.args["weight"].id)
    flow.freeze(op, rows, f"looked up by index in {op.where()}")
    others: list[Dims] = [[None] * len(_shape(flow, value)) for value in op.results()[1:]]
    return [[None, columns], *others]


@rule("index_select")
def index_select(flow: Propagation, op: Op) -> list[Dims]:
    """Pick positions of one dimension."""
    out = list(flow.of(op.args["self"].id))
    axis = op.args["dim"] % len(out)
    _stay(flow, op, out[axis])
    out[axis] = None
    return [out]


def _indexed(flow: Propagation, op: Op) -> list[int | None]:
    """Place of each dimension of the source among the index tensors, or None where it is not indexed."""
    places: list[int | None] = []
    for i, index in enumerate(op.args["indices"]):
        value = flow.record.values[index.id] if isinstance(index, Ref) else None
        wide = len(value.shape) if value is not None and "bool" in str(value.dtype) else 1  # a mask takes several
        places += [None if value is None else i] * wide
    return places + [None] * (len(flow.of(op.args["self"].id)) - len(places))


@rule("index", "_unsafe_index")
def index(flow: Propagation, op: Op) -> list[Dims]:
    """Pick positions of some dimensions at once; the others pass."""
    dims = flow.of(op.args["self"].id)
    places = _indexed(flow, op)
    for labels, place in zip(dims, places, strict=True):
        if place is not None:
            _stay(flow, op, labels)
    taken = [axis for axis, place in enumerate(places) if place is not None]
    passed = [labels for labels, place in zip(dims, places, strict=True) if place is None]
    new: Dims = [None] * (len(_shape(flow, op.results()[0])) - len(passed))
    together = bool(taken) and taken == list(range(taken[0], taken[-1] + 1))
    at = taken[0] if together else 0
    return [[*passed[:at], *new, *passed[at:]]]


@rule("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
def index_put(flow: Propagation, op: Op) -> list[Dims]:
    """Write at positions of some dimensions; the others are joined with those of the written values."""
    dims = list(flow.of(op.args["self"].id))
    places = _indexed(flow, op)
    written = flow.of(op.args["values"].id)
    shape = _shape(flow, op.args["values"].id)
    for back in range(1, len(dims) + 1):
        if places[-back] is not None:
            _stay(flow, op, dims[-back])
            break
        if back <= len(written) and shape[-back] != 1:
            dims[-back] = flow.join(op, dims[-back], written[-back])
    for labels, place in zip(dims, places, strict=True):
        if place is not None:
            _stay(flow, op, labels)
    return [dims]


@rule("gather")
def gather(flow: Propagation, op: Op) -> list[Dims]:
    """Pick a position of one dimension for each entry of the index; the index follows the others."""
    dims, wanted = flow.of(op.args["self"].id), flow.of(op.args["index"].id)
    axis = op.args["dim"] % len(dims)
    _stay(flow, op, dims[axis])
    return [[w if i == axis else flow.join(op, d, w) for i, (d, w) in enumerate(zip(dims, wanted, strict=True))]]


@rule("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
def scatter(flow: Propagation, op: Op) -> list[Dims]:
    """Write to a position of one dimension for each entry of the index, which follows the others."""
    dims = list(flow.of(op.args["self"].id))
    wanted = flow.of(op.args["index"].id)
    axis = op.args["dim"] % len(dims)
    _stay(flow, op, dims[axis])
    source = op.args.get("src")
    for i in range(len(dims)):
        if i != axis:
            dims[i] = flow.join(op, dims[i], wanted[i])
        if isinstance(source, Ref):
            flow.join(op, wanted[i], flow.of(source.id)[i])
    return [dims]


@rule("index_add", "index_add_", "index_copy", "index_copy_")
def index_add(flow: Propagation, op: Op) -> list[Dims]:
    """Add rows at positions of one dimension; the other dimensions are joined."""
    dims = list(flow.of(op.args["self"].id))
    source = flow.of(op.args["source"].id)
    axis = op.args["dim"] % len(dims)
    for i, labels in enumerate(source):
        if i == axis:
            _stay(flow, op, dims[i])
            _stay(flow, op, labels)
        else:
            dims[i] = flow.join(op, dims[i], labels)
    return [dims]


@rule("topk", "sort", "argsort", "kthvalue", "median", "cummax", "cummin")
def order(flow: Propagation, op: Op) -> list[Dims]:
    """Rank along one dimension, which must stay."""
    dims = flow.of(op.args["self"].id)
    axis = op.args.get("dim", -1) % len(dims)
    _stay(flow, op, dims[axis])
    kept = [None if i == axis else labels for i, labels in enumerate(dims)]
    dropped = [labels for i, labels in enumerate(dims) if i != axis]
    return [kept if len(_shape(flow, value)) == len(dims) else dropped for value in op.results()]


@rule("bucketize", "searchsorted")
def bounded(flow: Propagation, op: Op) -> list[Dims]:
    """Find the interval of each entry among bounds: the bounds stay; entries pass if all share the same bounds."""
    bounds = op.args["boundaries" if op.name == "bucketize" else "sorted_sequence"]
    given = op.args["self"]
    limits = flow.of(bounds.id)
    if not isinstance(given, Ref):
        for labels in limits:
            flow.freeze(op, labels, f"bounds of {op.where()}")
        return [[None] * len(flow.record.values[value].shape) for value in op.results()]
    dims = list(flow.of(given.id))
    flow.freeze(op, limits[-1], f"bounds of {op.where()}")
    if len(limits) > 1:
        flow.freeze(op, dims[-1], f"sought in bounds of its own by {op.where()}")
        dims = [*(flow.join(op, a, b) for a, b in zip(dims[:-1], limits[:-1], strict=True)), None]
    return [dims for _ in op.results()]
