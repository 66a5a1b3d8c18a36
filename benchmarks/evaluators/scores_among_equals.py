"""Cheap scores among networks of equal cost: which of them orders these as a whole fine-tune does?

Run ``python -m benchmarks.evaluators.scores_among_equals`` from the root of the repository; it goes on where it
stopped, a candidate at a time, and begins none after ``--minutes``. On three tasks of `benchmarks.support.hard_tasks`
candidates are drawn at random within 3 % below 15 % of the FLOPs. Each is scored in every cheap way there is here, and
then fine-tuned twice on the labels, with different seeds: the mean of the two test scores is the truth, and how far the
two agree with each other is what a score can hope for. All directions were fixed before the runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.evaluators import AdaptiveBN, Evaluator, FineTune
from autoprune.protocols import Failure, FloatArray, IntArray, Measurement
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.hard_tasks import SMALL, TASKS, Task

COMMAND = "python -m benchmarks.evaluators.scores_among_equals"
STORED = RESULTS / "scores_among_equals.json"
SHARE, BAND, CANDIDATES, SEEDS = 0.15, 0.03, 16, (0, 1)
POOL, RESAMPLES = 20_000, 2000
RUNGS, STEPS, SHORT = (10, 20, 40, 80), 200, 40
"""Steps of a training of `STEPS` steps after which it is looked at; and those of one with a schedule of its own."""
FEWEST = 6
"""Candidates of a task that is reported."""
FEATURES = 1024
DEFAULT = "re-fitted loss (default)"
SCORES = (
    DEFAULT,
    "statistics alone",
    "gradients of masks",
    "Fisher information of masks",
    "last layer trained on cached features",
    "10 steps of a fine-tune",
    "40 steps of a fine-tune",
    "fine-tune of 40 steps",
    "extrapolated from 80 steps",
)
OTHERS, OWN = "combination learned on the other tasks", "combination learned on the other pairs"

Row = dict[str, Any]


def drawn(study: Study, n: int, rng: np.random.Generator) -> IntArray:
    """Candidates whose groups each lose a fraction drawn from U(0, most), in the band of costs; shape (n, d)."""
    sizes, flops = study.problem.sizes, study.costs["flops"]
    limit = study.limits["flops"]

    def draw(most: float) -> IntArray:
        some = (most * rng.random((POOL, len(sizes))) * sizes).astype(np.int64)
        cost = flops(some)
        return np.unique(some[(cost <= limit) & (cost > (1 - BAND) * limit)], axis=0)

    found: IntArray = max((draw(most) for most in np.arange(1, 11) / 10), key=len)
    if len(found) < n:
        raise RuntimeError(f"only {len(found)} candidates of {POOL} are within {BAND:.0%} of the budget")
    return rng.permutation(found)[:n]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)


def mask_gradients(module: nn.Module, batches: Any) -> tuple[float, float]:
    """Sum over the units after norms of the gradient of the loss to a mask of ones: its size, and its mean square.

    Reference:
        Lee et al., "SNIP", ICLR 2019, arXiv:1810.02340; Turner et al., "BlockSwap", ICLR 2020, arXiv:1906.04113.
    """
    seen: list[Tensor] = []

    def watch(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    hooks = [each.register_forward_hook(watch) for each in module.modules() if isinstance(each, _BatchNorm)]
    of_samples: list[list[Tensor]] = []
    for x, y in batches:
        seen.clear()
        with torch.enable_grad():
            loss = len(x) * loss_of(module.eval()(x), y)
            loss.backward()
        of_samples.append([(a.detach() * a.grad).flatten(2).sum(2) for a in seen if a.grad is not None])
    for hook in hooks:
        hook.remove()
    module.zero_grad()
    layers = [torch.cat(parts) for parts in zip(*of_samples, strict=True)]
    size = sum(layer.mean(0).abs().sum().item() for layer in layers)
    return size, sum(layer.square().mean(0).sum().item() for layer in layers)


def last_layer_loss(module: nn.Module, task: Task) -> float:
    """Validation loss once the last linear layer is fitted to its inputs, which are computed once."""
    last = [each for each in module.modules() if isinstance(each, nn.Linear)][-1]
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inputs = []
    with torch.no_grad():
        for x in (task.train[0][:FEATURES], task.validation[0]):
            seen.clear()
            for batch in x.split(128):
                module.eval()(batch)
            inputs.append(torch.cat(seen))
    hook.remove()
    (x, checked), y = inputs, task.train[1][:FEATURES]
    optimizer = torch.optim.LBFGS(last.parameters(), max_iter=30, line_search_fn="strong_wolfe")
    begun = last.weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = loss_of(last(x), y) + 1e-3 * (last.weight - begun).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return loss_of(last(checked), task.validation[1]).item()


def signal(outcomes: list[Measurement | Failure]) -> float:
    """Mean loss of a candidate on validation samples."""
    (outcome,) = outcomes
    assert not isinstance(outcome, Failure), outcome
    return float(outcome.signal.mean())


class Bench:
    """A task with its candidates, and everything that scores them."""

    def __init__(self, name: str) -> None:
        self.task = task = TASKS[name](0)
        budget = f"flops <= {SHARE:.0%}"
        self.study = study_for(task.model, budget, task.data, metric=task.metric)
        self.candidates = drawn(self.study, CANDIDATES, np.random.default_rng(0))
        self.statistics, self.short = AdaptiveBN(), FineTune(steps=SHORT, lr=task.lr)
        self.course = FineTune(steps=STEPS, lr=task.lr)
        others: tuple[Evaluator, ...] = (self.statistics, self.short, self.course)
        for evaluator in others:
            evaluator.prepare(self.study.context)

    def row(self, i: int) -> Row:
        """Cheap scores, higher is better, processor time of each, and test scores after fine-tuning."""
        candidate, seconds, scores = self.candidates[i], {}, {}
        build = partial(self.study.evaluator.build, candidate)

        def timed(name: str, work: Callable[..., Any], *given: Any) -> Any:
            began = time.process_time()
            found = work(*given)
            seconds[name] = time.process_time() - began
            return found

        own, statistics, masks, fisher, last, ten, forty, short, extrapolated = SCORES
        scores[own] = -signal(timed(own, self.study.evaluator.evaluate, candidate[None]))
        scores[statistics] = -signal(timed(statistics, self.statistics.evaluate, candidate[None]))
        calibration = self.study.context.subsets.calibration
        scores[masks], scores[fisher] = timed(masks, lambda: mask_gradients(build(), calibration))
        scores[last] = -timed(last, lambda: last_layer_loss(build(), self.task))
        losses = [signal([timed(f"to step {n}", self.course.on_the_way, candidate, n)]) for n in RUNGS]
        scores[ten], scores[forty] = -losses[0], -losses[2]
        slope, start = np.polyfit(np.log(RUNGS), losses, 1)
        scores[short] = -signal(timed(short, self.short.evaluate, candidate[None]))
        scores[extrapolated] = -float(start + slope * np.log(STEPS))
        trained = []
        for seed in SEEDS:
            small = build()
            timed(f"fine-tune {seed}", self.task.recipe(seed, distill="none"), small)
            trained.append(self.task.judge(small))
        return {"scores": scores, "rungs": losses, "trained": trained, "seconds": seconds}


def signs(values: FloatArray) -> FloatArray:
    """Signs of all differences, shape (n, n)."""
    found: FloatArray = np.sign(values[:, None] - values[None])
    return found


def tau(x: FloatArray, y: FloatArray, rows: IntArray) -> float:
    """Kendall's tau-b of some candidates from signs; one drawn twice ties with itself in both."""
    x, y = x[np.ix_(rows, rows)], y[np.ix_(rows, rows)]
    untied = float((x * x).sum() * (y * y).sum()) ** 0.5
    return float((x * y).sum()) / untied if untied else 0.0


def normal_ranks(rows: list[Row]) -> FloatArray:
    """Every score as ranks of mean 0 and standard deviation 1, shape (n, scores)."""
    values = np.array([[row["scores"][name] for name in SCORES] for row in rows])
    ranks = values.argsort(axis=0).argsort(axis=0).astype(float)
    scaled: FloatArray = (ranks - ranks.mean(axis=0)) / ranks.std(axis=0)
    return scaled


def pairs_of(x: FloatArray, y: FloatArray, without: tuple[int, ...] = ()) -> tuple[FloatArray, FloatArray]:
    """Differences of scores of all pairs both ways, and which one is better."""
    some = [(i, j) for i, j in combinations(range(len(y)), 2) if y[i] != y[j] and not {i, j} & set(without)]
    both = np.array([*some, *((j, i) for i, j in some)])
    return x[both[:, 0]] - x[both[:, 1]], (y[both[:, 0]] > y[both[:, 1]]).astype(float)


def learned(parts: list[tuple[FloatArray, FloatArray]]) -> FloatArray:
    """Weights of scores, by logistic regression on pairs."""
    x, y = (np.concatenate(each) for each in zip(*parts, strict=True))
    weights: FloatArray = LogisticRegression(C=0.1, fit_intercept=False, max_iter=500).fit(x, y).coef_[0]
    return weights


def opinions(benches: Mapping[str, list[Row]]) -> dict[str, dict[str, FloatArray]]:
    """Signs of the differences that every score sees, by task and score."""
    ranks = {task: normal_ranks(rows) for task, rows in benches.items()}
    truth = {task: np.array([np.mean(row["trained"]) for row in rows]) for task, rows in benches.items()}
    found: dict[str, dict[str, FloatArray]] = {}
    for task, rows in benches.items():
        x = ranks[task]
        seen = {name: signs(x[:, k]) for k, name in enumerate(SCORES)}
        if len(benches) > 1:
            weights = learned([pairs_of(ranks[other], truth[other]) for other in benches if other != task])
            seen[OTHERS] = signs(x @ weights)
        own = np.zeros((len(rows), len(rows)))
        for i, j in combinations(range(len(rows)), 2):
            own[i, j] = np.sign((x[i] - x[j]) @ learned([pairs_of(x, truth[task], (i, j))]))
            own[j, i] = -own[i, j]
        found[task] = {**seen, OWN: own}
    return found


def estimate(values: FloatArray) -> str:
    """The first value, with the 2.5 and 97.5 percentiles of the others."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:+.2f} [{low:+.2f}, {high:+.2f}]"


def report(benches: Mapping[str, list[Row]]) -> tuple[str, list[str]]:
    """The report, and the scores that are better than the default with an interval above 0."""
    rng = np.random.default_rng(0)
    draws = {
        task: [np.arange(len(rows)), *rng.integers(0, len(rows), (RESAMPLES, len(rows)))]
        for task, rows in benches.items()
    }
    seen = opinions(benches)
    for task, rows in benches.items():
        seen[task]["the other fine-tune"] = signs(np.array([row["trained"][1] for row in rows]))
    truth = {task: signs(np.array([np.mean(row["trained"]) for row in rows])) for task, rows in benches.items()}
    first = {task: signs(np.array([row["trained"][0] for row in rows])) for task, rows in benches.items()}
    names = list(next(iter(seen.values())))
    taus = {
        name: {
            task: np.array(
                [tau(seen[task][name], (first if "other fine" in name else truth)[task], d) for d in draws[task]]
            )
            for task in benches
        }
        for name in names
    }
    mean = {name: np.mean([taus[name][task] for task in benches], axis=0) for name in names}
    better = [n for n in names[:-1] if n != DEFAULT and np.percentile((mean[n] - mean[DEFAULT])[1:], 2.5) > 0]
    lines = [
        [
            name,
            *(estimate(taus[name][task]) for task in benches),
            estimate(mean[name]),
            "" if name in (DEFAULT, names[-1]) else estimate(mean[name] - mean[DEFAULT]),
        ]
        for name in names
    ]
    spread = [
        f"- {task}: {len(rows)} candidates, {100 * min(means):.1f} to {100 * max(means):.1f} % on test samples after "
        f"fine-tuning (median {100 * np.median(means):.1f})"
        for task, rows in benches.items()
        for means in [[float(np.mean(row["trained"])) for row in rows]]
    ]
    cost = [
        f"{name} {np.mean([row['seconds'][name] for rows in benches.values() for row in rows]):.2f}"
        for name in next(iter(benches.values()))[0]["seconds"]
    ]
    verdict = (
        f"Better than the default with an interval above 0: {', '.join(better)}."
        if better
        else "None is better than the default with an interval above 0."
    )
    return (
        "\n\n".join(
            [
                "Kendall's tau between a cheap score and the mean test score of two fine-tunes, among candidates drawn "
                f"at random that cost within {BAND:.0%} of each other ({SHARE:.0%} of the FLOPs), with 95 % bootstrap "
                "intervals over the candidates; of the mean over tasks, and of its difference to that of the default. "
                "The last row is tau between the two fine-tunes. Combinations are learned by logistic regression on "
                "the ranks of all scores: on the pairs of the other tasks, or of the same task but for the two "
                "candidates compared.",
                table(("score", *benches, "mean", "minus default"), lines),
                verdict,
                "\n".join(spread),
                f"Processor time of one candidate in seconds: {', '.join(cost)}.",
            ]
        ),
        better,
    )


def stored() -> dict[str, dict[str, Row]]:
    """Rows of earlier runs, by task and number of the candidate."""
    rows: dict[str, dict[str, Row]] = json.loads(STORED.read_text())["rows"] if STORED.exists() else {}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no candidate after this time")
    parser.add_argument("--tasks", nargs="+", default=[""], help="only those whose name contains one of these")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    where, began, bench = environment(COMMAND), time.monotonic(), cache(Bench)
    for i in range(CANDIDATES):
        for name in (each for each in SMALL if any(part in each for part in chosen.tasks)):
            rows = stored()
            if str(i) in rows.get(name, {}) or time.monotonic() - began > 60 * chosen.minutes:
                continue
            rows.setdefault(name, {})[str(i)] = bench(name).row(i)
            STORED.write_text(json.dumps({"environment": where, "rows": rows}, indent=1))
            print(name, i, json.dumps(rows[name][str(i)]), file=sys.stderr, flush=True)
    whole = stored()
    enough = {name: [whole[name][i] for i in sorted(whole[name], key=int)] for name in SMALL if name in whole}
    text, better = report({name: rows for name, rows in enough.items() if len(rows) >= FEWEST})
    results = {"environment": where, "better": better, "rows": whole}
    write("scores_among_equals", "Cheap scores among networks of equal cost", results, text)


if __name__ == "__main__":
    main()
