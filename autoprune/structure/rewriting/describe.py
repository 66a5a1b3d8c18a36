"""Description of a module from its recorded calls at several sizes, with sizes that follow its tensors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autoprune.structure.rewriting.capture import Frame, Held, Step
from autoprune.structure.rewriting.expressions import Expression, Row, Source, express, sources_of
from autoprune.structure.rewriting.graph_module import Description
from autoprune.structure.rewriting.widths import WHOLE, resized

Path = tuple[Any, ...]
"""Path of a leaf in nested arguments."""


class NotFollowedError(Exception):
    """Raised if a module cannot be rewritten; gives the reason."""


@dataclass(frozen=True)
class Run:
    """Recorded call, with shapes of its tensors that may differ from the recorded ones.

    Attributes:
        frame: The call.
        shapes: Shape of each tensor, at artificial widths if `imagined`.
        imagined: Whether numbers that follow the widths are taken from `shapes`.
    """

    frame: Frame
    shapes: Sequence[tuple[int, ...]]
    imagined: bool = False

    def arguments(self, step: Step) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a step of the call, at the imagined widths if there are any."""
        if not self.imagined:
            return step.args, step.kwargs
        return resized(step, lambda held: self.frame.shapes[held.index], lambda held: self.shapes[held.index])


def describe(module: nn.Module, runs: Sequence[Run], training: Frame | None = None) -> Description:
    """Describe the calls of a module.

    Args:
        module: The module, for the parameters of its forward.
        runs: Its calls, the first as recorded on the examples.
        training: One more call on the same inputs in training mode.

    Raises:
        NotFollowedError: If its calls differ in more than numbers, or a number follows no size.
    """
    frames = [run.frame for run in runs] + ([] if training is None else [training])
    refused = next((frame.refused for frame in frames if frame.refused), "")
    if refused:
        raise NotFollowedError(refused)
    for frame in frames[1:]:
        _require_alike(frames[0], frame, numbers=frame is not training)
    return _Writer(module, runs, training).write()


def _require_alike(first: Frame, other: Frame, *, numbers: bool) -> None:
    """Refuse calls that differ in more than whole numbers; in training, floats and flags may differ, too."""
    why = "what it runs depends on its input" if numbers else "it runs otherwise in training"
    varying = (int,) if numbers else (int, float, bool)
    a, b = (list(leaves(_whole(frame))) for frame in (first, other))
    if len(a) != len(b) or first.states != other.states:
        raise NotFollowedError(why)
    for (place, left), (path, right) in zip(a, b, strict=True):
        varies = type(left) is type(right) and type(left) in varying
        if place != path or not (varies or left == right):
            raise NotFollowedError(why)


def _whole(frame: Frame) -> Any:
    """Return all parts of a call, nested."""
    steps = [(step.kind, step.target, step.args, step.kwargs, step.output) for step in frame.steps]
    return (frame.arguments, steps, frame.output)


def leaves(given: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Iterate over the leaves of nested arguments with their paths, in order."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(given, dict):
        items = given.items()
    elif isinstance(given, list | tuple):
        items = enumerate(given)
    elif isinstance(given, slice):
        items = enumerate((given.start, given.stop, given.step))
    else:
        yield path, given
        return
    for key, item in items:
        yield from leaves(item, (*path, key))


@dataclass
class _Writer:
    module: nn.Module
    runs: Sequence[Run]
    training: Frame | None
    inputs: list[list[Any]] = field(default_factory=list)
    nodes: list[list[Any]] = field(default_factory=list)
    placed: dict[int, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    sizes: list[tuple[Source, Row]] = field(default_factory=list)
    numbers: list[tuple[Source, Row]] = field(default_factory=list)

    @property
    def first(self) -> Frame:
        return self.runs[0].frame

    def write(self) -> Description:
        self._inputs()
        for number, step in enumerate(self.first.steps):
            self._step(number, step)
        output = self._output()
        return {"name": type(self.module).__name__, "inputs": self.inputs, "nodes": self.nodes, "output": output}

    # Inputs

    def _inputs(self) -> None:
        parameters = inspect.signature(self.module.forward).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for parameter in named:
            default = [] if parameter.default is parameter.empty else [encode(parameter.default, self._no_tensor)]
            if parameter.kind is parameter.KEYWORD_ONLY and not default:
                default = [None]
            self.inputs.append([parameter.name, *default])
        for place, parameter in enumerate(named):
            here = {"node": place}
            given = self.first.arguments.get(parameter.name, parameter.default)
            if parameter.default is None and isinstance(given, Held):
                self._add("given", parameter.name, [here])
            self._argument(here, given, (parameter.name,), parameter.name)

    def _argument(self, here: Any, given: Any, path: Path, name: str) -> None:
        if isinstance(given, Held) and given.index in self.placed:
            self._add("identical", name, [here, self.placed[given.index]])
        elif isinstance(given, Held):
            self._place(given, here)
        elif type(given) is int and (row := self._argument_row(path)) and len(set(row)) > 1:
            self.made[repr(("argument", path))] = here
            self.numbers.append((("argument", path), row))
        elif isinstance(given, list | tuple | dict) and any(isinstance(leaf, Held | int) for _, leaf in leaves(given)):
            for key, item in given.items() if isinstance(given, dict) else enumerate(given):
                self._argument(self._add("operator", "getitem", [here, key]), item, (*path, key), f"{name}[{key!r}]")
        else:
            value = encode(given, self._no_tensor)
            self._add("expect", name, [here, value])

    def _argument_row(self, path: Path) -> Row | None:
        rows = []
        for run in self.runs:
            found: Any = run.frame.arguments
            if path[0] not in found:
                return None
            for key in path:
                found = found[key]
            rows.append(found)
        return tuple(rows)

    def _no_tensor(self, leaf: Any) -> Any:
        raise NotFollowedError(f"its forward is given a {type(leaf).__name__}")

    # Nodes

    def _add(self, kind: str, target: str, args: Any, kwargs: Any = None) -> dict[str, int]:
        self.nodes.append([kind, target, args, {"dict": []} if kwargs is None else kwargs])
        return {"node": len(self.inputs) + len(self.nodes) - 1}

    def _once(self, kind: str, target: str, args: list[Any]) -> Any:
        key = repr((kind, target, args))
        if key not in self.made:
            self.made[key] = self._add(kind, target, args)
        return self.made[key]

    def _place(self, held: Held, node: Any) -> None:
        """Assign a node to a tensor; its sizes are known from now on."""
        new = held.index not in self.placed
        self.placed[held.index] = node
        if new:
            self.sizes += self._own(held)

    def _own(self, held: Held) -> list[tuple[Source, Row]]:
        rank = len(self.runs[0].shapes[held.index])
        return [((held.index, d), tuple(run.shapes[held.index][d] for run in self.runs)) for d in range(rank)]

    def _node(self, held: Held) -> Any:
        if held.index not in self.placed:
            self._place(held, self._once("state", self.first.states[held.index], []))
        return self.placed[held.index]

    def _expression(self, found: Expression) -> Any:
        if isinstance(found, int):
            return found
        if found[0] == "source":
            source = found[1]
            if source[0] == "argument":
                return self.made[repr(source)]
            return self._once("method", "size", [self.placed[source[0]], source[1]])
        return self._once("operator", found[0], [self._expression(part) for part in found[1:]])

    # Steps

    def _step(self, number: int, step: Step) -> None:
        given = (step.args, step.kwargs)
        for _, held in leaves(given):
            if isinstance(held, Held):
                self._node(held)
        chosen = self._numbers(step, self._rows(number, step))
        paths = (path for path, _ in leaves(given))  # in the order in which they are encoded

        def leaf(value: Any) -> Any:
            return self._leaf(value, next(paths), chosen, step, number)

        args = [encode(item, leaf, every=True) for item in step.args]
        kwargs = encode(step.kwargs, leaf, every=True)
        if step.kind == "property":
            node = self._once(step.kind, step.target, args)
        else:
            node = self._add(step.kind, step.target, args, kwargs)
        self._outputs(step.output, node)

    def _outputs(self, output: Any, node: Any) -> None:
        if isinstance(output, Held):
            # In place: the tensor keeps its identity, and its later readers must come after this call.
            self._place(output, node)
        elif isinstance(output, list | tuple | dict):
            for key, item in output.items() if isinstance(output, dict) else enumerate(output):
                if any(isinstance(leaf, Held) for _, leaf in leaves(item)):
                    self._outputs(item, self._add("operator", "getitem", [node, key]))

    def _rows(self, number: int, step: Step) -> dict[Path, Row]:
        """Find each number among the arguments, with its values in all runs."""
        columns = []
        for run in self.runs:
            own = run.frame.steps[number]
            columns.append(dict(leaves(run.arguments(own))))
        paths = [path for path, leaf in columns[0].items() if type(leaf) is int]
        return {
            path: tuple(column.get(path, leaf) for column in columns) for path in paths for leaf in [columns[0][path]]
        }

    def _numbers(self, step: Step, rows: dict[Path, Row]) -> dict[Path, Any]:
        """Find the form of each number in the description."""
        whole = step.target.rpartition(".")[2] in WHOLE and step.kind in ("method", "function")
        own = [leaf for _, leaf in leaves((step.args, step.kwargs)) if isinstance(leaf, Held)]
        nearby = [pair for held in own for pair in self._own(held)]
        sources = sources_of([*nearby, *self.numbers, *self.sizes])
        aligned = self._aligned(step, own[0], rows) if whole and own else {}
        shaped = step.target.rpartition(".")[2] in ("reshape", "view")
        open_size = shaped and bool(own) and all(-1 not in row for row in rows.values())
        found: dict[Path, Any] = {}
        for path, row in rows.items():
            expression = aligned.get(path) or (row[0] if len(set(row)) == 1 else None)
            if expression is None and row in sources:
                expression = ("source", sources[row])
            if expression is None and open_size:
                open_size = False
                found[path] = -1
                continue
            expression = express(row, sources) if expression is None else expression
            if expression is None:
                raise NotFollowedError(f"a size that {step.target} is given follows no tensor")
            found[path] = self._expression(expression)
        return found

    def _aligned(self, step: Step, x: Held, rows: dict[Path, Row]) -> dict[Path, Expression]:
        """Find leading and trailing numbers that equal the sizes of the input there, up to the first that differs."""
        wanted = list(rows.items())
        have = self._own(x)
        found: dict[Path, Expression] = {}
        for step_ in (1, -1):
            for (path, row), (source, own) in zip(wanted[::step_], have[::step_], strict=False):
                if row != own or (len(set(row)) == 1 and self.runs[0].shapes[x.index][source[1]] == 1):
                    break
                found.setdefault(path, ("source", source))
        return found

    def _leaf(self, value: Any, path: Path, chosen: dict[Path, Any], step: Step, number: int) -> Any:
        if isinstance(value, Held):
            return self._node(value)
        if isinstance(value, torch.device):
            return self._once("property", "device", [self._any_tensor(step)])
        if isinstance(value, torch.dtype) and value.is_floating_point:
            same = next((i for i in self.placed if self.first.dtypes[i] == value), None)
            return (
                encode(value, self._no_tensor) if same is None else self._once("property", "dtype", [self.placed[same]])
            )
        if self.training is not None and type(value) in (bool, float, int):
            other = dict(leaves((self.training.steps[number].args, self.training.steps[number].kwargs)))[path]
            if other != value:
                mode = self._once("state", "training", [])
                both = [encode(one, self._no_tensor) for one in (value, other)]
                return self._once("operator", "getitem", [both, mode])
        if path in chosen:
            return chosen[path]
        return encode(value, self._no_tensor)

    def _any_tensor(self, step: Step) -> Any:
        held = next((leaf for _, leaf in leaves((step.args, step.kwargs)) if isinstance(leaf, Held)), None)
        if held is not None:
            return self._node(held)
        if not self.placed:
            raise NotFollowedError("it makes a tensor from nothing")
        return next(iter(self.placed.values()))

    # Output

    def _output(self) -> Any:
        rows = [dict(leaves(run.frame.output)) for run in self.runs]
        sources = sources_of([*self.numbers, *self.sizes])
        paths = (path for path, _ in leaves(self.first.output))

        def leaf(value: Any) -> Any:
            path = next(paths)
            if isinstance(value, Held):
                return self._node(value)
            if type(value) is int:
                expression = express(tuple(row[path] for row in rows), sources)
                if expression is None:
                    raise NotFollowedError("a number that it returns follows no tensor")
                return self._expression(expression)
            return encode(value, self._no_tensor)

        return encode(self.first.output, leaf, every=True)


def encode(given: Any, leaf: Callable[[Any], Any], *, every: bool = False) -> Any:
    """Encode nested arguments as JSON, see `Description`; `leaf` encodes all leaves, or only those unknown here."""
    if isinstance(given, dict):
        return {"dict": [[key, encode(value, leaf, every=every)] for key, value in given.items()]}
    if isinstance(given, list):
        return [encode(item, leaf, every=every) for item in given]
    if isinstance(given, tuple):
        return {"tuple": [encode(item, leaf, every=every) for item in given]}
    if isinstance(given, slice):
        return {"slice": [encode(part, leaf, every=every) for part in (given.start, given.stop, given.step)]}
    if every:
        return leaf(given)
    if given is None or type(given) in (bool, int, str):
        return given
    if given is ...:
        return {"ellipsis": True}
    if type(given) is float:
        return given if math.isfinite(given) else {"float": str(given)}
    if isinstance(given, torch.dtype | torch.memory_format | torch.layout):
        return {"torch": str(given).removeprefix("torch.")}
    return leaf(given)
