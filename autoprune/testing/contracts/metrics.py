"""Contract of a user's metrics."""

# ruff: noqa: D102  (the names of the tests are sentences)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.data import batch as batches
from autoprune.protocols import FloatArray
from autoprune.testing.contexts import image_context
from autoprune.testing.contracts.shared import bytes_of

if TYPE_CHECKING:
    from autoprune.evaluators.protocol import Context


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
        before = [bytes_of(tensor) for batch in context.subsets.validation for tensor in batches.tensors(batch)]
        self._measured(context)
        assert [bytes_of(t) for batch in context.subsets.validation for t in batches.tensors(batch)] == before

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
