"""The run of a recovery: steps, validation, best weights, checkpoints, and the receipt."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from autoprune.data.batch import Batch, Guarded, default_forward, to_device
from autoprune.data.subsets import Subsets, fingerprint
from autoprune.evaluators.recovery.gradual import Stage, stages_of
from autoprune.evaluators.recovery.held_out import HeldOut
from autoprune.evaluators.recovery.nested import Samples
from autoprune.evaluators.recovery.progress import Progress
from autoprune.evaluators.recovery.receipt import Recovered, as_curve
from autoprune.evaluators.recovery.sources import Sources, calibration_of, first_batch, sources_of
from autoprune.evaluators.training.checkpoint import WAY_OUT, read_same, write_checkpoint
from autoprune.evaluators.training.course import Course, DivergedError
from autoprune.evaluators.training.lessons import Lessons
from autoprune.evaluators.training.parameters import Trained
from autoprune.evaluators.training.teachers import Better, device_of, fresh_outputs, none_better, private
from autoprune.evaluators.training.weights import Weights, load_weights, weights_of
from autoprune.files.access import as_path, shortened, sound
from autoprune.metrics.choosing import resolve_metric
from autoprune.structure.analysis import require_supported
from autoprune.structure.given import unwrap

if TYPE_CHECKING:
    from autoprune.evaluators.recovery.recovery import Recovery

log = logging.getLogger(__name__)

_POINTS = [[float]]
_FORM = {
    "identity": {str: object},
    "stage": int,
    "course": {str: object},
    "kept": {"step": int, "signal": (float, None), "weights": {str: object}},
    "losses": _POINTS,
    "validations": _POINTS,
    "worse": int,
    "seconds": float,
}


def recovered(recipe: Recovery, small: nn.Module, keep_going: bool = False) -> Recovered:
    """Train a model in place by a recipe, see `autoprune.evaluators.recovery.recover`.

    Args:
        recipe: The recipe.
        small: Trained in place.
        keep_going: Return the receipt at Ctrl-C, in place of raising on.
    """
    small = unwrap(small)
    require_supported(small)
    run = _Run(recipe, small)
    modes = [(module, module.training) for module in small.modules()]
    stopped = ""
    try:
        stopped = run.train()
    except DivergedError as error:
        stopped = str(error)
        log.warning("%s; the weights of step %d are kept", stopped, run.kept.step)
    except KeyboardInterrupt:
        if not keep_going:
            raise
        stopped = "interrupted"
    finally:
        load_weights(small, run.kept.weights)
        for module, mode in modes:
            module.training = mode
    return run.receipt(stopped)


@dataclass
class _Kept:
    """Weights to end with: the best so far, or without validation the latest whose losses were finite."""

    step: int
    signal: float
    weights: Weights


@dataclass
class _Run:
    """State of one recovery."""

    recipe: Recovery
    small: nn.Module
    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    worse: int = 0
    seconds: float = 0.0
    taken: int = 0

    def __post_init__(self) -> None:
        recipe = self.recipe
        recipe.require_teacher()
        self.began = time.perf_counter()
        device = device_of(self.small)
        self.dense = None if recipe.teacher is None else private(recipe.teacher, device)
        sources = sources_of(recipe.data, recipe.batch_size, recipe.seed)
        first = to_device(first_batch(sources.training, recipe.seed), device)
        forward = Guarded(recipe.forward or default_forward)
        self.held_out = self._held_out(sources, first, forward)
        better: Better = none_better
        if self.dense is not None and recipe.distill != "none":
            better = fresh_outputs(self.dense, forward)
        inner = self.dense if recipe.inner else None
        self.lessons = Lessons(sources.training, self.judge, forward, better, inner, recipe.loss)
        self.stages = stages_of(recipe, self.small, self.dense, Samples(self._calibration(first), forward))
        trained = Trained(self.small, recipe.train, recipe.rank, {}, recipe.seed)
        self.count, self.share = trained.count, trained.share
        self.identity = self._identity()
        self.before = self.held_out.score(self.small)
        signal = self.held_out.signal(self.small) if self.held_out.validates else math.inf
        self.kept = _Kept(0, signal, weights_of(self.small))

    def _held_out(self, sources: Sources, first: Batch, forward: Callable[..., Any]) -> HeldOut:
        device = device_of(self.small)
        held = {part: [to_device(batch, device) for batch in some] for part, some in sources.held_out.items()}
        subsets = Subsets((first,), tuple(held.get("validation", [first])), tuple(held.get("test", ())), (), "")
        reference = private(self.small, device) if self.dense is None else self.dense
        self.judge = resolve_metric(self.recipe.metric, subsets, lambda batch: forward(reference, batch))
        return HeldOut(self.judge, forward, held, self.dense)

    def _calibration(self, first: Batch) -> list[Batch]:
        """Samples to re-fit nested networks on; a single network needs none, it comes re-fitted."""
        recipe, device = self.recipe, device_of(self.small)
        if recipe.steps_to == 1:
            return [first]
        return [to_device(batch, device) for batch in calibration_of(recipe.data, recipe.batch_size, recipe.seed)]

    def _identity(self) -> dict[str, Any]:
        teacher = None if self.dense is None else fingerprint(weights_of(self.dense))
        return {**self.recipe.settings, "model": fingerprint(weights_of(self.small)), "teacher": teacher}

    def train(self) -> str:
        """Train to the end, and return the reason why it ended before; empty if it did not.

        Raises:
            DivergedError: If a loss is NaN or infinite.
        """
        first, state = self._resumed()
        before: nn.Module | None = None
        with Progress(self.recipe.steps, self.taken) as progress:
            for i, stage in enumerate(self.stages):
                if i < first:
                    continue
                resumes = state is not None and i == first
                module = stage.again() if resumes else stage.make(before)
                course = Course(module, self.recipe, self.lessons, stage.steps, stage.masks, stage.slices)
                if resumes:
                    with sound(f"checkpoint {shortened(self.recipe.checkpoint or '')} is damaged", WAY_OUT):
                        course.load(state["course"])
                before = course.best
                if self._stage(i, stage, course, progress):
                    return f"no better validation for {self.recipe.patience} times"
        return ""

    def _stage(self, number: int, stage: Stage, course: Course, progress: Progress) -> bool:
        """Train one network; True if it is to be the last because validation no longer improves."""
        interval, last = self.recipe.interval, stage.last
        while course.taken < stage.steps and not self._enough():
            course.losses.clear()
            course.go_on(min((course.taken // interval + 1) * interval, stage.steps))
            self.taken = stage.before + course.taken
            self.losses.append((self.taken, sum(course.losses) / len(course.losses)))
            signal = self._judge(course) if last else None
            progress.update(self.taken, self.losses[-1][1], signal)
            self._write(number, course)
        return last and self._enough()

    def _enough(self) -> bool:
        return self.recipe.patience is not None and self.worse >= self.recipe.patience

    def _judge(self, course: Course) -> float | None:
        """Validate the network in training, and keep its weights if they are the best, or if nothing can be said."""
        if not self.held_out.validates:
            self.kept = _Kept(self.taken, math.inf, weights_of(course.best))
            return None
        signal = self.held_out.signal(course.best)
        self.validations.append((self.taken, signal))
        self.worse += 1
        if signal < self.kept.signal or (self.kept.step == 0 and len(self.stages) > 1):
            self.worse = 0
            self.kept = _Kept(self.taken, signal, weights_of(course.best))
        return signal

    def _resumed(self) -> tuple[int, Any]:
        """Stage and state of the checkpoint, if there is one."""
        if self.recipe.checkpoint is None or not (path := as_path(self.recipe.checkpoint, "checkpoint")).exists():
            return 0, None
        state = read_same(path, self.identity, _FORM, "a recovery")
        kept = state["kept"]
        signal = math.inf if kept["signal"] is None else kept["signal"]
        self.kept = _Kept(kept["step"], signal, kept["weights"])
        self.losses, self.validations = [*as_curve(state["losses"])], [*as_curve(state["validations"])]
        self.worse, self.seconds = state["worse"], state["seconds"]
        self.taken = self.losses[-1][0]
        log.info("going on from step %d of %d in %s", self.taken, self.recipe.steps, shortened(path))
        return state["stage"], state

    def _write(self, stage: int, course: Course) -> None:
        if self.recipe.checkpoint is None:
            return
        kept = {"step": self.kept.step, "signal": _finite(self.kept.signal), "weights": dict(self.kept.weights)}
        state = {"identity": self.identity, "stage": stage, "course": course.state(), "kept": kept}
        state |= {"losses": self.losses, "validations": [(at, value) for at, value in self.validations]}
        state |= {"worse": self.worse, "seconds": self._seconds()}
        write_checkpoint(Path(self.recipe.checkpoint), state)

    def _seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    def receipt(self, stopped: str) -> Recovered:
        """Make the receipt, once the weights to keep are in the model."""
        recipe = self.recipe
        distill = "none" if self.dense is None else "inner" if recipe.inner else recipe.distill
        notes = [self.judge.note]
        if not self.held_out.validates:
            notes.append("no validation samples, so the last weights are kept; give Data(calibration=, validation=)")
        elif self.held_out.part == "validation":
            notes.append("the scores are on the samples that chose the weights; give Data(test=...) for others")
        if self.held_out.validates and self.kept.step == 0:
            notes.append("no weights on the way were better on validation samples than those at the start")
        return Recovered(
            train=recipe.train,
            parameters=self.count,
            share=self.share,
            distill=distill,
            steps=self.taken,
            best_step=self.kept.step,
            losses=tuple(self.losses),
            validations=tuple(self.validations),
            metric=self.judge.name if self.held_out.part else "",
            held_out=self.held_out.part,
            before=self.before,
            after=self.held_out.score(self.small),
            teacher=self.held_out.score(self.dense),
            seconds=self._seconds(),
            stopped=stopped,
            notes=tuple(notes),
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
