"""What can be pruned from a model, what each part of it is worth, and why the rest stays."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from autoprune.costs.structural import StructuralCosts
from autoprune.structure.analysis import analyse
from autoprune.structure.examples import ExampleInputs, example_inputs_of, unwrap
from autoprune.structure.structure import Structure
from autoprune.structure.trace import Forward
from autoprune.structure.units import Group

WIDTH = 100
GROUPS_SHOWN = 40
REASONS_SHOWN = 3

REMEDIES = {
    "returned by the model": "right for the outputs that matter; where inner features are returned too, pass forward= "
    "that leaves them out",
    " has no rule": "if these layers matter, compute the same with matrix products, convolutions and elementwise "
    "operations",
    "not checked within": "pass smaller example_inputs= (one or two samples), which check faster",
}
"""What a user can do, by a part of the reason."""


@dataclass(frozen=True)
class GroupShare:
    """What a group is worth: the shares of the dense model that go when this group alone keeps a single unit.

    A layer between two groups shrinks with either, and so counts for both: shares of groups add up to at least the
    share that is reachable with all of them.

    Attributes:
        name: Name of the group.
        units: How many units it has.
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
class FrozenPart:
    """Parameters that cannot shrink along some dimension, all for one reason.

    Attributes:
        reason: Why, in words.
        tensors: The parameters, in forward order.
        params_share: Share of the dense model's parameters, in [0, 1], that lie in what stays along that dimension.
            They may still go along another one: the first layer reads the model's inputs, but can lose outputs.
        remedy: What a user can do about it; empty where nothing is known.
    """

    reason: str
    tensors: tuple[str, ...]
    params_share: float
    remedy: str


@dataclass(frozen=True, eq=False)
class Inspection:
    """What can be pruned and why the rest cannot; ``print`` it.

    Attributes:
        model: Class of the model.
        structure: What `inspect` found, for more detail.
        dense: Costs of the dense model: ``flops`` (multiply-accumulates of one sample), ``params`` and
            ``memory_bytes`` (parameters, buffers and the peak of activations, batch size 1).
        removable: Share of each cost, in [0, 1), that goes when every group keeps a single unit.
        groups: In forward order.
        frozen: Largest share of the parameters first.
        untouched: Parameters that the forward pass did not read, with their number of elements; they stay.
    """

    model: str
    structure: Structure
    dense: Mapping[str, int]
    removable: Mapping[str, float]
    groups: tuple[GroupShare, ...]
    frozen: tuple[FrozenPart, ...]
    untouched: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: all but `structure`, of which it names the device that the pass was traced on."""
        return {
            "model": self.model,
            "traced_on": self.structure.device,
            "dense": dict(self.dense),
            "removable": dict(self.removable),
            "groups": [asdict(group) for group in self.groups],
            "frozen": [{**asdict(part), "tensors": list(part.tensors)} for part in self.frozen],
            "untouched": dict(self.untouched),
        }

    def __str__(self) -> str:
        """Plain text of at most 100 columns."""
        return "\n".join([*self._summary(), *self._groups(), *self._stays()])

    def _summary(self) -> list[str]:
        units, groups = sum(group.units for group in self.groups), len(self.groups)
        what = f"{units} removable units in {groups} group{'s' * (groups > 1)}" if units else "nothing can be pruned"
        lines = [f"{self.model}: {what}", "", f"  {'cost':12}    dense  removable"]
        meanings = ("multiply-accumulates of one sample", "", "weights, buffers and peak of activations, one sample")
        for (name, dense), meaning in zip(self.dense.items(), meanings, strict=True):
            amount = f"{_human(dense).upper()}B" if name == "memory_bytes" else _human(dense)
            lines.append(f"  {name:12}  {amount:>7}    {_percent(self.removable[name]):>7}  {meaning}".rstrip())
        return lines

    def _groups(self) -> list[str]:
        if not self.groups:
            return []
        shown = self.groups[:GROUPS_SHOWN]
        width = min(max(len("group"), *(len(group.name) for group in shown)), WIDTH - 40)
        lines = ["", f"  {'group':{width}}   units  layers    flops   params"]
        lines.append("  " + "-" * (len(lines[-1]) - 2))
        for group in shown:
            shares = f"{_percent(group.flops_share):>7}  {_percent(group.params_share):>7}"
            lines.append(f"  {_shorten(group.name, width):{width}}  {group.units:>6}  {group.layers:>6}  {shares}")
        if len(self.groups) > len(shown):
            lines.append(f"  ... and {len(self.groups) - len(shown)} more")
        note = (
            "flops, params: share of the dense model that goes when this group alone keeps one unit (above: when every "
            "group does). A layer between two groups counts for both."
        )
        return [*lines, "", *_wrap(note, "  ")]

    def _stays(self) -> list[str]:
        title = "What stays, and the share of the params there (which may still shrink along another dimension)"
        lines = ["", f"  {title}"]
        for part in self.frozen[:REASONS_SHOWN]:
            lines += _wrap(f"{part.reason}: {_some(part.tensors)}", f"  {_percent(part.params_share):>7}  ")
            lines += _wrap(f"-> {part.remedy}", " " * 11) if part.remedy else []
        if (rest := len(self.frozen) - REASONS_SHOWN) > 0:
            lines.append(f"           ... and {rest} more reason{'s' * (rest > 1)}: see .frozen")
        if self.untouched:
            count = f"{_human(sum(self.untouched.values()))} params that the forward pass did not read"
            lines += _wrap(f"{count}: {_some(list(self.untouched))}", " " * 11)
        if not self.frozen and not self.untouched:
            lines.append(" " * 11 + ("nothing" if self.groups else "the model has no parameters"))
        if self.structure.device != "meta":
            note = f"Traced on real values ({self.structure.device}), because the model cannot run on the meta device."
            lines += ["", *_wrap(note, "  ")]
        return lines


def inspect(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    forward: Forward | None = None,
    checks: str = "on",
) -> Inspection:
    """Say what can be pruned from a model, what each group is worth, and why the rest stays.

    The model comes back unchanged. A model in which nothing can be pruned gives an inspection that says why.

    Args:
        model: Any module that runs on the inputs; DataParallel, DDP and compiled wrappers are looked through.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs; None for the example that
            the model carries (``example_input_array``, ``dummy_inputs``, timm's ``pretrained_cfg``).
        forward: ``forward(model, *args, **kwargs)`` where calling the model is not enough; returns what matters.
        checks: ``"on"`` freezes a group that fails a check; ``"strict"`` raises instead.

    Raises:
        ValueError: If there are no example inputs, or the model returns NaN or infinity for them.
        UnsupportedModelError: If the model is scripted, quantised, spread over devices, or cannot be copied.
        StructureCheckError: If a group fails and `checks` is ``"strict"``.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> [(group.name, group.units) for group in inspect(model, torch.ones(2, 4)).groups]
        [('0', 8)]
    """
    model = unwrap(model)
    args, kwargs = example_inputs_of(model, example_inputs)
    structure = analyse(model, args, kwargs, forward=forward, checks=checks)
    costs = StructuralCosts(structure)
    groups = structure.groups
    widths = np.tile(structure.sizes.astype(np.float64), (len(groups) + 2, 1))
    np.fill_diagonal(widths[: len(groups)], 1.0)  # row i: group i alone keeps one unit
    widths[-1] = 1.0  # every group does; the row before is dense
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
        frozen=_frozen(structure, parameters, float(table["params"][-2])),
        untouched={name: parameters[name].numel() for name in structure.untouched},
    )


def _layers(group: Group) -> int:
    return len({slot.tensor.rpartition(".")[0] for slot in group.slots})


def _frozen(structure: Structure, parameters: Mapping[str, Tensor], total: float) -> tuple[FrozenPart, ...]:
    """Frozen dimensions by reason: the union of the slices that stay, in each parameter."""
    moving: dict[str, dict[str, float]] = defaultdict(dict)
    for part in structure.frozen:
        left = moving[part.reason].get(part.tensor, 1.0)
        moving[part.reason][part.tensor] = left * (1 - part.size / parameters[part.tensor].shape[part.dim])
    found = []
    for reason, tensors in moving.items():
        elements = sum((1 - left) * parameters[name].numel() for name, left in tensors.items())
        remedy = next((text for key, text in REMEDIES.items() if key in reason), "")
        found.append(FrozenPart(reason, tuple(tensors), elements / total, remedy))
    return tuple(sorted(found, key=lambda part: -part.params_share))


def _human(number: float) -> str:
    """Three digits and a decimal prefix, as budgets take them: 2580000 is ``2.58M``."""
    power = 0
    while number >= 999.5 and power < 4:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{('', 'k', 'M', 'G', 'T')[power]}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _some(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _shorten(name: str, width: int) -> str:
    """Leave out the middle of a name that is too long: both ends tell names apart."""
    half = (width - 3) // 2
    return name if len(name) <= width else f"{name[:half]}...{name[-half:]}"


def _wrap(text: str, first: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
