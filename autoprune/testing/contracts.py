"""Contract tests that every optimizer, space, evaluator, cost, metric and rule must pass.

Subclass a contract in a test module under a name that starts with ``Test`` and fill in its ``make_`` methods:

    class TestMyOptimizer(OptimizerContract):
        def make(self, problem, seed):
            return MyOptimizer(problem, seed)
"""

# ruff: noqa: D102  (the names of the tests are sentences)

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from autoprune.costs import GivenCost, StructuralCosts, make_costs
from autoprune.data import batch as batches
from autoprune.optimizers.problem import Problem
from autoprune.protocols import (
    FAILED,
    OK,
    RACED,
    ChoosesWidths,
    Evaluations,
    Failure,
    FloatArray,
    IntArray,
    Measurement,
    Optimizer,
    Pends,
    Pruning,
    SearchSpace,
)
from autoprune.search_spaces import require_registered, space_from_json
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import build
from autoprune.structure.structure import Structure
from autoprune.structure.units import Group
from autoprune.testing.contexts import image_context
from autoprune.testing.problems import KnownProblem, product_problem

if TYPE_CHECKING:
    from autoprune.evaluators.protocol import Context, Evaluator


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
        before = _random_states()
        optimizer = self.make(known.problem, 0)
        for _ in range(8):
            _turn(optimizer, known)
        assert _random_states() == before


class SpaceContract:
    """Contract of spaces: the properties that the search relies on."""

    def make_space(self) -> SearchSpace:
        """Return a space of at least one dimension."""
        raise NotImplementedError

    def make_structure(self) -> Structure:
        """Return the structure that the space was made for."""
        raise NotImplementedError

    def test_sizes_count_the_options(self) -> None:
        space = self.make_space()
        assert space.sizes.dtype == np.int64
        assert space.sizes.tolist() == [len(dimension.options) for dimension in space.dimensions]
        assert (space.sizes >= 1).all()

    def test_option_zero_is_dense(self) -> None:
        space, structure = self.make_space(), self.make_structure()
        dense = np.zeros(len(space.sizes), dtype=np.int64)
        assert space.widths(dense[None])[0].tolist() == structure.sizes.tolist()
        assert space.zeroed(dense[None]).tolist() == [0]
        edit = structure.edit(space.pruning(dense.tolist()))
        assert not edit.slices
        assert not edit.zeroed

    def test_later_options_of_ordered_dimensions_cost_fewer_nonzero_parameters(self) -> None:
        space = self.make_space()
        cost = make_costs(self.make_structure(), space)["nonzero_params"]
        for j, dimension in enumerate(space.dimensions):
            if dimension.ordered:
                ladder = np.zeros((len(dimension.options), len(space.sizes)), dtype=np.int64)
                ladder[:, j] = np.arange(len(ladder))
                assert (np.diff(space.widths(ladder), axis=0) <= 0).all(), dimension.name
                assert (np.diff(cost(ladder)) < 0).all(), dimension.name

    def test_canonical_is_idempotent_and_stays_in_the_space(self) -> None:
        space = self.make_space()
        canonical = space.canonical(_draw(space))
        assert canonical.dtype == np.int64
        assert ((canonical >= 0) & (canonical < space.sizes)).all()
        np.testing.assert_array_equal(space.canonical(canonical), canonical)
        np.testing.assert_array_equal(space.widths(canonical), space.widths(_draw(space)))
        np.testing.assert_array_equal(space.zeroed(canonical), space.zeroed(_draw(space)))

    def test_decode_names_every_dimension_with_one_of_its_options(self) -> None:
        space = self.make_space()
        for candidate in space.canonical(_draw(space)):
            decoded = space.decode(candidate.tolist())
            assert list(decoded) == [dimension.name for dimension in space.dimensions]
            for dimension, option in zip(space.dimensions, candidate, strict=True):
                assert decoded[dimension.name] == dimension.options[option]

    def test_json_restores_an_equal_space(self) -> None:
        space = self.make_space()
        require_registered(space)
        restored = space_from_json(json.loads(json.dumps(space.to_json())))
        assert type(restored) is type(space)
        assert restored.to_json() == space.to_json()
        assert restored.dimensions == space.dimensions
        candidates = _draw(space)
        np.testing.assert_array_equal(restored.widths(candidates), space.widths(candidates))
        np.testing.assert_array_equal(restored.zeroed(candidates), space.zeroed(candidates))
        assert restored.pruning(candidates[0].tolist()) == space.pruning(candidates[0].tolist())

    def test_choices_of_widths_are_all_that_a_candidate_changes(self) -> None:
        space = self.make_space()
        if not isinstance(space, ChoosesWidths):
            return
        groups, widths = space.choices
        candidates = _draw(space)
        expected = np.tile(space.widths(np.zeros((1, len(space.sizes)), dtype=np.int64)), (len(candidates), 1))
        expected[:, groups] = widths[np.arange(len(groups)), candidates]
        np.testing.assert_array_equal(space.widths(candidates), expected)
        assert len(set(groups.tolist())) == len(groups)
        assert not space.zeroed(candidates).any()

    def test_what_is_kept_and_zeroed_agrees_with_the_numbers(self) -> None:
        space, structure = self.make_space(), self.make_structure()
        groups = {group.name: group.size for group in structure.groups}
        candidates = space.canonical(_draw(space))
        widths, zeroed = space.widths(candidates), space.zeroed(candidates)
        assert widths.dtype == zeroed.dtype == np.float64
        assert widths.shape == (len(candidates), len(groups))
        assert zeroed.shape == (len(candidates),)
        for candidate, row, zeros in zip(candidates, widths, zeroed, strict=True):
            pruning = space.pruning(candidate.tolist())
            structure.edit(pruning)  # refuses names and numbers that the model does not have
            kept = pruning.kept
            assert sum(pruning.zeroed.values()) == zeros
            for units in kept.values():
                assert list(units) == sorted(set(units))
            assert [len(kept.get(name, range(size))) for name, size in groups.items()] == row.tolist()

    def test_it_describes_itself_in_one_line(self) -> None:
        description = self.make_space().describe()
        assert description.strip()
        assert "\n" not in description


class EvaluatorContract:
    """Contract of evaluators: the properties that the search relies on."""

    def make_evaluator(self) -> Evaluator:
        """Return an evaluator that is not prepared yet."""
        raise NotImplementedError

    def make_context(self) -> Context:
        """Return a context for ``prepare``; every call returns an equal one with a separate model.

        By default a small convolutional network on images, `autoprune.testing.contexts.image_context`.
        """
        return image_context()

    def make_candidates(self, context: Context) -> IntArray:
        """Return candidates to evaluate, shape (n, d), the dense one first; by default four more at random."""
        return np.concatenate([np.zeros((1, len(context.space.sizes)), dtype=np.int64), _draw(context.space)[:4]])

    def test_two_calls_agree_bit_for_bit(self) -> None:
        evaluator, candidates = self._prepared()
        first = evaluator.evaluate(candidates)
        again = evaluator.evaluate(candidates[::-1].copy())[::-1]
        _assert_same(first, again)

    def test_another_evaluator_of_the_same_kind_agrees(self) -> None:
        (a, candidates), (b, _) = self._prepared(), self._prepared()
        _assert_same(a.evaluate(candidates), b.evaluate(candidates))

    def test_every_candidate_gets_finite_values_or_a_reason(self) -> None:
        evaluator, candidates = self._prepared()
        results = evaluator.evaluate(candidates)
        assert len(results) == len(candidates)
        assert isinstance(results[0], Measurement), results[0]
        for result in results:
            if isinstance(result, Failure):
                assert result.reason
            else:
                assert result.signal.dtype == np.float64
                assert result.signal.ndim == result.metric.ndim == 1
                assert np.isfinite(result.signal).all()
                assert np.isfinite(result.metric).all()
                assert result.distortion.ndim == 1
                assert result.seconds >= 0

    def test_chunks_of_the_validation_batches_join_up_to_the_whole(self) -> None:
        evaluator, candidates = self._prepared()
        parts = []
        for chunk in (slice(0, 1), slice(1, None)):
            parts += evaluator.evaluate(candidates[-1:], chunk)
            evaluator.evaluate(candidates[1:2], slice(0, 1))  # others may come in between
        (whole,) = evaluator.evaluate(candidates[-1:])
        assert isinstance(whole, Measurement)
        joined = np.concatenate([part.signal for part in parts if isinstance(part, Measurement)])
        np.testing.assert_array_equal(joined, whole.signal)

    def test_the_model_and_the_random_states_come_back_unchanged(self) -> None:
        context = self.make_context()
        model = context.model
        evaluator = self.make_evaluator()
        candidates = self.make_candidates(context)
        before = _fingerprint(model)
        states = _random_states()
        evaluator.prepare(context)
        evaluator.evaluate(candidates)
        evaluator.build(candidates[-1])
        evaluator.test(candidates[-1])
        assert _fingerprint(model) == before
        assert _random_states() == states

    def test_it_pickles_before_it_is_prepared(self) -> None:
        context = self.make_context()
        candidates = self.make_candidates(context)
        copy = pickle.loads(pickle.dumps(self.make_evaluator()))
        original = self.make_evaluator()
        copy.prepare(context)
        original.prepare(self.make_context())
        _assert_same(copy.evaluate(candidates), original.evaluate(candidates))

    def test_what_is_built_shares_no_storage_with_the_model(self) -> None:
        context = self.make_context()
        evaluator = self.make_evaluator()
        evaluator.prepare(context)
        owned = {tensor.untyped_storage().data_ptr() for tensor in _tensors(context.model) if tensor.numel()}
        for candidate in self.make_candidates(context):
            built = evaluator.build(candidate)
            assert isinstance(built, nn.Module)
            assert not owned & {tensor.untyped_storage().data_ptr() for tensor in _tensors(built) if tensor.numel()}

    def _prepared(self) -> tuple[Evaluator, IntArray]:
        context, evaluator = self.make_context(), self.make_evaluator()
        evaluator.prepare(context)
        return evaluator, self.make_candidates(context)


class CostContract:
    """Contract of costs: the properties that the search relies on."""

    def make_cost(self) -> GivenCost:
        """Return the cost."""
        raise NotImplementedError

    def make_context(self) -> Context:
        """Return a context with the groups that the cost names, `autoprune.testing.contexts.context_of` of a model."""
        return image_context()

    def test_every_candidate_has_a_finite_cost(self) -> None:
        context = self.make_context()
        costs = self._computed(context, _draw(context.space))
        assert costs.dtype == np.float64
        assert costs.shape == (20,)
        assert np.isfinite(costs).all()

    def test_the_cost_of_a_candidate_does_not_depend_on_the_others_or_on_the_call(self) -> None:
        context = self.make_context()
        candidates = _draw(context.space)
        together = self._computed(context, candidates)
        alone = [self._computed(context, candidate[None])[0] for candidate in candidates]
        np.testing.assert_allclose(together, alone, rtol=1e-9, atol=0)
        np.testing.assert_allclose(together, self._computed(context, candidates[::-1].copy())[::-1], rtol=1e-9, atol=0)

    def _computed(self, context: Context, candidates: IntArray) -> FloatArray:
        return make_costs(context.structure, context.space, {"own": self.make_cost()})["own"](candidates)


class MetricContract:
    """Contract of metrics: the properties that the search relies on."""

    def make_metric(self) -> Any:
        """Return the metric as `autoprune.search` takes it; all to fill in where it scores a classifier."""
        raise NotImplementedError

    def make_context(self) -> Context:
        """Return a context with this metric; by default on images with labels."""
        return image_context(metric=self.make_metric())

    def test_a_set_has_a_finite_value_that_does_not_depend_on_the_call(self) -> None:
        first, second = self._measured(self.make_context()), self._measured(self.make_context())
        assert np.isfinite(first).all()
        np.testing.assert_array_equal(first, second)

    def test_the_batches_come_back_unchanged(self) -> None:
        context = self.make_context()
        before = [_bytes(tensor) for batch in context.subsets.validation for tensor in batches.tensors(batch)]
        self._measured(context)
        assert [_bytes(t) for batch in context.subsets.validation for t in batches.tensors(batch)] == before

    def test_the_value_of_a_sample_does_not_depend_on_the_others_in_its_batch(self) -> None:
        context = self.make_context()
        if not context.judge.per_sample:
            return
        batch = context.subsets.validation[0]
        together, alone = (self._measured(context, split) for split in ([batch], batches.pieces(batch, 1)))
        assert together.shape == (batches.batch_size(batch),)
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)

    def _measured(self, context: Context, parts: Any = None) -> FloatArray:
        def run(batch: Any) -> Any:
            return context.forward(context.model, batch)

        parts = context.subsets.validation if parts is None else parts
        return context.judge.measure(run, parts, context.judge.dense_outputs(run, parts)).metric


class RuleContract:
    """Contract of a rule: a network with the operation between two layers is pruned, and rightly so."""

    def make_example(self) -> Example:
        """Return a network whose layers the operation connects, with two samples for it; a new one at every call."""
        raise NotImplementedError

    def test_units_pass_through_the_operation_and_the_checks(self) -> None:
        assert analyse(self.make_example(), checks="strict").groups

    def test_costs_of_pruned_networks_are_those_that_are_counted_on_them(self) -> None:
        example = self.make_example()
        structure = analyse(example)
        costs = StructuralCosts(structure)
        for share in (0.75, 0.5, 0.0):
            kept = {group.name: _last_units(group, share) for group in structure.groups}
            built = build(example.model, structure.edit(Pruning(kept)))
            widths = np.array([[len(units) for units in kept.values()]], dtype=np.float64)
            found = analyse(replace(example, model=built))
            counted = StructuralCosts(found).flops(found.sizes[None].astype(np.float64))
            assert costs.flops(widths).tolist() == counted.tolist()
            assert costs.params(widths).tolist() == [sum(parameter.numel() for parameter in built.parameters())]


def _last_units(group: Group, share: float) -> tuple[int, ...]:
    """Units at the end of a group: about a share of them, in a number that the group may keep."""
    count = max(int(share * group.size) // group.multiple, 1) * group.multiple
    return tuple(range(group.size - count, group.size))


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


def _draw(space: SearchSpace) -> IntArray:
    """Random candidates of a space, shape (20, d); the same at every call."""
    return np.random.default_rng(0).integers(0, space.sizes, size=(20, len(space.sizes)))


def _random_states() -> tuple[str, str, bytes]:
    return repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()  # noqa: NPY002


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that an evaluator must not change: values, gradients, flags, modes and hooks."""
    values = [
        (name, tensor.requires_grad, tensor.grad is None, str(tensor.device), _bytes(tensor))
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [
        (name, type(module), module.training, *(len(getattr(module, hook)) for hook in hooks))
        for name, module in model.named_modules()
    ]
    return [*values, *modules]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16


def _assert_same(first: list[Measurement | Failure], second: list[Measurement | Failure]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Measurement) and isinstance(b, Measurement):
            np.testing.assert_array_equal(a.signal, b.signal)
            np.testing.assert_array_equal(a.metric, b.metric)
            np.testing.assert_array_equal(a.distortion, b.distortion)
        elif isinstance(a, Failure) and isinstance(b, Failure):
            assert a.reason == b.reason
