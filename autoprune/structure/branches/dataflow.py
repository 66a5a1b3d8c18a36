"""Dependences between the operations of a record, with writes in place told from reads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from heapq import heappop, heappush

from torch.utils._pytree import tree_leaves

from autoprune.structure.macs import products_of
from autoprune.structure.tracing.record import Op, Record, Ref


class Dataflow:
    """Operations that each operation depends on, and those that depend on it.

    An operation depends on the one that made a value it reads, and on the last one that wrote to the value's storage.

    Args:
        record: Its passes in evaluation mode.

    Attributes:
        end: Stands for the caller, who reads the outputs: the number of operations.
        uses: Operations that depend on each operation, `end` among them, if anything that is returned depends on them.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.end = len(record.ops)
        self._made: dict[int, int] = {}
        self._wrote: dict[int, list[int]] = {}
        self._sources: list[dict[int, tuple[int, ...]]] = []
        for op in record.ops:
            self._sources.append({value: self.sources(value, op.index) for value in op.inputs()})
            read = set(op.inputs())
            self._made.update((value, op.index) for value in op.results() if value not in read)
            for value in written(op):
                self._wrote.setdefault(record.values[value].base, []).append(op.index)
        returned = {source for value in record.outputs for source in self.sources(value, self.end)}
        self.live = self._ancestors(returned)
        self.uses: list[list[int]] = [[] for _ in record.ops]
        for index in sorted(self.live):
            for source in set(self.makers(index)):
                self.uses[source].append(index)
        for source in returned:
            self.uses[source].append(self.end)

    def sources(self, value: int, before: int) -> tuple[int, ...]:
        """Return the operations that gave a value what it holds before an operation; none for one from outside."""
        made = self._made.get(value)
        writes = self._wrote.get(self.record.values[value].base, [])
        at = bisect_left(writes, before)
        last = writes[at - 1] if at else None
        if last is None or (made is not None and made > last):
            return () if made is None else (made,)
        if made is None or value in self.record.ops[last].results():
            return (last,)
        return (last, made)

    def read(self, index: int, value: int) -> tuple[int, ...]:
        """Return the sources of a value that an operation reads."""
        return self._sources[index][value]

    def makers(self, index: int) -> list[int]:
        """Return the operations that an operation depends on."""
        return [source for own in self._sources[index].values() for source in own]

    def region(self, reader: int, value: int) -> frozenset[int]:
        """Find the operations that serve nothing but one value that one operation reads.

        Args:
            reader: The operation.
            value: One of those that it reads.
        """
        elsewhere = {s for other, own in self._sources[reader].items() if other != value for s in own}
        heap = [-source for source in self.read(reader, value)]  # the latest first: then all uses are known
        inside: set[int] = set()
        seen: set[int] = set()
        while heap:
            index = -heappop(heap)
            if index in seen or index in elsewhere:
                continue
            seen.add(index)
            if all(use in inside or use == reader for use in self.uses[index]):
                inside.add(index)
                for source in self.makers(index):
                    heappush(heap, -source)
        return frozenset(inside)

    def reaches(self, values: Iterable[int], region: Iterable[int], earliest: int) -> bool:
        """Return whether a region depends on one of some values, by itself or through operations without products.

        A norm may serve two branches. Through layers all that is late in a model depends on all that is early.

        Args:
            values: Their indices.
            region: Operations.
            earliest: No operation before this one is looked at.
        """
        wanted = set(values)
        waiting = list(region)
        seen = set(waiting)
        while waiting:
            index = waiting.pop()
            op = self.record.ops[index]
            if wanted.intersection(op.inputs()):
                return True
            further = {source for source in self.makers(index) if source >= earliest} - seen
            seen |= further
            further = {source for source in further if not products_of(self.record, self.record.ops[source])}
            waiting.extend(further)
        return False

    def _ancestors(self, ends: Iterable[int]) -> set[int]:
        waiting = list(ends)
        seen = set(waiting)
        while waiting:
            further = set(self.makers(waiting.pop())) - seen
            seen |= further
            waiting.extend(further)
        return seen


def written(op: Op) -> list[int]:
    """Values that an operation writes to in place."""
    names = [a.name for a in op.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    leaves = tree_leaves([op.args[name] for name in names if name in op.args])
    return [leaf.id for leaf in leaves if isinstance(leaf, Ref)]
