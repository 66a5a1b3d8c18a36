"""Proposals that come from no model: changes to the best candidates, and those of a space that can be listed."""

from __future__ import annotations

import numpy as np

from autoprune.optimizers.problem import Problem
from autoprune.optimizers.repair import ENUMERABLE
from autoprune.protocols import FloatArray, IntArray

_LISTED = 4096  # candidates of a small space that are looked at for one ask


def elites_of(candidates: IntArray, objectives: FloatArray, budgets: FloatArray) -> IntArray:
    """Best candidate within each budget, or the best of all where none is, shape (budgets, d)."""
    ranked = np.argsort(objectives[:, 0], kind="stable")
    within = (objectives[ranked, None, 1:] <= budgets).all(axis=2)
    elites: IntArray = candidates[ranked[within.argmax(axis=0)]]
    return elites


def vary(problem: Problem, elites: IntArray, n: int, rng: np.random.Generator) -> IntArray:
    """Set one or two entries of elites to any option, repaired; shape (n, d).

    Unlike the others, these are not filled up to their budget: where a loss is not monotone, smaller can be better.
    """
    varied = rng.choice(elites, n)
    for share in (1.0, 0.5):
        rows = np.flatnonzero(rng.random(n) < share)
        dims = rng.integers(varied.shape[1], size=len(rows))
        varied[rows, dims] = rng.integers(problem.sizes[dims])
    return problem.repair(varied)


def some_of_all(problem: Problem, rng: np.random.Generator) -> IntArray:
    """Draw feasible candidates of a space that can be listed, shape (<= 4096, d); none of a larger one."""
    if problem.size > ENUMERABLE:
        return np.zeros((0, len(problem.sizes)), dtype=np.int64)
    everything = rng.permutation(problem.canonical(problem.enumerate()))[:_LISTED]
    return everything[problem.feasible(everything)]


def unknown(candidates: IntArray, known: IntArray) -> IntArray:
    """Candidates that are not known, each once, in their order."""
    seen = {row.tobytes() for row in known}
    fresh = [key for key in dict.fromkeys(row.tobytes() for row in candidates) if key not in seen]
    return np.frombuffer(b"".join(fresh), dtype=np.int64).reshape(-1, candidates.shape[1])


def in_turn(kinds: list[IntArray]) -> IntArray:
    """Merge proposals, one of each kind in turn, without duplicates."""
    rows = [kind[i] for i in range(max(map(len, kinds))) for kind in kinds if i < len(kind)]
    merged = np.array(rows, dtype=np.int64).reshape(-1, kinds[0].shape[1])
    return unknown(merged, merged[:0])
