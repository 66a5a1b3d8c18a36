"""Contract tests that every optimizer, space, evaluator, cost, metric and rule must pass.

Subclass a contract in a test module under a name that starts with ``Test`` and fill in its ``make_`` methods:

    class TestMyOptimizer(OptimizerContract):
        def make(self, problem, seed):
            return MyOptimizer(problem, seed)
"""

from autoprune.testing.contracts.costs import CostContract
from autoprune.testing.contracts.evaluators import EvaluatorContract
from autoprune.testing.contracts.metrics import MetricContract
from autoprune.testing.contracts.optimizers import OptimizerContract
from autoprune.testing.contracts.rules import RuleContract
from autoprune.testing.contracts.spaces import SpaceContract

__all__ = [
    "CostContract",
    "EvaluatorContract",
    "MetricContract",
    "OptimizerContract",
    "RuleContract",
    "SpaceContract",
]
