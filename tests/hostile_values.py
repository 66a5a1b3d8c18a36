"""Wrong values: those that no argument takes, whatever it is, and those for one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import autoprune
from tests.hostile import X, Y

VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "2.5": lambda: 2.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "2**70": lambda: 2**70,
    "1j": lambda: 1j,
    "text": lambda: "nonsense",
    "no text": lambda: "",
    "long text": lambda: "x" * 20_000,
    "bytes": lambda: b"nonsense",
    "path": lambda: Path("no/such/place"),
    "[]": lambda: [],
    "[None]": lambda: [None],
    "[[]]": lambda: [[]],
    "()": lambda: (),
    "{}": lambda: {},
    "{'a': 1}": lambda: {"a": 1},
    "{5: None}": lambda: {5: None},
    "set": lambda: {"a", 5},
    "object": object,
    "class": lambda: nn.Linear,
    "module": lambda: nn.Linear(3, 3),
    "function": lambda: lambda: 5,
    "generator": lambda: (i for i in range(3)),
    "array": lambda: np.ones((3, 3)),
    "words": lambda: np.array(["a", "b"]),
    "tensor": lambda: torch.randn(5, 3),
    "large tensor": lambda: torch.randn(300, 300),
    "empty tensor": lambda: torch.randn(0, 8),
    "device": lambda: torch.device("meta"),
}
"""Replacements of any argument."""


def labels(value: int) -> Callable[[], Any]:
    return lambda: (X, Y.masked_fill(torch.arange(len(Y)) < 40, value))


def _empties() -> Iterator[Any]:
    while True:
        yield X[:0], Y[:0]


DATA = {
    "other width": lambda: (X[:, :3], Y),
    "integers": lambda: (X.long(), Y),
    "complex": lambda: (X + 1j, Y),
    "three": lambda: (X, Y, Y),
    "other length": lambda: (X, Y[:7]),
    "nan": lambda: (X * float("nan"), Y),
    "few": lambda: (X[:5], Y[:5]),
    "empties": _empties,
    "batches of text": lambda: ["a", "b"],
    "a batch in a dict": lambda: [{"x": X, "y": Y}],
    "a scalar": lambda: [(X, 5)],
    "mixed": lambda: [(X[:20], Y[:20]), (X[:20, :3], Y[:20]), (X, Y), (X, Y)],
}
BUDGETS = {
    text: lambda text=text: text
    for text in (
        "flops", "flops <=", "flops <= 50", "flops <= -5%", "flops <= 200%", "flops <= 1e400", "flops >= 50%",
        "flop <= 50%", "flops <= 50% and flops <= 40%", "accuracy drop <= -1pp", "accuracy drop >= 1pp", "loss <= 0.3",
        "accuracy >= 200%", "accuracy <= 50%", "latency <= 0", "latency <= 5 s", "throughput <= 9/s", "memory <= 1 B",
        "energy <= 5", "flops <= 0.001%", "flops <= nan", "flops < 50%", "50%", "flops <= 50 %%", "params<=1__0",
    )
}  # fmt: skip


START = {
    "[[1]]": lambda: [[1]],
    "[[7.9, 0]]": lambda: [[7.9, 0]],
    "[[True, 0]]": lambda: [[True, 0]],
    "[[99, 0]]": lambda: [[99, 0]],
    "[[-1, 0]]": lambda: [[-1, 0]],
    "[1, 1]": lambda: [1, 1],
    "floats": lambda: [np.array([0.5, 1.0])],
    "other option": lambda: [{"0": 5.5}],
    "list as option": lambda: [{"0": []}],
    "other dimension": lambda: [{"none": 1, 5: 2}],
}
COSTS = {
    "a number": lambda: {"j": 5},
    "returns None": lambda: {"j": lambda c: None},
    "other shape": lambda: {"j": lambda c: c},
    "complex": lambda: {"j": lambda c: c.sum(1) * 1j},
    "nan": lambda: {"j": lambda c: np.full(len(c), np.nan)},
    "words": lambda: {"j": lambda c: ["a"] * len(c)},
    "random": lambda: {"j": lambda c: np.random.default_rng().random(len(c))},
    "no name": lambda: {5: lambda c: c.sum(1)},
    "flops": lambda: {"flops": lambda c: c.sum(1)},
    "latency": lambda: {"latency": lambda c: c.sum(1)},
    "no arguments": lambda: {"j": lambda: 5},
}
OUTPUTS = {
    "[0, None]": lambda: [0, None],
    "[1.5]": lambda: [1.5],
    "[99]": lambda: [99],
    "returns None": lambda: lambda made: None,
    "returns text": lambda: lambda made: "x",
    "raises": lambda: lambda made: made.nothing,
}
FORWARD = {
    "returns None": lambda: lambda net, batch: None,
    "returns text": lambda: lambda net, batch: "x",
    "few rows": lambda: lambda net, batch: net(batch[0])[:1],
    "complex": lambda: lambda net, batch: net(batch[0]) + 1j,
    "raises": lambda: lambda net, batch: net.nothing,
    "one argument": lambda: lambda net: net,
    "nan": lambda: lambda net, batch: net(batch[0]) * float("nan"),
    "a constant": lambda: lambda net, batch: torch.ones(len(batch[0]), 4),
}
METRIC = {
    "returns None": lambda: autoprune.Metric(lambda outputs, batch: None, True),
    "returns text": lambda: autoprune.Metric(lambda outputs, batch: "x", True),
    "other shape": lambda: autoprune.Metric(lambda outputs, batch: outputs, True),
    "complex": lambda: autoprune.Metric(lambda outputs, batch: outputs[:, 0] * 1j, True),
    "nan": lambda: autoprune.Metric(lambda outputs, batch: outputs[:, 0] * float("nan"), True),
    "raises": lambda: autoprune.Metric(lambda outputs, batch: outputs.nothing, True),
    "set of None": lambda: autoprune.Metric(lambda forward, batches: None, True, per_sample=False),
    "set of nan": lambda: autoprune.Metric(lambda forward, batches: float("nan"), True, per_sample=False),
    "loss of None": lambda: lambda outputs, targets: None,
    "loss of text": lambda: lambda outputs, targets: "x",
    "loss that raises": lambda: lambda outputs, targets: outputs.nothing,
    "loss class": lambda: nn.CrossEntropyLoss,
    "other targets": lambda: nn.MSELoss(),
}
SPACE = {
    "no such module": lambda: autoprune.Channels(ignore=["none*"]),
    "nothing left": lambda: autoprune.Channels(ignore=["*"]),
    "one option": lambda: autoprune.Channels(options=(1.0,)),
    "too wide": lambda: autoprune.Channels(round_to=512),
    "edges": lambda: autoprune.Channels(round_to="auto"),
    "criterion of None": lambda: autoprune.Channels(criterion=lambda group: None),
    "criterion that raises": lambda: autoprune.Channels(criterion=lambda group: group.nothing),
}
EXAMPLES = {
    "other width": lambda: X[:2, :3],
    "two": lambda: (X, X),
    "other name": lambda: {"y": X},
    "[X, 5]": lambda: [X, 5],
    "nan": lambda: X[:2] * float("nan"),
    "no samples": lambda: X[:0],
    "no tensor": lambda: {"x": 5},
}
