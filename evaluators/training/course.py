"""The training of one module: optimizer steps that can pause, be written to a file, and continue to the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from autoprune.data.batch import to_device
from autoprune.data.sampling import seeded
from autoprune.evaluators.adaptive_bn import statistics
from autoprune.evaluators.training.features import Slices
from autoprune.evaluators.training.lessons import Lessons
from autoprune.evaluators.training.loader import Rounds, mixed
from autoprune.evaluators.training.parameters import Masks, Trained
from autoprune.evaluators.training.weights import load_weights, weights_of

if TYPE_CHECKING:
    from torch.optim.swa_utils import AveragedModel

    from autoprune.evaluators.recovery.recovery import Recovery


_MOST_MOMENTUM = 0.1
"""Share of a batch in running statistics that short trainings raise it to, which is PyTorch's default."""


class DivergedError(ValueError):
    """A loss that is NaN or infinite."""


class Course:
    """Trains one module in place by a recipe.

    The random draws of a step are seeded by its number, so no random state needs to be kept: a training in parts, in
    one process or several, gives the same weights as one without a pause.

    Args:
        module: Trained in place.
        recipe: Settings of the training.
        lessons: Batches and losses.
        steps: Steps of the whole training, which the learning rate follows.
        masks: Elements that stay zero.
        slices: Units of the dense model that the module keeps, for inner features.

    Attributes:
        module: The module in training.
        taken: Steps so far.
        losses: Losses of the steps since `load`, the mean over the batches of each.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recovery,
        lessons: Lessons,
        steps: int,
        masks: Masks,
        slices: Slices | None = None,
    ) -> None:
        self.module = module
        self.taken = 0
        self.losses: list[float] = []
        self._steps = steps
        self._recipe, self._lessons, self._slices = recipe, lessons, slices or {}
        self.trained = Trained(module, recipe.train, recipe.rank, masks, recipe.seed)
        self._device = next(module.parameters()).device
        on_gpu = self._device.type == "cuda" and torch.cuda.is_bf16_supported()
        self._mixed = on_gpu if recipe.mixed_precision is None else recipe.mixed_precision
        self._normalised = bool(statistics(module))
        self._optimizer = recipe.make_optimizer(self.trained.leaves)
        self._schedule = LambdaLR(self._optimizer, _factor(recipe.schedule, round(recipe.warmup * steps), steps))
        self._rounds = self._from(0, 0)
        self._average: AveragedModel | None = None
        if recipe.ema is not None:
            from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

            blend = get_ema_multi_avg_fn(recipe.ema)  # type: ignore[no-untyped-call]  # torch does not annotate it
            self._average = AveragedModel(module, multi_avg_fn=blend, use_buffers=True)

    @property
    def best(self) -> nn.Module:
        """The module with the weights to score and keep: averaged ones where the recipe says so."""
        return self.module if self._average is None else self._average.module

    def go_on(self, steps: int) -> None:
        """Train until `steps` steps are taken in total.

        Raises:
            DivergedError: If a loss is NaN or infinite; the weights are those before the step.
        """
        self.module.train()
        lesson = self._lessons.of(self.module, self._slices)
        following = _following(self.module, self._steps)
        with following, self.trained.collecting(), lesson as loss_of, torch.enable_grad():
            while self.taken < steps:
                with seeded(mixed(self._recipe.seed, self.taken)):
                    self._step(loss_of)
                self.taken += 1

    def _step(self, loss_of: Any) -> None:
        parts = self._recipe.accumulate
        total = 0.0
        self._optimizer.zero_grad()
        for _ in range(parts):
            batch = to_device(next(self._rounds), self._device)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
                loss: Tensor = loss_of(batch) / parts
            if not math.isfinite(value := loss.item()):
                rate = self._optimizer.param_groups[0]["lr"]
                raise DivergedError(
                    f"the loss of a training must be finite, but it is {value} at step {self.taken}; lower lr (now "
                    f"{rate:g}), or look for NaN in the data"
                )
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            total += value
        if self._recipe.most_norm is not None:
            nn.utils.clip_grad_norm_(self.trained.leaves, self._recipe.most_norm)
        self._optimizer.step()
        self._schedule.step()
        self.trained.merge()
        if self._average is not None:
            self._average.update_parameters(self.module)
        self.losses.append(total)

    def state(self) -> dict[str, Any]:
        """Everything that a training needs to continue, for a checkpoint."""
        return {
            "taken": self.taken,
            "position": list(self._rounds.position),
            "weights": weights_of(self.module),
            "leaves": self.trained.state(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "average": None if self._average is None else weights_of(self._average),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave of a training of the same module by the same recipe."""
        load_weights(self.module, state["weights"])
        self.trained.load(state["leaves"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self._average is not None:
            load_weights(self._average, state["average"])
        self.taken = state["taken"]
        self._rounds = self._from(*state["position"])

    def _from(self, turn: int, read: int) -> Rounds:
        # A batch norm cannot take statistics of a single sample.
        least = 2 if self._normalised else 1
        return Rounds(self._lessons.source, self._recipe.seed, (turn, read), least)


@contextmanager
def _following(module: nn.Module, steps: int) -> Iterator[None]:
    """Let running statistics forget what was before the last tenth of the steps.

    The momentum of a network that was trained for long, 0.01 or less, would leave it the statistics of weights that it
    no longer has.
    """
    norms = [(norm, norm.momentum) for norm in statistics(module) if norm.momentum is not None]
    try:
        for norm, momentum in norms:
            norm.momentum = max(momentum, min(_MOST_MOMENTUM, 10 / steps))
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


def _factor(schedule: str, warmup: int, steps: int) -> Any:
    """Learning rate of a step as a share of the largest: it rises linearly, then falls by the schedule."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(steps - warmup, 1)
        if schedule == "cosine":
            return (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return 1 - done if schedule == "linear" else 1.0

    return factor
