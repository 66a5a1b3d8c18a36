"""Wrong arguments for every public call and every command, and what must then hold for their answer."""

import contextlib
import re
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from typer.testing import CliRunner

import autoprune
from autoprune.cli import app
from autoprune.costs.latency import Latency
from autoprune.errors import AutopruneError
from autoprune.evaluators import AdaptiveBN, Compensated, FineTune, Supernet
from autoprune.execution import RayExecutor
from autoprune.structure.adapters import ADAPTERS
from tests.damaging import TooSlowError
from tests.machine import Machine

MOST_SECONDS = 10
WAITED = 12
MOST_CHARACTERS = 700
X = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)

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


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))


@dataclass(frozen=True)
class Call:
    """A public call.

    Attributes:
        of: What is called.
        run: Calls it with keyword arguments, and others that it needs.
        valid: Arguments that it takes.
        takes: For each argument the names of the values in `VALUES` that are right for it, by design.
        words: For each argument what messages may call it, where that is not its name.
        own: For each argument further wrong values, by name.
    """

    of: Callable[..., object]
    run: Callable[..., object]
    valid: Callable[[], dict[str, Any]]
    takes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Callable[[], Any]]] = field(default_factory=dict)

    def values(self, argument: str) -> dict[str, Callable[[], Any]]:
        """All wrong values for an argument."""
        return {**VALUES, **self.own.get(argument, {})}


def _search(**given: Any) -> object:
    settings = {"trials": 1, "progress": False, "evaluator": "adaptive_bn", "prior": "criterion"}
    return autoprune.search(**{**settings, **given})


def _profile(**given: Any) -> object:
    with _clock():
        return autoprune.profile(**given)


def _clock() -> contextlib.AbstractContextManager[object]:
    """A simulated machine in the place of the clock, so that a table takes no time."""
    machine = Machine(cold=1.3, per_pass=2e-5)
    return mock.patch("autoprune.costs.profiling.profile.clock_for", return_value=machine)


def _labels(value: int) -> Callable[[], Any]:
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

PATHS = ("text", "path")
MANY = ("2**70",)
PLAIN = ("True",)
EMPTY = ("[]", "()", "{}", "empty tensor")
READABLE = (
    "flops <= 50", "flop <= 50%", "loss <= 0.3", "accuracy >= 200%", "accuracy <= 50%", "memory <= 1 B", "energy <= 5",
    "flops <= 0.001%",
)  # fmt: skip
"""Budgets whose sense depends on the model, the metric and the costs."""
_SPACE = "space|ignore|round_to|criterion|options"
_BUDGET = "budget|limit|drop|throughput|score|percentage|unit|cost"


def make_calls(folder: Path) -> dict[str, Call]:
    """Every public call, on a result and files of its own in a folder."""
    result = autoprune.search(model(), "flops <= 60%", (X, Y), trials=8, progress=False, evaluator="adaptive_bn")
    saved, small = result.save(folder / "result"), folder / "small.safetensors"
    autoprune.save(result.build(), small)
    result.plot()  # whose first call imports a library, for longer than a call may take where others use the machine
    anything = tuple(VALUES)
    settings: dict[Callable[..., object], dict[str, Sequence[str]]] = {
        autoprune.Data: {
            "labels": ("None", "text", "no text", "long text"),
            **dict.fromkeys(("calibration", "validation", "test"), anything),  # read by a search
        },
        autoprune.Channels: {
            "options": ("None",),
            "bounds": ("{}",),
            "ignore": (*EMPTY, "words", "{'a': 1}"),
            "criterion": ("module",),  # which is called
            **dict.fromkeys(("step", "round_to", "min_width"), MANY),
            "edges": ("{}", "{'a': 1}", "{5: None}"),
        },
        autoprune.Sparsity: {"ignore": (*EMPTY, "words", "{'a': 1}")},
        autoprune.Racing: {},
        autoprune.Rungs: {"reduction": ("2.5", *MANY)},
        RayExecutor: {
            "address": ("None", "text", "no text", "long text"),
            "workers": ("None", *MANY),
            "cpus_per_worker": ("2.5", *MANY),
            "gpus_per_worker": ("0", "2.5", *MANY),
            "threads_per_worker": MANY,
            "max_restarts": ("0", *MANY),
            "runtime_env": ("None", "{}", "{'a': 1}", "{5: None}"),
            "timeout_seconds": ("None", "2.5", *MANY),
            "synchronous": PLAIN,
            "generation": MANY,
            "ahead": ("0", *MANY),
        },
        FineTune: {
            "steps": MANY,
            "train_fn": ("None",),
            "lr": ("2.5", *MANY),
            "seed": ("0",),
            "start": ("None",),
        },
        Supernet: {
            "steps": MANY,
            "data": anything,  # read by a search
            "loss": ("None",),
            "subnets": ("0", *MANY),
            "optimizer": ("None", "module"),
            "schedule": ("None", "class"),
            "lr": ("2.5", *MANY),
            "batch_size": MANY,
            "checkpoint": ("None", *PATHS, "no text", "long text"),
            "checkpoint_steps": MANY,
            "mixed_precision": ("None", *PLAIN),
            "seed": ("0",),
        },
        Compensated: {
            **dict.fromkeys(("bn", "bias", "least_squares", "renew"), PLAIN),
            "ridge": ("None", "2.5", *MANY),
            **dict.fromkeys(("memory_bytes", "share_bytes"), ("None", "0", *MANY)),
        },
        AdaptiveBN: {"share_bytes": ("None", "0", *MANY)},
    }
    return {
        "search": Call(
            autoprune.search,
            _search,
            lambda: {"model": model(), "budget": "flops <= 60%", "data": (X, Y)},
            takes={
                "data": ("a scalar", "255", "-7"),  # with a note
                "budget": ("flops <= 50",),
                "trials": MANY,
                "seed": ("0",),
                "cost_batch": MANY,
                "max_seconds": ("None", "2.5", *MANY),
                "start": EMPTY,
                **dict.fromkeys(("forward", "outputs", "example_inputs", "labels", "latency"), ("None",)),
                "costs": ("None", "{}"),
                "racing": PLAIN,
                "run_dir": ("None", *PATHS),
                "progress": PLAIN,
            },
            words={
                "data": "data|batch|samples|labels|forward|example_inputs",
                "budget": _BUDGET,
                "outputs": "outputs|forward",
                "forward": "forward|model|output|costs",
                "metric": "metric|loss|output",
                "space": _SPACE,
                "example_inputs": "example_inputs|forward|model",
            },
            own={
                "data": {**DATA, "255": _labels(255), "-7": _labels(-7)},
                "budget": BUDGETS,
                "start": START,
                "costs": COSTS,
                "outputs": OUTPUTS,
                "forward": FORWARD,
                "metric": METRIC,
                "space": {name: make for name, make in SPACE.items() if name != "edges"},  # which measures latencies
                "example_inputs": EXAMPLES,
                "run_dir": {"a file": lambda: small},
            },
        ),
        "inspect": Call(
            autoprune.inspect,
            autoprune.inspect,
            lambda: {"model": model(), "example_inputs": X[:2]},
            takes={
                "forward": ("None", "few rows", "complex", "a constant"),
                "outputs": ("None",),
                "space": tuple(name for name in SPACE if name not in ("no such module", "edges")),
            },
            words={
                "outputs": "outputs|forward",  # what a function of the user's raises comes from the forward
                "forward": "forward|model",
                "space": _SPACE,
            },
            own={"example_inputs": EXAMPLES, "outputs": OUTPUTS, "forward": FORWARD, "space": SPACE},
        ),
        "profile": Call(
            autoprune.profile,
            _profile,
            lambda: {"model": model(), "example_inputs": X[:2], "networks": 6},
            takes={
                "seed": ("0",),
                "forward": ("None", "few rows", "complex"),
                "outputs": ("None",),
                "path": ("None", *PATHS),
            },
            words={"outputs": "outputs|forward", "forward": "forward|model"},
            own={"example_inputs": EXAMPLES, "outputs": OUTPUTS, "forward": FORWARD, "space": SPACE},
        ),
        "audit": Call(
            autoprune.audit,
            lambda **given: autoprune.audit(**{"k": 4, "repeats": 0, **given}),
            lambda: {"result": result, "train_fn": lambda _: None},
            takes={
                "train_fn": ("module",),
                "k": MANY,
                "repeats": ("0",),
                "seed": ("0",),
                "steps": ("None",),
                "evaluators": ("[]", "()"),
                "initialise": ("None", "module"),
                "run_dir": ("None", *PATHS),
            },
            words={"steps": "steps|train_fn", "evaluators": "evaluator"},
        ),
        "load": Call(
            autoprune.load,
            autoprune.load,
            lambda: {"path": small, "fresh_model": model()},
            words={"fresh_model": "fresh_model|small.safetensors was not made for this"},
        ),
        "save": Call(
            autoprune.save,
            autoprune.save,
            lambda: {"module": result.build(), "path": folder / "again.safetensors"},
            takes={"path": ("text",)},
        ),
        "SearchResult.load": Call(
            autoprune.SearchResult.load,
            autoprune.SearchResult.load,
            lambda: {"path": saved, "model": model()},
            takes={"model": ("None", "module")},  # whose sizes are compared once something is built
        ),
        "SearchResult.best": Call(
            result.best,
            result.best,
            lambda: {"budget": "flops <= 60%"},
            takes={"budget": ("None", "flops <= 50")},
            words={"budget": _BUDGET},
            own={"budget": BUDGETS},
        ),
        "SearchResult.build": Call(
            result.build,
            result.build,
            lambda: {"what": "flops <= 60%"},
            takes={"what": ("None",)},
            words={"what": _BUDGET},
        ),
        "SearchResult.save": Call(
            result.save,
            result.save,
            lambda: {"path": folder / f"save-{time.monotonic_ns()}"},
            takes={"path": PATHS, "replace": PLAIN},
        ),
        "SearchResult.sensitivity": Call(result.sensitivity, result.sensitivity, dict),
        "SearchResult.plot": Call(result.plot, result.plot, dict, takes={"path": ("None", "text")}),
        "Latency.load": Call(
            Latency.load, Latency.load, lambda: {"path": folder / "none.json"}, words={"path": "latency|path"}
        ),
        "Budget.parse": Call(
            autoprune.Budget.parse,
            autoprune.Budget.parse,
            lambda: {"budget": "flops <= 60%"},
            takes={"budget": READABLE},
            words={"budget": _BUDGET},
            own={"budget": BUDGETS},
        ),
        "register_adapter": Call(
            autoprune.register_adapter,
            _registered,
            lambda: {"kind": type(model())},
            takes={"kind": ("class",), "resize": ("None", "module"), "prepare": ("None", "module")},
        ),
        "Metric": Call(
            autoprune.Metric,
            autoprune.Metric,
            lambda: {"fn": lambda outputs, batch: outputs, "higher_is_better": True},
            takes={
                "fn": ("module",),
                "name": ("text", "no text", "long text"),
                **dict.fromkeys(("higher_is_better", "per_sample"), PLAIN),
            },
            words={"needs_dense": "needs_dense|fn"},
        ),
        **{kind.__name__: Call(kind, kind, dict, takes=takes) for kind, takes in settings.items()},
    }


def _registered(**given: Any) -> None:
    """Registers an adapter, and leaves no trace of it."""
    before = dict(ADAPTERS)
    try:
        autoprune.register_adapter(**given)
    finally:
        ADAPTERS.clear()
        ADAPTERS.update(before)


@dataclass(frozen=True)
class Wrong:
    """A call with wrong values for some of its arguments.

    Attributes:
        call: Its name.
        values: The name of the value of each argument that is replaced.
    """

    call: str
    values: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.call}({', '.join(f'{name}={value[:30]}' for name, value in self.values.items())})"


def single(calls: Mapping[str, Call]) -> Iterator[Wrong]:
    """Every value for every argument of every call, one at a time."""
    for name, call in calls.items():
        for argument in arguments_of(call):
            for value in call.values(argument):
                yield Wrong(name, {argument: value})


def several(calls: Mapping[str, Call], rng: np.random.Generator) -> Iterator[Wrong]:
    """Values for two or three arguments of a call at once, without end."""
    names = [name for name, call in calls.items() if len(arguments_of(call)) > 1]
    while True:
        name = names[rng.integers(len(names))]
        known = arguments_of(calls[name])
        chosen = rng.choice(known, min(int(rng.integers(2, 4)), len(known)), replace=False).tolist()
        yield Wrong(name, {argument: str(rng.choice(list(calls[name].values(argument)))) for argument in chosen})


def arguments_of(call: Call) -> list[str]:
    """The arguments of a call that may be given by name."""
    return [name for name in signature(call.of).parameters if name not in ("self", "cls")]


def outcome(call: Call, wrong: Wrong) -> tuple[str, str]:
    """``"accepted"``, ``"refused"`` or ``"WRONG"`` for a call in the current folder, and why."""
    values = {argument: call.values(argument)[name]() for argument, name in wrong.values.items()}
    with _deadline(), _restored():
        try:
            call.run(**{**call.valid(), **values})
        except (AutopruneError, ValueError, TypeError, OSError) as error:
            words = [call.words.get(argument, argument) for argument in values]
            files = [
                re.escape(str(value)[-20:]) for value in values.values() if isinstance(value, str | Path) and value
            ]
            return judged(str(error), [*words, *files], error)
        except BaseException as error:  # of any kind is what this looks for
            return "WRONG", f"{type(error).__name__}: {error}"
    odd = [argument for argument, name in wrong.values.items() if name not in call.takes.get(argument, ())]
    return ("WRONG", f"took {', '.join(odd)} without a word") if odd else ("accepted", "")


def settled(make: Callable[[], tuple[str, str]]) -> tuple[str, str, bool]:
    """Judge a call, and return whether it was repeated because it was too slow.

    A hang comes back, and a stall of a machine that others use too does not.
    """
    fate, why = make()
    again = why.startswith(TooSlowError.__name__)
    if again:
        fate, why = make()
    return fate, why, again


def judged(message: str, words: Sequence[str], error: BaseException | None = None) -> tuple[str, str]:
    """Judge whether a message is short, holds no dump, and names one of the arguments."""
    said = f"{type(error).__name__}: {message}" if error is not None else message
    if len(message) > MOST_CHARACTERS or re.search(r"tensor\(|\[\[.*\]\]\n", message):
        return "WRONG", f"too long: {said}"
    if not any(re.search(rf"(?<![a-z])({word})", message) for word in words):
        return "WRONG", f"does not name {' or '.join(words)}: {said}"
    return "refused", said


COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "search": (
        ["MODEL"],
        {
            "--budget": "flops <= 60%", "--run-dir": "run", "--data": "m.py:data", "--weights": "", "--trials": "1",
            "--max-seconds": "", "--seed": "0", "--metric": "", "--optimizer": "random", "--evaluator": "adaptive_bn",
            "--criterion": "l2", "--round-to": "", "--ignore": "", "--executor": "local", "--workers": "",
            "--gpus-per-worker": "", "--latency": "", "--cost-batch": "", "--rewrite": "", "--input-shape": "",
            "--example": "",
        },
    ),
    "front": (["RUN_DIR"], {"--plot": ""}),
    "build": (
        ["RUN_DIR"], {"--model": "m.py:model", "--output": "built.safetensors", "--budget": "", "--trial": ""}
    ),
    "inspect": (["MODEL"], {"--rewrite": "", "--input-shape": "2,8", "--example": ""}),
    "profile": (
        ["MODEL"],
        {
            "--output": "t.json", "--batch": "", "--device": "", "--threads": "", "--runtime": "",
            "--input-shape": "2,8", "--example": "",
        },
    ),
}  # fmt: skip
"""Positional arguments and options of each command, with what is right for them; empty where they are left out."""

WORDS = (
    "", "nonsense", "-1", "0", "1.5", "nan", "1e400", "9" * 30, "x" * 5_000, "no.json", ".", "m.py", "m.py:five",
    "m.py:none", "m.py:data", "m.py:raises", "m.py:needs", "no.py:model", "os:getcwd", "2,3", "2,0", "9" * 9 + ",8",
    "cuda:99", "meta", "\u00e9\n", "None", "[]", "small.safetensors", "result", "1/0", "flops", "auto",
)  # fmt: skip
"""Words given to any option of a command."""

TAKEN = {
    "search --data": ("m.py:data",),
    "search --trials": ("9" * 30, "auto"),
    "search --max-seconds": ("1.5", "9" * 30),
    "search --seed": ("0",),
    "search --ignore": ("0",),
    "search --gpus-per-worker": ("0",),
    "search --cost-batch": ("9" * 30,),
    **{f"search --{name}": ("auto",) for name in ("metric", "optimizer", "evaluator", "criterion")},
    **{f"{name} RUN_DIR": ("result",) for name in ("front", "build")},
    **{f"{name}": WORDS for name in ("search --run-dir", "build --output", "profile --output", "front --plot")},
}
"""Words that an option takes, by design: those that are written to take nearly any name."""

ALIASES = {"input-shape": ("example_inputs",), "example": ("example_inputs",), "RUN_DIR": ("run_dir", "path must be")}
"""Names of options in messages of the library."""

LEFT_OUT = (("search --round-to", "auto"),)  # which measures latencies
MODULE = """
from tests.hostile import X, Y, model

five = 5

def data():
    return X, Y

def raises():
    raise ValueError("raises, as this function of the user does")

def needs(argument):
    return argument
"""


@dataclass(frozen=True)
class Command:
    """A command line with one wrong word.

    Attributes:
        name: The command.
        option: What is wrong: an option, or the positional argument.
        word: What it is given.
    """

    name: str
    option: str
    word: str

    def __str__(self) -> str:
        return f"autoprune {self.name} {self.option} {self.word[:30]!r}"


def make_folder(folder: Path) -> None:
    """Make the files that command lines name; `make_calls` makes the others."""
    (folder / "m.py").write_text(MODULE)


def commands() -> Iterator[Command]:
    """Every word for every option of every command."""
    for name, (positional, options) in COMMANDS.items():
        for option in (*positional, *options):
            for word in WORDS:
                if (f"{name} {option}", word) not in LEFT_OUT:
                    yield Command(name, option, word)


def answer(command: Command) -> tuple[str, str]:
    """Judge a command line in the current folder, which is restored; see `outcome`."""
    with _restored():
        return _answer(command)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Leaves the current folder as it was."""
    there = {path: path.read_bytes() if path.is_file() else b"" for path in Path().iterdir()}
    try:
        yield
    finally:
        for path in set(Path().iterdir()) - there.keys():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, content in there.items():
            if path.is_file() and path.read_bytes() != content:
                path.write_bytes(content)


def _answer(command: Command) -> tuple[str, str]:
    positional, options = COMMANDS[command.name]
    right = {"MODEL": "m.py:model", "RUN_DIR": "result"}
    arguments = [command.word if name == command.option else right[name] for name in positional]
    for option, value in options.items():
        word = command.word if option == command.option else value
        arguments += [option, word] if word or option == command.option else []
    with _deadline(), _clock():
        try:
            found = CliRunner().invoke(app, [command.name, *arguments])
        except BaseException as error:  # of any kind is what this looks for
            return "WRONG", f"{type(error).__name__}: {error}"
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        own = "as this function of the user does" in str(found.exception)
        return ("refused" if own else "WRONG"), f"{type(found.exception).__name__}: {found.exception}"
    if found.exit_code == 0:
        taken = command.word in TAKEN.get(f"{command.name} {command.option}", ())
        return ("accepted", "") if taken else ("WRONG", "took it without a word")
    name = command.option.lstrip("-")
    words = [name, name.replace("-", "_"), re.escape(command.word[:20]) or name]
    words += ALIASES.get(name, ())
    return judged(found.stderr.strip().splitlines()[-1], words)


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """Ends what takes longer than it may, with an error that no ``except`` of ours takes."""

    def stop(*_: Any) -> None:
        raise TooSlowError

    # The time of the processor, because others may use it too; what only waits gets much more.
    handlers = {name: signal.signal(name, stop) for name in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    signal.alarm(WAITED * MOST_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for name, handler in handlers.items():
            signal.signal(name, handler)
