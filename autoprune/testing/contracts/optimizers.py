"""Contract of optimizers."""

# ruff: noqa: D102  (the names of the tests are sentences)

from __future__ import annotations

import numpy as np

from autoprune.optimizers.problem import Problem
from autoprune.protocols import FAILED, OK, RACED, Evaluations, IntArray, Optimizer, Pends
from autoprune.testing.contracts.shared import random_states
from autoprune.testing.problems import KnownProblem, product_problem


class OptimizerContract:
    """Contract of optimizers: the properties that `autoprune.search` relies on."""

    def make(self, problem: Problem, seed: int) -> Optimizer:
        """Return a fresh optimizer; the only method to fill in."""
        raise NotImplementedError

    def make_problem(self) -> KnownProblem:
        """Return the problem to search, with at least 500 feasible candidates."""
        return product_problem((6, 4, 5, 3, 6, 4), seed=0)

    def make_tiny_problem(self) -> KnownProblem:
        """Return a problem with 7 to 200 feasible candidates."""
        return product_problem((3, 3, 4), seed=0, budget=0.8)

    def test_proposals_are_feasible_candidates_of_the_space(self) -> None:
        known = self.make_problem()
        optimizer = self.make(known.problem, 0)
        for _ in range(10):
            candidates = _turn(optimizer, known)
            assert candidates.dtype == np.int64
            assert candidates.ndim == 2
            assert 1 <= len(candidates) <= 8
            assert ((candidates >= 0) & (candidates < known.problem.sizes)).all()
            assert (known.problem.feasible(candidates) | known.problem.probes(candidates)).all()
            np.testing.assert_array_equal(candidates, known.problem.canonical(candidates))

    def test_the_same_seed_gives_the_same_search(self) -> None:
        known = self.make_problem()
        a, b = self.make(known.problem, 7), self.make(known.problem, 7)
        for _ in range(8):
            np.testing.assert_array_equal(_turn(a, known), _turn(b, known))

    def test_another_seed_gives_another_search(self) -> None:
        known = self.make_problem()
        a, b = self.make(known.problem, 0), self.make(known.problem, 1)
        assert any(not np.array_equal(_turn(a, known), _turn(b, known)) for _ in range(8))

    def test_failed_and_raced_evaluations_do_not_stop_the_search(self) -> None:
        known = self.make_problem()
        optimizer = self.make(known.problem, 0)
        for status in (FAILED, RACED, OK, FAILED, RACED, OK, FAILED, RACED):
            candidates = _turn(optimizer, known, status)
            assert len(candidates)
            assert (known.problem.feasible(candidates) | known.problem.probes(candidates)).all()

    def test_late_and_shuffled_results_are_learnt_from(self) -> None:
        known = self.make_problem()
        optimizer = self.make(known.problem, 0)
        batches = [optimizer.ask(4) for _ in range(10)]
        for batch in batches[::-1]:
            optimizer.tell(known.evaluate(batch[::-1]))
        fresh = optimizer.ask(4)
        assert len(fresh)
        assert not _keys(fresh) & _keys(np.concatenate(batches))

    def test_a_history_told_in_bulk_and_shuffled_continues_the_same_search(self) -> None:
        known = self.make_problem()
        first = self.make(known.problem, 3)
        history = []
        for status in (OK, RACED, OK, FAILED, OK, OK):
            candidates = first.ask(8)
            history.append(known.evaluate(candidates, status))
            first.tell(history[-1])
        second = self.make(known.problem, 3)
        second.tell(_shuffled(history))
        for _ in range(3):
            np.testing.assert_array_equal(_turn(first, known), _turn(second, known))

    def test_what_is_pending_continues_the_same_search_when_told_by_an_earlier_one(self) -> None:
        known = self.make_problem()
        first, second = self.make(known.problem, 3), self.make(known.problem, 3)
        if not isinstance(second, Pends):
            return
        batches = [_turn(first, known) for _ in range(4)]
        pending = first.ask(8)
        for batch in batches:
            second.tell(known.evaluate(batch))
        second.pend(pending)
        asked = first.ask(4)
        np.testing.assert_array_equal(second.ask(4), asked)
        for optimizer in (first, second):
            optimizer.tell(known.evaluate(np.concatenate([pending, asked])))
        np.testing.assert_array_equal(second.ask(8), first.ask(8))

    def test_nothing_is_proposed_twice_and_a_tiny_space_is_exhausted(self) -> None:
        known = self.make_tiny_problem()
        optimizer = self.make(known.problem, 0)
        seen = []
        for _ in range(100):
            candidates = _turn(optimizer, known)
            if not len(candidates):
                break
            seen.extend(candidates.tolist())
        proposed = np.array(seen)
        feasible = known.problem.feasible(proposed)
        assert known.problem.probes(proposed[~feasible]).all()
        assert sorted(proposed[feasible].tolist()) == known.feasible_candidates().tolist()
        assert optimizer.ask(8).shape == (0, len(known.problem.sizes))

    def test_nothing_pending_is_proposed_again(self) -> None:
        known = self.make_tiny_problem()
        optimizer = self.make(known.problem, 0)
        total = len(known.feasible_candidates())
        batches = [optimizer.ask(2) for _ in range(3)]
        optimizer.tell(known.evaluate(batches[1][:1]))
        everything = len(known.problem.enumerate())
        batches += [optimizer.ask(everything), optimizer.ask(everything)]
        proposed = np.concatenate(batches)
        assert len(proposed) == len(_keys(proposed))
        assert known.problem.feasible(proposed).sum() == total

    def test_global_random_states_are_left_alone(self) -> None:
        known = self.make_problem()
        before = random_states()
        optimizer = self.make(known.problem, 0)
        for _ in range(8):
            _turn(optimizer, known)
        assert random_states() == before


def _turn(optimizer: Optimizer, known: KnownProblem, status: str = OK) -> IntArray:
    candidates = optimizer.ask(8)
    if len(candidates):
        optimizer.tell(known.evaluate(candidates, status, reason="out of memory" if status == FAILED else ""))
    return candidates


def _keys(candidates: IntArray) -> set[tuple[int, ...]]:
    return {tuple(candidate) for candidate in candidates.tolist()}


def _shuffled(history: list[Evaluations]) -> Evaluations:
    status = [s for part in history for s in part.status]
    reasons = [r for part in history for r in part.reasons]
    order = np.random.default_rng(0).permutation(len(status))
    return Evaluations(
        candidates=np.concatenate([part.candidates for part in history])[order],
        objectives=np.concatenate([part.objectives for part in history])[order],
        stderr=np.concatenate([part.stderr for part in history])[order],
        samples=np.concatenate([part.samples for part in history])[order],
        status=tuple(status[i] for i in order),
        reasons=tuple(reasons[i] for i in order),
        distortion=np.concatenate([part.distortion for part in history])[order],
        acceptable=np.concatenate([part.acceptable for part in history])[order],
    )
