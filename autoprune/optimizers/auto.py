"""Default optimizer: the knapsack's front of measured tables, refined by evolution and screened by a surrogate."""

from __future__ import annotations

from collections import Counter
from typing import final

import numpy as np

from autoprune.optimizers.history import Archive
from autoprune.optimizers.knapsack.relinearise import front_of, reachable, spread_budgets
from autoprune.optimizers.knapsack.sensitivity import Table, next_probes, table_of
from autoprune.optimizers.knapsack.table_correction import corrected_tables
from autoprune.optimizers.level_switch import evolve
from autoprune.optimizers.nsga2 import breed, find_coupled
from autoprune.optimizers.problem import Problem
from autoprune.optimizers.surrogate import THRESHOLD, Surrogate
from autoprune.protocols import Evaluations, FloatArray, IntArray

_START, _SCAN, _FRONT, _REFINE = "uniform pruning", "sensitivity scan", "knapsack front", "refinement"
_SHOWN = 8  # values of tau in the notes
_FRONTS = (33, 17, 9, 5)  # numbers of budgets that leave equal gaps
_FRONT_SHARE = 0.25  # of the trials, the most for the front, but for the least of these numbers
_QUICK_ROUNDS = 2
_LEAST_ADDITIVE = 0.5  # rank correlation of summed and joint losses, below which the table's front is left early
_FEWEST = 4  # trials to breed from
_PROPOSALS = 80  # of each kind, for every ask
_KNAPSACKS = 400  # dimensions times budgets of the knapsacks solved for one ask
_AT_LIMIT = 1.3  # stretches the budgets aimed at, so that about a quarter of them are the limit itself
_UNSCREENED = 4  # one in this number is not screened, so that the surrogate learns where it errs
_GREED = 0.7  # probability of taking the best prediction; else the next one, and so on
_BELOW = 0.7  # of the cost at which a limit on the score is known to be missed: how far below it may yet be met
_WINDOW = 0.1  # of the budget range: how near to its budget every second choice must come


@final
class Auto:
    """Composes the other optimizers; every evaluation serves all of them.

    1. The problem's seeds: dense, uniform pruning, and the user's start.
    2. A scan: the loss of each dimension alone, for at most 40 % of the trials (`sensitivity.next_probes`).
    3. The knapsack's front of that table, for at most a quarter of the trials; for 5 budgets if sums of the table turn
       out to rank assembled candidates badly.
    4. Proposals of four kinds until the trials end: knapsacks on tables corrected by evaluations of assembled
       candidates (`corrected_tables`), children of `NSGA2` and of `LevelSwitch`, and one or two random changes to the
       best candidate of a budget. A surrogate screens them for budgets spread over the budget range, a quarter at the
       limit itself, while its cross-validated rank correlation is good; otherwise the kinds take turns.

    Once a candidate misses a limit on the score, the last two phases look for the cheapest one that meets it: between
    the costs at which the front is known to miss it and the cheapest candidate that meets it, instead of over the whole
    budget range.

    Args:
        problem: The problem to search.
        seed: Not negative; the same seed gives the same proposals for the same history.
    """

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self._problem = problem
        self._archive = Archive(problem, seed)
        self._surrogate = Surrogate(problem)
        self._coupled = find_coupled(problem)
        self._fronts: dict[int, tuple[bytes, IntArray]] = {}
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
        """Propose probes, then the table's front, then refinements, shape (any, d)."""
        table = table_of(self._problem, self._archive.probes())
        known = self._archive.known()
        found = [next_probes(self._problem, known, n, lambda: self._front(table, _FRONTS[-1], _QUICK_ROUNDS))]
        self._phase = _SCAN if len(found[0]) else _REFINE
        if len(found[0]) < n:
            affordable = [count for count in _FRONTS if count <= _FRONT_SHARE * self._problem.trials]
            most = affordable[0] if affordable and self._adds_up(table) else _FRONTS[-1]
            found.append(self._within_aim(_new(self._front(table, most), known)))
            self._phase = _FRONT if len(found[1]) and not len(found[0]) else self._phase
        missing = n - sum(map(len, found))
        return np.concatenate([*found, self._refine(missing, table, known, rng)] if missing > 0 else found)

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
                _vary(problem, _elites(candidates, objectives, budgets), _PROPOSALS, rng),
            ]
        # In turn, so that no kind crowds out the others where no surrogate chooses among them.
        proposals = _in_turn([rng.permutation(_new(kind, known)) for kind in kinds])
        self._surrogate.fit(candidates, objectives)
        if not self._surrogate.trusted or not len(proposals):
            return proposals
        screened = self._screen(problem, proposals, budgets, rng)
        unscreened = (n + rng.integers(_UNSCREENED)) // _UNSCREENED  # at random where few are asked for at once
        return np.concatenate([screened[: n - unscreened], proposals])

    def _screen(self, problem: Problem, proposals: IntArray, budgets: FloatArray, rng: np.random.Generator) -> IntArray:
        """Choose a proposal with a good prediction within each budget, shape (<= budgets, d).

        A cheap candidate may have the best prediction within every budget, so every second choice must cost nearly as
        much as its budget allows.
        """
        predicted = self._surrogate.predict(proposals)
        costs = problem.costs(proposals)
        low, high = problem.budget_range.T
        chosen: list[int] = []
        for i, budget in enumerate(budgets):
            fits = (costs <= budget).all(axis=1)
            if i % 2 or (len(budgets) == 1 and rng.random() < 0.5):
                fits &= (np.maximum(costs, low) >= budget - _WINDOW * (high - low)).any(axis=1)
            fits[chosen] = False
            best = np.flatnonzero(fits)[np.argsort(predicted[fits], kind="stable")]
            if len(best):
                chosen.append(int(best[min(rng.geometric(_GREED), len(best)) - 1]))
        return proposals[np.array(chosen, dtype=np.int64)]

    def _front(self, table: Table, n: int, rounds: int = 6) -> IntArray:
        """Front of a table for `n` budgets, cached until the table changes."""
        key = b"".join(row.tobytes() for row in table.losses)
        if self._fronts.get(n, (b"",))[0] != key:
            self._fronts[n] = (
                key,
                front_of(self._problem, table.losses, spread_budgets(self._problem, n), "sum", rounds),
            )
        return self._fronts[n][1]


def _elites(candidates: IntArray, objectives: FloatArray, budgets: FloatArray) -> IntArray:
    """Best candidate within each budget, or the best of all where none is, shape (budgets, d)."""
    ranked = np.argsort(objectives[:, 0], kind="stable")
    within = (objectives[ranked, None, 1:] <= budgets).all(axis=2)
    elites: IntArray = candidates[ranked[within.argmax(axis=0)]]
    return elites


def _vary(problem: Problem, elites: IntArray, n: int, rng: np.random.Generator) -> IntArray:
    """Set one or two entries of elites to any option, repaired; shape (n, d).

    Unlike the others, these are not filled up to their budget: where a loss is not monotone, smaller can be better.
    """
    varied = rng.choice(elites, n)
    for share in (1.0, 0.5):
        rows = np.flatnonzero(rng.random(n) < share)
        dims = rng.integers(varied.shape[1], size=len(rows))
        varied[rows, dims] = rng.integers(problem.sizes[dims])
    return problem.repair(varied)


def _new(candidates: IntArray, known: IntArray) -> IntArray:
    """Candidates that are not known, each once, in their order."""
    seen = {row.tobytes() for row in known}
    fresh = [key for key in dict.fromkeys(row.tobytes() for row in candidates) if key not in seen]
    return np.frombuffer(b"".join(fresh), dtype=np.int64).reshape(-1, candidates.shape[1])


def _in_turn(kinds: list[IntArray]) -> IntArray:
    """Merge proposals, one of each kind in turn, without duplicates."""
    rows = [kind[i] for i in range(max(map(len, kinds))) for kind in kinds if i < len(kind)]
    merged = np.array(rows, dtype=np.int64).reshape(-1, kinds[0].shape[1])
    return _new(merged, merged[:0])
