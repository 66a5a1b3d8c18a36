"""ONNX files: exported from a traced program, simplified where possible, and compared under onnxruntime."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import UnsupportedModelError
from autoprune.files.access import brief
from autoprune.imports import importing
from autoprune.result.exporting.call import Call, names_of, plain
from autoprune.result.exporting.parity import Parity, compare
from autoprune.result.exporting.program import DIMENSIONS, Program, described, quiet, why

try:
    with importing():
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # of which torch.onnx says less clearly that it is missing
except ImportError as error:
    raise ImportError("format='onnx' needs onnx, onnxscript and onnxruntime; install autoprune[onnx]") from error

METADATA = "autoprune"
"""Key of the metadata in the file's ``metadata_props``."""

MOST_BYTES = 2**31 - 1
"""Largest file that the format allows."""


def write_onnx(program: Program, fresh: Path, tolerance: float | None) -> Parity:
    """Write an ONNX file that gives the module's outputs under onnxruntime.

    Raises:
        UnsupportedModelError: If it cannot be exported or run, or its outputs differ.
    """
    call = program.calls[0]
    _require_numpy_types(call, program)
    model = _exported(program)
    notes = dict(described(program, {}), onnxruntime=onnxruntime.__version__)
    slim = _slimmed(model)
    parity = None
    if slim is not None:
        try:
            parity = _compared(program, slim, tolerance)
            model, notes["simplified_by"] = slim, "onnxslim"
        except UnsupportedModelError:  # then the file is not simplified
            pass
    if parity is None:
        parity = _compared(program, model, tolerance)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps({**notes, "parity": parity.to_json()})
    fresh.write_bytes(model.SerializeToString())
    return parity


def _exported(program: Program) -> onnx.ModelProto:
    call = program.calls[0]
    with torch.no_grad():
        outputs = names_of(plain(call.reference(*call.args, **call.kwargs)))
    try:
        with quiet():
            made = torch.onnx.export(program.exported, dynamo=True, verbose=False, output_names=_free(outputs, program))
        if made is None or made.model_proto.ByteSize() > MOST_BYTES:
            raise ValueError("it is over 2 GiB, the most that one file may hold; use format='torch'")
        model = made.model_proto
    except Exception as error:  # the exporter raises many types
        raise UnsupportedModelError(
            f"{call.name} cannot be exported to ONNX{why(error)}; format='torch' may still work"
        ) from error
    for graph in _graphs(model.graph):
        del graph.value_info[:]  # shapes inside, which runtimes infer
        for node in graph.node:
            del node.metadata_props[:]  # paths of the machine, longer than all else
            node.doc_string = ""
    _name_dimensions(model.graph, program)
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _free(names: list[str], program: Program) -> list[str]:
    """Names of outputs that no input has, nor another output."""
    taken = set(program.inputs)
    free = []
    for name in names:
        word = re.sub(r"\W", "_", name)
        while word in taken:
            word = f"{word}_out"
        taken.add(word)
        free.append(word)
    return free


def _name_dimensions(graph: onnx.GraphProto, program: Program) -> None:
    """Name symbolic sizes after what they are: ``batch`` and ``sequence``, or ``decoder_input_ids_sequence``."""
    words: dict[str, str] = {}
    for info in graph.input:
        for dim, size in enumerate(info.type.tensor_type.shape.dim):
            if size.dim_param and size.dim_param not in words:
                word = program.dynamic.get(info.name, {}).get(dim, DIMENSIONS.get(dim, f"dim_{dim}"))
                taken = word in words.values() and dim > 0
                words[size.dim_param] = f"{info.name}_{word}" if taken else word
    for info in (*graph.input, *graph.output):
        for size in info.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\w+", lambda found: words.get(found[0], found[0]), size.dim_param)


def _slimmed(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The model simplified by onnxslim; None where that is not installed, or fails."""
    try:
        with importing():
            import onnxslim
    except ImportError:
        return None
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    try:
        with quiet():
            made: Any = onnxslim.slim(copied)
    except Exception:  # of another library, whose help is optional
        return None
    same = [i.name for i in made.graph.input] == [i.name for i in model.graph.input]
    return made if same and made.ByteSize() <= model.ByteSize() else None


def _compared(program: Program, model: onnx.ModelProto, tolerance: float | None) -> Parity:
    name = f"{program.calls[0].name} exported to ONNX"
    try:
        session = _session(model.SerializeToString())
        found = [_run(session, program, call) for call in program.calls]
    except Exception as error:  # onnxruntime has a separate type for each failure
        raise UnsupportedModelError(f"{name} cannot be run by onnxruntime: {brief(error)}") from error
    return compare(program.expected, found, name, tolerance)


def _run(session: onnxruntime.InferenceSession, program: Program, call: Call) -> list[Tensor]:
    given = dict(zip(program.inputs, call.tensors, strict=True))
    feed = {node.name: given[node.name].detach().cpu().numpy() for node in session.get_inputs()}
    return [torch.from_numpy(np.asarray(output)) for output in session.run(None, feed)]


def _session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _require_numpy_types(call: Call, program: Program) -> None:
    outputs = [tensor for each in program.expected for tensor in each.expected]
    for tensor in (*call.tensors, *outputs):
        try:
            tensor.detach().cpu()[:0].numpy() if tensor.ndim else tensor.detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"format='onnx' takes no inputs and outputs of type {kind}, which NumPy does not have, so that they "
                "cannot be compared under onnxruntime; pass model.float(), or use format='torch'"
            ) from error
