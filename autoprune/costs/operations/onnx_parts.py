"""Nodes of an ONNX graph as parts of a latency model.

The graph is taken after onnxruntime has folded and fused it (batch norm into convolutions, scales into products), but
before it chooses memory layouts, because that choice depends on widths: blocks of channels for a convolution, plain
rows for a depthwise one whose channels fill no whole number of blocks. So the graph has the same nodes at all widths,
and the layout is chosen for each node alone, when it is timed. A convolution is timed with the change of layout that
the next convolution needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from autoprune.costs.latency.timing import Repeated

if TYPE_CHECKING:
    from autoprune.costs.operations.onnx_sessions import OnnxRuntime

Array = np.ndarray[Any, Any]

_CONVOLUTIONS = frozenset({"Conv", "FusedConv"})
_PASSED = frozenset({"Add", "BatchNormalization", "Clip", "Concat", "HardSigmoid", "Mul", "Relu", "Sigmoid"})
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Constant", "Shape"})
_PRODUCTS = ("MatMul", "Gemm", "Attention")
_ALIGNED = 4  # blocked layouts take multiples of four channels, whatever the block
_LONGEST = 64  # whole numbers in a constant that are sizes, and not data
_MOST_COPIES = 8
_COPIED_ELEMENTS = 2**20  # data that copies of a node may read and write; they drown what calling a session takes


@dataclass(frozen=True)
class _Input:
    """Input of a node: data, a weight, or whole numbers such as the sizes of a reshape."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.values if self.role == "values" else self.shape


@dataclass(frozen=True)
class _Node:
    """Node of a graph; implements `autoprune.costs.operations.parts.Operation`."""

    runtime: OnnxRuntime
    shell: ModelProto  # an empty graph with the versions of the model
    node: NodeProto
    inputs: tuple[_Input, ...]
    reader: str = ""  # the kind of convolution that reads what a convolution writes

    @property
    def numbers(self) -> tuple[int, ...]:
        own = [number for given in self.inputs for number in given.numbers]
        return (*own, *(number for attribute in self.node.attribute for number in _whole(attribute)))

    @property
    def template(self) -> str:
        return self.describe(iter(["_"] * len(self.numbers)))

    @property
    def kind(self) -> str:
        name = self.node.op_type
        if "Conv" in name:
            return _kind_of_convolution(self.node)
        if any(product in name for product in _PRODUCTS):
            return "matmul"
        return "norm" if "Normalization" in name else "elementwise"

    @property
    def aligned(self) -> int:
        return _ALIGNED if self.node.op_type in _CONVOLUTIONS else 1

    @property
    def module(self) -> str:
        return ""  # a graph of operators does not say

    def where(self) -> str:
        return f"{self.node.op_type} {self.node.name!r}"

    def describe(self, numbers: Iterator[str]) -> str:
        said = []
        for given in self.inputs:
            separator = "," if given.role == "values" else "x"
            said.append(f"{given.role} {given.dtype}[{separator.join(next(numbers) for _ in given.numbers)}]")
        for attribute in self.node.attribute:
            if whole := _whole(attribute):
                said.append(f"{attribute.name}={','.join(next(numbers) for _ in whole)}")
            elif attribute.type == AttributeProto.STRING:
                said.append(f"{attribute.name}={attribute.s.decode()}")
        read = f" read by a {self.reader}" if self.reader else ""
        return f"{self.node.op_type}({', '.join(said)}){read}"

    def make(self, numbers: Iterator[int]) -> Callable[[], Any]:
        """Make the sessions of a call at once, so that their set-up is not timed."""
        alone, feed = self._alone(numbers)
        if self.reader:
            chosen = _without_reader(self.runtime.optimised(self._read(alone).SerializeToString(), whole=True))
        else:
            chosen = self.runtime.optimised(alone.SerializeToString(), whole=True)
        chosen, feed = _without_reordering(self.runtime, chosen, feed)
        moved = sum(array.size for array in feed.values())
        copies = int(np.clip(_COPIED_ELEMENTS // max(moved, 1), 1, _MOST_COPIES))
        session = self.runtime.session(_copied(chosen, copies).SerializeToString(), optimise=False)
        return Repeated(lambda: session.run(None, feed), copies)

    def _alone(self, numbers: Iterator[int]) -> tuple[ModelProto, dict[str, Array]]:
        """Make a graph of this node only with other numbers, and noise as its inputs."""
        feed: dict[str, Array] = {}
        weights: dict[str, Array] = {}
        rng = np.random.default_rng(0)
        for given in self.inputs:
            own = [next(numbers) for _ in given.numbers]
            if given.role == "values":
                weights[given.name] = np.array(own, dtype=given.dtype).reshape(given.shape)
            elif given.role != "absent":
                noise = rng.random(own, dtype=np.float32) + np.float32(0.1)
                held = noise.astype(given.dtype) if given.dtype.startswith("float") else np.zeros(own, given.dtype)
                (feed if given.role == "data" else weights)[given.name] = held
        node = NodeProto()
        node.CopyFrom(self.node)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.INT:
                attribute.i = next(numbers)
            elif attribute.type == AttributeProto.INTS:
                attribute.ints[:] = [next(numbers) for _ in attribute.ints]
        outputs = [ValueInfoProto(name=name) for name in node.output if name]
        kept = [numpy_helper.from_array(held, name) for name, held in weights.items()]
        return _model_like(self.shell, [node], _infos(feed), outputs, kept), feed

    def _read(self, alone: ModelProto) -> ModelProto:
        """Make a graph of this convolution with a small one after it."""
        (weight,) = (tensor for tensor in alone.graph.initializer if tensor.name == self.node.input[1])
        channels = weight.dims[0]
        places = [1] * (len(weight.dims) - 2)
        grouped = self.reader == "grouped convolution"
        kernel = np.ones([channels, 1, *places] if grouped else [1, channels, *places], dtype=np.float32)
        groups = channels if grouped else 1
        reader = helper.make_node("Conv", [self.node.output[0], "kernel"], ["read"], "reader", group=groups)
        return _model_like(
            alone,
            [*alone.graph.node, reader],
            list(alone.graph.input),
            [ValueInfoProto(name="read")],
            [*alone.graph.initializer, numpy_helper.from_array(kernel, "kernel")],
        )


def _without_reader(model: ModelProto) -> ModelProto:
    """Cut the optimised graph of `_Node._read` before the reader."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    end = made_by["read"]
    dropped = [end]
    if end.op_type == "ReorderOutput":
        end = made_by[end.input[0]]
        dropped.append(end)
    nodes = [node for node in model.graph.node if node not in dropped]
    used = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in used]
    return _model_like(model, nodes, list(model.graph.input), [ValueInfoProto(name=end.input[0])], weights)


def node_operations(runtime: OnnxRuntime, model: ModelProto, inputs: Mapping[str, Array]) -> list[_Node]:
    """Nodes of a fused graph that compute, in order of execution."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    feed = {given.name: inputs[given.name] for given in model.graph.input if given.name not in constants}
    values = {**feed, **values_of(runtime, model, feed)}

    def read(name: str) -> _Input:
        if name in constants:
            tensor = constants[name]
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
            shape = tuple(tensor.dims)
            if dtype in ("int32", "int64") and np.prod(shape, dtype=np.int64) <= _LONGEST:
                return _Input(name, "values", dtype, shape, tuple(numpy_helper.to_array(tensor).ravel().tolist()))
            return _Input(name, "weight", dtype, shape)
        if name not in values:
            return _Input(name, "absent", "", ())
        return _Input(name, "data", values[name].dtype.name, values[name].shape)

    nodes = [node for node in model.graph.node if node.op_type not in _VIEWS]
    shell = _model_like(model, [], [], [], [])
    return [_Node(runtime, shell, node, tuple(map(read, node.input)), _reader(model, node)) for node in nodes]


def _reader(model: ModelProto, node: NodeProto) -> str:
    """Kind of the first convolution that reads the output of a convolution, also through nodes that keep layouts."""
    if node.op_type not in _CONVOLUTIONS:
        return ""
    reached = set(node.output)
    for other in model.graph.node:  # in order of execution
        if reached & set(other.input):
            if other.op_type in _CONVOLUTIONS:
                return _kind_of_convolution(other)
            if other.op_type in _PASSED:
                reached |= set(other.output)
    return ""


def _kind_of_convolution(node: NodeProto) -> str:
    groups = [attribute.i for attribute in node.attribute if attribute.name == "group"]
    return "grouped convolution" if groups and groups[0] > 1 else "convolution"


def values_of(runtime: OnnxRuntime, model: ModelProto, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Compute the outputs of all nodes of a graph, by name."""
    names = [name for node in model.graph.node for name in node.output if name]
    shown = ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(ValueInfoProto(name=name) for name in names)
    session = runtime.session(shown.SerializeToString(), optimise=False)
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def _without_reordering(
    runtime: OnnxRuntime, model: ModelProto, feed: Mapping[str, Array]
) -> tuple[ModelProto, dict[str, Array]]:
    """Remove the change of layout at the beginning of a graph, which depends on the node before it."""
    first = [n for n in model.graph.node if n.op_type == "ReorderInput" and n.input[0] in feed]
    rest = [node for node in model.graph.node if node not in first]
    if not first or not rest:
        return model, dict(feed)
    values = values_of(runtime, model, feed)
    fresh = {node.output[0]: values[node.output[0]] for node in first}
    read = {name for node in rest for name in node.input}
    fed = {name: array for name, array in {**feed, **fresh}.items() if name in read}
    return _model_like(model, rest, _infos(fed), list(model.graph.output), list(model.graph.initializer)), fed


def _copied(model: ModelProto, copies: int) -> ModelProto:
    """Make a graph that runs its nodes `copies` times; the outputs are those of the last."""
    made = {name for node in model.graph.node for name in node.output if name}
    nodes = []
    for k in range(copies - 1):
        for node in model.graph.node:
            again = NodeProto()
            again.CopyFrom(node)
            again.name = f"{node.name}_{k}"
            again.input[:] = [f"{name}_{k}" if name in made else name for name in node.input]
            again.output[:] = [f"{name}_{k}" if name else name for name in node.output]
            nodes.append(again)
    graph = model.graph
    return _model_like(model, [*nodes, *graph.node], list(graph.input), list(graph.output), list(graph.initializer))


def _model_like(
    model: ModelProto,
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    weights: list[onnx.TensorProto],
) -> ModelProto:
    graph: GraphProto = helper.make_graph(nodes, "part", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _infos(feed: Mapping[str, Array]) -> list[ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feed.items()
    ]


def _whole(attribute: AttributeProto) -> tuple[int, ...]:
    """The whole numbers of an attribute."""
    if attribute.type == AttributeProto.INT:
        return (attribute.i,)
    return tuple(attribute.ints) if attribute.type == AttributeProto.INTS else ()
