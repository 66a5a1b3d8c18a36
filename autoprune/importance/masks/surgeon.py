"""Optimal brain surgeon, column by column: weights to the right make up for those set to zero."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from autoprune.importance.masks.layer import Layer
from autoprune.structure.slicing.zeros import Pattern

SPAN = 128
"""Columns whose masks are chosen together, and whose effect on columns further right is applied at once."""


def sparse_gpt(layer: Layer, pattern: Pattern, zeros: int, span: int = SPAN) -> Tensor:
    """Set elements to zero from left to right, each span of columns its share, and correct the columns that follow.

    An element is worth w^2 over the diagonal of the inverse moments once the columns before it are gone. In a span, the
    elements or blocks of least worth go; with N:M the least in every group, right before its first column is done.

    Args:
        layer: Matrix and moments; its factorisation serves all levels and patterns.
        pattern: Form of the zeros.
        zeros: Number of elements.
        span: Columns of a span at most.

    Returns:
        The weights, exactly zero where set to zero, shape (outputs, columns).

    Reference:
        Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
        arXiv:2301.00774, algorithm 1. A row whose error is larger than that of its mask alone is masked alone.
    """
    columns = layer.weight.T.contiguous()  # (columns, outputs): the loop below works on whole rows in memory
    gone = torch.zeros_like(columns, dtype=torch.bool)
    factor = layer.factor
    diagonal = factor.diagonal()
    spans = list(spans_of(layer, pattern, span))
    counts = _shares([_cells(columns.shape[1], end - start, pattern) for start, end in spans], zeros // pattern.each)
    for (start, end), count in zip(spans, counts, strict=True):
        part = columns[start:end]
        worth = (part / diagonal[start:end, None]).square()
        if not pattern.stay:
            gone[start:end] = pattern.mask(worth.T, count * pattern.each).T
        errors = torch.zeros_like(part)
        for i in range(end - start):
            at = start + i
            if pattern.stay and i % pattern.columns == 0 and i + pattern.columns <= end - start:
                group = slice(at, at + pattern.columns)
                worth = (columns[group] / diagonal[group, None]).square()
                gone[group] = pattern.mask(worth.T, 0).T
            errors[i] = torch.where(gone[at], part[i] / diagonal[at], 0.0)
            part[i].masked_fill_(gone[at], 0.0)
            part[i + 1 :].addr_(factor[at, at + 1 : end], errors[i], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    made = columns.T.contiguous()
    return layer.better(made, layer.weight.masked_fill(gone.T, 0.0))


def spans_of(layer: Layer, pattern: Pattern, span: int) -> Iterator[tuple[int, int]]:
    """First and last columns of spans, of whole cells each; none reaches across positions of a kernel.

    Single elements know no positions, and their spans do.
    """
    columns = layer.weight.shape[1]
    run = columns if pattern.rows * pattern.columns == 1 else layer.run
    width = max(span // pattern.columns, 1) * pattern.columns
    for first in range(0, columns, run):
        for start in range(first, first + run, width):
            yield start, min(start + width, first + run)


def _cells(outputs: int, columns: int, pattern: Pattern) -> int:
    return (outputs // pattern.rows) * (columns // pattern.columns)


def _shares(cells: list[int], gone: int) -> list[int]:
    """Divide the cells that go among spans, in proportion to the cells of each; they add up."""
    total = sum(cells)
    ends = [0]
    seen = 0
    for count in cells:
        seen += count
        ends.append(gone * seen // max(total, 1))
    return [last - first for first, last in pairwise(ends)]
