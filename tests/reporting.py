"""Results made of numbers, for reports of any size, and what a page holds."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import torch

import autoprune
from autoprune.metrics.statistics import Evaluation
from autoprune.pareto import Direction
from autoprune.protocols import FAILED, RACED, Dimension
from autoprune.result import SearchResult, Trial
from autoprune.result.outline import Layer, LayerTimes, Outline, Stays
from autoprune.result.report.packing import unpacked
from autoprune.result.trials import find_front
from autoprune.search_spaces import Channels, Depth, Product, Sparsity
from autoprune.search_spaces.channels import ChannelSpace
from zoo import ZOO

UNITS = 16
HOSTILE = (
    "</script><script>document.title='broken'</script>",
    """quotes ' " ` and <!-- a comment""",
    "Größe 层 \u2028 \u202e 🙂",
    "=HYPERLINK(1)",
    "a" * 500,
)


def searched_in(run_dir):
    """The saved result of a short search over widths, depth and zeros of a residual network."""
    found = autoprune.search(
        ZOO["resnet20"].build(),
        "flops <= 80%",
        torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        trials=10,
        space=Product(Channels(step=0.25), Depth(), Sparsity(levels=(0.0, 0.5, 0.9))),
        evaluator="adaptive_bn",
        optimizer="random",
        execution=autoprune.Execution(run_dir=run_dir),
    )
    found.save(run_dir)
    return found


def made(trials=40, dimensions=6, names=(), seed=0, limits=("flops",), measured=False):
    """A result of random trials whose costs are sums over dimensions, the first dimensions with these names."""
    rng = np.random.default_rng(seed)
    named = [*names, *(f"layer.{j}" for j in range(len(names), dimensions))]
    options = tuple(range(UNITS, 0, -2))
    space = ChannelSpace(
        dimensions=tuple(Dimension(name, options) for name in named),
        groups=tuple((name, UNITS) for name in named),
        order={name: tuple(range(UNITS)) for name in named},
    )
    weight = rng.integers(1, 50, dimensions)
    chosen = rng.integers(0, len(options), (trials, dimensions))
    chosen[: min(dimensions, trials // 3)] *= np.eye(dimensions, dtype=np.int64)[: trials // 3]
    chosen = np.vstack([np.zeros((1, dimensions), dtype=np.int64), chosen])
    kept = UNITS - 2 * chosen
    costs = {"flops": kept @ weight, "params": kept.sum(1), "latency_ms": (kept @ weight) / 1e4 + 0.1}
    share = kept.mean(1) / UNITS
    score = np.round(np.clip(share**0.3 + rng.normal(0, 0.03, len(share)), 0, 1) * 400) / 400
    bound = {name: float(0.7 * costs[name][0]) for name in limits}
    found = []
    for i in range(len(chosen)):
        own = {name: float(values[i]) for name, values in costs.items()}
        found.append(
            Trial(
                id=i - 1,
                candidate=tuple(chosen[i].tolist()),
                decoded=space.decode(chosen[i]),
                costs=own,
                score=float(score[i]),
                interval=(float(score[i]) - 0.02, float(score[i]) + 0.02),
                signal=float(1 - share[i] + rng.normal(0, 0.01)),
                evaluations=(Evaluation(samples=400, signal=float(1 - share[i]), metric=float(score[i])),),
                feasible=all(own[name] <= limit for name, limit in bound.items()),
            )
        )
    dense, *rest = found
    if trials > 20:
        rest[-1] = replace(rest[-1], status=FAILED, reason=f"out of memory {HOSTILE[0]}", score=np.nan)
        rest[-2] = replace(rest[-2], status=RACED, evaluations=(Evaluation(samples=100, signal=1.0, part=True),))
    direction = Direction(True)
    front = find_front(rest, tuple(bound), direction)
    if measured:
        rest = [measured_trial(trial, rng) if trial in front else trial for trial in rest]
        front = find_front(rest, tuple(bound), direction)
    tested = {trial.id: replace(trial, test_score=trial.score - 0.01, test_interval=(0.1, 0.9)) for trial in front}
    return SearchResult(
        trials=tuple(tested.get(trial.id, trial) for trial in rest),
        front=tuple(tested.values()),
        dense=dense,
        space=space,
        limits=bound,
        budget=" and ".join(f"{name} <= 70%" for name in bound),
        metric="accuracy",
        higher_is_better=True,
        notes=("a note", *names),
        stopped="trials",
        seconds=12.0,
        seed=seed,
        outline=outline_for(space, times_of(front) if measured else None),
    )


def measured_trial(trial, rng):
    """A trial whose latency was measured, near to its prediction."""
    latency = trial.costs["latency_ms"]
    value = float(latency * rng.uniform(0.95, 1.05))
    return replace(
        trial,
        costs={**trial.costs, "latency_ms": value},
        predicted={"latency_ms": latency},
        cost_intervals={"latency_ms": (0.99 * value, 1.01 * value)},
    )


def times_of(front):
    """Every layer takes a tenth of what the network does, and the rest what is left."""
    ms = [10.0, *(trial.costs["latency_ms"] for trial in front)]
    count = len(front[0].candidate)
    return LayerTimes(
        trials=(-1, *(trial.id for trial in front)),
        layers=tuple((0.1 * each,) * count for each in ms),
        rest=tuple(each - count * 0.1 * each for each in ms),
    )


def outline_for(space, times=None):
    """A chain of linear layers, each as wide as one group."""
    sizes = ((1, ()), *((0, ((i, 1),)) for i in range(len(space.groups))))
    layers = []
    for i, (name, _) in enumerate(space.groups):
        rows = (i, i + 1) if i else (1,)
        layers.append(Layer(name, "Linear", (0, ((i, 1),)), ((1.0, rows),), ((1.0, rows), (1.0, (i + 1,)))))
    uniform = tuple(tuple([k] * len(space.sizes)) for k in (2, 4))
    stays = (Stays("returned by the model", ("head.weight",), 3, 0.01, "right for outputs"),)
    layers[0] = replace(layers[0], heads=(0, ((0, 2),)))  # two heads for each unit, which share keys and values
    return Outline("Chain", space.groups, 0, (), sizes, tuple(layers), (), stays, uniform, times)


class Page(HTMLParser):
    """Scripts, data and attributes of a page, as a browser parses it."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.data, self.style, self.texts = [], [], {}, "", []
        self._open = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open = (tag, dict(attrs))

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._open = None

    def handle_data(self, text):
        if self._open is None:
            self.texts.append(text)
        elif self._open[0] == "style":
            self.style += text
        elif "type" in self._open[1]:
            self.data[self._open[1]["id"]] = json.loads(text)
        else:
            self.scripts.append(text)

    @property
    def bulk(self):
        return json.loads(unpacked(self.data["data-bulk"]))
