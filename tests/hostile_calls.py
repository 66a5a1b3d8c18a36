"""Every public call with wrong values for its arguments, and what it came to."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

import autoprune
from autoprune.costs.latency.model import Latency
from autoprune.errors import AutopruneError
from autoprune.evaluators import AdaptiveBN, Compensated, FineTune, Supernet
from autoprune.execution import RayExecutor
from autoprune.structure.slicing.adapters import ADAPTERS
from tests.damaging import model
from tests.hostile import X, Y, deadline, judged, restored, simulated_clock
from tests.hostile_values import BUDGETS, COSTS, DATA, EXAMPLES, FORWARD, METRIC, OUTPUTS, SPACE, START, VALUES, labels
from tests.searching import grouped

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
    settings = {"trials": 1, "evaluator": "adaptive_bn", "prior": "criterion"}
    return autoprune.search(**grouped(**{**settings, **given}))


def _profile(**given: Any) -> object:
    with simulated_clock():
        return autoprune.profile(**given)


def _called(inputs: Any = None) -> dict[str, Callable[[], Any]]:
    """Wrong ways to call a model, by name."""
    return {
        f"{name} {value}": partial(lambda name, make: autoprune.Call(**{"inputs": inputs, name: make()}), name, make)
        for name, values in (("forward", FORWARD), ("outputs", OUTPUTS))
        for value, make in values.items()
    }


def make_calls(folder: Path) -> dict[str, Call]:
    """Every public call, on a result and files of its own in a folder."""
    result = autoprune.search(model(), "flops <= 60%", (X, Y), trials=8, evaluator="adaptive_bn")
    saved, small = result.save(folder / "result"), folder / "small.safetensors"
    autoprune.save(result.build(), small)
    result.plot()  # whose first call imports a library, for longer than a call may take where others use the machine
    anything = tuple(VALUES)
    settings: dict[Callable[..., object], dict[str, Sequence[str]]] = {
        autoprune.Data: {
            "labels": ("None", "text", "no text", "long text"),
            **dict.fromkeys(("calibration", "validation", "test"), anything),  # read by a search
            **dict.fromkeys(("calibration_samples", "validation_samples", "test_samples"), ("None",)),
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
        autoprune.Call: {
            "inputs": anything,  # run by a search
            "forward": ("None",),
            "outputs": ("None", "text", "no text", "long text", "True", "0", "-1", "2**70", "module"),
            "cost_batch": MANY,
        },
        autoprune.Start: {"candidates": anything},  # of a space that a search knows
        autoprune.Execution: {
            "run_dir": ("None", *PATHS, "no text", "long text"),
            "resume": (),
            "progress": PLAIN,
            "workers": ("None", "2**70"),
            "callbacks": ("[]", "()"),
            "storage": ("None", "text", "long text"),  # opened by a search
        },
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
                "max_seconds": ("None", "2.5", *MANY),
                "start": EMPTY,
                "example": ("None",),
                "costs": ("None", "{}"),
                "early_stopping": PLAIN,
            },
            words={
                "data": "data|batch|samples|labels|forward|example",
                "budget": _BUDGET,
                "metric": "metric|loss|output",
                "space": _SPACE,
                "example": "example|forward|model|output|costs",
                "execution": "execution|run_dir",
            },
            own={
                "data": {**DATA, "255": labels(255), "-7": labels(-7)},
                "budget": BUDGETS,
                "start": START,
                "costs": COSTS,
                "metric": METRIC,
                "space": {name: make for name, make in SPACE.items() if name != "edges"},  # which measures latencies
                "example": {**EXAMPLES, **_called()},
                "execution": {"a file": lambda: autoprune.Execution(run_dir=small)},
            },
        ),
        "inspect": Call(
            autoprune.inspect,
            autoprune.inspect,
            lambda: {"model": model(), "example": X[:2]},
            takes={
                "example": ("forward few rows", "forward complex", "forward a constant"),
                "space": tuple(name for name in SPACE if name not in ("no such module", "edges")),
            },
            words={"example": "example|outputs|forward|model", "space": _SPACE},
            own={"example": {**EXAMPLES, **_called(X[:2])}, "space": SPACE},
        ),
        "profile": Call(
            autoprune.profile,
            _profile,
            lambda: {"model": model(), "example": X[:2], "networks": 6},
            takes={
                "seed": ("0",),
                "batch": ("None",),
                "example": ("forward few rows", "forward complex"),
                "path": ("None", *PATHS),
            },
            words={"example": "example|outputs|forward|model"},
            own={"example": {**EXAMPLES, **_called(X[:2])}},
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
        "SearchResult.plot": Call(result.plot, result.plot, dict, takes={"path": ("None", "text"), "axes": ("None",)}),
        "SearchResult.plot_sensitivity": Call(
            result.plot_sensitivity, result.plot_sensitivity, dict, takes={"axes": ("None",)}
        ),
        "SearchResult.plot_convergence": Call(
            result.plot_convergence, result.plot_convergence, dict, takes={"axes": ("None",)}
        ),
        "SearchResult.to_optuna": Call(
            result.to_optuna, result.to_optuna, dict, takes={"storage": ("None",), "name": ("None", "text")}
        ),
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
        **{kind.__name__: Call(kind, kind, dict, takes, {"candidates": "start"}) for kind, takes in settings.items()},
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
    values: dict[str, Any] = {}
    with deadline(), restored():
        try:
            for argument, name in wrong.values.items():
                values[argument] = call.values(argument)[name]()  # a group may refuse it already
            call.run(**{**call.valid(), **values})
        except (AutopruneError, ValueError, TypeError, OSError) as error:
            words = [call.words.get(argument, argument) for argument in wrong.values]
            files = [
                re.escape(str(value)[-20:]) for value in values.values() if isinstance(value, str | Path) and value
            ]
            return judged(str(error), [*words, *files], error)
        except BaseException as error:  # of any kind is what this looks for
            return "WRONG", f"{type(error).__name__}: {error}"
    odd = [argument for argument, name in wrong.values.items() if name not in call.takes.get(argument, ())]
    return ("WRONG", f"took {', '.join(odd)} without a word") if odd else ("accepted", "")
