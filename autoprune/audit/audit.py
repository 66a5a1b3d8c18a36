"""Train some of the candidates of a search to see how far its cheap scores can be trusted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from autoprune.arguments import MOST_SEED, said, shown, whole_number, why_no_function
from autoprune.audit.controls import Initialise, uniform_widths, with_new_weights, with_random_units
from autoprune.audit.training import Training, builder_of, trained, training_by
from autoprune.audit.training_log import Key, Record, Trainings, audit_identity
from autoprune.errors import InfeasibleBudgetError
from autoprune.evaluators import EVALUATORS, Evaluator, EvaluatorName, Orders, make_evaluator
from autoprune.evaluators.scoring.scorer import Measuring
from autoprune.execution import Outcome, evaluate_one
from autoprune.protocols import OK, FloatArray, IntArray
from autoprune.result import SearchResult
from autoprune.result.audit_report import FOUND, NEW_WEIGHTS, RANDOM_UNITS, UNIFORM, Audit, Trained, Variant
from autoprune.result.builders import FromEvaluator
from autoprune.result.choosing import rank_of
from autoprune.result.ranking import BAND, FEWEST
from autoprune.result.trials import Trial

log = logging.getLogger(__name__)

MOST_REPEATS = 1_000


def audit(
    result: SearchResult,
    train_fn: Callable[..., object],
    k: int = 16,
    *,
    steps: int | None = None,
    evaluators: Sequence[EvaluatorName | Evaluator] = (),
    repeats: int = 3,
    initialise: Initialise | None = None,
    seed: int = 0,
    run_dir: str | Path | None = None,
) -> SearchResult:
    """Train some candidates of a search by your own recipe, and compare the trained scores with the cheap ones.

    It trains `k` candidates: the best one, a third from the front, a third that cost nearly the same as the best, and
    others spread over cost and score. Each is scored on the held-out samples of the search, which chose none of them.
    Then it trains control networks of the best one in the same way: with new weights, with random units, and with
    uniform widths at equal cost. They measure the value of its widths, its units and its weights.

    Args:
        result: What `autoprune.search` returned. After a restart, get it by searching with ``resume=True``.
        train_fn: ``train_fn(model)``, or ``train_fn(model, steps)`` if `steps` is given, trains a model in place by the
            recipe that its users will train it with. A `Recovery` gets another seed for every training, and learns no
            inner features, which control networks with new weights or random units do not share. Other functions should
            draw from the global random state of PyTorch, NumPy or Python, which is seeded for every training. What it
            raises costs one candidate.
        k: Candidates to train, at least 4; all there are if the search has fewer.
        steps: The budget that `train_fn` gets.
        evaluators: Names or instances of further evaluators, whose scores of the same candidates are compared too.
        repeats: Trainings of the best one and of each control network, with other seeds; 0 omits the control networks.
        initialise: ``initialise(model)`` gives a pruned model new weights in place. By default ``reset_parameters`` of
            every module; without it in one of the modules, new weights are left out.
        seed: Of trainings and of the units drawn.
        run_dir: Folder for finished trainings, in ``audit.jsonl``; with the same search and settings, an interrupted
            audit continues there. It may be the `run_dir` of the search.

    Returns:
        The result with the report in ``result.audit``, which `SearchResult.save` keeps. Ctrl-C gives a report on the
        trainings so far.

    Raises:
        FileFormatError: If `result` was loaded from disk, because the model and the samples are needed.
        ValueError: If an argument is out of range or an unknown name, there are fewer than 4 candidates, or `run_dir`
            holds an audit of something else.

    Reference:
        Liu et al., "Rethinking the Value of Network Pruning", ICLR 2019, arXiv:1810.05270, for the comparison with new
        weights at equal training; theirs also scales the training by the FLOPs saved.

    Example:
        >>> result = autoprune.audit(result, train_fn, k=16)  # doctest: +SKIP
        >>> print(result.audit)  # doctest: +SKIP
    """
    if not isinstance(result, SearchResult):
        raise TypeError(f"result must be what autoprune.search returned, got {shown(result)}")
    training = training_by(train_fn, steps is not None)
    builder = builder_of(result, "audit")
    k = whole_number("k", k, FEWEST)
    repeats = whole_number("repeats", repeats, 0, MOST_REPEATS)
    seed = whole_number("seed", seed, 0, MOST_SEED)
    if steps is not None:
        steps = whole_number("steps", steps, 1, why=", or None")
    if initialise is not None and (why := why_no_function(initialise, 1)):
        raise TypeError(f"initialise must be a function initialise(model), or None, {why}")
    if isinstance(evaluators, str) or not isinstance(evaluators, Sequence):
        raise TypeError(f"evaluators must be a list of names or evaluators, got {shown(evaluators)}")
    named = _named(builder.evaluator, evaluators)
    chosen = spread(result, k)
    identity = audit_identity(builder.context, type(builder.evaluator).__name__, steps, seed)
    with Trainings.open(run_dir, identity) as trainings:
        work = _Work(builder, training, () if steps is None else (steps,), seed, trainings)
        try:
            _run(work, result, chosen, named, repeats, initialise)
        except KeyboardInterrupt:
            log.warning("interrupted; reporting on what was trained so far")
            work.notes.append("interrupted before everything was trained")
        return replace(result, audit=_report(work, result, chosen, tuple(named), steps, repeats))


def spread(result: SearchResult, k: int) -> list[Trial]:
    """Candidates to train, by cost: the best, some of the front, some of equal cost, some far from all of these.

    Raises:
        ValueError: If there are fewer than 4 candidates.
    """
    done = {t.candidate: t for t in reversed(result.trials) if t.status == OK and t.feasible and any(t.candidate)}
    pool = sorted(done.values(), key=lambda trial: trial.id)
    if len(pool) < FEWEST:
        raise ValueError(f"audit needs at least {FEWEST} pruned candidates that were scored, got {len(pool)}")
    cost = np.array([trial.costs[next(iter(result.limits))] for trial in pool])
    points = np.stack([_ranks(cost), _ranks(np.array([trial.score for trial in pool]))], axis=1)
    ids = [trial.id for trial in pool]
    best = ids.index(_best(result, pool).id)
    front = [i for i, trial in enumerate(pool) if done[trial.candidate] in result.front]
    near = [i for i in range(len(pool)) if abs(cost[i] - cost[best]) <= BAND * max(cost[i], cost[best])]
    picked = [best]
    for some, upto in ((front, 1 + k // 3), (near, 1 + 2 * (k // 3)), (range(len(pool)), k)):
        _pick_far(points, picked, some, upto)
    return sorted((pool[i] for i in picked), key=lambda trial: (trial.costs[next(iter(result.limits))], trial.id))


def _best(result: SearchResult, pool: Sequence[Trial]) -> Trial:
    """The best trial, or the nearest to it where none meets the limits or the best is the dense model."""
    try:
        best = result.best()
    except InfeasibleBudgetError:
        best = result.dense
    found = [trial for trial in pool if trial.candidate == best.candidate]
    return found[0] if found else min(pool, key=partial(rank_of, result))


def _ranks(values: FloatArray) -> FloatArray:
    """Ranks from 0 to 1; equal values share one."""
    places: FloatArray = np.unique(values, return_inverse=True)[1] / max(len(np.unique(values)) - 1, 1)
    return places


def _pick_far(points: FloatArray, picked: list[int], some: Sequence[int], upto: int) -> None:
    """Add to `picked` from `some`, each time the one farthest from all picked, until there are `upto`."""
    left = [i for i in some if i not in picked]
    while left and len(picked) < upto:
        gaps = np.linalg.norm(points[left][:, None] - points[picked][None], axis=2).min(axis=1)
        picked.append(left.pop(int(gaps.argmax())))


def _named(own: Evaluator, others: Sequence[str | Evaluator]) -> dict[str, Evaluator | None]:
    """Evaluators by name, that of the search first; None for it, because its scores are known."""
    names = {kind: name for name, kind in EVALUATORS.items() if name != "auto"}
    named: dict[str, Evaluator | None] = {names.get(type(own), type(own).__name__): None}
    for other in others:
        evaluator = make_evaluator(other)
        base = name = names.get(type(evaluator), type(evaluator).__name__)
        if isinstance(other, str) and name in named:
            continue
        for i in range(2, 2 + len(others)):
            name = name if name not in named else f"{base} {i}"
        named[name] = evaluator
    return named


@dataclass
class _Work:
    """Common state of the trainings of an audit."""

    builder: FromEvaluator
    training: Training
    steps: tuple[int, ...]
    seed: int
    trainings: Trainings

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.found: dict[Key, Record] = {}
        self.kinds: dict[str, tuple[IntArray, Callable[[int], nn.Module]]] = {}
        context = self.builder.context
        dense = self.builder.evaluator.build(np.zeros(len(context.space.sizes), dtype=np.int64))
        self._measure = Measuring(context, dense.eval())

    def train(self, kind: str, candidate: IntArray, repeat: int, make: Callable[[], nn.Module]) -> None:
        """Make a module, train it and score it on the held-out samples, unless it is in the log already."""
        context = self.builder.context
        zeroed = context.structure.edit(context.space.pruning(candidate.tolist())).zeroed

        def made() -> nn.Module:
            return trained(make(), zeroed, lambda module: self.training(module, self.seed + repeat, *self.steps))

        key = (kind, *candidate.tolist(), repeat)
        if key not in self.found:
            self._keep(key, lambda: self._measure(made, "test"))

    def score(self, name: str, evaluator: Evaluator, candidates: IntArray) -> None:
        """Score candidates by another evaluator, which is prepared only if some scores are missing in the log."""
        keys = [(name, *candidate) for candidate in candidates.tolist()]
        try:
            if not all(key in self.trainings for key in keys):
                evaluator = copy.deepcopy(evaluator)
                evaluator.prepare(self.builder.context)
        except Exception as error:  # costs this evaluator, not the audit
            self.notes.append(f"{name} was left out: {said(error)}")
            return
        for key, candidate in zip(keys, candidates, strict=True):
            self._keep(key, partial(evaluate_one, evaluator, candidate))
        if isinstance(evaluator, Orders):
            evaluator.release()

    def like(self, candidate: IntArray, limited: tuple[str, ...], initialise: Initialise | None) -> None:
        """Plan the trainings of the control networks of a candidate."""
        build = self.builder.evaluator.build
        builder = self.builder
        seed = self.seed
        zeroed = builder.context.space.pruning(candidate.tolist()).zeroed
        self.kinds[FOUND] = candidate, lambda repeat: build(candidate)
        uniform = uniform_widths(builder, {name: float(builder.costs[name](candidate[None])[0]) for name in limited})
        if np.array_equal(uniform, candidate):
            self.notes.append("the widths of the network found are uniform")
        else:
            self.kinds[UNIFORM] = uniform, lambda repeat: build(uniform)
        self.kinds[RANDOM_UNITS] = candidate, lambda repeat: with_random_units(builder, candidate, seed + repeat)

        def renewed(repeat: int) -> nn.Module:
            return with_new_weights(build(candidate), zeroed, initialise, seed + repeat)

        try:
            renewed(0)
        except ValueError as error:
            self.notes.append(f"new weights were left out: {error}; pass initialise=")
        else:
            self.kinds[NEW_WEIGHTS] = candidate, renewed

    def _keep(self, key: Key, measure: Callable[[], Outcome]) -> None:
        known = key in self.trainings
        record = self.found[key] = self.trainings.recall(key, measure)
        if not known:
            end = record.reason or f"{self.builder.context.judge.name} {record.score:.4f}"
            log.info("%s: %s (%.1f s)", " ".join(map(str, key)), end, record.seconds)


def _run(
    work: _Work,
    result: SearchResult,
    chosen: Sequence[Trial],
    named: Mapping[str, Evaluator | None],
    repeats: int,
    initialise: Initialise | None,
) -> None:
    """Score and train the candidates, then the control networks: one training of each kind before the next round."""
    for name, evaluator in named.items():
        if evaluator is not None:
            work.score(name, evaluator, np.array([trial.candidate for trial in chosen], dtype=np.int64))
    for trial in chosen:
        work.train(FOUND, np.array(trial.candidate, dtype=np.int64), 0, partial(result.build, trial))
    if not repeats:
        return
    candidate = np.array(_best(result, chosen).candidate, dtype=np.int64)
    work.like(candidate, tuple(result.limits), initialise)
    for repeat in range(repeats):
        for kind, (like, make) in work.kinds.items():
            work.train(kind, like, repeat, partial(make, repeat))


def _report(
    work: _Work, result: SearchResult, chosen: Sequence[Trial], named: Sequence[str], steps: int | None, repeats: int
) -> Audit:
    """Assemble the report from the trainings."""
    cost = next(iter(result.limits))

    def found(*key: str | int) -> Record:
        return work.found.get(key, Record(reason="not done"))

    rows = []
    for trial in chosen:
        after = found(FOUND, *trial.candidate, 0)
        before = {name: found(name, *trial.candidate) for name in named[1:]}
        scores = {named[0]: trial.score} | {name: record.score for name, record in before.items()}
        signals = {named[0]: trial.signal} | {name: record.signal for name, record in before.items()}
        rows.append(Trained(trial.id, trial.costs[cost], after.score, scores, signals, after.reason))
    variants = {}
    for kind, (like, _) in work.kinds.items():
        records = [found(kind, *like.tolist(), repeat) for repeat in range(repeats)]
        scores_of = tuple(record.score for record in records if not record.reason)
        variants[kind] = Variant(float(work.builder.costs[cost](like[None])[0]), scores_of)
    report = Audit(
        rows=tuple(rows),
        evaluators=tuple(named),
        metric=result.metric,
        higher_is_better=result.higher_is_better,
        samples=work.builder.context.subsets.samples["test"],
        cost=cost,
        steps=steps,
        winner=_best(result, chosen).id,
        variants=variants,
        seconds=sum(record.seconds for record in work.found.values()),
    )
    return replace(report, notes=(*work.notes, *_notes(report, work.found, work.builder.context.subsets.synthetic)))


def _notes(report: Audit, found: Mapping[Key, Record], synthetic: bool) -> list[str]:
    notes = []
    reasons = [record.reason for record in found.values() if record.reason]
    if reasons:
        notes.append(f"{len(reasons)} of {len(found)} trainings and scores failed; the first: {reasons[0]}")
    if report.noise == 0:
        notes.append("repeated trainings gave equal scores: draw from the global random state in train_fn to see luck")
    if synthetic:
        notes.append("scores before and after training are of random inputs: search with data to audit what matters")
    return notes
