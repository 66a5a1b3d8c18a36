"""Default optimizer: the knapsack's front of measured tables, refined by evolution and screened by a surrogate."""

from __future__ import annotations

from collections import Counter
from typing import Literal, final

import numpy as np

from autoprune.optimizers.history import Archive
from autoprune.optimizers.knapsack.coupling import coupled_front
from autoprune.optimizers.knapsack.relinearise import front_of, reachable, spread_budgets
from autoprune.optimizers.knapsack.sensitivity import Table, next_probes, table_of
from autoprune.optimizers.knapsack.table_correction import corrected_tables
from autoprune.optimizers.level_switch import evolve
from autoprune.optimizers.nsga2 import breed, find_coupled
from autoprune.optimizers.problem import Problem
from autoprune.optimizers.proposals import elites_of, in_turn, some_of_all, unknown, vary
from autoprune.optimizers.screening import choose_by_gain
from autoprune.optimizers.surrogate import THRESHOLD, Surrogate
from autoprune.protocols import Evaluations, FloatArray, IntArray

_START, _SCAN, _FRONT, _REFINE = "uniform pruning", "sensitivity scan", "knapsack front", "refinement"
_EXPECTED = "expected front"
_LEAST_SCAN = 16  # trials: with fewer, what a scan takes is worth more as assembled candidates
_LEAST_ORDERED = 0.5  # of the dimensions: options without an order have no neighbours to learn a table from
_SHOWN = 8  # values of tau in the notes
_FRONTS = (33, 17, 9, 5)  # numbers of budgets that leave equal gaps
_FRONT_SHARE = 0.5  # of the trials, the most for the front, but for the least of these numbers
_QUICK_ROUNDS = 2
_LEAST_ADDITIVE = 0.5  # rank correlation of summed and joint losses, below which the table's front is left early
_FEWEST = 4  # trials to breed from
_PROPOSALS = 80  # of each kind, for every ask
_KNAPSACKS = 400  # dimensions times budgets of the knapsacks solved for one ask
_GRID = 40  # budgets that gains are averaged over
_AT_LIMIT = 1.3  # stretches the budgets aimed at, so that about a quarter of them are the limit itself
_UNSCREENED = 4  # one in this number is not screened, so that the surrogate learns where it errs
_BELOW = 0.7  # of the cost at which a limit on the score is known to be missed: how far below it may yet be met


@final
class Auto:
    """Composes the other optimizers; every evaluation serves all of them.

    1. The problem's seeds: dense, uniform pruning, and the user's start.
    2. The knapsack's front of what is expected before any evaluation, for 5 budgets; without a prior all dimensions
       are expected to lose alike, and where a scan follows, that is not worth a trial.
    3. A scan: the loss of each dimension alone, for at most 40 % of the trials (`sensitivity.next_probes`). It is left
       out below 16 trials, where fewer than half of the dimensions are ordered, and where a prior is known and the
       trials do not suffice to measure every dimension once.
    4. The knapsack's front of that table, for at most half of the trials; for 5 budgets if sums of the table turn out
       to rank assembled candidates badly.
    5. Proposals of four kinds until the trials end: knapsacks on tables corrected by evaluations of assembled
       candidates (`corrected_tables`), children of `NSGA2` and of `LevelSwitch`, and one or two random changes to the
       best candidate of a budget; in a space that can be listed, any candidate. A surrogate chooses those whose
       predictions promise most to the front over the budget range, a quarter of it at the limit itself
       (`choose_by_gain`), while its cross-validated rank correlation is good; otherwise the kinds take turns.

    Once a candidate misses a limit on the score, the last two phases look for the cheapest one that meets it: between
    the costs at which the front is known to miss it and the cheapest candidate that meets it, instead of over the whole
    budget range.

    Args:
        problem: The problem to search.
        seed: Not negative; the same seed gives the same proposals for the same history.
        solver: ``"dynamic"`` solves fronts of tables by dynamic programming on linearised costs; ``"milp"`` starts both
            the expected front and the table's with five budgets solved by integer programming, which knows how costs
            of two dimensions depend on each other (`coupled_front`): up to some seconds for each budget.

    Raises:
        ValueError: If `solver` is unknown.
    """

    def __init__(self, problem: Problem, seed: int = 0, solver: Literal["dynamic", "milp"] = "dynamic") -> None:
        if solver not in ("dynamic", "milp"):
            raise ValueError(f"solver must be 'dynamic' or 'milp', got {solver!r}")
        self._problem = problem
        self._exact = solver == "milp"
        self._archive = Archive(problem, seed)
        self._surrogate = Surrogate(problem)
        self._coupled = find_coupled(problem)
        self._fronts: dict[tuple[int, bool], tuple[bytes, IntArray]] = {}
        self._guess: IntArray | None = None
        self._phase = _START
        self._asked: Counter[str] = Counter()

    @property
    def surrogate_history(self) -> list[tuple[int, float]]:
        """(feasible candidates evaluated, cross-validated Kendall tau at equal cost) of every surrogate fitted."""
        return self._surrogate.history

    @property
    def phase(self) -> str:
        """Purpose of the last candidates asked for."""
        return self._phase

    @property
    def notes(self) -> tuple[str, ...]:
        """Number of candidates of each phase, and the rank correlations of the surrogate."""
        phases = ", ".join(f"{count} {phase}" for phase, count in self._asked.items())
        notes = [f"candidates by the phase that began their batch: {phases}"] if phases else []
        if history := self.surrogate_history:
            places = np.unique(np.linspace(0, len(history) - 1, _SHOWN).astype(np.int64))
            taus = ", ".join(f"{history[i][1]:.2f} after {history[i][0]}" for i in places)
            notes.append(
                f"surrogate: rank correlation at equal cost (Kendall's tau, cross-validated) {taus} candidates; "
                f"it screens proposals while that is at least {THRESHOLD:g}"
            )
        return tuple(notes)

    def ask(self, n: int) -> IntArray:
        """Return up to `n` new candidates, feasible or single changes, int64, shape (<= n, d); empty at the end."""
        self._phase = _START
        candidates = self._archive.ask(n, self._propose)
        self._asked[self._phase] += len(candidates)
        return candidates

    def tell(self, evaluations: Evaluations) -> None:
        """Learn from evaluations, in any order."""
        self._archive.tell(evaluations)

    def pend(self, candidates: IntArray) -> None:
        """Take candidates (n, d) as proposed already."""
        self._archive.pend(candidates)

    def _propose(self, n: int, rng: np.random.Generator) -> IntArray:
        """Propose the expected front, probes, the table's front, then refinements, shape (any, d)."""
        known = self._archive.known()
        table = table_of(self._problem, self._archive.probes())
        found = [unknown(self._expected(), known)]
        phase = _EXPECTED
        if self._scans and len(found[0]) < n:
            missing = n - len(found[0])
            found.append(
                next_probes(self._problem, known, missing, lambda: self._front(table, _FRONTS[-1], _QUICK_ROUNDS))
            )
            phase = phase if len(found[0]) else _SCAN
        if (made := sum(map(len, found))) < n:
            affordable = [count for count in _FRONTS if count <= _FRONT_SHARE * self._problem.trials]
            most = affordable[0] if affordable and self._adds_up(table) else _FRONTS[-1]
            front = self._front(table, most)
            if self._exact:
                front = np.concatenate([self._front(table, _FRONTS[-1], exact=True), front])
            found.append(self._within_aim(unknown(front, known)))
            phase = phase if made else _FRONT
        if (made := sum(map(len, found))) < n:
            phase = phase if made else _REFINE
            found.append(self._refine(n - made, table, known, rng))
        self._phase = phase
        return np.concatenate(found)

    @property
    def _scans(self) -> bool:
        """True if single changes are measured at all."""
        return self._problem.trials >= _LEAST_SCAN and bool(self._problem.ordered.mean() >= _LEAST_ORDERED)

    def _expected(self) -> IntArray:
        """Front of what is expected before any evaluation, which costs no probe; shape (any, d).

        Empty without a prior, where a scan follows: its table will know better.
        """
        if self._scans and self._problem.prior is None:
            return self._problem.seeds[:0]
        if self._guess is None:
            table = table_of(self._problem, self._archive.nothing())
            self._guess = front_of(self._problem, table.losses, spread_budgets(self._problem, _FRONTS[-1]))
        return self._guess

    def _aim(self) -> FloatArray:
        """Range of the costs to search, shape (c, 2): the budget range, or the part where a limit on the score is met.

        An optimizer does not know such a limit until a candidate misses it. The cheapest candidate that meets it, by
        the first cost, is the upper end. All cheaper ones miss it; the lower end is somewhat below the cost of the best
        of them, because better candidates may meet the limit there.
        """
        wanted = self._problem.budget_range.copy()
        (_, objectives), acceptable = self._archive.ok(), self._archive.acceptable()
        if not acceptable.all():
            high = min(objectives[acceptable, 1], default=wanted[0, 1])
            cheaper = objectives[objectives[:, 1] < high]
            best = cheaper[cheaper[:, 0].argmin(), 1] if len(cheaper) else wanted[0, 0]
            wanted[0] = min(max(_BELOW * best, wanted[0, 0]), high), high
        return wanted

    def _within_aim(self, candidates: IntArray) -> IntArray:
        """Candidates whose costs are within the aim; all without a limit on the score."""
        low, high = self._aim()[0]
        first = self._problem.costs(candidates)[:, 0]
        aimed: IntArray = candidates[((low <= first) & (first < high)) | self._archive.acceptable().all()]
        return aimed

    def _adds_up(self, table: Table) -> bool:
        """Return whether sums of the table rank the assembled candidates well, or too few are known to tell."""
        from scipy.stats import spearmanr

        candidates, objectives = self._archive.ok()
        joint = np.count_nonzero(candidates, axis=1) > 1
        summed = sum(row[candidates[joint, j]] for j, row in enumerate(table.losses))
        if joint.sum() < _FRONTS[-1] or np.ptp(summed) == 0 or np.ptp(objectives[joint, 0]) == 0:
            return True
        return bool(spearmanr(summed, objectives[joint, 0]).statistic >= _LEAST_ADDITIVE)

    def _refine(self, n: int, table: Table, known: IntArray, rng: np.random.Generator) -> IntArray:
        """Return proposals, the `n` most promising first, shape (any, d)."""
        problem = self._problem.aimed(self._aim())
        (candidates, objectives) = self._archive.ok()
        low, high = problem.budget_range.T
        # Evenly spaced budgets cover the whole range in every ask; the jitter keeps asks from repeating the same ones.
        place = (np.arange(n) + rng.uniform(-0.5, 0.5, n)) / (n - 1) if n > 1 else rng.random(1)
        budgets = reachable(problem, low + np.clip(_AT_LIMIT * place, 0.0, 1.0)[:, None] * (high - low))
        # The time of a knapsack grows with the dimensions, so large problems solve it for a random part of the budgets.
        solved = rng.permutation(budgets)[: max(_KNAPSACKS // len(problem.sizes), 1)]
        tables = corrected_tables(table, candidates, objectives, rng)
        kinds = [front_of(problem, tables, solved, rounds=_QUICK_ROUNDS)]
        if len(candidates) >= _FEWEST:
            kinds += [
                breed(problem, candidates, objectives, _PROPOSALS, rng, coupled=self._coupled),
                evolve(problem, candidates, objectives, _PROPOSALS, rng),
                vary(problem, elites_of(candidates, objectives, budgets), _PROPOSALS, rng),
            ]
        # In turn, so that no kind crowds out the others where no surrogate chooses among them.
        proposals = in_turn([rng.permutation(unknown(kind, known)) for kind in kinds])
        self._surrogate.fit(candidates, objectives)
        if not self._surrogate.trusted or not len(proposals):
            return proposals
        unscreened = int(n + rng.integers(_UNSCREENED)) // _UNSCREENED  # at random where few are asked for at once
        pool = unknown(np.concatenate([proposals, some_of_all(problem, rng)]), known)
        screened = self._screen(problem, pool, n - unscreened)
        return np.concatenate([screened, proposals])

    def _screen(self, problem: Problem, proposals: IntArray, n: int) -> IntArray:
        """Choose the proposals that promise most to the front over the budget range, shape (<= n, d)."""
        objectives = self._archive.ok()[1]
        low, high = problem.budget_range.T
        places = np.minimum(_AT_LIMIT * (np.arange(_GRID) + 0.5) / _GRID, 1.0)
        budgets = reachable(problem, low + places[:, None] * (high - low))
        within = (objectives[:, None, 1:] <= budgets).all(axis=2)
        best = np.where(within, objectives[:, :1], objectives[:, 0].max()).min(axis=0)
        fits = np.asarray((problem.costs(proposals)[:, None] <= budgets).all(axis=2))
        learnt = self._surrogate
        predicted = learnt.warp(learnt.predict(proposals))
        return proposals[choose_by_gain(predicted, learnt.spread, fits, learnt.warp(best), n)]

    def _front(self, table: Table, n: int, rounds: int = 6, exact: bool = False) -> IntArray:
        """Front of a table for `n` budgets, cached until the table changes."""
        key = b"".join(row.tobytes() for row in table.losses)
        if self._fronts.get((n, exact), (b"",))[0] != key:
            budgets = spread_budgets(self._problem, n)
            if exact:
                front = coupled_front(self._problem, table.losses, budgets).candidates
            else:
                front = front_of(self._problem, table.losses, budgets, "sum", rounds)
            self._fronts[n, exact] = key, front
        return self._fronts[n, exact][1]
