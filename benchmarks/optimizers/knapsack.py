"""Time and memory of the knapsack: whole fronts of additive tables, and a front of ResNet-56 under true FLOPs.

Run ``python -m benchmarks.optimizers.knapsack`` from the root of the repository, about a minute on one thread; exits
with 1 when a target is missed. Times are processor times, the best of several, measured in one run.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune.costs import make_costs
from autoprune.data.batch import default_forward
from autoprune.importance.calibration import Calibration
from autoprune.importance.criteria import rank_units
from autoprune.optimizers import Problem
from autoprune.optimizers.knapsack.multiple_choice import choose_options
from autoprune.optimizers.knapsack.relinearise import front_of
from autoprune.protocols import FloatArray, IntArray
from autoprune.search_spaces import Channels
from autoprune.search_spaces.channels import ChannelSpace
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from benchmarks.support.common import environment, table, write
from zoo.concat import densenet
from zoo.mobile import mobilenet_v2
from zoo.resnet import resnet

COMMAND = "python -m benchmarks.optimizers.knapsack"
ROUNDS = 5
BINS = 10_000
SIZES = ((60, 32, BINS), (120, 32, BINS), (60, 32, 2 * BINS), (1000, 16, BINS), (2000, 16, BINS), (1000, 16, 2 * BINS))
MOST_SECONDS = {(60, 32, BINS): 1.0, (1000, 16, BINS): 20.0}
MOST_GROWTH, MOST_GB, MOST_FRONT_SECONDS = 2.3, 2.0, 2.0
BUDGETS = 40
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "ResNet-56": lambda: resnet(56),
    "MobileNetV2": mobilenet_v2,
    "DenseNet-BC, 3 x 6 layers": lambda: densenet(growth=12, blocks=(6, 6, 6)),
}


def best_seconds(call: Callable[[], object]) -> float:
    """Processor seconds of the fastest of several calls."""
    spent = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return min(spent)


def time_table(dims: int, options: int, bins: int) -> dict[str, float]:
    """The optimum for every budget on the grid; losses and costs that no option dominates, so that all count."""
    rng = np.random.default_rng(0)
    losses = [np.sort(rng.random(options)) for _ in range(dims)]
    costs = [np.sort(rng.random(options))[::-1] for _ in range(dims)]
    least = sum(float(row[-1]) for row in costs) * (1 + 1e-12)
    budgets = np.linspace(least, sum(float(row[0]) for row in costs), bins + 1)

    def solve() -> IntArray:
        return choose_options(losses, costs, budgets, bins=bins)

    seconds = best_seconds(solve)
    minimax = best_seconds(lambda: choose_options(losses, costs, budgets, "minimax"))
    tracemalloc.start()
    solve()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"dims": dims, "options": options, "bins": bins, "seconds": seconds, "minimax": minimax, "gb": peak / 1e9}


def criteria_table(model: nn.Module, structure: Structure, space: ChannelSpace) -> list[FloatArray]:
    """Share of each group's squared weights that goes with the units removed: no evaluation, no data."""
    parameters = {name: p.detach().square() for name, p in model.named_parameters()}
    by_name = {dimension.name: dimension for dimension in space.dimensions}
    tables = []
    for group in structure.groups:
        if group.name in by_name:
            energy = np.zeros(group.size)
            for slot in group.slots:
                if slot.tensor in parameters:
                    rows = parameters[slot.tensor].movedim(slot.dim, 0)
                    each = rows.reshape(len(rows), -1).sum(1).numpy()
                    energy += each[slot.indices].reshape(group.size, -1).sum(axis=1)
            lost = np.concatenate([[0.0], np.cumsum(np.sort(energy))]) / energy.sum()
            tables.append(lost[group.size - np.array(by_name[group.name].options)])
    return tables


def time_front(make: Callable[[], nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
    """Seconds from the structure to a front of 40 budgets, 90 to 30 % of the dense cost: ranking, space, table, all."""
    model = make().eval()
    structure = analyse(Example(model, (torch.zeros(2, 3, 32, 32),)))

    def solve() -> tuple[Problem, FloatArray, IntArray]:
        order = rank_units(Calibration(model, structure, (), default_forward), "l2")
        space = Channels().bind(structure, order)
        costs = make_costs(structure, space)

        def limited(candidates: IntArray) -> FloatArray:
            return np.column_stack([costs[name](candidates) for name in names])

        dense = limited(np.zeros((1, len(space.sizes)), dtype=np.int64))[0]
        problem = Problem(space.sizes, names, 0.9 * dense, limited, canonical=space.canonical)
        budgets = np.linspace(0.9, 0.3, BUDGETS)[:, None] * dense
        return problem, budgets, front_of(problem, criteria_table(model, structure, space), budgets)

    problem, budgets, front = solve()
    used = problem.costs(front) / budgets
    return {
        "limits": " and ".join(names),
        "dims": len(problem.sizes),
        "seconds": best_seconds(solve),
        "within": bool((used <= 1).all()),
        "used": float(used.max(axis=1).mean()),
    }


def main() -> int:
    """Measure, write the report, and say whether all targets are met."""
    torch.set_num_threads(1)
    where = environment(COMMAND)
    tables = {size: time_table(*size) for size in SIZES}
    growth = {
        f"{a[0]} x {a[1]}, {what} double": tables[b]["seconds"] / tables[a]["seconds"]
        for a, b, what in (
            (SIZES[0], SIZES[1], "dimensions"),
            (SIZES[0], SIZES[2], "bins"),
            (SIZES[3], SIZES[4], "dimensions"),
            (SIZES[3], SIZES[5], "bins"),
        )
    }
    limits = (("flops",), ("flops", "params"))
    fronts = {f"{name}, {' and '.join(n)}": time_front(make, n) for name, make in NETWORKS.items() for n in limits}
    targets = {
        **{f"{d} x {k}, {bins} bins: below {most:.0f} s": tables[d, k, bins]["seconds"] < most
           for (d, k, bins), most in MOST_SECONDS.items()},
        f"1000 x 16: below {MOST_GB:.0f} GB": tables[1000, 16, BINS]["gb"] < MOST_GB,
        f"twice the dimensions or bins: at most {MOST_GROWTH} times the time": max(growth.values()) <= MOST_GROWTH,
        f"ResNet-56, FLOPs, {BUDGETS} budgets: below {MOST_FRONT_SECONDS:.0f} s after the trace":
            fronts["ResNet-56, flops"]["seconds"] < MOST_FRONT_SECONDS,
        "no budget exceeded": all(row["within"] for row in fronts.values()),
    }  # fmt: skip
    results = {
        "environment": where,
        "targets": targets,
        "tables": list(tables.values()),
        "growth": growth,
        "fronts": fronts,
    }
    write("knapsack", "The knapsack: time and memory", results, report(list(tables.values()), growth, fronts, targets))
    return 0 if all(targets.values()) else 1


def report(
    tables: list[dict[str, float]], growth: dict[str, float], fronts: dict[str, Any], targets: dict[str, bool]
) -> str:
    """The tables, in Markdown."""
    sizes = ("dims", "options", "bins")
    return "\n\n".join(
        (
            "Whole fronts of additive tables: the optimum for every budget on the grid of bins. Memory includes the "
            "answers, one row of 8-byte integers for each budget.",
            table(
                ("dimensions", "options", "bins", "least sum (s)", "least maximum (s)", "most memory (GB)"),
                [
                    (*(row[s] for s in sizes), *(f"{row[s]:.3f}" for s in ("seconds", "minimax")), f"{row['gb']:.3f}")
                    for row in tables
                ],
            ),
            table(("growth of the least sum", "times"), [(name, f"{ratio:.2f}") for name, ratio in growth.items()]),
            f"Fronts of {BUDGETS} budgets under true costs, 90 to 30 % of the dense ones, from a table of squared "
            "weights: everything after the trace, from ranking the units on.",
            table(
                ("network, limits", "dimensions", "seconds", "mean use of the tightest limit"),
                [(name, row["dims"], f"{row['seconds']:.2f}", f"{row['used']:.2%}") for name, row in fronts.items()],
            ),
            table(("target", "met"), [(name, "yes" if met else "NO") for name, met in targets.items()]),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
