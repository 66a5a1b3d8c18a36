"""Reliability of cheap scores, and the worth of the widths, units and weights of a found network.

Run ``python -m benchmarks.evaluators.audit`` from the root of the repository, about 5 minutes of one core (``--quick``
tries everything out in one). Two networks are searched with the defaults, and `autoprune.audit` trains a spread of the
candidates: the demo's residual network on clean digits, where nearly everything ends near 99 %, and a ResNet-20 on hard
ones, where accuracies spread. Every evaluator that there is scores the same candidates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import autoprune
from autoprune.result.ranking import Estimate
from benchmarks.support import trained
from benchmarks.support.common import RESULTS, environment, table, write
from examples import quickstart

COMMAND = "python -m benchmarks.evaluators.audit"
EVALUATED = ("adaptive_bn", "finetune", "supernet")
K, TRIALS, REPEATS = 16, 200, 3
BUDGET = "flops <= 50%"

Case = tuple[nn.Module, dict[str, trained.Part], Callable[[nn.Module], None]]


def demo() -> Case:
    """The network and the fine-tune of examples/quickstart.py."""
    torch.manual_seed(0)
    data, model = quickstart.digits(), quickstart.ResNet()
    quickstart.train(model, data["train"], epochs=15, lr=0.01)
    return model, data, lambda small: quickstart.train(small, data["train"], epochs=4, lr=0.003, seed=drawn())


def hard() -> Case:
    """The network and the fine-tune of benchmarks/peers/comparison.py."""
    case = trained.trained("resnet20", seed=0)
    recipe = partial(trained.train, data=case.data["train"], epochs=3, lr=0.003)
    return case.model, case.data, lambda small: recipe(small, seed=drawn())


CASES = {"demo, clean digits": demo, "ResNet-20, hard digits": hard}


def drawn() -> int:
    """A seed for recipes with a generator of their own, from the global one, which the audit seeds."""
    return int(torch.randint(2**31, ()))


def run(case: Case, k: int, trials: int, repeats: int) -> autoprune.Audit:
    model, data, recipe = case
    samples = autoprune.Data(
        calibration=data["train"], validation=data["validation"], test=data["test"], test_samples=2000
    )
    result = autoprune.search(model, BUDGET, samples, trials=trials, execution=autoprune.Execution(progress=False))
    report = autoprune.audit(result, recipe, k, evaluators=EVALUATED, repeats=repeats).audit
    assert report is not None
    return report


def section(name: str, report: autoprune.Audit) -> str:
    rows = []
    for label, ranking in (*report.rankings.items(), (f"{report.cost} alone", report.cost_ranking)):
        regret = [f"{100 * ranking.regret[most].value:.1f}" for most in ranking.regret]
        rows.append([label, interval(ranking.tau), interval(ranking.tau_in_band), *regret])
    scores = table(["score", "tau", f"tau at equal cost ({ranking.pairs_in_band} pairs)", "behind, of 1", "of 3"], rows)
    variants = table(
        ["like the best network", "MACs", "accuracy", "trainings"],
        [
            [kind, f"{v.cost:,.0f}", f"{100 * v.mean:.1f} %", ", ".join(f"{100 * x:.1f}" for x in v.trained)]
            for kind, v in report.variants.items()
        ],
    )
    words = "\n\n".join(filter(None, [report.verdict(), report.comparison(), report.origin(), *report.notes]))
    accuracies = sorted(row.trained for row in report.rows)
    return (
        f"## {name}\n\n{len(report.rows)} of {TRIALS} trials trained; accuracy afterwards {100 * accuracies[0]:.1f} to "
        f"{100 * accuracies[-1]:.1f} % on {report.samples} held-out samples; {report.seconds:.0f} s.\n\n{scores}\n\n"
        f"{variants}\n\n{words}\n\n![scores before and after training](audit-{slug(name)}.png)"
    )


def interval(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def slug(name: str) -> str:
    return name.partition(",")[0].lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest setting; writes nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    where, began, reports = environment(COMMAND), time.process_time(), {}
    for name, make in CASES.items():
        reports[name] = run(make(), *((4, 12, 1) if quick else (K, TRIALS, REPEATS)))
        print(name, f"after {time.process_time() - began:.0f} s of processor time", reports[name], sep="\n", flush=True)
    if quick:
        return
    results: dict[str, Any] = {"environment": where, "cpu_seconds": time.process_time() - began}
    results["cases"] = {name: report.to_json() for name, report in reports.items()}
    for name, report in reports.items():
        report.plot(RESULTS / f"audit-{slug(name)}.png")
    intro = (
        f"Searches under {BUDGET} with the default evaluator; then {K} of the candidates, and {REPEATS} times each the "
        "best one and networks like it, get the same fine-tune. Kendall's tau between the accuracy before it on "
        "validation data and the accuracy after it on held-out data, with 95 % bootstrap intervals over the candidates "
        "(they say nothing about other networks or data); then how many points the first choice, or the best of the "
        "first 3, stays behind the best of all."
    )
    text = "\n\n".join([intro, *(section(name, report) for name, report in reports.items())])
    write("audit", "How far cheap scores can be trusted", results, text)


if __name__ == "__main__":
    main()
