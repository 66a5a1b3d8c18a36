"""Exact choice among coupled options: pairwise costs, options that silence dimensions, and several limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import ArrayLike

from autoprune.errors import InfeasibleBudgetError
from autoprune.protocols import FloatArray, IntArray

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

_OPTIMAL, _INFEASIBLE = 0, 2  # status of scipy.optimize.milp
_TOLERANCE = 1e-6  # of a limit, relative
_HALF = 0.5  # a variable that is 0 or 1 but for rounding


@dataclass(frozen=True)
class Pair:
    """Costs of two dimensions together, in addition to what each costs alone; none while one of them is silenced.

    Attributes:
        first: A dimension.
        second: Another one.
        costs: For each option of both, shape (sizes[first], sizes[second], c).
    """

    first: int
    second: int
    costs: FloatArray


@dataclass(frozen=True)
class Silence:
    """An option in which another dimension has neither cost nor loss.

    Attributes:
        dimension: The dimension that silences.
        option: Its option that does.
        silenced: The dimension that is silenced.
    """

    dimension: int
    option: int
    silenced: int


@dataclass(frozen=True)
class Choice:
    """Answer of `choose_coupled`.

    Attributes:
        options: The option of each dimension, 0 where it is silenced, int64, shape (d,); None where the search tree
            ended before one was found.
        loss: Sum of the losses; infinite without options.
        bound: Proven lower bound of the least loss; minus infinity where none was proven.
    """

    options: IntArray | None
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """Difference of loss and bound as a share of the loss; 0 where the choice is proven to be the best."""
        return gap_of(self.loss, self.bound)


def gap_of(loss: float, bound: float) -> float:
    """Difference of a loss and a lower bound as a share of the loss, not negative."""
    return max(loss - bound, 0.0) / abs(loss) if loss else 0.0


def choose_coupled(
    losses: Sequence[ArrayLike],
    costs: Sequence[ArrayLike],
    limits: ArrayLike,
    pairs: Sequence[Pair] = (),
    silences: Sequence[Silence] = (),
    most_loss: float = np.inf,
    nodes: int | None = None,
) -> Choice | None:
    """Choose one option of each dimension with the least sum of losses within all limits, exactly.

    A mixed-integer linear program, solved by HiGHS. An option is a variable of 0 or 1; those of a dimension sum to 1,
    with a further state of no cost and no loss for dimensions that can be silenced. For the options i and j of a pair
    a variable y_ij >= 0 stands for their product: the sum of y_ij over j is that of i, and over i that of j (a
    transportation problem), which is far tighter than y_ij >= x_i + x_j - 1, and makes all y_ij whole where all x are.

    Args:
        losses: Loss of each option, lower is better, finite; d arrays of any positive lengths.
        costs: Costs of each option in the units of `limits`, shapes (sizes[j], c), or (sizes[j],) for one limit.
        limits: Largest sum of each cost, shape (c,), or a number.
        pairs: Costs of pairs of dimensions.
        silences: Options that silence other dimensions; a dimension silenced by nothing always counts.
        most_loss: Largest sum of losses that is of interest, such as that of a known choice.
        nodes: Most nodes of the search tree; none by default. The answer then has a proven gap.

    Returns:
        The choice; None if it is proven that there is none up to `most_loss`.

    Raises:
        InfeasibleBudgetError: If no choice is within the limits.
        ValueError: If shapes disagree, a number is not finite, or a dimension silences itself.

    Example:
        >>> pair = Pair(0, 1, np.array([[[4.0], [2.0]], [[2.0], [1.0]]]))
        >>> choose_coupled([[0, 3], [0, 1]], [[0, 0], [0, 0]], 2, [pair]).options
        array([0, 1])

    Reference:
        Huangfu and Hall, "Parallelizing the dual revised simplex method", Math. Prog. Comp. 10, 2018 (HiGHS); Adams and
        Sherali, Management Science 32(10), 1986, for the linearised products.
    """
    loss, cost, most = _checked(losses, costs, limits, pairs, silences)
    choice = _Program(loss, cost, most, pairs, silences).solve(most_loss, nodes)
    if (
        choice is not None
        and choice.options is not None
        and (spent(choice.options, cost, pairs, silences) > most).any()
    ):
        # The solver allows a limit to be exceeded by its tolerance.
        choice = _Program(loss, cost, most - _TOLERANCE * np.abs(most), pairs, silences).solve(most_loss, nodes)
    return choice


class _Rows:
    """Rows of a sparse matrix with bounds, one after the other."""

    def __init__(self) -> None:
        self._entries: list[tuple[IntArray, IntArray, FloatArray]] = []
        self._bounds: list[tuple[FloatArray, FloatArray]] = []
        self._count = 0

    def add(self, row: ArrayLike, column: ArrayLike, value: ArrayLike, low: ArrayLike, high: ArrayLike) -> None:
        """Add entries in rows numbered from 0, and the bounds of these rows."""
        entry, at, each = np.broadcast_arrays(row, column, value)
        lowest, highest = np.broadcast_arrays(np.atleast_1d(low), np.atleast_1d(high))
        self._entries.append((self._count + entry.ravel(), at.ravel(), each.ravel().astype(np.float64)))
        self._bounds.append((lowest.astype(np.float64), highest.astype(np.float64)))
        self._count += len(lowest)

    def constraint(self, variables: int) -> LinearConstraint:
        """Make the constraint on a number of variables."""
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array

        row, column, value = map(np.concatenate, zip(*self._entries, strict=True))
        low, high = map(np.concatenate, zip(*self._bounds, strict=True))
        return LinearConstraint(csr_array((value, (row, column)), shape=(self._count, variables)), low, high)


@final
class _Program:
    """The linear program; its variables are the states of all dimensions, then the products of all pairs.

    The states of a dimension are its options, and a last one for being silenced where something silences it.
    """

    def __init__(
        self,
        losses: Sequence[FloatArray],
        costs: Sequence[FloatArray],
        limits: FloatArray,
        pairs: Sequence[Pair],
        silences: Sequence[Silence],
    ) -> None:
        self._losses = losses
        self._silenced = {silence.silenced for silence in silences}
        self._sizes = np.array([len(row) for row in losses])
        states = np.array([len(row) + (j in self._silenced) for j, row in enumerate(losses)])
        self._starts = np.cumsum(states) - states
        self._states = int(states.sum())
        products = [states[pair.first] * states[pair.second] for pair in pairs]
        self._variables = self._states + int(sum(products))
        self._objective = np.zeros(self._variables)
        spent = np.zeros((self._variables, len(limits)))
        for j, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
            own = self._options(j)
            self._objective[own] = loss
            spent[own] = cost

        self._rows = _Rows()
        dims = np.repeat(np.arange(len(states)), states)
        self._rows.add(dims, np.arange(self._states), 1.0, np.ones(len(states)), 1.0)
        self._add_silences(silences)
        first = self._states
        for pair, count in zip(pairs, products, strict=True):
            grid = self._add_pair(pair, first, states)
            spent[grid[: self._sizes[pair.first], : self._sizes[pair.second]]] = pair.costs
            first += int(count)
        # Each limit relative to itself, because the solver's tolerances are absolute.
        scale = np.where(limits > 0, limits, 1.0)
        at, limit = np.nonzero(spent)
        self._rows.add(limit, at, spent[at, limit] / scale[limit], -np.inf, limits / scale)

    def _options(self, j: int) -> IntArray:
        """Variables of the options of a dimension."""
        own: IntArray = self._starts[j] + np.arange(self._sizes[j])
        return own

    def _add_silences(self, silences: Sequence[Silence]) -> None:
        """A dimension is in its last state if, and only if, one that silences it has such an option."""
        for j in sorted(self._silenced):
            by = np.array([self._starts[s.dimension] + s.option for s in silences if s.silenced == j])
            gone = self._starts[j] + self._sizes[j]
            self._rows.add(0, [gone, *by], [1.0, *[-1.0] * len(by)], -np.inf, 0.0)
            self._rows.add(
                np.repeat(np.arange(len(by)), 2),
                np.column_stack([np.full(len(by), gone), by]).ravel(),
                np.tile([1.0, -1.0], len(by)),
                np.zeros(len(by)),
                np.inf,
            )

    def _add_pair(self, pair: Pair, first: int, states: IntArray) -> IntArray:
        """Add the rows and columns of products of a pair, and return their variables, one for each two states."""
        grid: IntArray = first + np.arange(states[pair.first] * states[pair.second]).reshape(states[pair.first], -1)
        for j, lines in ((pair.first, grid), (pair.second, grid.T)):
            own = self._starts[j] + np.arange(states[j])
            line = np.repeat(np.arange(len(own)), lines.shape[1])
            self._rows.add(
                np.concatenate([line, np.arange(len(own))]),
                np.concatenate([lines.ravel(), own]),
                np.concatenate([np.ones(lines.size), -np.ones(len(own))]),
                np.zeros(len(own)),
                0.0,
            )
        return grid

    def solve(self, most_loss: float, nodes: int | None) -> Choice | None:
        """Solve it, as `choose_coupled` does."""
        from scipy.optimize import Bounds, milp

        if np.isfinite(most_loss):
            self._rows.add(0, np.arange(self._states), self._objective[: self._states], -np.inf, most_loss)
        whole = np.arange(self._variables) < self._states
        answer = milp(
            self._objective,
            integrality=whole.astype(np.int64),
            bounds=Bounds(0.0, 1.0),
            constraints=self._rows.constraint(self._variables),
            options={"mip_rel_gap": 0.0} | ({} if nodes is None else {"node_limit": nodes}),
        )
        if answer.status == _INFEASIBLE and not np.isfinite(most_loss):
            raise InfeasibleBudgetError("limits must allow at least one choice of options, but none meets them all")
        if answer.status == _INFEASIBLE:
            return None
        if answer.x is None:
            return Choice(None, np.inf, _number(answer.mip_dual_bound))
        chosen = np.array([int(answer.x[self._options(j)].argmax()) for j in range(len(self._sizes))], dtype=np.int64)
        gone = [j for j in sorted(self._silenced) if answer.x[self._starts[j] + self._sizes[j]] > _HALF]
        chosen[gone] = 0
        loss = sum(float(row[i]) for j, (row, i) in enumerate(zip(self._losses, chosen, strict=True)) if j not in gone)
        proven = answer.status == _OPTIMAL
        return Choice(chosen, loss, loss if proven else _number(answer.mip_dual_bound))


def _number(bound: float | None) -> float:
    """Bound of the solver, which has none where it ended early or gave up."""
    return -np.inf if bound is None else float(bound)


def spent(
    options: IntArray, costs: Sequence[FloatArray], pairs: Sequence[Pair], silences: Sequence[Silence]
) -> FloatArray:
    """Costs of a choice whose silenced dimensions are at 0, shape (c,)."""
    gone = {s.silenced for s in silences if options[s.dimension] == s.option}
    total = np.sum([row[i] for j, (row, i) in enumerate(zip(costs, options, strict=True)) if j not in gone], axis=0)
    for pair in pairs:
        if not {pair.first, pair.second} & gone:
            total = total + pair.costs[options[pair.first], options[pair.second]]
    return np.asarray(total, dtype=np.float64)


def _checked(
    losses: Sequence[ArrayLike],
    costs: Sequence[ArrayLike],
    limits: ArrayLike,
    pairs: Sequence[Pair],
    silences: Sequence[Silence],
) -> tuple[list[FloatArray], list[FloatArray], FloatArray]:
    """Losses (sizes[j],), costs (sizes[j], c) and limits (c,) as arrays of floats."""
    most = np.atleast_1d(np.asarray(limits, dtype=np.float64))
    loss = [np.asarray(row, dtype=np.float64) for row in losses]
    cost = [np.asarray(row, dtype=np.float64) for row in costs]
    cost = [row[:, None] if row.ndim == 1 else row for row in cost]
    sizes = [len(row) for row in loss]
    wanted = [(size, len(most)) for size in sizes]
    if not sizes or any(row.ndim != 1 or not len(row) for row in loss) or [row.shape for row in cost] != wanted:
        raise ValueError(f"costs must have shapes {wanted}, as losses and limits, got {[row.shape for row in cost]}")
    for pair in pairs:
        shape = (sizes[pair.first], sizes[pair.second], len(most))
        if pair.first == pair.second or np.shape(pair.costs) != shape:
            raise ValueError(
                f"pairs must be of two dimensions and have costs of shape {shape}, got {pair.first}, {pair.second} and "
                f"{np.shape(pair.costs)}"
            )
    for silence in silences:
        if silence.dimension == silence.silenced or not 0 < silence.option < sizes[silence.dimension]:
            raise ValueError(f"silences must name an option other than 0 and another dimension, got {silence}")
    if not all(np.isfinite(row).all() for row in (*loss, *cost, *(pair.costs for pair in pairs))):
        raise ValueError("losses and costs must be finite; leave out options that are impossible")
    if np.isnan(most).any() or most.ndim != 1:
        raise ValueError(f"limits must be numbers of shape (c,), got {limits!r}")
    return loss, cost, most
