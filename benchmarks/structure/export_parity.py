"""Exported networks of the zoo, dense and pruned to half of the FLOPs: parity, sizes of files, and time.

Run ``python -m benchmarks.structure.export_parity`` from the root of the repository: about 15 minutes of processor time
on one thread; it goes on where it stopped, and names repeat these alone. Each network is pruned by one share of the
units of every group, chosen at random, and exported to ONNX and as a program of torch.export. Time is processor time of
onnxruntime on one thread, for 8 samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from autoprune.costs.structural import StructuralCosts
from autoprune.errors import UnsupportedModelError
from autoprune.protocols import Pruning
from autoprune.result.exporting.export import export
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from benchmarks.structure.export_report import HEADER, rows, summary
from benchmarks.support.common import RESULTS, environment, table, write
from zoo import ZOO, Entry, draw, resnet, settled
from zoo.hf import HF_ZOO
from zoo.tasks import TASK_ZOO

COMMAND = "python -m benchmarks.structure.export_parity"
FOUND = RESULTS / "export.json"
SHARE = 0.5
"""Share of the FLOPs that a pruned network may keep."""

NETWORKS = {
    "images": ("resnet20", "vgg_bn", "mobilenet_v2", "shufflenet_v2", "densenet", "convnext", "resnet20_wide"),
    "detection": ("ssd", "centre_points", "detector"),
    "maps": ("unet", "deeplab", "fcn"),
    "super-resolution": ("edsr",),
    "points": ("pointnet",),
    "recommendation": ("dlrm", "two_tower"),
    "time series": ("tcn", "lstm_forecaster", "nbeats"),
    "audio": ("wavenet", "keyword_spotter", "speaker_tdnn", "WhisperForConditionalGeneration"),
    "graphs": ("gcn",),
    "text": (
        *("text_cnn", "transformer_classifier", "BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"),
        *("Qwen3ForCausalLM", "T5ForConditionalGeneration"),
    ),
    "image transformers": ("ViTForImageClassification", "SwinForImageClassification"),
}
KIND = {name: kind for kind, names in NETWORKS.items() for name in names}
ROUNDS, CALLS, BATCH = 15, 10, 8


def entry_of(name: str) -> Any:
    """Entry of a network in the zoo, or of a ResNet-20 with 4.3 million parameters, nearly all of its file."""
    if name == "resnet20_wide":
        shapes = ((3, 16, 16),)
        return Entry(name, partial(settled, partial(resnet, 20, width=64), shapes), partial(draw, shapes), frozenset())
    return {**ZOO, **TASK_ZOO, **HF_ZOO}[name]


def halved(structure: Structure, share: float = SHARE) -> Pruning:
    """Keep the largest equal share of the units of every group that meets the share of the FLOPs."""
    costs = StructuralCosts(structure)
    dense = structure.dense.astype(np.float64)
    limit = share * costs.flops(dense[None])[0]
    count = len(structure.groups)
    generator = np.random.default_rng(0)
    orders = [generator.permutation(group.size) for group in structure.groups]
    for kept in np.arange(1.0, 0.0, -0.01):
        widths = [
            max(group.multiple, round(kept * group.size / group.multiple) * group.multiple)
            for group in structure.groups
        ]
        if costs.flops(np.array([[*widths, *dense[count:]]]))[0] <= limit:
            break
    chosen = zip(structure.groups, orders, widths, strict=True)
    return Pruning({group.name: tuple(sorted(order[:width].tolist())) for group, order, width in chosen})


def measure(name: str) -> dict[str, Any]:
    """Export one network, dense and pruned, and time both."""
    entry = entry_of(name)
    inputs = entry.inputs()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    model = entry.build()
    structure = analyse(Example(model, args, kwargs))
    pruning = halved(structure)
    small = structure.build(model, pruning)
    widths = np.array([len(pruning.kept[group.name]) for group in structure.groups], dtype=np.float64)
    widths = np.concatenate([widths, structure.dense[len(widths) :]])
    flops = StructuralCosts(structure).flops(np.stack([structure.dense.astype(np.float64), widths]))
    found: dict[str, Any] = {"kind": KIND[name], "flops": float(flops[1] / flops[0])}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for which, module in (("dense", model), ("pruned", small)):
            path = Path(folder) / f"{which}.onnx"
            found[which] = {"weights": weights_of(module), **exported(module, path, inputs)}
            if path.exists():
                sessions[which] = session_of(path)
        if len(sessions) == 2:
            found["ms"] = timed(sessions, inputs)
    return found


def weights_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def exported(module: nn.Module, path: Path, inputs: Any) -> dict[str, Any]:
    """Export to both formats: differences, sizes and notes, or the error."""
    found: dict[str, Any] = {}
    for ending, target in ((".onnx", "onnx"), (".pt2", "torch")):
        file = path.with_suffix(ending)
        try:
            written = export(module, file, inputs)
        except UnsupportedModelError as error:
            found[target] = {"error": str(error)}
            continue
        found[target] = {
            "absolute": written.parity.absolute,
            "relative": written.parity.relative,
            "bytes": file.stat().st_size,
            "dynamic": sorted({word for dims in written.dynamic.values() for word in dims.values()}),
            "notes": list(written.notes),
        }
    if path.exists():
        found["onnx"]["tensors"] = sum(
            len(tensor.raw_data) or tensor.ByteSize() for tensor in onnx.load(path).graph.initializer
        )
    return found


def session_of(path: Path) -> onnxruntime.InferenceSession:
    """Session on one thread that does not spin."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def timed(sessions: Mapping[str, onnxruntime.InferenceSession], inputs: Any) -> dict[str, float]:
    """Median processor time of a call in milliseconds; the two take turns."""
    tensors = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    feeds = {}
    for which, session in sessions.items():
        nodes = session.get_inputs()
        given = inputs if isinstance(inputs, dict) else dict(zip([n.name for n in nodes], tensors, strict=False))
        free = all(node.shape and node.shape[0] == "batch" for node in nodes)
        feeds[which] = {node.name: repeated(given[node.name], free).numpy() for node in nodes}
    seconds: dict[str, list[float]] = {which: [] for which in sessions}
    for _ in range(ROUNDS):
        for which, session in sessions.items():
            began = time.process_time()
            for _ in range(CALLS):
                session.run(None, feeds[which])
            seconds[which].append((time.process_time() - began) / CALLS)
    return {which: 1e3 * statistics.median(values) for which, values in seconds.items()}


def repeated(tensor: torch.Tensor, free: bool) -> torch.Tensor:
    """Inputs of 8 samples, where the batch is free."""
    return tensor[torch.arange(BATCH) % len(tensor)] if free else tensor


def in_turn() -> list[str]:
    """Networks, the first of every kind before the second of any."""
    return [name for _, name in sorted((names.index(name), name) for names in NETWORKS.values() for name in names)]


def main() -> None:
    """Measure what is missing, and write the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="networks to measure again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(FOUND.read_text()) if FOUND.exists() else {"environment": environment(COMMAND), "networks": {}}
    for name in given.names or [name for name in in_turn() if name not in results["networks"]]:
        results["networks"][name] = measure(name)
        FOUND.write_text(json.dumps(results, indent=1) + "\n")
        print(name, results["networks"][name]["pruned"]["onnx"], flush=True)
    found = results["networks"]
    write("export", "Exported networks", results, f"{summary(found)}\n\n{table(HEADER, rows(found, list(KIND)))}")


if __name__ == "__main__":
    main()
