"""Contract of a user's costs."""

# ruff: noqa: D102  (the names of the tests are sentences)

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from autoprune.costs import GivenCost, make_costs
from autoprune.protocols import FloatArray, IntArray
from autoprune.testing.contexts import image_context
from autoprune.testing.contracts.shared import draw

if TYPE_CHECKING:
    from autoprune.evaluators.protocol import Context


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
        costs = self._computed(context, draw(context.space))
        assert costs.dtype == np.float64
        assert costs.shape == (20,)
        assert np.isfinite(costs).all()

    def test_the_cost_of_a_candidate_does_not_depend_on_the_others_or_on_the_call(self) -> None:
        context = self.make_context()
        candidates = draw(context.space)
        together = self._computed(context, candidates)
        alone = [self._computed(context, candidate[None])[0] for candidate in candidates]
        np.testing.assert_allclose(together, alone, rtol=1e-9, atol=0)
        np.testing.assert_allclose(together, self._computed(context, candidates[::-1].copy())[::-1], rtol=1e-9, atol=0)

    def _computed(self, context: Context, candidates: IntArray) -> FloatArray:
        return make_costs(context.structure, context.space, {"own": self.make_cost()})["own"](candidates)
