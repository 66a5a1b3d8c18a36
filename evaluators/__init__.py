"""Evaluators: score candidates without, or with little, training."""

from __future__ import annotations

from collections.abc import Callable

from autoprune.evaluators.adaptive_bn import AdaptiveBN
from autoprune.evaluators.compensation import Compensated
from autoprune.evaluators.finetune import FineTune
from autoprune.evaluators.protocol import Context, Evaluator, Forward, Orders

EVALUATORS: dict[str, Callable[[], Evaluator]] = {
    "adaptive_bn": AdaptiveBN,
    "auto": AdaptiveBN,
    "compensated": Compensated,
    "finetune": FineTune,
}
"""``"auto"`` is adaptive batch norm, which scores a model without batch norm as it is."""


def make_evaluator(spec: str | Evaluator) -> Evaluator:
    """Make the evaluator meant by a name, or take one already made.

    Raises:
        ValueError: If it is an unknown name, or no evaluator.
    """
    if isinstance(spec, str) and spec in EVALUATORS:
        return EVALUATORS[spec]()
    if isinstance(spec, str | type) or not hasattr(spec, "evaluate"):
        raise ValueError(f"evaluator must be one of {sorted(EVALUATORS)} or an Evaluator instance, got {spec!r}")
    return spec


__all__ = [
    "EVALUATORS",
    "AdaptiveBN",
    "Compensated",
    "Context",
    "Evaluator",
    "FineTune",
    "Forward",
    "Orders",
    "make_evaluator",
]
