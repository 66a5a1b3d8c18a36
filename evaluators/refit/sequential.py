"""Zeros set layer after layer: each weight is solved for what it reads once the layers before it have theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch
from autoprune.importance.calibration import Calibration
from autoprune.importance.masks.observe import Observed
from autoprune.importance.masks.solver import Solver
from autoprune.importance.moments import Moments, Sample
from autoprune.importance.padding import positions_of
from autoprune.importance.reading import Reader, Reading, See, matrix_of
from autoprune.protocols import IntArray
from autoprune.structure.slicing.slicing import Edit
from autoprune.structure.slicing.zeros import UNSTRUCTURED, Pattern

Run = Callable[[Batch], object]
Put = Callable[[nn.Module, str, Tensor], None]


class Sequential:
    """Solves the weights of a network in forward order, with the errors of earlier layers in their inputs.

    Weights that read the same values form a stage. For each, the calibration samples run through the dense network and
    through the pruned one, which has its zeros up to there. The dense weight is replaced by the one whose outputs on
    the pruned inputs come nearest to the dense outputs, so that it makes up for errors of earlier layers; its zeros are
    then set by the method. Where a bias is corrected, outputs get the means that they have in the dense network.

    Args:
        calibration: The dense model in evaluation mode, with buffers of its own.
        solver: With observations of the dense model, which tell the order of weights, their biases and norms.
        put: Replaces a parameter of a module.

    Reference:
        Dense outputs as the target of a layer whose inputs come from pruned ones: He et al., "Channel Pruning for
        Accelerating Very Deep Neural Networks", ICCV 2017, arXiv:1707.06168, section 3.2. SparseGPT (arXiv:2301.00774)
        takes the outputs of the dense weight on the pruned inputs, which leaves errors of earlier layers as they are.
    """

    def __init__(self, calibration: Calibration, solver: Solver, put: Put) -> None:
        self._calibration = calibration
        self._solver = solver
        self._put = put
        self._stages = stages_of(solver.observed)

    @torch.no_grad()
    def apply(self, module: nn.Module, edit: Edit, run: Run, through: Callable[[Run], None]) -> None:
        """Set the zeros of an edit in a module, in place.

        Args:
            module: Cut from the dense model, with units gone and no zeros yet.
            edit: The edit.
            run: Runs the module on a batch.
            through: Calls a function, which runs the module, with each calibration batch; norms may be corrected
                meanwhile.
        """
        for stage in self._stages:
            names = [name for name in stage if name in edit.zeroed]
            if names:
                pairs = self._observe(module, names[0], run, through)
                for name in names:
                    self._solve(module, edit, name, pairs)

    def _observe(self, module: nn.Module, name: str, run: Run, through: Callable[[Run], None]) -> list[Pair]:
        """Moments of what each matrix of a weight reads in both networks, by its first row."""
        dense = self._calibration
        every = max(each.moments.every for each in self._solver.observed[name])
        sources = len({id(each.moments) for each in self._solver.observed[name]})
        inputs: tuple[Inputs, Inputs] = ({}, {})
        of_dense, of_module = (
            Reading(network, dense.structure, _into(own, every), tied=True, names=(name,))
            for network, own in zip((dense.model, module), inputs, strict=True)
        )
        pairs: list[Pair] = []

        def observed(batch: Batch) -> None:
            for own in inputs:
                own.clear()
            mask = positions_of(batch)
            with of_dense.batch(mask):
                dense.forward(dense.model, batch)
            with of_module.batch(mask):
                run(batch)
            theirs, mine = ([own[reader].rows for reader in sorted(own, key=_start)] for own in inputs)
            if sources == 1:  # one or several products with the same values, and maybe others in the pruned network
                theirs, mine = theirs[:1], mine[:1]
            if not pairs:
                pairs.extend(Pair.between(*rows) for rows in zip(mine, theirs, strict=True))
            for pair, *rows in zip(pairs, mine, theirs, strict=True):
                pair.joint.add(torch.cat(rows, dim=1))

        through(observed)
        return pairs

    def _solve(self, module: nn.Module, edit: Edit, name: str, pairs: Sequence[Pair]) -> None:
        """Fit a weight to the dense outputs, set its zeros, and correct its biases."""
        solver = self._solver
        whole = self._calibration.model.get_parameter(name).detach()
        parts = list(_parts(solver.observed[name], pairs, edit.slices.get(name, {})))
        fitted = module.get_parameter(name).detach().clone(memory_format=torch.contiguous_format)
        for part in parts:
            matrix = matrix_of(fitted, part.reader)  # a view
            target = _rows(whole, part.reader)[part.rows]
            matrix.copy_(follow(target, matrix, part.pair, solver.centred(part.dense), solver.damping))
        self._put(module, name, fitted)
        now = {name: [replace(part.dense, reader=part.reader, moments=part.pair.own) for part in parts]}
        pattern = Pattern.parse(edit.patterns.get(name, UNSTRUCTURED))
        made = solver.of(module, now).solve(name, pattern, edit.zeroed[name])
        self._put(module, name, made)
        for part in parts:
            bias = part.dense.bias
            if bias is not None and solver.shifts(part.dense):
                begun = self._calibration.model.get_parameter(bias).detach()[part.rows].double()
                outputs = begun + _rows(whole, part.reader)[part.rows].double() @ part.pair.dense_mean
                value = module.get_parameter(bias).detach().clone()
                own = slice(part.reader.start, part.reader.start + part.reader.outputs)
                value[own] = (outputs - matrix_of(made, part.reader).double() @ part.pair.own.mean).to(value)
                self._put(module, bias, value)


@dataclass(frozen=True, eq=False)
class Pair:
    """Inputs of a matrix in a pruned network, row by row next to those in the dense one.

    Attributes:
        columns: Inputs in the pruned network.
        joint: Moments of rows (pruned, dense).
    """

    columns: int
    joint: Moments

    @classmethod
    def between(cls, pruned: Tensor, dense: Tensor) -> Pair:
        """Empty moments for rows of these lengths."""
        return cls(pruned.shape[1], Moments(pruned.shape[1] + dense.shape[1], 0))

    @property
    def own(self) -> Moments:
        """Moments of the inputs in the pruned network."""
        return self.joint.part(0, self.columns)

    @property
    def dense_mean(self) -> Tensor:
        """Mean of the inputs in the dense network, float64, shape (dense columns,)."""
        return self.joint.mean[self.columns :]

    def products(self, centred: bool) -> tuple[Tensor, Tensor]:
        """E[x x^T] of pruned inputs x and E[d x^T] with dense inputs d, or covariances; float64."""
        both = self.joint.products(centred)[:, : self.columns].double()
        return both[: self.columns], both[self.columns :]


def stages_of(observed: Mapping[str, Sequence[Observed]]) -> list[list[str]]:
    """Weights in forward order; those that read the same values one after the other are together."""

    def source(name: str) -> object:
        moments = {id(each.moments) for each in observed[name]}
        return moments.pop() if len(moments) == 1 else name

    return [list(names) for _, names in groupby(observed, key=source)]


def follow(dense: Tensor, start: Tensor, pair: Pair, centred: bool, damping: float) -> Tensor:
    """Weight V that minimises E|V x - W d|^2 + r |V - S|^2 with inputs x of a pruned network and d of the dense one.

    Args:
        dense: W, shape (outputs, dense columns).
        start: S, shape (outputs, columns).
        pair: Moments of x and d.
        centred: A bias or a norm takes care of means.
        damping: r, as a share of the mean square of x.

    Returns:
        V, float64, shape (outputs, columns).
    """
    own, cross = pair.products(centred)
    mean = float(own.diagonal().mean())
    ridge = damping * mean if mean > 0 else 1.0
    right = dense.double() @ cross + ridge * start.double()
    own.diagonal().add_(ridge)
    fitted: Tensor = torch.cholesky_solve(right.T, torch.linalg.cholesky(own)).T
    return fitted


@dataclass(frozen=True, eq=False)
class _Part:
    """Matrix of a weight in a pruned network.

    Attributes:
        dense: The matrix in the dense network.
        reader: In the pruned one.
        rows: Rows of the whole dense matrix that stay of it, int64, shape (outputs,).
        pair: Of its inputs.
    """

    dense: Observed
    reader: Reader
    rows: Tensor
    pair: Pair


def _parts(observed: Sequence[Observed], pairs: Sequence[Pair], slices: Mapping[int, IntArray]) -> Iterator[_Part]:
    """Lay out the matrices of a weight; all of a stage that read one input share the first pair."""
    start = 0
    for i, each in enumerate(sorted(observed, key=lambda each: each.reader.start)):
        first, last = each.reader.start, each.reader.start + each.reader.outputs
        left = slices.get(1 - each.reader.dim, np.arange(first, last))
        rows = torch.from_numpy(left[(left >= first) & (left < last)])
        pair = pairs[i] if len(pairs) == len(observed) else pairs[0]
        yield _Part(each, Reader(each.reader.name, start, len(rows), pair.columns, each.reader.dim), rows, pair)
        start += len(rows)


def _rows(parameter: Tensor, reader: Reader) -> Tensor:
    """All rows of a weight as a matrix."""
    return parameter.flatten(1) if reader.dim else parameter.T


Inputs = dict[Reader, Sample]
"""Rows that each matrix multiplied."""


def _into(inputs: Inputs, every: float) -> See:
    """Take about one of `every` rows, the same ones of any network."""

    def see(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        for rows in parts():
            inputs.setdefault(reader, Sample(every)).add(rows.detach())

    return see


def _start(reader: Reader) -> int:
    return reader.start
