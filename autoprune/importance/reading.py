"""Find the weights that read units among the operations of a model, and observe the rows that each multiplies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from autoprune.importance.calibration import Calibration
from autoprune.importance.latest_product import LatestProduct
from autoprune.importance.padding import kept_positions, positions_of
from autoprune.structure.owners import owners
from autoprune.structure.slicing.adapters import refresh_flat_weights
from autoprune.structure.structure import Structure

CHUNK_BYTES = 64 * 2**20
"""Most memory for rows on their way into moments."""

_CASTS = ("_to_copy", "clone")


@dataclass(frozen=True)
class Reader:
    """A weight, or some rows of it, as the matrix (outputs, columns) that multiplies what it reads.

    Attributes:
        name: Of the parameter.
        start: First row of the parameter's matrix that is meant.
        outputs: Number of rows.
        columns: Number of columns: (channel, position of the kernel) where a convolution reads.
        dim: Dimension of the parameter that meets the inputs: 1, or 0 where it is stored (inputs, outputs).
    """

    name: str
    start: int
    outputs: int
    columns: int
    dim: int


def matrix_of(parameter: Tensor, reader: Reader) -> Tensor:
    """The matrix (outputs, columns) of a reader, from the dense parameter."""
    matrix = parameter.flatten(1) if reader.dim else parameter.T
    return matrix[reader.start : reader.start + reader.outputs]


See = Callable[[Reader, Callable[[], Iterator[Tensor]]], None]
"""``see(reader, rows)``: ``rows()`` yields the rows that the reader multiplies in chunks, (n, columns) each."""


class Reading(TorchDispatchMode):  # type: ignore[no-untyped-call]  # as its parent has it
    """Observes every product of rows with a weight that reads units.

    It observes ungrouped convolutions and matrix products, whatever Python code calls them: layers, recurrent cells,
    projections of attention, functions with bare parameters. A weight is left out where two modules hold it, where
    another operation reads it before the product, and where the product takes only some of its columns. Without
    gradients a product that nothing reads, such as the logits, is not computed: outputs of such a pass have no values.

    Args:
        model: Runs inside; in evaluation mode.
        structure: Of the model.
        see: Called for each product.
        tied: Observe weights that several modules hold, too.
        names: Observe these weights, whether they read units or not; None for those that read units.

    Attributes:
        source: What the product that `see` is called for multiplies, as the operation gets it.
        normalised: Readers whose outputs batch norm reads.
        otherwise: Parameters that go through other operations, too.
        firsts: For each reader the readers that read the same values just before it, or itself where none did.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        see: See,
        tied: bool = False,
        names: Collection[str] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._see = see
        self._receive: See | None = None
        self._at_outputs = False
        self._all = names is not None
        self.source: Tensor | None = None
        self._units_of = structure.units_of
        self._places: dict[int, list[tuple[int, str, nn.Parameter]]] = {}
        held = Counter(owner.name for owner in owners(model))
        self._parameters = dict(model.named_parameters())
        for name, parameter in self._parameters.items():
            if parameter.numel():
                place = self._places.setdefault(parameter.untyped_storage().data_ptr(), [])
                place.append((int(parameter.storage_offset()), name, parameter))
        read = (name for name in self._parameters if name in (structure.units_of if names is None else names))
        self._wanted = {name for name in read if tied or held[name] == 1}
        self._single = {name for name in self._parameters if held[name] == 1}
        self.otherwise: set[str] = set()
        self.normalised: set[Reader] = set()
        self.firsts: dict[Reader, set[Reader]] = defaultdict(set)
        self._latest: tuple[Any, Reader, Tensor] | None = None  # with what was read, so that its memory stays taken
        self._biases: dict[Reader, set[str | None]] = defaultdict(set)
        self._awaiting: MutableMapping[Tensor, Reader] = WeakIdKeyDictionary()  # products that a bias may follow
        self._casts: dict[int, tuple[str, Tensor]] = {}
        self._shapes: MutableMapping[Tensor, tuple[int, ...]] = WeakIdKeyDictionary()
        self._made_by: MutableMapping[Tensor, Reader] = WeakIdKeyDictionary()
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._mask: Tensor | None = None
        self._latest_product: LatestProduct | None = None  # None where gradients are recorded

    @contextmanager
    def batch(self, mask: Tensor | None, gradients: bool = False) -> Iterator[None]:
        """Observe one forward pass; `mask` is True at real positions, bool, shape (samples, positions)."""
        fused = torch.backends.mha.get_fastpath_enabled()
        self._mask = mask
        self._latest_product = None if gradients else LatestProduct()
        with ExitStack() as stack:
            handle = register_module_forward_pre_hook(lambda module, _: refresh_flat_weights(module))
            stack.callback(handle.remove)
            torch.backends.mha.set_fastpath_enabled(False)  # whose products cannot be seen
            stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
            if self._recurrent:  # whose fused kernels hide their products, too
                stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
                torch._C._set_mkldnn_enabled(False)  # not `flags`, which warns of hardware that is not there
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(self)
            yield
        self._casts.clear()
        self._latest = None

    def backward(self, loss: Tensor, receive: See, at_outputs: bool = False) -> None:
        """Run a backward pass inside `batch`, and show what it returns through each weight.

        ``receive(reader, rows)`` gets the rows W^T g, shape (n, columns), for the gradients g of the loss towards the
        outputs of a product with the matrix W, where its inputs need a gradient; with `at_outputs` the rows g
        themselves, shape (n, outputs).
        """
        self._receive = receive
        self._at_outputs = at_outputs
        try:
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        finally:
            self._receive = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and observe it."""
        if self._latest_product is None:
            out = func(*args, **(kwargs or {}))
        else:
            out = self._latest_product.run(func, args, kwargs or {})
        name = func.overloadpacket.__name__
        if self._receive is not None:
            if name in ("mm", "bmm", "convolution_backward"):
                self._returned(name, args, out, self._receive)
        elif name in ("mm", "addmm", "bmm", "convolution"):
            self._product(name, args, out)
        elif "batch_norm" in name and isinstance(args[0], Tensor) and args[0] in self._made_by:
            self.normalised.add(self._made_by[args[0]])
        elif name in ("view", "_unsafe_view"):
            self._viewed(args[0], out)
        elif not any(returned.alias_info is not None for returned in func._schema.returns) or name == "add_":
            self._else(name, args, kwargs, out)
        return out

    def bias_of(self, reader: Reader) -> str | None:
        """Parameter that is added to every product of this matrix and to nothing else; None without one."""
        found = self._biases[reader]
        (name,) = found if len(found) == 1 else (None,)
        others = [other for other, names in self._biases.items() if name in names and other.name != reader.name]
        return None if others or name not in self._single else name

    def _viewed(self, x: Tensor, out: Tensor) -> None:
        self._shapes[out] = tuple(x.shape)
        if x in self._awaiting and out.shape[-1:] == x.shape[-1:]:
            self._awaiting[out] = self._awaiting[x]

    def _else(self, name: str, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        """Note the parameters that an operation reads; a copy in another type stands for its original."""
        if name in ("add", "add_") and not kwargs and all(isinstance(each, Tensor) for each in args):
            for product, bias in (args, args[::-1]):
                reader = self._awaiting.get(product)
                added = self._name(bias)
                if reader is not None and added is not None:
                    self._biases[reader] = self._biases[reader] - {None} | {added}
                    return
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (found := self._name(leaf)) is not None:
                if name in _CASTS and isinstance(out, Tensor) and out.stride() == leaf.stride():
                    self._casts[out.untyped_storage().data_ptr()] = found, out
                else:
                    self.otherwise.add(found)

    def _name(self, tensor: Tensor) -> str | None:
        if tensor.numel() == 0 or tensor.layout != torch.strided:
            return None
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in self._casts:
            return self._casts[pointer][0]
        for offset, name, parameter in self._places.get(pointer, ()):
            if offset <= tensor.storage_offset() < offset + parameter.numel():
                return name
        return None

    def _product(self, kind: str, args: tuple[Any, ...], out: Tensor) -> None:
        bias, x, weight = (args[0], args[1], args[2]) if kind == "addmm" else (None, args[0], args[1])
        if kind == "convolution":
            bias = args[2]
        name = self._name(weight)
        if name is None:
            for each in (x, bias):
                if each is not None and (other := self._name(each)) is not None:
                    self.otherwise.add(other)
            return
        reader = self._reader(kind, name, weight, args) if name in self._wanted else None
        if reader is None or not self._observes(reader):
            self.otherwise.add(name)
            return
        self._made_by[out] = reader
        if bias is None and kind != "convolution":
            self._awaiting[out] = reader
        self._biases[reader].add(None if bias is None else self._name(bias) or "")
        self.firsts[reader].add(self._first(reader, x, args[3:] if kind == "convolution" else ()))
        self.source = x
        self._see(reader, lambda: self._rows(kind, x, args))

    def _observes(self, reader: Reader) -> bool:
        return self._all or self._units_of[reader.name][reader.dim] is not None

    def _first(self, reader: Reader, x: Tensor, geometry: Sequence[Any]) -> Reader:
        """Reader that was the first to read these values, with no other read in between."""
        if x.is_inference() or x.layout != torch.strided:  # without a version, which shows writes
            return reader
        storage = x.untyped_storage().data_ptr(), x.storage_offset(), x._version
        seen = *storage, x.shape, x.stride(), self._shapes.get(x), reader.columns, str(geometry)
        if self._latest is None or self._latest[0] != seen:
            self._latest = seen, reader, x
        return self._latest[1]

    def _returned(self, kind: str, args: tuple[Any, ...], out: Any, receive: See) -> None:
        """Show a product of gradients with a weight; matrix products have the weight in the second or first place."""
        if kind == "convolution_backward":
            places = [("convolution", args[2], out[0], args[0])]
        else:  # g W as it is written, or (W^T g^T) of inputs that are laid out by columns
            places = [
                (kind, args[1].transpose(-1, -2), out, args[0]),
                (kind, args[0], out.transpose(-1, -2), args[1].transpose(-1, -2)),
            ]
        for product, weight, found, gradient in places:
            name = self._name(weight)
            if name in self._wanted and found is not None:
                reader = self._reader(product, name, weight, args[1:])
                if reader is not None and self._observes(reader):
                    if self._at_outputs:
                        rows = partial(self._gradient_rows, product, gradient)
                    else:
                        rows = partial(self._returned_rows, product, args[0], weight, found)
                    receive(reader, rows)
                return

    def _gradient_rows(self, kind: str, gradient: Tensor) -> Iterator[Tensor]:
        if kind == "convolution":
            rows = gradient.movedim(1, -1)
            kept = kept_positions(self._mask, tuple(rows.shape[:-1]))
            yield rows.reshape(-1, rows.shape[-1]) if kept is None else rows[kept]
        else:
            yield from self._rows(kind, gradient, ())

    def _returned_rows(self, kind: str, gradient: Tensor, weight: Tensor, out: Tensor) -> Iterator[Tensor]:
        if kind != "convolution":
            yield from self._rows(kind, out, ())
            return
        rows = gradient.movedim(1, -1)
        kept = kept_positions(self._mask, tuple(rows.shape[:-1]))
        rows = rows.reshape(-1, rows.shape[-1]) if kept is None else rows[kept]
        matrix = weight.flatten(1)
        for part in torch.split(rows, max(1, CHUNK_BYTES // (8 * matrix.shape[1]))):
            if part.numel():
                yield part @ matrix

    def _reader(self, kind: str, name: str, weight: Tensor, args: tuple[Any, ...]) -> Reader | None:
        """Matrix that a product multiplies with; None where it is not made of a parameter's rows."""
        parameter = self._parameters[name]
        if kind == "convolution":
            transposed, groups = args[6], args[8]
            if transposed or groups != 1 or weight.shape != parameter.shape:
                return None
            return Reader(name, 0, len(parameter), parameter[0].numel(), 1)
        if kind == "bmm":
            if weight.stride(0) != 0 and len(weight) > 1:
                return None
            weight = weight[0]
        offset = 0 if weight.untyped_storage().data_ptr() in self._casts else parameter.storage_offset()
        offset = weight.storage_offset() - offset
        columns, outputs = weight.shape
        whole = parameter.numel() == weight.numel()
        rows = weight.stride() == (1, columns) and columns == parameter[0].numel() and offset % columns == 0
        if parameter.is_contiguous() and rows and not (whole and len(parameter) != outputs):
            return Reader(name, offset // columns, outputs, columns, 1)
        if parameter.ndim == 2 and whole and weight.stride() == parameter.stride() and weight.shape == parameter.shape:
            return Reader(name, 0, outputs, columns, 0)
        return None

    def _rows(self, kind: str, x: Tensor, args: tuple[Any, ...]) -> Iterator[Tensor]:
        if kind == "convolution":
            yield from unfolded(x, args[1].shape[2:], args[3], args[4], args[5], self._mask)
            return
        shape = self._shapes.get(x, tuple(x.shape))
        kept = kept_positions(self._mask, shape[:-1])
        rows = x.reshape(-1, x.shape[-1])
        if kept is not None and kept.numel() == len(rows):
            rows = rows[kept.flatten()]
        for part in torch.split(rows, max(1, CHUNK_BYTES // (8 * max(rows.shape[1], 1)))):
            if part.numel():
                yield part


def unfolded(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """Unfold the inputs of a convolution into rows that its flattened weight multiplies, (n, columns) each."""
    space = len(kernel)
    x = F.pad(x, [each for size in reversed(padding) for each in (size, size)])
    for dim in range(space):
        x = x.unfold(2 + dim, dilation[dim] * (kernel[dim] - 1) + 1, stride[dim])[..., :: dilation[dim]]
    x = x.movedim(1, 1 + space)  # samples, positions, channels, kernel: a view, and much larger than its storage
    columns = x.shape[1 + space :].numel()
    kept = kept_positions(mask, tuple(x.shape[: 1 + space]))
    size = max(1, CHUNK_BYTES // (8 * max(x[:1].numel(), 1)))
    for start in range(0, len(x), size):
        rows = x[start : start + size].reshape(-1, columns)
        if kept is not None:
            rows = rows[kept[start : start + size].flatten()]
        if rows.numel():
            yield rows


def watch(calibration: Calibration, see: See) -> Reading:
    """Run the model itself on the batches, and call `see` for every product with a weight that reads units."""
    reading = Reading(calibration.model, calibration.structure, see)
    for batch in calibration.batches:
        mask = positions_of(batch)
        with reading.batch(mask):
            calibration.forward(calibration.model, batch)
    return reading
