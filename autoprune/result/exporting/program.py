"""Programs of ``torch.export``, with as many dynamic dimensions as the model allows; failures with their place."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection

from autoprune.errors import UnsupportedModelError
from autoprune.files.access import brief
from autoprune.result.exporting.call import Call
from autoprune.result.exporting.parity import Outputs

BATCH, SEQUENCE = "batch", "sequence"
DIMENSIONS = {0: BATCH, 1: SEQUENCE}
_OPERATION = re.compile(r"\b(?:aten|prims|prim|torchvision|quantized|higher_order)[.:]+\w+(?:\.\w+)?")
_NOISY = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


Traced = tuple[ExportedProgram, tuple[str, ...], dict[int, tuple[int, ...]]]
"""Program, names of its inputs, and the dynamic dimensions of each."""


@dataclass(frozen=True, eq=False)
class Program:
    """Traced program with the calls that it is compared on.

    Attributes:
        exported: The program.
        calls: Calls to compare: that it was traced on, and one of other sizes where some are dynamic.
        expected: Outputs of the model for each of them.
        inputs: Names of the input tensors.
        dynamic: Names of the dynamic dimensions of each input that has some.
        notes: What was fixed, and why.
    """

    exported: ExportedProgram
    calls: tuple[Call, ...]
    expected: tuple[Outputs, ...]
    inputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]
    notes: tuple[str, ...]


def traced(call: Call, notes: tuple[str, ...] = ()) -> Program:
    """Trace a call with dynamic dimensions, and with fewer where tracing or another size goes wrong.

    Args:
        call: The call.
        notes: Those of the program begin with these.

    Raises:
        UnsupportedModelError: If it cannot be traced at any size; names the operation or the line.
    """
    told = list(notes)
    attempts = [call]
    for fewer in (call.fixed(1), call.fixed(0, 1)):
        if fewer.dynamic != attempts[-1].dynamic:
            attempts.append(fewer)
    for tried in attempts[:-1]:
        try:
            return _traced(tried, told)
        except UnsupportedModelError as error:
            fixed = SEQUENCE if any(1 in dims for dims in tried.dynamic.values()) else BATCH
            told.append(f"the {fixed} has a fixed size: {brief(ValueError(error))}")
    return _traced(attempts[-1], told)


def _traced(call: Call, notes: list[str]) -> Program:
    exported = _export(call, strict=False)
    inputs, found = _dynamic_in(exported, call)
    if found != call.dynamic:
        exported, inputs, found = _by_bytecode(call, (exported, inputs, found))
    if found != call.dynamic:  # trace again, because files would name sizes that became constants later in the trace
        lost = sorted({dim for i, dims in call.dynamic.items() for dim in dims if dim not in found.get(i, ())})
        told = [f"the {DIMENSIONS[dim]} has a fixed size: the model's code makes it a constant" for dim in lost]
        return _traced(replace(call, dynamic=found), [*notes, *told])
    other = call.of_other_sizes()
    calls = (call,) if other is None else (call, other)
    try:
        expected = tuple(each.run() for each in calls)
        for each in calls[1:]:
            each.outputs_of(exported.module())
    except UnsupportedModelError:
        raise
    except Exception as error:  # the model or its program may refuse other sizes in any way
        raise UnsupportedModelError(f"{call.name} does not run with inputs of other sizes: {brief(error)}") from error
    dynamic = {inputs[i]: {dim: DIMENSIONS[dim] for dim in dims} for i, dims in found.items()}
    return Program(exported, calls, expected, inputs, dynamic, tuple(dict.fromkeys(notes)))


def _by_bytecode(call: Call, before: Traced) -> Traced:
    """Trace again by analysing bytecode, which follows ``len(x)``, unless that goes wrong or fixes as much."""
    try:
        exported = _export(call, strict=True)
        inputs, found = _dynamic_in(exported, call)
    except UnsupportedModelError:
        return before
    return (exported, inputs, found) if found == call.dynamic else before


def _export(call: Call, *, strict: bool) -> ExportedProgram:
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]  # torch's
    for i, dims in call.dynamic.items():
        shapes[call.tensors[i]] = dict.fromkeys(dims, Dim.AUTO)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # runtimes have no fused encoder layer
    try:
        with torch.no_grad(), quiet(), redirect_stderr(io.StringIO()):  # to which the tracer prints whole graphs
            free = shapes if call.dynamic else None
            exported = torch.export.export(
                call.module, call.args, dict(call.kwargs), dynamic_shapes=free, strict=strict
            )
    except Exception as error:  # the tracer raises many types, and so may a user's forward
        raise UnsupportedModelError(
            f"{call.name} cannot be exported{why(error)}; autoprune.save, which needs no trace, still works"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    for module in exported.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # paths of the machine, longer than all else
    return exported


def _dynamic_in(exported: ExportedProgram, call: Call) -> tuple[tuple[str, ...], dict[int, tuple[int, ...]]]:
    """Names of the input tensors, and the dimensions of each that are no constants."""
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    names = [name for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    tensors = [name for name in names if isinstance(placeholders[name].meta.get("val"), torch.Tensor)]
    if len(tensors) != len(call.tensors):
        raise UnsupportedModelError(
            f"{call.name} was exported with {len(tensors)} inputs, and takes {len(call.tensors)} tensors"
        )
    sizes = [placeholders[name].meta["val"].shape for name in tensors]
    found = {i: tuple(dim for dim in dims if _free(sizes[i][dim])) for i, dims in call.dynamic.items()}
    if any(0 in dims and 0 not in found[i] for i, dims in call.dynamic.items()):  # samples of all inputs, or of none
        found = {i: tuple(dim for dim in dims if dim) for i, dims in found.items()}
    return tuple(tensors), {i: dims for i, dims in found.items() if dims}


def _free(size: Any) -> bool:
    """Return whether a traced size may have other values: it may also have become a constant later in the trace."""
    return isinstance(size, torch.SymInt) and not size.node.shape_env.replace(size.node.expr).is_number


def why(error: BaseException) -> str:
    """Say which operation or line an exporter stopped at, for a message: ``" at aten.foo: ..."``."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # None ends the loop
    operations = [found[0] for each in reversed(chain) if (found := _OPERATION.search(str(each)))]
    lines = [line for each in reversed(chain) if (line := _line(each))]
    at = f" at {operations[0]}" if operations else ""
    where = f" in {lines[0]}" if lines else ""
    deepest = next((each for each in reversed(chain) if str(each).strip()), chain[-1])
    told = brief(ValueError(str(deepest).strip().partition("\n\n")[0]))
    return f"{at}{where}: {told}"


def _line(error: BaseException) -> str:
    """Line of the model's code in a message of the tracer; empty if it names none."""
    found = re.search(r"""(?:File "|\()[^"()]*?([^"()/]+?)"?(?:, line |:)(\d+),? in (\w+)""", str(error))
    return f"{found[1]}:{found[2]} ({found[3]})" if found else ""


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Silence libraries, by default the exporters: what they warn of is measured afterwards."""
    loggers = [logging.getLogger(name) for name in libraries or _NOISY]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def described(program: Program, parity: dict[str, Any]) -> dict[str, Any]:
    """Describe an exported model for the metadata of its file."""
    return {
        "format": "autoprune-export",
        "version": 1,
        "model": program.calls[0].name,
        "dynamic": {name: {str(dim): word for dim, word in dims.items()} for name, dims in program.dynamic.items()},
        "parity": parity,
        "notes": list(program.notes),
        "torch": torch.__version__,
    }
