"""Fine-tuning: train a candidate briefly before scoring it, the dearest and most faithful of the cheap scores."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
from torch import Tensor, nn

from autoprune.arguments import MOST_SEED, positive, shown, whole_number, why_no_function
from autoprune.data.sampling import seeded
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.evaluators.compensated import Compensated
from autoprune.evaluators.protocol import Context, Evaluator, Tells
from autoprune.evaluators.recovery.recovery import Recovery
from autoprune.evaluators.recovery.sources import sources_of
from autoprune.evaluators.scoring.out_of_memory import fitting
from autoprune.evaluators.scoring.scorer import DENSE_BYTES, Measuring, bound_forward
from autoprune.evaluators.training.candidate import Given, Trainer, TrainFn
from autoprune.evaluators.training.course import Course
from autoprune.evaluators.training.distillation import labels_loss_of
from autoprune.evaluators.training.lessons import Lessons
from autoprune.evaluators.training.loader import shuffled
from autoprune.evaluators.training.teachers import Better, device_of, fresh_outputs, kept_outputs, none_better, private
from autoprune.protocols import Failure, IntArray, Measurement


class FineTune:
    """Scores a candidate after a short training that starts from the module of another evaluator.

    Each candidate is a copy of its own, trained from the same seed for the same number of steps, so a score depends on
    nothing but the candidate, nor on whether it was scored after fewer steps (`autoprune.Rungs`). Batch-norm statistics
    are re-estimated afterwards, elements set to zero stay zero, and the dense candidate, the teacher, stays as it is.
    `build` trains again unless the candidate is the one trained last; on a GPU that repeats as exactly as its kernels.

    Without a `train_fn`, AdamW with a learning rate that falls linearly to 0 learns the outputs of the dense model on
    the calibration samples (KL divergence for logits, else squared error, where they fit into 256 MiB), and their
    labels where the metric has a loss on them. Give more samples with ``Data(calibration_samples=...)``.

    Args:
        steps: The budget: optimizer steps for each candidate, one batch of the calibration data each.
        train_fn: A `Recovery`, which learns from its `data`, or from the calibration samples where it has none, and
            from its teacher or the dense model; or ``train_fn(model, steps)``, which trains a model in place, for your
            own data and recipe. It pickles to workers, and should take its randomness from PyTorch's, NumPy's or
            Python's global state, which is seeded.
        start: Evaluator that builds the module to train; `Compensated` by default.
        lr: Largest learning rate of the default recipe.
        seed: Seed of all random draws in training; a `Recovery` has its own.

    Reference:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, at temperature 1.
    """

    def __init__(
        self,
        steps: int = 50,
        train_fn: TrainFn | Recovery | None = None,
        start: Evaluator | None = None,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        self.steps = whole_number("steps", steps, 1)
        if train_fn is not None and (why := why_no_function(train_fn, 2)):
            raise TypeError(f"train_fn must be a function train_fn(model, steps), or None, {why}")
        self._lr = positive("lr", lr)
        self._seed = whole_number("seed", seed, 0, MOST_SEED)
        self._train_fn: TrainFn | None = None if isinstance(train_fn, Recovery) else train_fn
        own = Recovery(lr=self._lr, seed=self._seed, schedule="linear", warmup=0.0)
        self._given = train_fn if isinstance(train_fn, Recovery) else None
        self._recipe = self._given or own
        if self._recipe.steps_to > 1 or self._recipe.checkpoint is not None:
            raise ValueError("train_fn must be a Recovery without steps_to= and checkpoint=, which are for one model")
        if start is not None and (isinstance(start, type) or not hasattr(start, "build")):
            raise TypeError(f"start must be an evaluator, such as Compensated(), or None, got {shown(start)}")
        self._start: Evaluator = Compensated() if start is None else start

    def prepare(self, context: Context) -> None:
        """Compute the outputs of the dense model on the calibration samples.

        Raises:
            ValueError: If there is nothing to train, or the default recipe finds nothing to learn.
        """
        if not any(parameter.requires_grad for parameter in context.model.parameters()):
            raise ValueError("finetune needs parameters to train, but none requires gradients; set requires_grad first")
        self._context = context
        self._start.prepare(context)
        dense = self._start.build(np.zeros(len(context.space.sizes), dtype=np.int64)).eval()
        self._measure = Measuring(context, dense)
        self._last: tuple[tuple[bytes, int], nn.Module] | None = None
        self._begun: tuple[bytes, Course] | None = None
        if self._train_fn is None:
            self._lessons = self._lessons_of(context, dense)

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Train candidates and score them on validation batches."""
        return [self._measure(partial(self._trained, candidate), "validation", chunk) for candidate in candidates]

    @property
    def continues(self) -> bool:
        """True if a training can be continued: one by the default recipe can, one by the user's recipe starts again."""
        return self._train_fn is None

    def on_the_way(self, candidate: IntArray, steps: int) -> Measurement | Failure:
        """Score a candidate on the validation samples after the first steps of its training.

        With a `train_fn`, after a whole training of `steps` steps: only the `train_fn` knows its schedule.
        """
        return self._measure(partial(self._trained, candidate, steps), "validation")

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a trained candidate on the held-out samples."""
        return self._measure(partial(self._trained, candidate), "test")

    def build(self, candidate: IntArray) -> nn.Module:
        """Return the trained module that was scored."""
        return self._trained(candidate)

    def notes(self) -> tuple[str, ...]:
        """Notes of the evaluator that builds the start."""
        return self._start.notes() if isinstance(self._start, Tells) else ()

    @property
    def identity(self) -> str:
        """Name with the settings of the training, and the identity of a start that has learned something."""
        start = getattr(self._start, "identity", "")
        recipe = f"lr={self._lr:g}, seed={self._seed}"
        if self._given is not None:
            recipe = ", ".join(f"{name}={value}" for name, value in self._given.settings.items())
        return f"FineTune(steps={self.steps}, {recipe})" + (f" of {start}" if start else "")

    def _trained(self, candidate: IntArray, steps: int | None = None) -> nn.Module:
        """Copy of the trained candidate, for its caller to keep; chunks of one candidate share a training."""
        key = candidate.tobytes(), steps or self.steps
        if self._last is None or self._last[0] != key:
            self._last = None  # freed before the next training, so that two modules are never held together
            self._last = key, self._train(candidate, key[1])
        return copy.deepcopy(self._last[1])

    def _train(self, candidate: IntArray, steps: int) -> nn.Module:
        """Train a candidate for `steps` steps, from where it was last scored if it was."""
        if not candidate.any():
            return self._start.build(candidate)
        context = self._context
        course = self._course(candidate, steps)
        module = course.module
        modes = [(part, part.training) for part in module.modules()]
        course.go_on(steps)
        if isinstance(course, Course):
            module = course.best
        for part, mode in modes:
            part.training = mode
        module.zero_grad(set_to_none=True)
        if isinstance(course, Course) and steps < self.steps:
            self._begun = candidate.tobytes(), course
            module = copy.deepcopy(module)
        with seeded(0):
            recalibrate(module, context.subsets.calibration, bound_forward(context, module))
        return module

    def _lessons_of(self, context: Context, dense: nn.Module) -> Lessons:
        """Batches to learn from, and what the dense model makes of them.

        Raises:
            ValueError: If there is nothing to learn.
        """
        recipe, judge = self._recipe, context.judge
        teacher = dense if recipe.teacher is None else private(recipe.teacher, device_of(dense))
        better: Better = none_better
        inner = teacher if recipe.inner else None
        if recipe.data is not None:
            source = sources_of(recipe.data, recipe.batch_size, recipe.seed).training
            if recipe.distill != "none":
                better = fresh_outputs(teacher, context.forward)
            return Lessons(source, judge, context.forward, better, inner, recipe.loss)
        calibration = context.subsets.calibration
        outputs: tuple[Tensor | None, ...] = (None,) * len(calibration)
        if judge.distance is not None and recipe.distill != "none":
            with seeded(0):
                outputs = judge.dense_outputs(fitting(bound_forward(context, teacher)), calibration, DENSE_BYTES)
        labelled = recipe.loss is not None or labels_loss_of(judge) is not None
        pairs = zip(calibration, outputs, strict=True)
        batches = [batch for batch, output in pairs if labelled or inner is not None or output is not None]
        if not batches:
            raise ValueError("finetune finds neither labels nor outputs to compare; pass FineTune(train_fn=...)")
        better = kept_outputs(calibration, outputs)
        return Lessons(shuffled(batches), judge, context.forward, better, inner, recipe.loss)

    def _course(self, candidate: IntArray, steps: int) -> Trainer:
        """Training of this candidate that was begun, unless it is past `steps`; else a new one."""
        begun, self._begun = self._begun, None  # a training that fails is not continued
        if begun is not None and begun[0] == candidate.tobytes() and begun[1].taken <= steps:
            return begun[1]
        begun = None  # frees the old training before a new one is made
        context = self._context
        module = self._start.build(candidate)
        edit = context.structure.edit(context.space.pruning(candidate.tolist()))
        parameters = dict(module.named_parameters())
        masks = {parameters[name]: parameters[name].detach() != 0 for name in edit.zeroed}
        if self._train_fn is not None:
            return Given(module, masks, self._train_fn, self._seed)
        return Course(module, self._recipe, self._lessons, self.steps, masks, edit.slices)
