"""Set up a search: trace the model, rank its units, fix the data, lay out the problem and score the dense model."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from autoprune.arguments import said
from autoprune.budget import Budget
from autoprune.data import batch as batches
from autoprune.data.sampling import seeded
from autoprune.early_stopping.racing import Rule
from autoprune.errors import AutopruneError, BudgetError, DataError, UnsupportedModelError
from autoprune.evaluators import Compensated, Context, Evaluator, Expects, Tells, make_evaluator
from autoprune.evaluators.adaptive_bn import statistics
from autoprune.evaluators.compensated import middle_of
from autoprune.evaluators.scoring.out_of_memory import fitting
from autoprune.evaluators.scoring.untouched import Untouched, is_ours
from autoprune.execution import evaluate_one
from autoprune.files.access import brief
from autoprune.importance.calibration import Calibration
from autoprune.importance.criteria import Criterion, order_units, score_units
from autoprune.importance.expected_loss import rival_losses
from autoprune.metrics.choosing import resolve_metric
from autoprune.metrics.judge import Judge
from autoprune.protocols import Failure, FloatArray, Measurement, SearchSpace
from autoprune.search_spaces import Settings, make_space, require_registered, with_latency
from autoprune.structure.analysis import analyse
from autoprune.structure.containers import sizes_of
from autoprune.structure.slicing.slicing import Edit, Slicer
from autoprune.structure.structure import Structure, delivered_as_graphs
from autoprune.study.arranging import arranged
from autoprune.study.calibration_check import Choice, check, ranking, unchecked
from autoprune.study.convergence import Deadline, planned
from autoprune.study.inputs import Inputs, counted_in_tokens, inputs_of
from autoprune.study.layout import Layout, lay_out
from autoprune.study.mapped_weights import own_copy
from autoprune.study.measured_costs import measure_costs
from autoprune.study.prior_check import choose_prior
from autoprune.study.request import Request
from autoprune.study.rivals import find_racing, why_not_applicable
from autoprune.study.start import Beginning, starts_of
from autoprune.study.study import Study

log = logging.getLogger(__name__)

DATABASE = "database.safetensors"
"""Name of the layer database in the run directory, where the criterion or the prior needs one."""
LEAST_ANALYSIS_SECONDS = 10.0
"""Time that the analysis of a model may take even if ``max_seconds`` is less."""


@dataclass(frozen=True)
class Parts:
    """Objects that the names and texts in a request stand for, before they know the model."""

    budget: Budget
    settings: Settings
    evaluator: Evaluator
    racing: Rule | None
    start: Sequence[Beginning]


@dataclass(frozen=True)
class _Ranked:
    """Importance of units, with the space whose order follows from it, and the metric.

    Attributes:
        criterion: Criterion by which units are ranked; None if the space ranks none.
        scores: Importance of the units of each group; empty if there is no criterion.
        judge: The metric.
        space: The space.
    """

    criterion: str | Criterion | None
    scores: Mapping[str, Tensor]
    judge: Judge
    space: SearchSpace


@dataclass(frozen=True)
class _Refit:
    """Evaluator, not prepared yet, with the context that the calibration check chose for it.

    Attributes:
        context: With the space in its final order.
        evaluator: The evaluator.
        fresh: A copy for workers.
        ranked: The final ranking.
        choice: The choice of the check; None without one.
    """

    context: Context
    evaluator: Evaluator
    fresh: Evaluator
    ranked: _Ranked
    choice: Choice | None = None


def parts_of(request: Request) -> Parts:
    """Make the objects that the request names.

    Raises:
        BudgetError: If the budget cannot be read.
        ValueError: If a name is unknown.
    """
    return Parts(
        racing=find_racing(request.early_stopping),
        budget=Budget.parse(request.budget),
        settings=make_space(request.space),
        evaluator=make_evaluator(request.evaluator),
        start=starts_of(request.start.candidates),
    )


def set_up(request: Request, deadline: Deadline) -> Study:
    """Turn a request into a study; raises the errors that `autoprune.search` documents."""
    parts = parts_of(request)
    inputs = inputs_of(request)
    structure = _analysed(request, inputs, deadline)
    _require_counted(parts.budget, structure)
    measured = measure_costs(request, parts.budget, parts.settings, inputs, structure, deadline)
    settings = parts.settings
    if measured.latency is not None:
        settings = with_latency(settings, measured.latency, structure)
    # Builds equal the scored models, even if the user trains theirs meanwhile.
    model = own_copy(inputs.model, borrow=_trusted(parts.evaluator, settings))
    scored = Slicer(model).cut(Edit({}, {})).eval()  # with buffers of its own, which a forward pass may write to
    inputs = counted_in_tokens(request, inputs, scored)
    forward = batches.Guarded(inputs.forward)
    run_dir = request.execution.run_dir
    kept = None if run_dir is None else Path(run_dir) / DATABASE
    calibration = Calibration(scored, structure, inputs.subsets.calibration, forward, kept, request.seed)
    ranked = _rank(request, settings, inputs, calibration)
    layout = lay_out(request, parts.budget, settings, parts.start, ranked.space, structure, ranked.judge, measured)
    if is_ours(parts.evaluator):
        inputs = replace(inputs, subsets=arranged(inputs.subsets, ranked.judge, calibration))
    context = Context(model, structure, ranked.space, inputs.subsets, ranked.judge, calibration.forward)
    refit = _refit(request, parts.evaluator, settings, context, ranked, layout, deadline, calibration)
    foreseen = _foreseen(request, refit)
    priors = _priors(request, refit, calibration) if foreseen is None else {}
    trials = planned(request.trials, len(ranked.space.sizes))
    problem = replace(layout.problem, trials=trials)
    untouched = Untouched(model, refit.evaluator)
    refit.evaluator.prepare(refit.context)
    untouched.require()
    if foreseen is not None:
        known = foreseen() or ()
        whole = tuple(row for row in known if row is not None)
        complete = known and len(whole) == len(known)
        priors = {"evaluator": whole} if complete else _priors(request, refit, calibration, known)
    notes = _notes(inputs, structure, ranked, layout, refit, measured.notes)
    dense = _score_dense(refit.evaluator, refit.context, untouched)
    prior = choose_prior(refit.evaluator, problem, priors)
    problem = replace(problem, prior=prior.losses)
    notes = (*notes, prior.note) if prior.note else notes
    worst = _worst_score(layout.budget, ranked.judge, dense)
    why_not = why_not_applicable(parts.racing, refit.evaluator, refit.context, worst)
    return Study(
        request=request,
        deadline=deadline,
        context=refit.context,
        evaluator=refit.evaluator,
        fresh=refit.fresh,
        problem=problem,
        costs=layout.costs,
        budget=layout.budget,
        limits=layout.limits,
        dense=dense,
        worst_score=worst,
        racing=None if why_not else parts.racing,
        notes=(*notes, f"no racing: {why_not}") if why_not and request.early_stopping != "auto" else notes,
        untouched=untouched,
        priced=measured.priced.of(model),
        latency=measured.latency,
        memory=measured.memory,
        choice=refit.choice,
    )


def _priors(
    request: Request, refit: _Refit, calibration: Calibration, fitted: Sequence[FloatArray | None] = ()
) -> dict[str, tuple[FloatArray, ...]]:
    """Expected losses of options by the start of the request, and by the evaluator for those that it knows."""
    ranked = refit.ranked
    checked = request.evaluator == "auto"  # which re-fits; another one may train each candidate for hours
    with seeded(0):
        kind, space = request.start.prior, refit.context.space
        return rival_losses(kind, space, ranked.scores, ranked.criterion, calibration, checked, fitted)


def _foreseen(request: Request, refit: _Refit) -> Callable[[], Sequence[FloatArray | None] | None] | None:
    """Function of the evaluator that tells the losses of options once it is prepared, if the prior is left to it."""
    evaluator, prior = refit.evaluator, request.start.prior
    if isinstance(evaluator, Expects) and prior in ("auto", "database"):
        return evaluator.expected_losses
    if isinstance(evaluator, Compensated) and prior == "auto" and statistics(refit.context.model):
        return evaluator.remaining_errors
    return None


def _analysed(request: Request, inputs: Inputs, deadline: Deadline) -> Structure:
    """Analyse the model within the deadline, but at least `LEAST_ANALYSIS_SECONDS`: there is no result without it.

    Raises:
        TimeoutError: If that takes longer than the search may.
    """
    call = request.example
    analysis = partial(analyse, inputs.example, checks=call.checks, rewrite=call.rewrite, seed=request.seed)
    if deadline.seconds is None:
        return analysis()
    try:
        return analysis(until=max(deadline.began + deadline.seconds, time.monotonic() + LEAST_ANALYSIS_SECONDS))
    except TimeoutError as error:
        raise TimeoutError(
            f"max_seconds={deadline.seconds:g} was over before it was known what can be removed from the model: "
            f"{error}; give more time, or shorter inputs as example="
        ) from error


def _require_counted(budget: Budget, structure: Structure) -> None:
    """Refuse a limit on FLOPs that are not all counted.

    Raises:
        UnsupportedModelError: Names the operations.
    """
    missing = structure.terms.uncounted
    if missing and any(limit.name == "flops" for limit in budget.limits):
        raise UnsupportedModelError(
            f"budget '{budget}' limits flops, but nothing says what {', '.join(missing[:3])} costs; limit params or "
            "latency_ms, or give its multiply-accumulates to autoprune.register_rule"
        )


def _trusted(evaluator: Evaluator, settings: Settings) -> bool:
    """Return whether no code of the user can reach the weights during the search."""
    return is_ours(evaluator) and (isinstance(settings.criterion, str) or settings.criterion is None)


@seeded(0)
def _rank(request: Request, settings: Settings, inputs: Inputs, calibration: Calibration) -> _Ranked:
    """Rank the units, find the metric, and bind the space to the order of units."""
    criterion = "l2" if settings.criterion == "auto" else settings.criterion
    scores: Mapping[str, Tensor] = {}
    if criterion is not None:
        scores = score_units(calibration, criterion, request.seed)
    forward = _blaming_data(fitting(lambda batch: calibration.forward(calibration.model, batch)))
    judge = resolve_metric(request.metric, inputs.subsets, forward)
    space = settings.bind(calibration.structure, order_units(scores))
    require_registered(space)
    return _Ranked(criterion, scores, judge, space)


def _refit(
    request: Request,
    evaluator: Evaluator,
    settings: Settings,
    context: Context,
    ranked: _Ranked,
    layout: Layout,
    deadline: Deadline,
    calibration: Calibration,
) -> _Refit:
    """Check which re-fit and criterion help, if the evaluator is ``"auto"``, or take the choice of a resumed search."""
    fresh = _copied(evaluator)
    if request.evaluator != "auto":
        return _Refit(context, evaluator, fresh, ranked)
    scores, criterion = ranked.scores, ranked.criterion
    middle = middle_of(context.space)  # by l2: its ridges must not depend on the choice of the check
    trials = planned(request.trials, len(context.space.sizes))
    choice = Choice.load(request.execution.run_dir) or (unchecked(settings) if deadline.passed else None)
    if choice is None:
        choice, evaluator, scores = check(context, settings, scores, layout.uniform, request.seed, calibration, trials)
    else:
        evaluator = choice.refit(middle)
        if settings.criterion == "auto" and choice.criterion != criterion:
            scores = ranking(context, choice.criterion, request.seed, calibration)
    if settings.criterion == "auto":
        criterion = choice.criterion
    space = settings.bind(context.structure, order_units(scores))
    ranked = replace(ranked, criterion=criterion, scores=scores, space=space)
    return _Refit(replace(context, space=space), evaluator, choice.refit(middle), ranked, choice)


def _copied(evaluator: Evaluator) -> Evaluator:
    """Copy the evaluator before it is prepared, for workers.

    Raises:
        TypeError: If it cannot be copied.
    """
    try:
        return copy.deepcopy(evaluator)
    except Exception as error:  # a user's object may raise anything when it is copied
        raise TypeError(
            f"evaluator must be something that can be copied before it is prepared, but {type(evaluator).__name__} "
            f"cannot ({brief(error)}); keep locks, files, sockets and generators out of it, or give it a __deepcopy__"
        ) from error


def _score_dense(evaluator: Evaluator, context: Context, untouched: Untouched) -> Measurement:
    """Score the unpruned model, which drops refer to.

    Raises:
        ValueError: If even the dense model cannot be scored.
    """
    outcome = evaluate_one(evaluator, np.zeros(len(context.space.sizes), dtype=np.int64))
    untouched.require()
    if isinstance(outcome, Failure):
        raise ValueError(
            f"model cannot be scored on the validation data: {outcome.reason} (the metric is {context.judge.name!r})"
        )
    return outcome


def _worst_score(budget: Budget, judge: Judge, dense: Measurement) -> float | None:
    """Turn the limits on the score into a number; None without any.

    Raises:
        BudgetError: If even the dense model is beyond it.
    """
    score = float(dense.metric.mean())
    worst = budget.worst_score(score, judge.direction)
    if not judge.direction.meets(score, worst):
        raise BudgetError(
            f"budget '{budget}' asks for more than the dense model has, whose {judge.name} is {score:.4f} on the "
            f"validation data; allow a worse one, or a drop, such as '{judge.name} drop <= 1pp'"
        )
    return worst


def _notes(
    inputs: Inputs, structure: Structure, ranked: _Ranked, layout: Layout, refit: _Refit, measured: Sequence[str]
) -> tuple[str, ...]:
    """Decisions for the reader of the result; the one that its scores are of random inputs comes first."""
    notes = [*_notes_of_structure(structure, ranked.space)]
    if not batches.divisible(inputs.stated):
        notes.append(
            "batches are used as a whole, because they cannot be cut by samples, as those of graphs: costs are of one "
            f"batch, with tensors of {sizes_of([*batches.tensors(inputs.stated)])}"
        )
    notes += measured
    if layout.minimises:
        notes.append(f"looking for the least {next(iter(layout.limits))} under '{layout.budget}'")
    drawn, metric = inputs.subsets.notes, ranked.judge.note
    ordered = (*drawn, *notes, metric) if inputs.subsets.synthetic else (*notes, metric, *drawn)
    checked = () if refit.choice is None else (refit.choice.note,)
    learned: tuple[str, ...] = ()
    if isinstance(refit.evaluator, Tells):
        learned = refit.evaluator.notes()  # after `prepare`, because only then it has learned something
    return (*ordered, *checked, *learned)


def _notes_of_structure(structure: Structure, space: SearchSpace) -> list[str]:
    traced = "" if structure.device == "meta" else f"; traced on real values ({structure.device})"
    notes = [f"search over {space.describe()}{traced}"]
    if structure.graphs:
        notes.append(f"{delivered_as_graphs(structure)}; rewrite='off' leaves them as they are")
    if structure.untrained:
        notes.append(f"what only training runs was not followed, and may not fit a pruned model: {structure.untrained}")
    if unread := [dimension.name for dimension in space.dimensions if dimension.name in structure.unread]:
        others = " and others" if len(unread) > 3 else ""
        goes = "goes" if len(unread) == 1 else "go"
        notes.append(f"no output depends on {', '.join(unread[:3])}{others}, which {goes} first")
    if structure.terms.uncounted:
        notes.append(f"flops leave out {', '.join(structure.terms.uncounted[:3])}, whose cost nothing says")
    return notes


def _blaming_data(forward: Callable[[batches.Batch], Any]) -> Callable[[batches.Batch], Any]:
    """Wrap the forward of a model that ran on other inputs before, to name the inputs in its errors."""

    def run(batch: batches.Batch) -> Any:
        try:
            return forward(batch)
        except AutopruneError:
            raise
        except Exception as error:  # the user's forward may raise anything
            sizes = sizes_of([*batches.tensors(batch)])
            raise DataError(
                f"data must hold batches that the model takes, but with tensors of {sizes} its forward raises "
                f"{said(error)}; give others, or autoprune.Call(forward=...)"
            ) from error

    return run
