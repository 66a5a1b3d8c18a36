"""Fine-tuning: train a candidate briefly before judging it, the dearest and most faithful of the cheap scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.evaluators.compensation import Compensated
from autoprune.evaluators.lessons import learns_labels, lesson_loss
from autoprune.evaluators.measuring import DENSE_BYTES, Measuring, bound_forward
from autoprune.evaluators.memory import fitting
from autoprune.evaluators.protocol import Context, Evaluator
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.sources import seeded

TrainFn = Callable[[nn.Module, int], None]
"""``train_fn(model, steps)`` trains a model in place for so many optimizer steps."""

MOST_NORM = 1.0
"""Gradients are clipped to this norm: the first steps of a network just cut may be steep."""


class FineTune:
    """Scores a candidate after a short training that starts from what another evaluator builds.

    Each candidate is a copy of its own, trained from the same seed for the same number of steps, so a score depends on
    nothing but the candidate. Batch-norm statistics are re-estimated afterwards, elements set to zero stay zero, and
    the dense candidate, the teacher, stays as it is. `build` trains again unless the candidate is the one trained last;
    on a GPU that repeats as exactly as its kernels do.

    Without a `train_fn`, AdamW with a learning rate that falls linearly to 0 learns the outputs of the dense model on
    the calibration samples (KL divergence for logits, else squared error, where they fit into 256 MiB), and their
    labels where the metric has a loss on them. Give more samples with ``Data(calibration_samples=...)``.

    Args:
        steps: The budget: optimizer steps for each candidate, one batch of the calibration data each.
        train_fn: ``train_fn(model, steps)`` trains a model in place; for your own data and recipe. It pickles to
            workers, and should take its randomness from PyTorch's, NumPy's or Python's global state, which is seeded.
        start: Builds what is trained; `Compensated` by default.
        lr: Largest learning rate of the default recipe.
        seed: Of everything drawn in training.

    Reference:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, at temperature 1.
    """

    def __init__(
        self,
        steps: int = 50,
        train_fn: TrainFn | None = None,
        start: Evaluator | None = None,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self._steps, self._train_fn, self._lr, self._seed = steps, train_fn, lr, seed
        self._start: Evaluator = Compensated() if start is None else start

    def prepare(self, context: Context) -> None:
        """Compute what the dense model gives on the calibration samples.

        Raises:
            ValueError: If there is nothing to train, or the default recipe finds nothing to learn.
        """
        if not any(parameter.requires_grad for parameter in context.model.parameters()):
            raise ValueError("finetune needs parameters to train, but none requires gradients; set requires_grad first")
        self._context = context
        self._start.prepare(context)
        dense = self._start.build(np.zeros(len(context.space.sizes), dtype=np.int64)).eval()
        self._measure = Measuring(context, dense)
        self._last: tuple[bytes, nn.Module] | None = None
        if self._train_fn is None:
            calibration = context.subsets.calibration
            with seeded(0):
                outputs = context.judge.dense_outputs(fitting(bound_forward(context, dense)), calibration, DENSE_BYTES)
            if context.judge.distance is None:
                outputs = (None,) * len(calibration)
            lessons = zip(calibration, outputs, strict=True)
            labelled = learns_labels(context.judge)
            self._lessons = [(batch, output) for batch, output in lessons if labelled or output is not None]
            if not self._lessons:
                raise ValueError("finetune finds neither labels nor outputs to compare; pass FineTune(train_fn=...)")

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Train candidates and score them on validation batches."""
        return [self._measure(partial(self._trained, candidate), "validation", chunk) for candidate in candidates]

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a trained candidate on the held-out samples."""
        return self._measure(partial(self._trained, candidate), "test")

    def build(self, candidate: IntArray) -> nn.Module:
        """The trained module that was scored."""
        return self._trained(candidate)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the start has to say of the dense network."""
        return getattr(self._start, "notes", ())

    @property
    def identity(self) -> str:
        """With that of a start that has learned something."""
        start = getattr(self._start, "identity", "")
        return f"FineTune of {start}" if start else "FineTune"

    def _trained(self, candidate: IntArray) -> nn.Module:
        """A copy of the trained candidate, for its caller to keep; chunks of one candidate share a training."""
        key = candidate.tobytes()
        if self._last is None or self._last[0] != key:
            self._last = None  # whatever happens next, two trained models are never held
            self._last = key, self._train(candidate)
        return copy.deepcopy(self._last[1])

    def _train(self, candidate: IntArray) -> nn.Module:
        context, module = self._context, self._start.build(candidate)
        if not candidate.any():
            return module
        zeroed = context.structure.edit(context.space.pruning(candidate.tolist())).zeroed
        parameters = dict(module.named_parameters())
        masks = {parameters[name]: parameters[name].detach() != 0 for name in zeroed}
        modes = [(part, part.training) for part in module.modules()]
        with seeded(self._seed), torch.enable_grad():
            if self._train_fn is None:
                self._distil(module, masks)
            else:
                self._train_fn(module, self._steps)
        for part, mode in modes:
            part.training = mode
        module.zero_grad(set_to_none=True)
        _mask(masks)
        with seeded(0):
            recalibrate(module, context.subsets.calibration, bound_forward(context, module))
        return module

    def _distil(self, module: nn.Module, masks: Mapping[nn.Parameter, Tensor]) -> None:
        """The default recipe; batches in an order drawn anew for each round."""
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self._lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self._steps)
        module.train()
        order: list[int] = []
        for _ in range(self._steps):
            order = order or torch.randperm(len(self._lessons)).tolist()
            optimizer.zero_grad()
            batch, dense = self._lessons[order.pop()]
            loss = lesson_loss(self._context.judge, self._context.forward(module, batch), batch, dense)
            assert loss is not None
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, MOST_NORM)
            optimizer.step()
            schedule.step()
            _mask(masks)


@torch.no_grad()
def _mask(masks: Mapping[nn.Parameter, Tensor]) -> None:
    for parameter, mask in masks.items():
        parameter.mul_(mask)
