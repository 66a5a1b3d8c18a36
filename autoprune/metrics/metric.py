"""Metrics that a user may name or give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from autoprune.arguments import flag, shown, why_no_function
from autoprune.metrics.losses import name_of

MetricName = Literal[
    "accuracy",
    "agreement",
    "auto",
    "cosine",
    "cross_entropy",
    "loss",
    "miou",
    "mse",
    "next_token",
    "relative_error",
]
METRICS = get_args(MetricName)


@dataclass(frozen=True)
class Metric:
    """Measure of a model given by the user.

    Attributes:
        fn: ``fn(outputs, batch)`` gives one value a sample, a tensor of shape (n,). With ``per_sample=False``,
            ``fn(forward, batches)`` gives one number for the whole set, and ``forward(batch)`` the outputs.
        higher_is_better: The direction of the values.
        per_sample: Whether `fn` scores samples one by one; only then can bad candidates be stopped early.
        name: Name in results; the name of `fn` if empty.
        needs_dense: Whether `fn` takes the outputs of the dense model as a third argument:
            ``fn(outputs, batch, dense)`` with its main output for the same samples, a tensor (n, ...); with
            ``per_sample=False``, ``fn(forward, batches, dense)`` with one such tensor for each batch.
    """

    fn: Callable[..., Any]
    higher_is_better: bool
    per_sample: bool = True
    name: str = ""
    needs_dense: bool = False

    def __post_init__(self) -> None:
        for name in ("higher_is_better", "per_sample", "needs_dense"):
            flag(name, getattr(self, name))
        if not isinstance(self.name, str):
            raise TypeError(f"name must be text, got {shown(self.name)}")
        dense = ", dense" * self.needs_dense
        if why := why_no_function(self.fn, 3 if self.needs_dense else 2):
            raise TypeError(
                f"fn must be a function fn(outputs, batch{dense}), or fn(forward, batches{dense}) with "
                f"per_sample=False, {why}"
            )
        object.__setattr__(self, "name", self.name or name_of(self.fn))
