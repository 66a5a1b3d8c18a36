"""Inspection of a model: its prunable groups with their share of the costs, and the reasons why the rest stays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from autoprune.arguments import pointing
from autoprune.costs.structural import StructuralCosts
from autoprune.errors import NothingToPruneError
from autoprune.files.access import write_text
from autoprune.inspection.by_output import frozen_by_output
from autoprune.inspection.html import as_cell, as_html
from autoprune.inspection.text import as_text
from autoprune.protocols import FloatArray
from autoprune.search_spaces import Settings, make_space, why_no_less
from autoprune.structure.analysis import analyse
from autoprune.structure.call import PLACES, CallOrInputs, Outputs, call_of, example_of
from autoprune.structure.example import Example
from autoprune.structure.given import unwrap
from autoprune.structure.structure import Structure
from autoprune.structure.units import Frozen, Group

SIZES = "its forward needs a size that no attribute holds: write -1 or x.shape in views, or register_adapter()"
RETURNED = "returned by the model"
REMEDIES = {
    RETURNED: "right for the outputs that matter; where inner features are returned too, leave them out "
    "with autoprune.Call(outputs=...) or Call(forward=...)",
    " has no rule": "if these layers matter, compute the same with matrix products, convolutions and elementwise "
    "operations",
    "looked up by index": "the rows are what data may ask for; their width shrinks with the layers that read it",
    "size in Python": SIZES,
    "check saw": SIZES,
    "smaller module raised": SIZES,
    "tied to a fixed": "a constant of that size is in the way: as a buffer or parameter of the module it shrinks along",
    "part of constant size": "padding adds a constant number of channels; a learned projection would leave them free",
    "indexed by position": "numbers in Python choose these; chunk, split and learned projections leave a choice",
}
"""Advice to the user, by a part of the reason."""


@dataclass(frozen=True)
class GroupShare:
    """Worth of a group: the shares of the dense model that are removed if this group alone is as small as allowed.

    A layer between two groups shrinks with either, and so counts for both: shares of groups add up to at least the
    share that is reachable with all of them.

    Attributes:
        name: Name of the group.
        units: Number of its units.
        layers: Modules whose parameters or buffers shrink with it.
        flops_share: Share of the FLOPs, in [0, 1).
        params_share: Share of the parameters, in [0, 1).
    """

    name: str
    units: int
    layers: int
    flops_share: float
    params_share: float


@dataclass(frozen=True)
class BranchShare:
    """Residual branch that may be dropped, with its share of the costs of the dense model.

    Attributes:
        name: Module that it consists of, or most of it.
        parent: Smallest other branch around it: the block of an attention; empty if there is none.
        flops_share: Share of the FLOPs, in [0, 1).
        params_share: Share of the parameters, in [0, 1).
    """

    name: str
    parent: str
    flops_share: float
    params_share: float


@dataclass(frozen=True)
class FrozenPart:
    """Parameters that cannot shrink along some dimension, all for one reason.

    Attributes:
        reason: The reason, in words.
        tensors: The parameters, in forward order.
        params_share: Share of the dense model's parameters, in [0, 1], in the slices that stay along that dimension.
            They may be removed along another one: the first layer reads the model's inputs, but can lose outputs.
        remedy: Advice to the user; empty where there is none.
    """

    reason: str
    tensors: tuple[str, ...]
    params_share: float
    remedy: str


@dataclass(frozen=True, eq=False)
class Inspection:
    """Prunable groups of a model, and the reasons why the rest stays; ``print`` it.

    Attributes:
        model: Class of the model.
        structure: Structure that `inspect` found, for more detail.
        dense: Costs of the dense model: ``flops`` (multiply-accumulates of one sample), ``params`` and
            ``memory_bytes`` (parameters, buffers and the peak of activations, of `cost_batch` samples).
        removable: Share of each cost, in [0, 1), that is removed if every group is as small as allowed: the most that a
            search with the same `space` can reach.
        groups: In forward order.
        frozen: Largest share of the parameters first.
        untouched: Parameters that the forward pass did not read, with their number of elements; they stay.
        attributes: Sizes that modules keep in Python and that follow the units, such as ``"h.0.attn.num_heads"``.
        graphs: Modules that are delivered as graphs of their operations, because their code does not follow the widths.
        limits: Smallest groups of the space, in words; empty where these are single units.
        branches: Residual branches that ``space="depth"`` may drop, in forward order.
        undropped: Other residual branches, by the module that adds them, with the reason why they stay.
        cost_batch: Samples that ``memory_bytes`` is stated at.
    """

    model: str
    structure: Structure
    dense: Mapping[str, int]
    removable: Mapping[str, float]
    groups: tuple[GroupShare, ...]
    frozen: tuple[FrozenPart, ...]
    untouched: Mapping[str, int]
    attributes: tuple[str, ...]
    graphs: tuple[str, ...] = ()
    limits: str = ""
    branches: tuple[BranchShare, ...] = ()
    undropped: Mapping[str, str] = field(default_factory=dict)
    cost_batch: int = 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary of everything but `structure`, of which it has the device and memory of the trace."""
        return {
            "model": self.model,
            "traced_on": self.structure.device,
            "trace_bytes": self.trace_bytes,
            "dense": dict(self.dense),
            "removable": dict(self.removable),
            "groups": [asdict(group) for group in self.groups],
            "frozen": [{**asdict(part), "tensors": list(part.tensors)} for part in self.frozen],
            "untouched": dict(self.untouched),
            "attributes": list(self.attributes),
            "graphs": list(self.graphs),
            "limits": self.limits,
            "branches": [asdict(branch) for branch in self.branches],
            "undropped": dict(self.undropped),
            "cost_batch": self.cost_batch,
        }

    @property
    def trace_bytes(self) -> int:
        """Peak bytes of inputs and results of the traced pass; 0 on the meta device."""
        if self.structure.device == "meta":
            return 0
        batch = self.structure.terms.batch
        dense = self.structure.sizes[None].astype(np.float64)
        # State is the same at any batch, and activations grow with it.
        one, all_of_it = (StructuralCosts(self.structure, n).memory_bytes(dense)[0] for n in (batch, 2 * batch))
        return int(all_of_it - one)

    def to_html(self, path: str | Path | None = None) -> str:
        """Make a web page that loads nothing from elsewhere, and write it to `path` if one is given."""
        page = as_html(self)
        if path is not None:
            write_text(path, page)
        return page

    def _repr_html_(self) -> str:
        """Make the tables for notebooks."""
        return as_cell(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the text in IPython, in place of every field."""
        printer.text(str(self))

    def __str__(self) -> str:
        """Format as plain text of at most 100 columns."""
        return as_text(self)


@pointing(PLACES)
def inspect(
    model: nn.Module,
    example: CallOrInputs | None = None,
    *,
    space: str | Settings = "channels",
) -> Inspection:
    """Report the prunable groups of a model with their share of the costs, and the reasons why the rest stays.

    The model comes back unchanged. For a model in which nothing can be pruned, the inspection gives the reasons.

    Args:
        model: Any module that runs on the inputs; DataParallel, DDP and compiled wrappers are looked through.
        example: A tensor, a tuple of positional inputs or a dict of keyword inputs; None for the example that the model
            carries. A list of these covers the branches of a forward. Or a `Call` of such inputs, which also says how
            to run the model, which outputs matter, and how it is traced.
        space: As in `autoprune.search`; it limits how small groups may be. ``Channels(step=1, min_fraction=1e-9)`` lets
            each keep a single unit.

    Raises:
        ValueError: If there are no example inputs, or the model returns NaN or infinity for them, or the
            outputs select nothing from its return value.
        UnsupportedModelError: If the model is scripted, quantised, spread over devices, or cannot be copied.
        StructureCheckError: If a group fails and the checks are ``"strict"``.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> {group.name: group.units for group in inspect(model, torch.ones(2, 4)).groups}
        {'0': 8}
    """
    settings = make_space(space)
    model = unwrap(model)
    call = call_of(example)
    traced = example_of(model, call)
    structure = analyse(traced, checks=call.checks, rewrite=call.rewrite)
    costs = StructuralCosts(structure, call.cost_batch)
    groups = structure.groups
    least = _least(settings, structure)
    widths = np.tile(structure.dense.astype(np.float64), (len(least) + 2, 1))
    rows = np.arange(len(least))
    widths[rows, rows] = np.where(rows < len(groups), least, 0.0)  # row i: group i alone is as small as allowed
    widths[-1] = least  # every group is; the row before is dense
    table = {name: getattr(costs, name)(widths) for name in ("flops", "params", "memory_bytes")}
    shares = {name: ((cost[-2] - cost) / max(cost[-2], 1.0)).tolist() for name, cost in table.items()}
    parameters = dict(model.named_parameters())
    return Inspection(
        model=type(model).__name__,
        structure=structure,
        dense={name: round(cost[-2]) for name, cost in table.items()},
        removable={name: share[-1] for name, share in shares.items()},
        groups=tuple(
            GroupShare(group.name, group.size, _layers(group), shares["flops"][i], shares["params"][i])
            for i, group in enumerate(groups)
        ),
        frozen=_frozen(_by_output(traced, structure, call.outputs), parameters, table["params"][-2]),
        untouched={name: parameters[name].numel() for name in structure.untouched},
        attributes=tuple(f"{a.module}.{a.path}".lstrip(".") for a in structure.attributes),
        graphs=tuple(structure.graphs),
        limits=_limits(settings, structure, least[: len(groups)]),
        branches=tuple(
            BranchShare(branch.name, branch.parent or "", shares["flops"][i], shares["params"][i])
            for i, branch in enumerate(structure.branches, len(groups))
        ),
        undropped=structure.undropped,
        cost_batch=call.cost_batch,
    )


def _least(settings: Settings, structure: Structure) -> FloatArray:
    """Smallest width of each group in a space, then 0 for each branch that it may drop, shape (groups + branches,)."""
    least = structure.dense.astype(np.float64)
    order = {group.name: tuple(range(group.size)) for group in structure.groups}
    try:
        space = settings.bind(structure, order)
    except NothingToPruneError:  # a space without a choice
        return least
    found = space.widths(space.sizes[None] - 1)[0]
    least[: len(found)] = found
    return least


def _limits(settings: Settings, structure: Structure, least: FloatArray) -> str:
    """Name the settings that keep groups from being smaller; empty where none does."""
    if all(width <= group.multiple for width, group in zip(least, structure.groups, strict=True)):
        return ""
    kept = f"the smallest network of the space keeps {least.sum():.0f} of {structure.sizes.sum()} units"
    return f"{kept}, by {why_no_less(settings)}"


def _layers(group: Group) -> int:
    return len({slot.tensor.rpartition(".")[0] for slot in group.slots})


def what_stays(structure: Structure, model: nn.Module) -> tuple[FrozenPart, ...]:
    """Parameters that cannot shrink along some dimension, by reason; outputs of the model are not told apart."""
    stays = [(part, _remedy(part)) for part in structure.frozen]
    parameters = dict(model.named_parameters())
    return _frozen(stays, parameters, max(sum(each.numel() for each in parameters.values()), 1))


def _remedy(part: Frozen) -> str:
    return next((text for key, text in REMEDIES.items() if key in part.reason), "")


def _by_output(example: Example, structure: Structure, outputs: Outputs | None) -> list[tuple[Frozen, str]]:
    """Frozen slices, each with advice to the user; those of outputs by the key or index of the output."""
    told_apart = outputs is None and any(part.reason == RETURNED for part in structure.frozen)
    by_output = frozen_by_output(example) if told_apart else {}
    found = []
    for part in structure.frozen:
        keys = [key for key, own in by_output.items() if part.reason == RETURNED and (part.tensor, part.dim) in own]
        for key in keys:
            others = [other for other in by_output if other != key]
            remedy = f"if it does not matter, pass autoprune.Call(outputs={others if len(others) > 1 else others[0]!r})"
            found.append((replace(part, reason=f"returned as {key!r}"), remedy))
        if not keys:
            found.append((part, _remedy(part)))
    return found


def _frozen(
    stays: Sequence[tuple[Frozen, str]], parameters: Mapping[str, Tensor], total: float
) -> tuple[FrozenPart, ...]:
    """Frozen dimensions by reason: the union of the slices that stay, in each parameter."""
    moving: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for part, remedy in stays:
        left = moving[part.reason, remedy].get(part.tensor, 1.0)
        moving[part.reason, remedy][part.tensor] = left * (1 - part.size / parameters[part.tensor].shape[part.dim])
    found = []
    for (reason, remedy), tensors in moving.items():
        elements = sum((1 - left) * parameters[name].numel() for name, left in tensors.items())
        found.append(FrozenPart(reason, tuple(tensors), elements / total, remedy))
    return tuple(sorted(found, key=lambda part: -part.params_share))
