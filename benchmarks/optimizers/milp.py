"""The exact choice among coupled options: time to proven optimality, and what it gains over the knapsack.

Run ``python -m benchmarks.optimizers.milp`` from the root of the repository, about four minutes on one thread; exits
with 1 when a target is missed; ``--starts`` measures what `auto` makes of it alone, and keeps the rest. Times are
processor times of single calls.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune.costs import make_costs
from autoprune.data.batch import default_forward
from autoprune.importance.calibration import Calibration
from autoprune.importance.criteria import rank_units
from autoprune.optimizers import Auto, Problem
from autoprune.optimizers.knapsack.coupling import coupled_front
from autoprune.optimizers.knapsack.milp import Pair, choose_coupled
from autoprune.optimizers.knapsack.relinearise import front_of, spread_budgets
from autoprune.protocols import FloatArray, IntArray
from autoprune.search_spaces import Channels
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.testing.problems import KnownProblem, blocks_problem, product_problem
from benchmarks.optimizers.knapsack import criteria_table
from benchmarks.support.common import RESULTS, environment, table, write
from zoo.mobile import mobilenet_v2
from zoo.resnet import resnet

COMMAND = "python -m benchmarks.optimizers.milp"
LAYERS, OPTIONS = 60, 16
SEEDS = range(5)
SHARES = (0.75, 0.5, 0.25)
MOST_SECONDS = 5.0
PROVEN = 1e-6
BUDGETS = 5
FEW_TRIALS = 12
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"ResNet-56": lambda: resnet(56), "MobileNetV2": mobilenet_v2}


def stepwise_chain(seed: int) -> KnownProblem:
    """A chain of 30 layers of 8 widths, whose latency rises in steps of a layer's input and output width."""
    known = product_problem([8] * 30, seed)
    rng = np.random.default_rng([seed, 2])
    steps = [np.ceil(np.arange(8, 0, -1) * units / 64) for units in rng.integers(16, 256, 30)]
    tables = [np.outer(a, b) ** 0.9 for a, b in pairwise(steps)]

    def latency(candidates: IntArray) -> FloatArray:
        ms = [each[candidates[:, i], candidates[:, i + 1]] for i, each in enumerate(tables)]
        return np.sum(ms, axis=0)[:, None]

    half = 0.5 * latency(np.zeros((1, 30), dtype=np.int64))[0]
    return replace(known, problem=Problem(known.problem.sizes, ("latency_ms",), half, latency))


KNOWN: Mapping[str, Callable[[int], KnownProblem]] = {
    "chain of 30 x 8, latency in steps": stepwise_chain,
    "chain of 30 x 8, two limits": lambda seed: product_problem([8] * 30, seed),
    "12 blocks that may be dropped": lambda seed: blocks_problem(12, seed),
}


def chain(seed: int) -> tuple[list[FloatArray], list[Pair]]:
    """Losses of `LAYERS` layers by width, and latencies that depend, in steps, on the widths of two neighbours."""
    rng = np.random.default_rng(seed)
    width = np.linspace(1, 1 / OPTIONS, OPTIONS)
    losses = [rng.lognormal() * (1 - width) ** rng.uniform(1, 3) for _ in range(LAYERS)]
    steps = [np.ceil(width * units / 8) for units in rng.integers(16, 512, LAYERS)]
    noise = [1 + 0.05 * rng.random((OPTIONS, OPTIONS)) for _ in range(LAYERS - 1)]
    pairs = [Pair(i, i + 1, (np.outer(steps[i], steps[i + 1]) ** 0.9 * noise[i])[..., None]) for i in range(LAYERS - 1)]
    return losses, pairs


def time_chain(seed: int, share: float) -> dict[str, float]:
    """Time the exact choice under one limit on latency."""
    losses, pairs = chain(seed)
    limit = share * sum(float(pair.costs[0, 0, 0]) for pair in pairs)
    start = time.process_time()
    choice = choose_coupled(losses, [np.zeros(OPTIONS)] * LAYERS, limit, pairs)
    seconds = time.process_time() - start
    assert choice is not None
    return {"seed": seed, "share": share, "seconds": seconds, "loss": choice.loss, "gap": choice.gap}


def start_auto(seed: int) -> dict[str, float]:
    """Let `auto` begin with the exact front, or with the knapsack's, where it is told each layer's loss beforehand."""
    losses, pairs = chain(seed)

    def latency(candidates: IntArray) -> FloatArray:
        ms = [pair.costs[candidates[:, pair.first], candidates[:, pair.second], 0] for pair in pairs]
        return np.sum(ms, axis=0)[:, None]

    half = 0.5 * latency(np.zeros((1, LAYERS), dtype=np.int64))[0]
    sizes = np.full(LAYERS, OPTIONS)
    problem = Problem(sizes, ("latency_ms",), half, latency, trials=FEW_TRIALS, prior=tuple(losses))
    known = KnownProblem(problem, tuple(losses))
    found = {"seed": float(seed)}
    for solver in ("dynamic", "milp"):
        start = time.process_time()
        candidates = Auto(problem, seed, solver=solver).ask(FEW_TRIALS)
        found[f"{solver} seconds"] = time.process_time() - start
        within = [candidates[problem.feasible(candidates, budget)] for budget in spread_budgets(problem, BUDGETS)]
        found[solver] = float(np.mean([known.loss(each).min() for each in within]))
    return found


def compare(problem: Problem, losses: list[FloatArray]) -> dict[str, float]:
    """Losses of the exact front as shares of the knapsack's, over budgets of the whole budget range."""

    def loss(front: IntArray) -> FloatArray:
        return np.sum([row[front[:, j]] for j, row in enumerate(losses)], axis=0)

    budgets = spread_budgets(problem, BUDGETS)
    start = time.process_time()
    knapsack = front_of(problem, losses, budgets)
    between = time.process_time()
    exact = coupled_front(problem, losses, budgets)
    seconds = time.process_time() - between
    share = loss(exact.candidates) / loss(knapsack)
    gaps = exact.gaps[np.isfinite(exact.gaps)]
    return {
        "dims": len(problem.sizes),
        "mean": float(share.mean()),
        "least": float(share.min()),
        "most": float(share.max()),
        "proven": int((gaps <= PROVEN).sum()),
        "gap": float(gaps.max(initial=0.0)),
        "seconds": seconds / BUDGETS,
        "knapsack_seconds": (between - start) / BUDGETS,
    }


def network_problem(make: Callable[[], nn.Module], names: tuple[str, ...]) -> tuple[Problem, list[FloatArray]]:
    """Channels in steps of an eighth, ranked and weighed by squared weights, at 60 % of each cost."""
    model = make().eval()
    structure = analyse(Example(model, (torch.zeros(2, 3, 32, 32),)))
    order = rank_units(Calibration(model, structure, (), default_forward), "l2")
    space = Channels(step=0.125).bind(structure, order)
    costs = make_costs(structure, space)

    def limited(candidates: IntArray) -> FloatArray:
        return np.column_stack([costs[name](candidates) for name in names])

    dense = limited(np.zeros((1, len(space.sizes)), dtype=np.int64))[0]
    return Problem(space.sizes, names, 0.6 * dense, limited), criteria_table(model, structure, space)


def measured() -> dict[str, Any]:
    """Measure all; with ``--starts`` what `auto` makes of the exact front alone, and read the rest."""
    if "--starts" in sys.argv:
        earlier = json.loads((RESULTS / "milp.json").read_text())
        return {"chains": earlier["chains"], "fronts": earlier["fronts"], "starts": [start_auto(s) for s in SEEDS]}
    fronts = {}
    for name, make in KNOWN.items():
        known = make(0)
        fronts[name] = compare(known.problem, list(known.losses))
    for name, network in NETWORKS.items():
        for names in (("flops",), ("flops", "params")):
            fronts[f"{name}, {' and '.join(names)}"] = compare(*network_problem(network, names))
    chains = [time_chain(seed, share) for seed in SEEDS for share in SHARES]
    return {"chains": chains, "fronts": fronts, "starts": [start_auto(seed) for seed in SEEDS]}


def main() -> int:
    """Measure, write the report, and say whether all targets are met."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the networks have random weights
    where = environment(COMMAND)
    found = measured()
    chains, starts, fronts = (found[name] for name in ("chains", "starts", "fronts"))
    targets = {
        f"{LAYERS} x {OPTIONS} with pairs: proven optimal": all(row["gap"] <= PROVEN for row in chains),
        f"{LAYERS} x {OPTIONS} with pairs: below {MOST_SECONDS:.0f} s": max(r["seconds"] for r in chains)
        < MOST_SECONDS,
        "auto started from it is never worse": all(row["milp"] <= row["dynamic"] * (1 + PROVEN) for row in starts),
        "never below the knapsack": all(row["most"] <= 1 + PROVEN for row in fronts.values()),
    }
    results = {"environment": where, "targets": targets, **found}
    write("milp", "The exact choice among coupled options", results, report(chains, starts, fronts, targets))
    return 0 if all(targets.values()) else 1


def report(
    chains: list[dict[str, float]], starts: list[dict[str, float]], fronts: dict[str, Any], targets: dict[str, bool]
) -> str:
    """The tables, in Markdown."""
    by_share = {share: [row for row in chains if row["share"] == share] for share in SHARES}
    return "\n\n".join(
        (
            f"A chain of {LAYERS} layers with {OPTIONS} widths each and one limit on latency, which depends on the "
            f"input and the output width of every layer; {len(SEEDS)} seeds. Seconds until the choice is proven to be "
            "the best.",
            table(
                ("latency allowed", "mean s", "most s", "largest gap"),
                [
                    (
                        f"{share:.0%}",
                        f"{np.mean([row['seconds'] for row in rows]):.2f}",
                        f"{max(row['seconds'] for row in rows):.2f}",
                        f"{max(row['gap'] for row in rows):.1e}",
                    )
                    for share, rows in by_share.items()
                ],
            ),
            f"The same chain as a problem of `auto`, which is told each layer's loss as its prior and asked for "
            f"{FEW_TRIALS} candidates: mean loss of the best within each of {BUDGETS} budgets, and seconds of `auto`, "
            'by default and started from the exact front (`partial(Auto, solver="milp")`).',
            table(
                ("seed", "loss by default", "loss from the exact front", "ratio", "s by default", "s"),
                [
                    (
                        int(row["seed"]),
                        f"{row['dynamic']:.4f}",
                        f"{row['milp']:.4f}",
                        f"{row['milp'] / row['dynamic']:.4f}",
                        f"{row['dynamic seconds']:.2f}",
                        f"{row['milp seconds']:.2f}",
                    )
                    for row in starts
                ],
            ),
            f"Fronts of {BUDGETS} budgets, from half of the limit to the limit, under true costs: the sum of losses as "
            "a share of the knapsack's. Costs with three widths in one product are linearised around the candidate "
            "found, so a proof holds for costs of pairs.",
            table(
                (
                    "problem",
                    "dimensions",
                    "mean",
                    "least",
                    "most",
                    "proven",
                    "largest gap",
                    "s a budget",
                    "knapsack's s",
                ),
                [
                    (
                        name,
                        row["dims"],
                        *(f"{row[key]:.4f}" for key in ("mean", "least", "most")),
                        f"{row['proven']} of {BUDGETS}",
                        f"{row['gap']:.2%}",
                        f"{row['seconds']:.2f}",
                        f"{row['knapsack_seconds']:.3f}",
                    )
                    for name, row in fronts.items()
                ],
            ),
            table(("target", "met"), [(name, "yes" if met else "NO") for name, met in targets.items()]),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
