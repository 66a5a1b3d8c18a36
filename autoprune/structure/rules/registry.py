"""All that is known of each operation: the rule for its labels, its multiply-accumulates, its sizes, its weights.

An operation is found by its namespace and name, ``"torchvision::roi_align"``, or else by its name alone, which is that
of PyTorch's own, ``"convolution"``: libraries keep the names. All operations that PyTorch tags as pointwise share the
rule of ``"pointwise"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from autoprune.arguments import shown, why_no_function
from autoprune.protocols import IntArray
from autoprune.structure.labels import Dims, Propagation
from autoprune.structure.tracing.record import Op, Record

Rule = Callable[[Propagation, Op], list[Dims]]
"""Labels of each result of an operation, from those of its arguments, which the propagation holds."""

Product = tuple[float, list[tuple[int, int]]]
"""Product of a constant and sizes of dimensions, each given as (value, dimension)."""

Formula = Callable[[Record, Op], list[Product]]
"""Multiply-accumulates of an operation for the whole traced batch: a sum of products of sizes."""


class Narrowed(Protocol):
    """A record without some of its units."""

    @property
    def record(self) -> Record:
        """The record at its dense sizes."""
        ...

    @property
    def flow(self) -> Propagation:
        """Its labels."""
        ...

    def shape(self, value: int) -> tuple[int, ...]:
        """Shape of a value without these units."""
        ...

    def alive(self, value: int) -> list[IntArray | None]:
        """Indices that stay of each dimension of a value; None where all do."""
        ...

    def shrinks(self, value: int) -> bool:
        """Return whether a value loses anything."""
        ...


Resize = Callable[[Op, Narrowed], dict[str, Any]]
"""Arguments of an operation that are sizes, by schema name, as they are without some units."""


@dataclass(frozen=True)
class Operation:
    """All that is known of one operation.

    Attributes:
        rule: Gives the labels of its results; None freezes all labels that it meets.
        macs: Counts its multiply-accumulates; None where it sums no products, or nothing is known of it.
        resize: Gives the arguments that follow the widths; None where there are none.
        weights: Names of the arguments one of which is the weight of a layer.
        free: Whether it is known to sum no products. Pointwise ones and PyTorch's own with a rule are, without it.
        statistics: Whether its values depend on the number of units; a masked replay runs it over kept units only.
        passes: Whether it rearranges or masks attention scores without mixing them.
        rearranges: Whether a smaller module may run it more or fewer times, because only strides or sizes ask for it.
    """

    rule: Rule | None = None
    macs: Formula | None = None
    resize: Resize | None = None
    weights: tuple[str, ...] = ()
    free: bool = False
    statistics: bool = False
    passes: bool = False
    rearranges: bool = False


OPERATIONS: dict[str, Operation] = {}
"""Every operation of which something is known; the only table by operation."""

_UNKNOWN = Operation()


def known(*names: str, **facts: Any) -> None:
    """Enter operations by name, each of them once.

    Args:
        names: Names without overload.
        facts: Fields of `Operation`.
    """
    twice = [name for name in names if name in OPERATIONS]
    assert not twice, f"{twice} have an entry already"
    OPERATIONS.update(dict.fromkeys(names, Operation(**facts)))


def rule(*names: str, **facts: Any) -> Callable[[Rule], Rule]:
    """Enter operations by name, as `known` does, with the decorated function as their rule."""

    def register(function: Rule) -> Rule:
        known(*names, rule=function, **facts)
        return function

    return register


def register_rule(
    name: str,
    rule: Rule | None = None,
    *,
    macs: Formula | None = None,
    resize: Resize | None = None,
    weights: Sequence[str] = (),
) -> None:
    """Tell autoprune how an operation of a library, or of your own, treats the units that pass through it.

    Without a rule, all labels that an operation meets stay. A wrong rule is found by the checks before a search, which
    compare numbers. What is left out here keeps what is known of the operation.

    Args:
        name: Namespace and name, such as ``"torchvision::roi_align"``, without overload. ``"aten::..."`` replaces what
            is known of an operation of PyTorch.
        rule: ``rule(flow, op)`` returns the labels of each result, one entry a dimension, as those in
            ``autoprune.structure.rules`` do: ``flow.of(op.args["x"].id)`` are the labels of an argument, ``flow.join``
            and ``flow.tie`` say what is removed together, ``flow.freeze`` what stays.
        macs: ``macs(record, op)`` returns multiply-accumulates for the traced batch as products of a constant and sizes
            of (value, dimension); an empty list where the operation sums no products. Without it, budgets on FLOPs are
            refused if the operation may multiply a parameter.
        resize: ``resize(op, narrowed)`` returns the arguments that are sizes, by name, for the shapes in `narrowed`.
        weights: Names of the arguments one of which is the weight of a layer; a sparsity space searches it.

    Raises:
        TypeError: If `name` has no namespace, or the others are no functions of two arguments.
    """
    if not isinstance(name, str) or "" in name.partition("::") or "." in name:
        raise TypeError(f"name must be namespace::name, such as 'torchvision::roi_align', got {shown(name)}")
    given: dict[str, Any] = {"rule": rule, "macs": macs, "resize": resize}
    for argument, function in given.items():
        if function is not None and (why := why_no_function(function, 2)):
            raise TypeError(f"{argument} must be a function of two arguments, {why}")
    facts = {argument: function for argument, function in given.items() if function is not None}
    if weights:
        facts["weights"] = tuple(weights)
    namespace, _, bare = name.partition("::")
    before = OPERATIONS.get(name) or OPERATIONS.get(bare if namespace == "aten" else name, _UNKNOWN)
    OPERATIONS[name] = replace(before, **facts)


def operation_of(op: Op) -> Operation:
    """Look up what is known of a recorded operation."""
    return operation_named(op.func)


def operation_named(func: torch._ops.OpOverload) -> Operation:
    """Look up what is known of an operation of PyTorch's dispatcher."""
    name = func.overloadpacket.__name__
    return OPERATIONS.get(f"{func.namespace}::{name}") or OPERATIONS.get(name, _UNKNOWN)


def rule_of(op: Op) -> Rule | None:
    """Find the rule of an operation, or None."""
    found = operation_of(op).rule
    if found is None and torch.Tag.pointwise in op.func.tags:
        return OPERATIONS["pointwise"].rule
    return found
