"""Linear maps in place of dropped blocks, merged into the layers that feed them, so that no operation is added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from autoprune.importance.calibration import Calibration
from autoprune.importance.padding import kept_positions, positions_of
from autoprune.protocols import IntArray
from autoprune.structure.branches.branch import Branch
from autoprune.structure.branches.handover import Run, runs_of
from autoprune.structure.owners import owners
from autoprune.structure.slicing.dropped import returned
from autoprune.structure.slicing.slicing import Edit

MOST_ROWS = 8192
"""Most positions of the calibration samples that maps are fitted to."""

MOST_BYTES = 2**29
"""Most memory for what blocks and the layers before them give at these positions."""

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges that are tried, as multiples of the mean square of the layer's outputs."""

LEAST_GAIN = 0.98
"""Largest share of the held-out error that a map may leave: any ridge gains a little by chance."""

_HELD_OUT = 4  # one row in four judges the ridges; drawn, because positions of sequences repeat
_AGREES = 1e-3  # relative difference between a layer's output and its product


@dataclass(frozen=True)
class LinearMap:
    """Change of a layer's output that stands for a run of blocks.

    Attributes:
        change: Added to the output (n, d) as ``output @ change``, shape (d, d).
        shift: Added to it, shape (d,); None for a layer without bias.
    """

    change: Tensor
    shift: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """Return what it adds to outputs, (n, d)."""
        out = x @ self.change
        return out if self.shift is None else out + self.shift


class LinearMaps:
    """Fits the sum of what a run of blocks adds to the stream by a linear function of the output of the layer before.

    With ``x = s + m``, where the layer's output m is the last to be added, blocks that turn x into y are replaced by
    ``s + m + m T``: T is the ridge regression of ``y - x`` on m in the dense model. Rows held out choose the ridge, and
    whether the blocks are only left out. The map of a run is fitted when a candidate first drops it, and kept.

    Args:
        calibration: The dense model and the samples.
        branches: Of its structure.

    Reference:
        Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
        arXiv:2505.02819, here with a ridge towards no change and, where there is a bias, an intercept.
    """

    def __init__(self, calibration: Calibration, branches: Sequence[Branch]) -> None:
        self._branches = branches
        self._blocks = {module: b for b in branches if b.whole for module in b.modules}
        modules = dict(calibration.model.named_modules())
        held = [owner.name for owner in owners(calibration.model)]
        fed_by = {b.fed_by for b in self._blocks.values() if b.fed_by}
        self._feeds = {name: modules[name] for name in sorted(fed_by) if held.count(f"{name}.weight") == 1}
        self._dims: dict[str, int] = {}  # of the weight, along which the outputs of each layer lie
        self._rows: dict[tuple[str, str], list[Tensor]] = {}
        self._found: dict[tuple[Run, bytes], LinearMap | None] = {}
        if self._feeds:
            self._collect(calibration, modules)

    @property
    def useful(self) -> bool:
        """Return whether any run of blocks can be replaced."""
        return bool(self._dims)

    def apply(self, module: nn.Module, edit: Edit, replace: Callable[[nn.Module, str, Tensor], None]) -> None:
        """Merge the maps of the runs that an edit drops into the layers of its module.

        Args:
            module: Cut by the edit, its layers re-fitted.
            edit: The edit.
            replace: ``replace(module, name, value)`` gives a parameter another value.
        """
        for run in runs_of(self._branches, edit.dropped):
            name = f"{run.fed_by}.weight"
            if run.fed_by not in self._dims or name in edit.zeroed:
                continue
            dim = self._dims[run.fed_by]
            found = self._map_of(run, edit.slices.get(name, {}).get(dim))
            if found is None:
                continue
            weight = module.get_parameter(name).detach()
            change = found.change.to(weight)
            replace(module, name, weight + (change.T @ weight if dim == 0 else weight @ change))
            if found.shift is not None:
                bias = module.get_parameter(f"{run.fed_by}.bias").detach()
                replace(module, f"{run.fed_by}.bias", bias + bias @ change + found.shift.to(bias))

    def _map_of(self, run: Run, kept: IntArray | None) -> LinearMap | None:
        """Fit the map of a run for the channels of the stream that stay; None if the blocks are better left out."""
        key = run, b"" if kept is None else kept.tobytes()
        if key not in self._found:
            fed = torch.cat(self._rows["fed", run.fed_by])
            after = torch.cat(self._rows["out", run.blocks[-1]])
            added = after - torch.cat(self._rows["in", run.blocks[0]])
            if kept is not None:
                index = torch.from_numpy(kept).to(fed.device)
                fed = fed[:, index]
                added = added[:, index]
            bias = getattr(self._feeds[run.fed_by], "bias", None) is not None
            # Norms divide by the length of the stream, but the few tokens where it is a thousand times longer, such as
            # the first, are those that attention rests on: the root is between the two.
            weight = after.norm(dim=1, keepdim=True).clamp(min=torch.finfo(after.dtype).tiny).rsqrt()
            self._found[key] = fitted_map(fed, added, weight, bias) if len(fed) == len(added) else None
        return self._found[key]

    @torch.no_grad()
    def _collect(self, calibration: Calibration, modules: Mapping[str, nn.Module]) -> None:
        """Observe the blocks and the layers that feed them at some positions of every batch."""
        widths = [min(layer.get_parameter("weight").shape) for layer in self._feeds.values()]
        row_bytes = 4 * max(widths) * (2 * len(self._blocks) + len(widths))
        most = max(min(MOST_ROWS, MOST_BYTES // row_bytes) // max(len(calibration.batches), 1), 1)
        mask: Tensor | None = None
        batches = 0

        def keep(kind: str, name: str, given: Tensor) -> None:
            rows = given.detach().flatten(0, -2)
            real = kept_positions(mask, given.shape[:-1])
            if real is not None:
                rows = rows[real.flatten()]
            drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(batches))[:most]
            index = drawn.sort().values.to(rows.device)  # the same for all that has as many rows
            self._rows.setdefault((kind, name), []).append(rows[index].float())

        with ExitStack() as stack:
            for name, branch in self._blocks.items():
                handle = modules[name].register_forward_hook(_watching(name, branch, keep), with_kwargs=True)
                stack.callback(handle.remove)
            for name, layer in self._feeds.items():
                stack.callback(layer.register_forward_hook(self._watching_layer(name, keep)).remove)
            for batch in calibration.batches:
                batches += 1
                mask = positions_of(batch)
                calibration.forward(calibration.model, batch)

    def _watching_layer(self, name: str, keep: Callable[[str, str, Tensor], None]) -> Callable[..., None]:
        def note(layer: Any, args: tuple[Any, ...], output: Any) -> None:
            if name not in self._dims:
                dim = _output_dim(layer, args[0], output)
                if dim is None:
                    return
                self._dims[name] = dim
            keep("fed", name, output)

        return note


def _watching(name: str, branch: Branch, keep: Callable[[str, str, Tensor], None]) -> Callable[..., None]:
    """Make a hook that notes the stream that a block is given, and the one that it hands on."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        instead = tree_leaves(returned(branch.modules[name], args, kwargs))
        pairs = zip(instead, tree_leaves(output), strict=True)
        changed = [(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor) and x is not y]
        if len(changed) == 1:
            keep("in", name, changed[0][0])
            keep("out", name, changed[0][1])

    return note


def _output_dim(layer: Any, x: Tensor, output: Tensor) -> int | None:
    """Dimension of a layer's weight along which its outputs lie; None if it is no product with that weight."""
    few = x.flatten(0, -2)[:8]
    expected = output.flatten(0, -2)[:8]
    bias = getattr(layer, "bias", None)
    for dim, weight in ((0, layer.weight), (1, layer.weight.T)):
        if weight.shape == (expected.shape[1], few.shape[1]):
            error = (F.linear(few, weight, bias) - expected).abs().max()
            if error <= _AGREES * expected.abs().max():
                return dim
    return None


def fitted_map(fed: Tensor, added: Tensor, weight: Tensor, intercept: bool) -> LinearMap | None:
    """Regress what is added, (n, d), on the output of a layer, (n, d); None where held-out rows are better without.

    Args:
        fed: The layer's output.
        added: The sum of what the blocks add to the stream.
        weight: Factor of each row's error, shape (n, 1).
        intercept: Whether a constant is fitted, too.
    """
    fed, added, weight = (each.double() for each in (fed, added, weight))
    order = torch.randperm(len(fed), generator=torch.Generator().manual_seed(0)).to(fed.device)
    held = order % _HELD_OUT == 0
    part = _Regression(fed[~held], added[~held], weight[~held], intercept)

    def error(found: LinearMap | None) -> float:
        left = added[held] if found is None else added[held] - found.of(fed[held])
        return float((weight[held] * left).square().sum())

    errors = {ridge: error(part.map(ridge)) for ridge in RIDGES}
    best = min(errors, key=errors.__getitem__)
    if not held.any() or errors[best] > LEAST_GAIN * error(None):
        return None
    found = _Regression(fed, added, weight, intercept).map(best)
    return LinearMap(found.change.float(), None if found.shift is None else found.shift.float())


class _Regression:
    """Weighted ridge regression for several ridges: one decomposition serves all."""

    def __init__(self, x: Tensor, y: Tensor, weight: Tensor, intercept: bool) -> None:
        share = weight.square() / weight.square().sum()
        self._means = ((share * x).sum(0), (share * y).sum(0)) if intercept else None
        if self._means is not None:
            x = x - self._means[0]
            y = y - self._means[1]
        x, y = weight * x, weight * y
        self._values, self._vectors = torch.linalg.eigh(x.T @ x)
        self._target = self._vectors.T @ (x.T @ y)
        self._scale = self._values.mean()

    def map(self, ridge: float) -> LinearMap:
        """Solve for one ridge."""
        change = self._vectors @ (self._target / (self._values.clamp(min=0) + ridge * self._scale)[:, None])
        return LinearMap(change, None if self._means is None else self._means[1] - self._means[0] @ change)
