"""Set up a search: validate the arguments, trace the model, draw the data, and build the `Problem`."""

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
from torch import Tensor, nn

from autoprune import batches
from autoprune.arguments import said, shown, whole_number
from autoprune.budget import Budget
from autoprune.checking import Choice, check, ranking, unchecked
from autoprune.costs import CostFunction, GivenCost, Latency, make_costs
from autoprune.costs.changes import Changes, LimitedCosts
from autoprune.costs.given import require_functions, require_steady
from autoprune.costs.memory.peak import PeakMemory, measure_memory
from autoprune.costs.operations.allocations import MEASURABLE
from autoprune.costs.profiling.profile import profile_structure
from autoprune.costs.timing import TimeOverError
from autoprune.criteria import order_units, score_units
from autoprune.data import Subsets, materialise, synthetic
from autoprune.errors import AutopruneError, BudgetError, DataError, InfeasibleBudgetError, UnsupportedModelError
from autoprune.evaluators import Context, Evaluator, make_evaluator
from autoprune.evaluators.compensation import middle_of
from autoprune.evaluators.memory import fitting
from autoprune.evaluators.untouched import Untouched, is_ours
from autoprune.files import brief, make_folder
from autoprune.importance.calibration import Calibration
from autoprune.mapped import own_copy
from autoprune.metrics import Metric, resolve_metric
from autoprune.optimizers import Problem, uniform_seeds
from autoprune.prior import PRIORS, expected_losses
from autoprune.protocols import ChoosesWidths, FloatArray, IntArray, Measurement, SearchSpace
from autoprune.result.trials import meets
from autoprune.search_spaces import (
    Settings,
    make_space,
    needs_latency,
    require_registered,
    why_no_less,
    with_latency,
)
from autoprune.sources import seeded
from autoprune.starts import Start, candidates_of, starts_of
from autoprune.stopping import Deadline, planned
from autoprune.structure.analysis import analyse, require_supported
from autoprune.structure.containers import sizes_of
from autoprune.structure.example import Example
from autoprune.structure.examples import examples_of, unwrap
from autoprune.structure.outputs import require_selecting, selecting
from autoprune.structure.slicing import Edit, Slicer
from autoprune.structure.structure import Structure, delivered_as_graphs

log = logging.getLogger(__name__)

SYNTHETIC_SAMPLES = 256
"""Samples of each part when no data is given."""

LEAST_ANALYSIS_SECONDS = 10.0
"""Time that the analysis of a model may take even if ``max_seconds`` is less."""

TIMED = ("latency_ms", "ms_per_sample")
"""Costs that are predicted, and measured on the networks of the front."""

_ROUNDING = 1e-9  # a user's cost of the cheapest candidate may differ in its last bit with the size of the population


@dataclass(frozen=True)
class Study:
    """One search, ready to run.

    Attributes:
        context: Context of evaluators and workers.
        evaluator: Prepared on the context.
        fresh: The same evaluator before that, for workers.
        problem: Problem of the optimizer.
        costs: Every cost by name, of candidates (n, d).
        budget: As parsed.
        limits: The limited costs, absolute, in the order of the budget. A budget of score limits alone limits the
            minimised cost to that of the dense model.
        notes: Decisions, in plain words.
        given: The user's arguments that run and judge models, by name.
        untouched: Sees whether an evaluator of the user's writes to the dense model.
        priced: The call that latencies and memory are measured on, if they are: a batch of the size that costs are
            stated at, without the copy of it that the forward of the context makes.
        worst_score: The worst score that the budget allows, in the metric's direction; None if it limits costs alone,
            and until the dense model is measured.
        latency: Predicts latencies; None if they are not limited, or the user gives a function for them.
        memory: Predicts the peak of memory; None if it is not limited, or cannot be measured.
        choice: Choice of the calibration check, to be written once the search begins; None without one.
    """

    context: Context
    evaluator: Evaluator
    fresh: Evaluator
    problem: Problem
    costs: Mapping[str, CostFunction]
    budget: Budget
    limits: Mapping[str, float]
    notes: tuple[str, ...]
    given: Mapping[str, Any]
    untouched: Untouched
    priced: Example
    worst_score: float | None = None
    latency: Latency | None = None
    memory: PeakMemory | None = None
    choice: Choice | None = None

    def costs_of(self, candidates: IntArray) -> dict[str, FloatArray]:
        """Every cost of candidates (n, d) by name, shape (n,) each."""
        canonical = self.problem.canonical(candidates)
        return {name: cost(canonical) for name, cost in self.costs.items()}


def prepare(
    model: nn.Module,
    budget: Any,
    data: Any,
    *,
    metric: str | Metric | Callable[..., Any] = "auto",
    space: str | Settings = "channels",
    evaluator: str | Evaluator = "auto",
    seed: int = 0,
    start: Start | Sequence[Start] = (),
    forward: batches.Forward | None = None,
    example_inputs: Any = None,
    outputs: Any = None,
    checks: str = "on",
    rewrite: str = "auto",
    costs: Mapping[str, GivenCost] | None = None,
    cost_batch: int = 1,
    trials: int | str = 200,
    prior: str = "auto",
    latency: Latency | str | Path | None = None,
    run_dir: str | None = None,
    deadline: Deadline | None = None,
) -> Study:
    """Trace, rank, fix the data and lay out the problem; the arguments are those of `autoprune.search`."""
    wanted, settings, chosen = Budget.parse(budget), make_space(space), make_evaluator(evaluator)
    cost_batch = whole_number("cost_batch", cost_batch, 1)
    require_functions({} if costs is None else costs)
    require_selecting(forward, outputs)
    starts = starts_of(start)
    if not isinstance(prior, str) or prior not in PRIORS:
        raise ValueError(f"prior must be one of {list(PRIORS)}, got {shown(prior)}")
    model = unwrap(model)
    device = require_supported(model)
    subsets = _subsets(model, data, example_inputs, metric, seed).to(device)
    plain_run = selecting(forward or batches.default_forward, outputs)
    run = batches.Guarded(plain_run)
    first = batches.fresh(batches.pieces(subsets.calibration[0], 2)[0])
    further = _branches(model, example_inputs)
    stated = subsets.calibration[0]  # costs are stated for this batch
    if data is not None and example_inputs is not None and not further:
        stated = batches.to_device(_like(model, example_inputs, stated), device)
        if not _same_sizes(stated, first):  # the data may take other branches of the forward
            further.append(first)
        first = batches.fresh(stated)
    example = Example.of_batch(model, first, plain_run, further)
    until = deadline or Deadline(time.monotonic())
    structure = _analysed(until, partial(analyse, example, checks=checks, rewrite=rewrite, seed=seed))
    _require_counted(wanted, structure)
    needed = needs_latency(settings) or any(limit.name in TIMED for limit in wanted.limits)
    measured = needed or latency is not None or any(limit.name == "memory_bytes" for limit in wanted.limits)
    priced = Example.of_batch(model, stated, plain_run)
    if measured:
        priced = priced.resized(cost_batch, "cost_batch")
    plain = forward is None
    source = _latency_of(latency, needed, costs, structure, priced, run_dir, plain, until)
    if source is not None:
        settings = with_latency(settings, source, structure)
    peak, without = _memory_of(wanted, structure, priced)
    trusted = is_ours(chosen) and (isinstance(settings.criterion, str) or settings.criterion is None)
    model = own_copy(model, borrow=trusted)  # builds equal the scored models, even if the user trains theirs meanwhile
    scored = Slicer(model).cut(Edit({}, {})).eval()  # with buffers of its own, which a forward pass may write to
    calibration = Calibration(scored, structure, subsets.calibration, run)
    with seeded(0):
        criterion = "l2" if settings.criterion == "auto" else settings.criterion
        scores: Mapping[str, Tensor] = {}
        if criterion is not None:
            scores = score_units(calibration, criterion, seed)
        judge = resolve_metric(metric, subsets, _blaming_data(fitting(lambda batch: run(scored, batch))))
        bound = settings.bind(structure, order_units(scores))
    require_registered(bound)
    named = make_costs(structure, bound, costs, cost_batch, source, None if peak is None else peak.predict)
    require_steady({name: named[name] for name in costs or {}}, bound)
    wanted = wanted.judged_by(judge.name, judge.higher_is_better, named)
    limits = wanted.resolve({name: float(cost(_dense(bound))[0]) for name, cost in named.items()})
    limits = limits or _cost_to_minimise(bound, named, not structure.terms.uncounted)
    minimise = bool(wanted.score_limits)
    lay_out = partial(_problem, structure, bound, named, start=starts, minimise=minimise)
    try:
        problem = _within_upper(lay_out, limits, None if minimise else source)
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(f"{error}; {_why_no_less(settings, bound, named, limits)}") from error
    context = Context(model, structure, bound, subsets, judge, run)
    fresh = _copied(chosen)
    checked: tuple[str, ...] = ()
    choice: Choice | None = None
    if evaluator == "auto":
        uniform = uniform_seeds(problem, (0.5,) if minimise else (1.0,))[-1]
        middle = middle_of(context.space)  # by l2: its ridges must not depend on the choice of the check
        choice = Choice.load(run_dir) or (unchecked(settings) if until.passed else None)
        if choice is None:
            choice, chosen, scores = check(context, settings, scores, uniform, seed)
        else:
            chosen = choice.refit(middle)
            if settings.criterion == "auto" and choice.criterion != criterion:
                scores = ranking(context, choice.criterion, seed)
        criterion = None if criterion is None else choice.criterion if settings.criterion == "auto" else criterion
        context = replace(context, space=settings.bind(structure, order_units(scores)))
        fresh = choice.refit(middle)
        checked = (choice.note,)
    with seeded(0):
        expected = expected_losses(prior, context.space, scores, criterion, calibration)
    problem = replace(problem, trials=planned(trials, len(bound.sizes)), prior=expected)
    untouched = Untouched(model, chosen)
    chosen.prepare(context)
    untouched.require()
    traced = "" if structure.device == "meta" else f"; traced on real values ({structure.device})"
    notes = [f"search over {bound.describe()}{traced}"]
    if structure.graphs:
        notes.append(f"{delivered_as_graphs(structure)}; rewrite='off' leaves them as they are")
    if structure.untrained:
        notes.append(f"what only training runs was not followed, and may not fit a pruned model: {structure.untrained}")
    if unread := [dimension.name for dimension in bound.dimensions if dimension.name in structure.unread]:
        others = " and others" if len(unread) > 3 else ""
        goes = "goes" if len(unread) == 1 else "go"
        notes.append(f"no output depends on {', '.join(unread[:3])}{others}, which {goes} first")
    if structure.terms.uncounted:
        notes.append(f"flops leave out {', '.join(structure.terms.uncounted[:3])}, whose cost nothing says")
    if not batches.divisible(stated):
        notes.append(
            "batches are used as a whole, because they cannot be cut by samples, as those of graphs: costs are of one "
            f"batch, with tensors of {sizes_of([*batches.tensors(stated)])}"
        )
    if source is not None:
        notes += [f"latency: {source}", *source.notes]
    if peak is not None:
        notes.append(f"memory_bytes: {peak}")
    notes += without
    if wanted.score_limits:
        notes.append(f"looking for the least {next(iter(limits))} under '{wanted}'")
    told = getattr(chosen, "notes", ())  # after `prepare`, because only then an evaluator knows what it learned
    ordered = (*_ordered(notes, judge.note, subsets), *checked, *told)
    given = {"metric": metric, "forward": forward, "outputs": outputs}
    given |= {f"costs[{name!r}]": function for name, function in (costs or {}).items()}
    return Study(
        context=context,
        evaluator=chosen,
        fresh=fresh,
        problem=problem,
        costs=named,
        budget=wanted,
        limits=limits,
        notes=ordered,
        given=given,
        untouched=untouched,
        latency=source,
        priced=priced.of(model),
        memory=peak,
        choice=choice,
    )


def _analysed(deadline: Deadline, analysis: Callable[..., Structure]) -> Structure:
    """Run the analysis within the deadline, but at least `LEAST_ANALYSIS_SECONDS`: there is no result without it.

    Raises:
        TimeoutError: If that takes longer than the search may.
    """
    if deadline.seconds is None:
        return analysis()
    try:
        return analysis(until=max(deadline.began + deadline.seconds, time.monotonic() + LEAST_ANALYSIS_SECONDS))
    except TimeoutError as error:
        raise TimeoutError(
            f"max_seconds={deadline.seconds:g} was over before it was known what can be removed from the model: "
            f"{error}; give more time, or shorter inputs as example_inputs="
        ) from error


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


def _ordered(notes: Sequence[str], metric: str, subsets: Subsets) -> tuple[str, ...]:
    """Order notes for the reader of the result; the one that its scores are of random inputs comes first."""
    return (*subsets.notes, *notes, metric) if subsets.synthetic else (*notes, metric, *subsets.notes)


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


def _latency_of(
    given: Latency | str | Path | None,
    needed: bool,
    costs: Mapping[str, GivenCost] | None,
    structure: Structure,
    example: Example,
    run_dir: str | None,
    plain: bool,
    deadline: Deadline,
) -> Latency | None:
    """Return the table given, that of the resumed run, or one measured now if it is `needed`.

    Unless the model is called with batches as they are (`plain`), the table may be of inputs of other sizes.
    """
    if given is None and ("latency_ms" in (costs or {}) or not needed):
        return None
    name = type(example.model).__name__
    kept = None if run_dir is None else Path(run_dir) / "latency.json"
    if given is None and kept is not None and kept.exists():
        given = kept
    if given is None:
        if kept is not None:
            make_folder(kept.parent, "run_dir")
        log.info("measuring latencies of %s; autoprune.profile measures once for many searches", name)
        try:
            return profile_structure(example, structure, path=kept, over=lambda: deadline.passed)
        except TimeOverError as error:
            there = f" what was measured is kept in {kept}.partial, and resume=True goes on from there;" if kept else ""
            raise TimeoutError(
                f"max_seconds={deadline.seconds:g} was over before latencies were measured: {error};{there} give more "
                "time, or a table that autoprune.profile measured once"
            ) from error
    if not isinstance(given, Latency | str | Path):
        raise ValueError(f"latency must be a table of autoprune.profile or the file of one, got {shown(given)}")
    found = given if isinstance(given, Latency) else Latency.load(given)
    try:
        found.require_match(structure, example.samples, name, example.batch if plain else None)
    except ValueError as error:
        if given != kept:
            raise
        raise ValueError(f"run_dir holds {kept} of an earlier search: {error}, or pass another run_dir") from error
    return found


def _memory_of(wanted: Budget, structure: Structure, example: Example) -> tuple[PeakMemory | None, list[str]]:
    """Make the predictor of peak memory if the budget limits it, or a note with the reason why there is none."""
    if all(limit.name != "memory_bytes" for limit in wanted.limits):
        return None, []
    device = next(example.model.parameters()).device.type
    why = "" if device in MEASURABLE else f"on {device} it cannot be measured"
    if not why:
        try:
            return measure_memory(example, structure), []
        except UnsupportedModelError as error:
            why = str(error)
    return None, [f"memory_bytes is weights and tensors alone, without what operations allocate while they run: {why}"]


def _within_upper(
    lay_out: Callable[[Mapping[str, float]], Problem], limits: Mapping[str, float], latency: Latency | None
) -> Problem:
    """Lay out the problem so that candidates meet limits at the upper ends of predicted latencies, if possible."""
    slack = 1.0 if latency is None else 1 / (1 + latency.correction.margin)
    tight = {name: limit * slack if name in TIMED else limit for name, limit in limits.items()}
    try:
        return lay_out(tight)
    except InfeasibleBudgetError:
        if tight == dict(limits):
            raise
        return lay_out(limits)


def _why_no_less(
    settings: Settings, space: SearchSpace, costs: Mapping[str, CostFunction], limits: Mapping[str, float]
) -> str:
    """Describe the smallest network of the space, in percent of the dense model, and the settings that limit it."""
    ends = np.concatenate([_dense(space), space.canonical(space.sizes[None] - 1)])
    shares = {name: costs[name](ends)[1] / costs[name](ends)[0] for name in limits if costs[name](ends)[0] > 0}
    told = ", ".join(f"{share:.2%} of the dense {name}" for name, share in shares.items())
    found = f"every dimension at its least leaves {told}" if told else "every dimension is at its least"
    return f"{found}; what stops there is {why_no_less(settings)}: loosen these, or allow more"


def hold_score(study: Study, dense: Measurement) -> Study:
    """Fill in the limit on the score as a number, once the dense model is measured.

    Raises:
        BudgetError: If even the dense model is beyond it.
    """
    judge, score = study.context.judge, float(dense.metric.mean())
    worst = study.budget.worst_score(score, judge.higher_is_better)
    if worst is not None and not meets(score, worst, judge.higher_is_better):
        raise BudgetError(
            f"budget '{study.budget}' asks for more than the dense model has, whose {judge.name} is {score:.4f} on the "
            f"validation data; allow a worse one, or a drop, such as '{judge.name} drop <= 1pp'"
        )
    return replace(study, worst_score=worst)


def _cost_to_minimise(space: SearchSpace, costs: Mapping[str, CostFunction], counted: bool) -> dict[str, float]:
    """Choose the cost to minimise under score limits alone, with the dense model's as its limit: FLOPs if they differ.

    They do not where elements are set to zero, nor in a model without multiplications.
    """
    ends = np.concatenate([_dense(space), space.canonical(space.sizes[None] - 1)])
    for name in ("flops", "nonzero_params") if counted else ("nonzero_params",):
        dense, least = costs[name](ends)
        if least < dense:
            return {name: float(dense)}
    raise BudgetError("budget must limit a cost, because no option of the space changes flops or nonzero_params")


def _subsets(model: nn.Module, data: Any, example_inputs: Any, metric: Any, seed: int) -> Subsets:
    if data is not None:
        return materialise(data, seed)
    if not (isinstance(metric, str) and metric in ("auto", "agreement")):
        raise DataError(
            f"metric {shown(metric)} needs data; pass data=, or metric='agreement' to compare with the model"
        )
    (args, kwargs), *_ = examples_of(model, example_inputs)
    if not args and not kwargs:
        raise DataError(f"example_inputs must hold at least one input, got {shown(example_inputs)}")
    if not any(tensor.ndim for tensor in batches.tensors((args, kwargs))):
        raise DataError(f"example_inputs must hold a tensor with a dimension for samples, got {shown(example_inputs)}")
    return synthetic(kwargs or (args if len(args) > 1 else args[0]), SYNTHETIC_SAMPLES, seed)


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
                f"{said(error)}; give others, or forward="
            ) from error

    return run


def _branches(model: nn.Module, example_inputs: Any) -> list[batches.Batch]:
    """Batches of a list of examples, which take branches that the data may not."""
    if not isinstance(example_inputs, list):
        return []
    return [kwargs or (*args, None) for args, kwargs in examples_of(model, example_inputs)]


def _like(model: nn.Module, example_inputs: Any, batch: batches.Batch) -> batches.Batch:
    """Example inputs in the form of a batch of the data, without a target."""
    ((args, kwargs),) = examples_of(model, example_inputs)
    return (*args, None) if args and isinstance(batch, list | tuple) else batches.of_call(args, kwargs)


def _same_sizes(one: batches.Batch, other: batches.Batch) -> bool:
    """Return whether the inputs in two batches differ at most in the number of samples."""
    sizes = [
        [(tensor.shape[1:], tensor.dtype) for tensor in batches.tensors(batches.inputs(batch))]
        for batch in (one, other)
    ]
    return sizes[0] == sizes[1]


def _dense(space: SearchSpace) -> IntArray:
    return np.zeros((1, len(space.sizes)), dtype=np.int64)


def _problem(
    structure: Structure,
    space: SearchSpace,
    costs: Mapping[str, CostFunction],
    limits: Mapping[str, float],
    start: Sequence[Start],
    minimise: bool,
) -> Problem:
    """Lay out the problem; the budget range is the whole reachable one if the cost is minimised."""
    names = tuple(limits)
    problem = Problem(
        sizes=space.sizes,
        cost_names=names,
        limits=np.array([limits[name] for name in names]),
        cost_function=LimitedCosts(costs, names, _changes(structure, space, names)),
        ordered=np.array([dimension.ordered for dimension in space.dimensions]),
        canonical=space.canonical,
    )
    fractions = (0.8, 0.6, 0.4, 0.2) if minimise else (1.0, 0.75, 0.5)
    if minimise:
        least = (1 + _ROUNDING) * problem.costs(problem.cheapest[None])[0]
        problem = replace(problem, budget_range=np.stack([least, problem.budget_range[:, 1]], axis=1))
    given = [candidate for item in start for candidate in candidates_of(item, space)]
    unread = np.array([dimension.name in structure.unread for dimension in space.dimensions])
    uniform = uniform_seeds(problem, fractions, unread)
    return replace(
        problem, seeds=np.concatenate([np.array(given, dtype=np.int64).reshape(-1, len(space.sizes)), uniform])
    )


def _changes(structure: Structure, space: SearchSpace, names: tuple[str, ...]) -> Changes | None:
    """Make the fast update of limited costs by single changes; None where costs or space are of another kind."""
    if not (isinstance(space, ChoosesWidths) and set(names) <= set(Changes.SUMS)):
        return None
    changes = Changes(structure, names, *space.choices)
    return changes if changes.exact else None
