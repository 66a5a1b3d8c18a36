"""Evaluators: they score candidates without training, after a short one, or after one shared by all candidates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from autoprune.arguments import by_name
from autoprune.data.batch import Forward
from autoprune.evaluators.adaptive_bn import AdaptiveBN
from autoprune.evaluators.compensated import Compensated
from autoprune.evaluators.finetune import FineTune
from autoprune.evaluators.growing import Growing
from autoprune.evaluators.masked import Masked
from autoprune.evaluators.protocol import Context, Evaluator, Expects, Orders, Rests, Tells, Trains
from autoprune.evaluators.scoring.scorer import Adapted, Measuring
from autoprune.evaluators.supernet import Supernet

EvaluatorName = Literal["auto", "compensated", "adaptive_bn", "finetune", "masked", "supernet"]

EVALUATORS: dict[str, Callable[[], Evaluator]] = {
    "adaptive_bn": AdaptiveBN,
    "auto": Compensated,
    "compensated": Compensated,
    "finetune": FineTune,
    "masked": Masked,
    "supernet": Supernet,
}
"""``"auto"`` re-fits weights, biases and statistics: without a re-fit, many candidates score at chance, and none is
better than another (`benchmarks.evaluators.compensation`). A search first checks which of these parts help, see
`autoprune.study.calibration_check`.
"""


def make_evaluator(spec: str | Evaluator) -> Evaluator:
    """Make the evaluator meant by a name, or take one already made.

    Raises:
        ValueError: If it is an unknown name, or no evaluator.
    """
    return by_name("evaluator", spec, EVALUATORS, "an Evaluator", "evaluate")


__all__ = [
    "EVALUATORS",
    "Adapted",
    "AdaptiveBN",
    "Compensated",
    "Context",
    "Evaluator",
    "EvaluatorName",
    "Expects",
    "FineTune",
    "Forward",
    "Growing",
    "Masked",
    "Measuring",
    "Orders",
    "Rests",
    "Supernet",
    "Tells",
    "Trains",
    "make_evaluator",
]
