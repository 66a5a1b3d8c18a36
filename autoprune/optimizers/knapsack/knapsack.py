"""Knapsack search: a table of the loss of each option alone, and the best sums of it for every budget."""

from __future__ import annotations

from typing import Literal, final

import numpy as np

from autoprune.optimizers.history import Archive
from autoprune.optimizers.knapsack.coupling import coupled_front
from autoprune.optimizers.knapsack.multiple_choice import Objective
from autoprune.optimizers.knapsack.relinearise import front_of, reachable, spread_budgets
from autoprune.optimizers.knapsack.sensitivity import SHARE, Table, next_probes, table_of
from autoprune.optimizers.problem import Problem
from autoprune.optimizers.random import draw_costs
from autoprune.protocols import Evaluations, FloatArray, IntArray

_BUDGETS = (33, 17, 9, 5, 3, 2, 1)  # numbers of budgets that leave equal gaps
_SCAN_BUDGETS = 5  # budgets that the scan refines around: recomputed after every probe, so few
_QUICK_ROUNDS = 2
_SCAN, _FRONT, _VARIED = "sensitivity scan", "knapsack front", "perturbed fronts"
_PROVEN = 1e-6  # gap that is rounding
_NOISE_MEASURED, _NOISE_FILLED, _MOST_NOISE = 0.1, 0.3, 0.5  # relative spread of losses in perturbed tables


@final
class Knapsack:
    """Measures options alone, then proposes the knapsack's front over the budget range, then variants of it.

    After the problem's seeds it asks for single changes (`sensitivity.next_probes`), for at most 40 % of the trials;
    these may be over the limits. Then it proposes the table's front (`front_of`), for the largest budget first and then
    always for the one in the widest gap; then the fronts of tables perturbed by their noise. It never waits: while
    probes are pending, the table holds the results so far. It does not learn from the scores of assembled candidates.

    Args:
        problem: The problem to search.
        seed: Not negative; the same seed gives the same proposals for the same history.
        table: ``"scan"`` measures; ``"prior"`` takes `Problem.prior` as it is and spends no trial on it.
        objective: ``"sum"`` minimises the sum of losses, ``"minimax"`` the largest one.
        solver: ``"dynamic"`` solves the front by dynamic programming on linearised costs, ``"milp"`` then looks for
            better sums by integer programming, which knows how costs of two dimensions depend on each other
            (`coupling.coupled_front`); it takes about a second for each budget.

    Raises:
        ValueError: If `table`, `objective` or `solver` is unknown, the prior is wanted and the problem has none, or
            ``"milp"`` is to minimise the largest loss.

    Reference:
        Frantar and Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees", ICML 2022, arXiv:2201.13096, with true
        costs in place of additive ones and without its search over the table's coefficients.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int = 0,
        table: Literal["scan", "prior"] = "scan",
        objective: Objective = "sum",
        solver: Literal["dynamic", "milp"] = "dynamic",
    ) -> None:
        if table not in ("scan", "prior"):
            raise ValueError(f"table must be 'scan' or 'prior', got {table!r}")
        if objective not in ("sum", "minimax"):
            raise ValueError(f"objective must be 'sum' or 'minimax', got {objective!r}")
        if solver not in ("dynamic", "milp") or (solver == "milp" and objective != "sum"):
            raise ValueError(f"solver must be 'dynamic', or 'milp' with objective='sum', got {solver!r}")
        if table == "prior" and problem.prior is None:
            raise ValueError("table='prior' needs a problem with a prior, got one without; use table='scan'")
        self._problem = problem
        self._scan = table == "scan"
        self._objective = objective
        self._exact = solver == "milp"
        self._gaps = np.empty(0)
        self._phase = ""
        self._archive = Archive(problem, seed)
        self._fronts: dict[tuple[int, bool], tuple[bytes, IntArray]] = {}

    @property
    def phase(self) -> str:
        """Purpose of the last candidates asked for."""
        return self._phase

    @property
    def notes(self) -> tuple[str, ...]:
        """Budgets for which the front of the table is proven to be the best, if it was solved exactly."""
        known = self._gaps[np.isfinite(self._gaps)]
        if not self._exact or not self._gaps.size:
            return ()
        if not known.size:
            return ("milp: too many options depend on each other for one program; the knapsack's front stands",)
        return (
            f"milp: {(known <= _PROVEN).sum()} of {len(self._gaps)} budgets have the least sum of the table's losses, "
            f"proven under costs of pairs; the largest gap is {known.max():.2%}",
        )

    def ask(self, n: int) -> IntArray:
        """Return up to `n` new candidates, feasible or single changes, int64, shape (<= n, d); empty at the end."""
        return self._archive.ask(n, self._propose)

    def tell(self, evaluations: Evaluations) -> None:
        """Learn from evaluations, in any order."""
        self._archive.tell(evaluations)

    def pend(self, candidates: IntArray) -> None:
        """Take candidates (n, d) as proposed already."""
        self._archive.pend(candidates)

    def table(self) -> Table:
        """Table of losses from the evaluations so far."""
        if self._scan:
            return table_of(self._problem, self._archive.probes())
        prior = self._problem.prior or ()
        unknown = tuple(np.full(len(row), np.nan) for row in prior)
        return Table(prior, tuple(np.arange(len(row)) == 0 for row in prior), unknown)

    def _propose(self, n: int, rng: np.random.Generator) -> IntArray:
        """Propose probes, then the front, then perturbed fronts, shape (any, d); some may be known already."""
        table = self.table()
        known = self._archive.known()
        found: list[IntArray] = []
        self._phase = _SCAN
        if self._scan:
            found.append(next_probes(self._problem, known, n, lambda: self._front(table, _SCAN_BUDGETS, _QUICK_ROUNDS)))
        if sum(map(len, found)) < n:
            self._phase = _FRONT
            found.append(self._front(table, self._count(), exact=self._exact))
        seen = {row.tobytes() for row in known}
        if len({row.tobytes() for part in found for row in part} - seen) < n:
            self._phase = _VARIED
            budgets = reachable(self._problem, draw_costs(self._problem, n, rng))
            noisy = _perturbed(table, rng)
            found.append(front_of(self._problem, noisy, budgets, self._objective, _QUICK_ROUNDS))
        return np.concatenate(found)

    def _count(self) -> int:
        """Number of budgets that fit into the trials left by the scan."""
        room = self._problem.trials - (int(SHARE * self._problem.trials) if self._scan else 0)
        return next(n for n in _BUDGETS if n <= max(room, 1))

    def _front(self, table: Table, n: int, rounds: int = 6, exact: bool = False) -> IntArray:
        """Front of a table for `n` budgets, cached until the table changes."""
        key = b"".join(row.tobytes() for row in table.losses)
        if self._fronts.get((n, exact), (b"",))[0] != key:
            budgets = spread_budgets(self._problem, n)
            if exact:
                solved = coupled_front(self._problem, table.losses, budgets)
                self._gaps = solved.gaps
                front = solved.candidates
            else:
                front = front_of(self._problem, table.losses, budgets, self._objective, rounds)
            self._fronts[n, exact] = key, front
        return self._fronts[n, exact][1]


def _perturbed(table: Table, rng: np.random.Generator) -> list[FloatArray]:
    """Multiply losses by log-normal factors of the size of their noise."""
    noisy = []
    for loss, measured, stderr in zip(table.losses, table.measured, table.stderr, strict=True):
        positive = np.isfinite(stderr) & (loss > 0)
        known = np.where(positive, stderr / np.where(positive, loss, 1.0), 0.0)
        spread = np.where(measured, np.clip(known, _NOISE_MEASURED, _MOST_NOISE), _NOISE_FILLED)
        noisy.append(loss * np.exp(spread * rng.standard_normal(len(loss))))
    return noisy


def milp(problem: Problem, seed: int = 0) -> Knapsack:
    """Make a `Knapsack` whose front is solved exactly where costs of two dimensions depend on each other."""
    return Knapsack(problem, seed, solver="milp")
