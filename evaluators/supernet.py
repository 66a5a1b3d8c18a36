"""A supernet: train the weights that all candidates share once, then score any of them without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from autoprune.data.batch import Batch
from autoprune.data.sampling import seeded
from autoprune.data.subsets import fingerprint
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.scoring.scorer import Adapted, bound_forward
from autoprune.evaluators.training.sandwich import Loss
from autoprune.evaluators.training.supernet import (
    MakeOptimizer,
    MakeSchedule,
    Recipe,
    Training,
)
from autoprune.evaluators.training.weights import Weights, load_weights, weights_of
from autoprune.files.access import as_path
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.structure.slicing.slicing import Edit, Slicer, build


@dataclass
class _Learned:
    """Result of a training: shared by the copies of an evaluator, so that one of them trains for all.

    Attributes:
        identity: Everything that it is a function of; empty until there is a result.
        weights: On the CPU.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class Supernet:
    """Scores candidates with weights that were trained once for all of them.

    `prepare` trains a copy of the model. Every step runs the largest candidate, the smallest and some random ones on
    the same batch, the sandwich rule; the largest learns from the labels, where the metric has a loss on them, and from
    the model given, the others from the largest. Each candidate uses its slice of the weights: the units that matter
    most, as ranked on the model given; where elements are set to zero, those of least magnitude at that step. Any
    candidate is then scored with its slice and batch-norm statistics of its own, as `AdaptiveBN` does. `build` delivers
    that network, which is already trained.

    The dense network of the search, which limits such as ``accuracy drop <= 1pp`` refer to, is the largest candidate
    with the trained weights, no longer the model given; a note gives both scores. Agreement is the exception: it
    always compares with the model given.

    Training happens once: copies of the evaluator share the trained weights, workers receive them, and one evaluator
    used for several searches of the same model, space, metric and samples is trained by the first. A `checkpoint` does
    the same for other processes, and lets a killed training continue; it ends with the same weights as without the
    interruption, bit for bit on a CPU with as many threads.

    Attributes:
        steps: Optimizer steps; each takes 2 + `subnets` forward and backward passes.
        data: Your training data, augmented as usual, as a DataLoader, a Dataset, arrays ``(X, y)``, or an iterable of
            batches that can be iterated again; ``Data(labels=)`` of the search holds for dict batches here, too. By
            default the calibration samples of the search: they are few, and while ``Data(calibration_samples=...)``
            gives more, all of your training data is better. It must not hold validation or test samples.
        loss: ``loss(outputs, batch)``, a scalar, for the largest candidate, in place of the metric's loss on labels;
            for all candidates where outputs cannot be compared with each other.
        subnets: Random candidates in each step.
        optimizer: Makes an optimizer from a list of parameters; by default AdamW with `lr`, and gradients clipped to a
            norm of 1.
        schedule: Makes a schedule from the optimizer and the number of steps; the rate falls linearly to 0 by default.
        lr: Largest learning rate of the default optimizer.
        batch_size: For arrays and datasets.
        checkpoint: A safetensors file to write regularly and at the end, and to continue from if it exists.
        checkpoint_steps: Steps between two writes of it.
        mixed_precision: Run forward passes in bfloat16; None: if the model is on a GPU that supports it.
        seed: Seed of all random draws in training.

    Raises:
        ValueError: If a setting is out of range.

    Reference:
        Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019, arXiv:1903.05134:
        sandwich rule, in-place distillation, statistics afterwards. Cai et al., "Once-for-All", ICLR 2020,
        arXiv:1908.09791: each dimension drawn by itself, from units sorted by importance. Here dimensions are drawn
        around a common level, so that costs spread, and the training starts from a trained model, which also teaches.
    """

    steps: int = 1000
    data: Any = None
    loss: Loss | None = None
    subnets: int = 2
    optimizer: MakeOptimizer | None = None
    schedule: MakeSchedule | None = None
    lr: float = 1e-3
    batch_size: int = 128
    checkpoint: str | Path | None = None
    checkpoint_steps: int = 100
    mixed_precision: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint = as_path(self.checkpoint, "checkpoint")
        self._recipe()  # mistakes must show before a search has begun
        self._own_data = self.data is not None
        self._learned = _Learned()

    def _settings(self) -> dict[str, Any]:
        return {setting.name: getattr(self, setting.name) for setting in fields(self)}

    def _recipe(self) -> Recipe:
        return Recipe(**self._settings())

    def __deepcopy__(self, memo: dict[int, Any]) -> Supernet:
        """Share the trained weights: a search copies its evaluator for the workers before it trains it."""
        copied = object.__new__(Supernet)
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Pickle unprepared; once trained, with the weights and without the inputs of training, such as the data."""
        settings = self._settings()
        if self._learned.weights:
            settings |= dict.fromkeys(("data", "loss", "optimizer", "schedule", "checkpoint"))
        return {**settings, "_own_data": self._own_data, "_learned": self._learned}

    def prepare(self, context: Context) -> None:
        """Train the shared weights, unless they are known already.

        Raises:
            ValueError: If there is nothing to train or to learn from, a loss is not finite, or the checkpoint is that
                of another training.
            DataError: If `data` cannot be iterated again, or is of an unknown form.
            FileFormatError: If the checkpoint is damaged or no checkpoint.
        """
        model = build(context.model, Edit({}, {}))
        identity = self._training_identity(context)
        if self._learned.identity == identity:
            load_weights(model, self._learned.weights)
        elif self._own_data and self.data is None:
            raise ValueError("supernet was pickled without its training data, and serves only what it was trained for")
        else:
            Training(context, model, self._recipe(), identity).run()
            self._learned.identity = identity
            self._learned.weights = weights_of(model)

        def adapt(module: nn.Module, _: Edit, run: Callable[[Batch], object]) -> None:
            recalibrate(module, context.subsets.calibration, run)

        with seeded(0):
            adapt(model, Edit({}, {}), bound_forward(context, model))  # the largest candidate is scored as it is
        self._context = replace(context, model=model)
        self._given = Slicer(context.model).cut(Edit({}, {})).eval()
        self._adapted = Adapted(self._context, adapt, self._given if context.judge.needs_dense else None)

    def _training_identity(self, context: Context) -> dict[str, Any]:
        """Everything that the weights are a function of and that can be compared."""
        recipe = self._recipe()
        settings = {name: getattr(recipe, name) for name in ("steps", "subnets", "lr", "batch_size", "seed")}
        return {
            **settings,
            "data": "own" if self._own_data else fingerprint(context.subsets.calibration),
            "metric": context.judge.name,
            "model": fingerprint(context.model.state_dict()),
            "space": fingerprint(context.space.to_json()),
        }

    def rest(self) -> None:
        """Free the memory of the latest candidate."""
        self._adapted.rest()

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Score candidates on validation batches."""
        return self._adapted.evaluate(candidates, chunk)

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a candidate on the held-out samples."""
        return self._adapted.test(candidate)

    def build(self, candidate: IntArray) -> nn.Module:
        """Return a plain module with the weights and statistics that were scored."""
        return self._adapted.build(candidate)

    @property
    def identity(self) -> str:
        """Fingerprint of the weights that scores are from: scores with other weights cannot be compared."""
        return f"{type(self).__name__} with weights {fingerprint(self._learned.weights)[:12]}"

    def notes(self) -> tuple[str, ...]:
        """Evaluate the largest candidate and the model given, and give both scores; once prepared."""
        judge, space = self._context.judge, self._context.space
        (largest,) = self.evaluate(np.zeros((1, len(space.sizes)), dtype=np.int64))
        given = self._adapted.score(self._given)
        if isinstance(given, Failure) or isinstance(largest, Failure):
            return ()
        return (
            f"the dense network of this search is the largest of the supernet: validation {judge.name} "
            f"{largest.metric.mean():.4f}, and {given.metric.mean():.4f} of the model given; drops refer to the former",
        )
