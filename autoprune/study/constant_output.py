"""Check whether the networks that a search found are better than a constant output."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial

import torch

from autoprune.data.sampling import seeded
from autoprune.metrics.constant import measure_constant
from autoprune.protocols import OK
from autoprune.result.trials import Trial
from autoprune.structure.slicing.slicing import Edit, Slicer
from autoprune.study.study import Study

log = logging.getLogger(__name__)


@seeded(0)  # a model may draw noise
def note_of_no_better(study: Study, found: Sequence[Trial]) -> tuple[str, ...]:
    """Note that no network found scores better than the dense model's mean output for every sample, or much better.

    Costs one pass of the dense model over the validation samples, for which there has to be time.
    """
    if study.deadline.passed:
        return ()
    judge = study.context.judge
    scores = [trial.score for trial in found if trial.status == OK and trial.feasible]
    if not scores:
        return ()
    try:
        constant = score_of_constant(study)
    except KeyboardInterrupt:
        log.warning("interrupted; the front was not compared with a constant output")
        return ()
    except Exception as error:  # a user's metric may need more of the outputs than one tensor
        log.debug("no score of a constant output: %s", error)
        return ()
    if not math.isfinite(constant):  # such as a correlation, which a constant has not
        return ()
    best = judge.direction.best(scores)
    dense = float(study.dense.metric.mean())
    if not judge.direction.better(dense, constant):
        return ()
    if not judge.direction.better(best, constant):
        return (
            f"no network within the budget is better than a constant output: the best has {judge.name} {best:.4f}, and "
            f"the mean output of the dense model for every sample {constant:.4f}; allow more of the dense cost, "
            "fine-tune, or give more calibration samples",
        )
    if study.request.evaluator == "auto" and abs(best - constant) < abs(dense - best):
        return (
            f"the best network within the budget, with {judge.name} {best:.4f}, is closer to a constant output, "
            f"{constant:.4f}, than to the dense model, {dense:.4f}: scores before training tell little about such "
            "networks after it; fine-tune several of the front, and one of uniform widths, before you choose, or allow "
            "more of the dense cost",
        )
    return ()


def score_of_constant(study: Study) -> float:
    """Metric of a model that returns the dense model's mean output over the validation samples for each of them."""
    context = study.context
    model = Slicer(context.model).cut(Edit({}, {})).eval()  # with buffers of its own, which a forward pass may write to
    run = partial(context.forward, model)
    with torch.no_grad():
        known = context.judge.dense_outputs(run, context.subsets.validation)
        _, constant = measure_constant(context.judge, run, context.subsets.validation, known)
    return float(constant.metric.mean())
