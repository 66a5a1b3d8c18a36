"""Networks exported to ONNX, compared with PyTorch, and run by onnxruntime."""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from autoprune.costs.latency.timing import Call
from autoprune.costs.operations.onnx_parts import node_operations
from autoprune.costs.operations.parts import ONNXRUNTIME, YARDSTICK, Family, Part, edit_to, parts_of
from autoprune.errors import UnsupportedModelError
from autoprune.protocols import IntArray
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import Slicer
from autoprune.structure.structure import Structure

try:
    import onnx
    import onnxruntime
except ImportError as error:
    raise ImportError("runtime='onnxruntime' needs onnx and onnxruntime; install autoprune[onnx]") from error

_DEFAULT = "CPUExecutionProvider"
_OPSET = 20  # the newest that torch.onnx.export(dynamo=False) writes; it has LayerNormalization and Gelu
_CLOSE = 1e-3  # largest difference of an output from PyTorch's, as a fraction of the largest output


@final
class OnnxRuntime:
    """onnxruntime with one provider, all graph optimisations, and as many threads as PyTorch has.

    Args:
        provider: Where it runs, such as ``"CUDAExecutionProvider"``; the CPU if empty.

    Raises:
        ValueError: If the provider is not installed.
    """

    def __init__(self, provider: str = "") -> None:
        self._provider = provider or _DEFAULT
        available = onnxruntime.get_available_providers()
        if self._provider not in available:
            raise ValueError(f"the provider of onnxruntime must be one of {available}, got {self._provider!r}")
        self.name = ONNXRUNTIME if self._provider == _DEFAULT else f"{ONNXRUNTIME}:{self._provider}"
        self.versions = {ONNXRUNTIME: str(onnxruntime.__version__), "onnx": str(onnx.__version__)}
        self.elsewhere = self._provider != _DEFAULT

    def network(self, example: Example) -> Call:
        """Export a module, compare the outputs of the session with those of the module, and return the session's call.

        Raises:
            UnsupportedModelError: If the module cannot be exported or run, or the outputs differ.
        """
        exported, inputs, expected = export(example)
        name = type(example.model).__name__
        try:
            session = self.session(exported)
            feed = {node.name: inputs[node.name] for node in session.get_inputs()}
            found = session.run(None, feed)
        except Exception as error:  # onnxruntime has a separate type for each failure
            raise UnsupportedModelError(f"{name} exported to ONNX cannot be run by onnxruntime: {error}") from error
        for i, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
            apart = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0.0))
            if not apart <= _CLOSE * max(float(np.abs(ours).max(initial=0.0)), 1e-3):
                raise UnsupportedModelError(
                    f"{name} exported to ONNX gives other outputs than in PyTorch: output {i} is up to "
                    f"{apart:.3g} apart; its latency under onnxruntime would be of another network"
                )
        return lambda: session.run(None, feed)

    def parts(self, example: Example, structure: Structure, seed: int) -> tuple[list[Family], list[Part]]:
        """Nodes of the optimised graph.

        Raises:
            UnsupportedModelError: If the module cannot be exported, or pruned ones have other nodes.
        """
        slicer = Slicer(example.model)

        def nodes(widths: IntArray) -> list[Any]:
            cut = slicer.cut(edit_to(structure, widths)).eval()
            exported, inputs, _ = export(example.of(cut))
            return node_operations(self, self.optimised(exported, whole=False), inputs)

        return parts_of(nodes, structure, seed)

    def yardstick(self, device: torch.device) -> Call:
        """A product of matrices."""
        matrix = np.random.default_rng(0).random((YARDSTICK, YARDSTICK), dtype=np.float32)
        kind = onnx.TensorProto.FLOAT
        info = [onnx.helper.make_tensor_value_info(name, kind, matrix.shape) for name in ("x", "y")]
        weight = onnx.numpy_helper.from_array(matrix, "w")
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "yardstick", info[:1], info[1:], [weight]
        )
        opsets = [onnx.helper.make_opsetid("", _OPSET)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = self.session(model.SerializeToString())
        return lambda: session.run(None, {"x": matrix})

    def session(self, model: bytes, optimise: bool = True) -> onnxruntime.InferenceSession:
        """Make a session as a user would, or one that takes the graph as it is."""
        levels = onnxruntime.GraphOptimizationLevel
        options = self._options(levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL)
        return onnxruntime.InferenceSession(model, options, providers=[self._provider])

    def optimised(self, model: bytes, whole: bool) -> onnx.ModelProto:
        """The graph after fusion, and after the choice of memory layouts too if `whole`."""
        levels = onnxruntime.GraphOptimizationLevel
        options = self._options(levels.ORT_ENABLE_ALL if whole else levels.ORT_ENABLE_EXTENDED)
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "model.onnx")
            onnxruntime.InferenceSession(model, options, providers=[self._provider])
            return onnx.load(options.optimized_model_filepath)

    def _options(self, level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # it warns that layouts written to a file are this machine's, as intended
        # Many sessions live at once, and threads of one that spin would slow down the others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options


def export(example: Example) -> tuple[bytes, dict[str, np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """Export a model to ONNX at these sizes, with its inputs by name and the outputs of PyTorch for them.

    It uses the exporter that traces TorchScript: a table needs some fifty exports, and the one of ``torch.export``
    takes 10 to 20 times as long for each. Optimised by onnxruntime, both have the same nodes, except for reshapes and
    pooling.

    Raises:
        UnsupportedModelError: If it cannot be exported.
    """
    whole = _Whole(example).eval()
    devices = {str(tensor.device) for tensor in [*whole.tensors, *whole.parameters()]}
    if devices != {"cpu"}:
        raise UnsupportedModelError(
            f"runtime='onnxruntime' exports models from the CPU, and this one is on {', '.join(sorted(devices))}; move "
            "it with model.cpu(), and name a provider that runs elsewhere, such as 'onnxruntime:CUDAExecutionProvider'"
        )
    if any(tensor.dtype == torch.bfloat16 for tensor in [*whole.tensors, *whole.parameters()]):
        raise UnsupportedModelError(
            "runtime='onnxruntime' takes no bfloat16, which NumPy does not have; pass model.float() and inputs like it"
        )
    names = [f"input_{i}" for i in range(len(whole.tensors))]
    file: Any = io.BytesIO()  # which the exporter takes, and its annotations do not know
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|copyreg).*")
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export")
        warnings.filterwarnings("ignore", category=TracerWarning)  # sizes are meant to be constants
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx")  # outputs are compared below
        expected = [leaf.detach().numpy() for leaf in whole(*whole.tensors)]
        try:
            torch.onnx.export(
                whole, tuple(whole.tensors), file, input_names=names, opset_version=_OPSET, dynamo=False, verbose=False
            )
        except Exception as error:  # the exporter raises many types, and so may a user's forward
            raise UnsupportedModelError(
                f"{type(example.model).__name__} cannot be exported to ONNX for runtime='onnxruntime': {error}"
            ) from error
    inputs = {name: tensor.numpy() for name, tensor in zip(names, whole.tensors, strict=True)}
    return file.getvalue(), inputs, expected


class _Whole(nn.Module):
    """Module that takes and returns only tensors."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        self.model = example.model
        self._forward = example.forward
        self._leaves, self._tree = tree_flatten((example.args, dict(example.kwargs)))
        self.tensors = [leaf.detach() for leaf in self._leaves if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._tree)
        returned = self._forward(self.model, *args, **kwargs)
        return tuple(leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor))
