"""Contract of evaluators."""

# ruff: noqa: D102  (the names of the tests are sentences)

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from autoprune.evaluators.protocol import Rests
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.testing.contexts import image_context
from autoprune.testing.contracts.shared import bytes_of, draw, random_states

if TYPE_CHECKING:
    from autoprune.evaluators.protocol import Context, Evaluator


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
        return np.concatenate([np.zeros((1, len(context.space.sizes)), dtype=np.int64), draw(context.space)[:4]])

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
            if isinstance(evaluator, Rests):
                evaluator.rest()
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
        states = random_states()
        evaluator.prepare(context)
        evaluator.evaluate(candidates)
        evaluator.build(candidates[-1])
        evaluator.test(candidates[-1])
        assert _fingerprint(model) == before
        assert random_states() == states

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


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _fingerprint(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that an evaluator must not change: values, gradients, flags, modes and hooks."""
    values = [
        (name, tensor.requires_grad, tensor.grad is None, str(tensor.device), bytes_of(tensor))
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [
        (name, type(module), module.training, *(len(getattr(module, hook)) for hook in hooks))
        for name, module in model.named_modules()
    ]
    return [*values, *modules]


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
