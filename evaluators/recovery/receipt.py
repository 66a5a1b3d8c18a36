"""Receipt of a recovery: the training that took place, and the score before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autoprune.metrics.summary import Summary


@dataclass(frozen=True)
class Recovered:
    """Receipt of a training after pruning.

    Attributes:
        train: What was trained: ``"all"``, ``"norm+bias"`` or ``"lora"``.
        parameters: Number of trained values.
        share: The same as a share of the parameters of the model.
        distill: What was learned from the teacher: ``"inner"``, ``"logits"`` or ``"none"``.
        steps: Steps taken, in all networks.
        best_step: Step of the last network whose weights are kept.
        losses: Mean loss of each interval by its last step, as (step, loss).
        validations: Signal on validation samples, lower is better, as (step, signal); empty without such samples.
        metric: Name of the metric; empty without validation samples.
        held_out: Samples of the scores: ``"test"``, ``"validation"`` (which chose the weights), or empty.
        before: Score before the training.
        after: Score of the weights kept.
        teacher: Score of the teacher.
        seconds: Wall time of training and validation, over all processes if it was resumed.
        stopped: Reason why it ended before its last step; empty if it did not.
        notes: Decisions in plain words.
    """

    train: str
    parameters: int
    share: float
    distill: str
    steps: int
    best_step: int
    losses: tuple[tuple[int, float], ...]
    validations: tuple[tuple[int, float], ...]
    metric: str
    held_out: str
    before: Summary | None
    after: Summary | None
    teacher: Summary | None
    seconds: float
    stopped: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        distilled = "" if self.distill == "none" else f", {self.distill} distillation"
        lines = [
            f"trained {self.train}: {self.parameters:,} values ({self.share:.1%} of the parameters){distilled}, "
            f"{self.steps} steps in {self.seconds:.0f} s"
        ]
        if self.losses:
            lines.append(
                f"loss {self.losses[0][1]:.4f} at step {self.losses[0][0]}, {self.losses[-1][1]:.4f} at the end"
            )
        if self.before is not None and self.after is not None:
            dense = "" if self.teacher is None else f"; teacher {self.teacher.mean:.4f}"
            scores = f"{_said(self.before)} before, {_said(self.after)} after{dense}"
            lines.append(f"{self.metric} on {self.held_out} samples: {scores}")
        if self.stopped:
            lines.append(f"stopped: {self.stopped}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _said(score: Summary) -> str:
    low, high = score.interval
    return f"{score.mean:.4f}" + (f" ({low:.4f} to {high:.4f})" if low == low else "")


def as_curve(points: Sequence[Sequence[float]]) -> tuple[tuple[int, float], ...]:
    """Points of a curve as read from a file."""
    return tuple((int(step), float(value)) for step, value in points)
