"""Search how much of each layer to remove: validate, set up, loop, verify, return the front."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from autoprune.arguments import pointing, shown
from autoprune.budget import Budget
from autoprune.costs import GivenCost, Latency
from autoprune.early_stopping.racing import Racing
from autoprune.early_stopping.successive_halving import Rungs
from autoprune.evaluators import Evaluator, EvaluatorName
from autoprune.execution import Execution, Executor, ExecutorName, execution_of
from autoprune.journal.sqlite_file import require_free
from autoprune.metrics.metric import Metric, MetricName
from autoprune.optimizers import OptimizerName, Problem, find_optimizer
from autoprune.protocols import Optimizer
from autoprune.result import SearchResult
from autoprune.result.outline import OUTLINE
from autoprune.result.trials import note_of_probes
from autoprune.search_spaces import Settings
from autoprune.structure.call import CallOrInputs, call_of
from autoprune.study.calls import Calls, callbacks_of, open_storage
from autoprune.study.constant_output import note_of_no_better
from autoprune.study.convergence import Deadline
from autoprune.study.fingerprint import identity_of
from autoprune.study.loop import Loop
from autoprune.study.mapped_weights import settle
from autoprune.study.outline import outline_of, timed
from autoprune.study.plan import line_of
from autoprune.study.progress import Progress
from autoprune.study.request import PLACES, Request
from autoprune.study.resume import open_journal
from autoprune.study.rivals import Rivals, note_of_racing
from autoprune.study.setup import set_up
from autoprune.study.start import Beginning, Start, start_of
from autoprune.study.trials import dense_of, result_of
from autoprune.study.verification import verify

log = logging.getLogger(__name__)


@pointing(PLACES)
def search(
    model: nn.Module,
    budget: str | Budget | Sequence[str | Budget],
    data: Any = None,
    *,
    metric: MetricName | Metric | Callable[..., Any] = "auto",
    space: str | Settings = "channels",
    evaluator: EvaluatorName | Evaluator = "auto",
    optimizer: OptimizerName | Optimizer | Callable[[Problem, int], Optimizer] = "auto",
    trials: int | Literal["auto"] = 200,
    max_seconds: float | None = None,
    seed: int = 0,
    start: Start | Beginning | Sequence[Beginning] = (),
    example: CallOrInputs | None = None,
    costs: Mapping[str, GivenCost | Latency | str | Path] | None = None,
    early_stopping: bool | Racing | Rungs | Literal["auto"] = "auto",
    execution: ExecutorName | Executor | Execution = "local",
) -> SearchResult:
    """Search how much of each layer of a model to remove, and return the Pareto front of pruned models.

    Args:
        model: Any ``nn.Module``; it comes back unchanged: weights, mode, hooks, device.
        budget: Limits on costs, for example ``"flops <= 50%"`` (of the dense model), ``"params <= 1.2M"``,
            ``"latency <= 60%"``, ``"throughput >= 900/s"``, ``"nonzero_params <= 10%"``, a list, or a `Budget`. Every
            candidate respects them, under the exact or measured cost. ``"45% <= flops <= 50%"`` spends all trials in
            that range; else the front reaches down to half of the limit. Or a limit on the score,
            ``"accuracy drop <= 1pp"`` or ``"accuracy >= 0.98"`` (``"loss <= 0.3"`` where lower is better): the search
            then minimises cost subject to that limit on the validation data, and a note says whether it also holds on
            held-out data. It minimises the first cost that the budget also limits, else ``flops``, or
            ``nonzero_params`` where the space does not change the FLOPs.
        data: `Data`, a DataLoader, or (X, y) arrays. Without data, seeded random inputs shaped like `example` stand
            in, and the score is agreement with the dense model on them.
        metric: ``"auto"`` (accuracy for class labels, else a loss that fits, the loss of the next token for language
            models, else agreement), another name, a loss module or function, or a `Metric`. By name also
            ``"next_token"`` (nats, padding left out), ``"miou"``, and against the dense outputs ``"cosine"`` and
            ``"relative_error"``, which need no labels. A loss keeps its reduction, class weights and ignored labels:
            the score is its value of the whole set. One without a ``reduction`` is called on single samples if their
            mean is its value of a batch, else on the whole set at once, and then bad candidates cannot be stopped
            early.
        space: ``"channels"``, ``"sparsity"``, ``"depth"``, ``"blocks"`` (all repeated blocks alike), ``"auto"`` (the
            widths that suit the model, with its depth; a note says which), or settings:
            ``Channels(round_to=8, ignore=["head*"], ...)``, ``Sparsity(levels=(0, 0.5, 0.9), ...)``,
            ``Product(Channels(), Depth())``.
        evaluator: ``"auto"`` is ``"compensated"`` (layers re-fitted by least squares, with biases and statistics);
            or ``"adaptive_bn"`` (statistics alone), ``"finetune"`` (a short training), ``"supernet"`` (one training of
            weights that all candidates share), or an `Evaluator`: those of ``autoprune.evaluators`` with settings, such
            as ``autoprune.evaluators.FineTune(steps=900)``, or one of your own.
        optimizer: ``"auto"``, ``"knapsack"``, ``"milp"``, ``"level_switch"``, ``"nsga2"``, ``"bayes"`` or ``"random"``,
            an `Optimizer`, or a function of (problem, seed), such as ``autoprune.optimizers.NSGA2``.
        trials: Candidates to evaluate, probes included. ``"auto"`` stops when the latest quarter of them has gained
            next to nothing (see `autoprune.study.convergence.why_converged`), at 1,000 at the latest; a note gives the
            reason.
        max_seconds: Time limit, counted from the call: running evaluations are dropped, and remaining measurements,
            checks and scores on held-out data are skipped; notes say so. Scoring the dense model comes first, without
            a limit. So does the analysis of the model, and for a limit on latency a table of all operations and 6
            networks: if the time is over before (10 seconds at least for the analysis), that is an error, which says
            how far it came.
        seed: The same seed, data and threads give the same front.
        start: Candidates to begin from: option indices, ``{dimension: option}``, trials, or earlier results. Or a
            `Start` of these, which also chooses the expected loss of options that optimizers plan with.
        example: Inputs that the model is called with: a tensor, a tuple or a dict; needed only without data. With data
            they give the size that costs are stated at, such as the length of a sequence. A list of these covers
            branches of the forward that the data may not take. Or a `Call` of such inputs, which also says how to run
            the model (``forward``), which ``outputs`` matter, and how it is traced: ``checks``, ``rewrite``, and
            ``cost_batch``, the samples that latencies and memory are stated at.
        costs: Further costs by name, which the budget may limit: functions that give (n,) for n candidates, as
            ``autoprune.costs.Candidates`` with ``.widths`` by group and ``.indices``. ``"latency_ms"`` may be a table
            from `autoprune.profile` or its file instead, for budgets on ``latency_ms`` or ``throughput``; without it,
            latencies are measured here first. Candidates must meet the limit at the upper end of their predicted
            interval; the networks on the front are then measured against the dense one, if this is the machine of the
            table. For a device out of reach, pass a function.
        early_stopping: ``"auto"`` looks at candidates after a quarter and half of the validation samples, and drops
            those that are two standard errors worse than one that costs no more; probes are scored on a quarter. True
            or `Racing` drops those alone that are known to be dominated, at a stated confidence (see docs/racing.md).
            Their status is ``"raced"``; they are never on the front, and count as trials. `Rungs` stop the trainings of
            ``"finetune"`` early, and False scores each on all samples.
        execution: ``"local"``, ``"ray"``, an `Executor`, such as ``autoprune.execution.RayExecutor(workers=8)``, or an
            `Execution` of one of these, which also names the ``run_dir`` that a search is kept in and resumed from, and
            trackers: ``autoprune.Execution(run_dir="runs/a", resume=True)``.

    Returns:
        The front and all measurements; ``result.build()`` gives a plain pruned module. Ctrl-C returns the trials so
        far.

    Raises:
        BudgetError: If the budget cannot be read, names an unknown cost or another metric, or asks for more score than
            the dense model has.
        InfeasibleBudgetError: If no candidate can meet it; names the cheapest that can be reached.
        UnsupportedModelError: If the model is scripted, quantised, or on several devices.
        NothingToPruneError: If nothing can be removed; says why.
        DataError: If the data is empty, or lacks labels that the metric needs.
        OSError: If the ``run_dir`` cannot be written, or is in use by another search.
        TimeoutError: If `max_seconds` was over before the model was analysed, or before there was a table of latencies
            for a limit on them.
        ValueError: If another argument is out of range or an unknown name, or differs from the resumed search.

    Example:
        >>> result = autoprune.search(model, "flops <= 50%", (images, labels))  # doctest: +SKIP
        >>> small = result.build()  # doctest: +SKIP
    """
    began = time.monotonic()
    request = Request(
        model=model,
        budget=budget,
        data=data,
        metric=metric,
        space=space,
        evaluator=evaluator,
        optimizer=optimizer,
        trials=trials,
        max_seconds=max_seconds,
        seed=seed,
        start=start_of(start),
        example=call_of(example),
        costs=costs,
        early_stopping=early_stopping,
        execution=execution_of(execution),
    )
    run_dir = request.execution.run_dir
    if run_dir is not None:
        require_free(run_dir, bool(request.execution.resume))
    runner = request.execution.make_executor()
    storage = open_storage(request.execution)
    make_optimizer = find_optimizer(request.optimizer)  # an unknown name must fail before the model is traced
    study = set_up(request, Deadline(began, request.max_seconds))
    for note in study.notes:
        log.info("%s", note)
    proposer = make_optimizer(study.problem, request.seed)
    if not (callable(getattr(proposer, "ask", None)) and callable(getattr(proposer, "tell", None))):
        raise TypeError(f"optimizer must make an object with the methods ask and tell, got {shown(proposer)}")
    log.info("%s", line_of(study))
    setup = study.deadline.spent
    dense = dense_of(study)
    outline = outline_of(study)
    identity = {**identity_of(study, dense, proposer, runner), OUTLINE: outline.to_json()}
    with open_journal(study, identity) as journal:
        if study.choice is not None:
            study.choice.save(run_dir)
        bar = Progress(request.most, study.context.judge.name, request.execution.progress)
        calls = Calls(callbacks_of(study, storage), journal)
        ended = Loop(study, proposer, runner, journal, Rivals(study, journal), bar, calls).run()
    found, verified = verify(study, ended.trials)
    explained = (
        *study.deadline.note_of_setup(setup, len(found)),
        *verified,
        *note_of_no_better(study, found),
        *note_of_racing(study, found),
        *ended.notes,
    )
    for note in (*note_of_probes(found), *explained):
        log.info("%s", note)
    result = result_of(study, dense, found, ended.stopped, explained)
    result = replace(result, outline=timed(outline, study, dense, result.front))
    settle(study.context.model, study.evaluator)
    return calls.end(result)
