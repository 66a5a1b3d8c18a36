"""Prior of the search: the expected loss of each option before any evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.importance.anchors import Anchors, anchors
from autoprune.importance.calibration import Calibration
from autoprune.importance.criteria import Criterion
from autoprune.importance.database.build import layer_database
from autoprune.importance.dropped import dearer, drops_of, measure_drops
from autoprune.importance.reconstruction import Removal, reconstruction_errors
from autoprune.importance.sensitivity import output_changes
from autoprune.protocols import FloatArray, IntArray, Pruning, SearchSpace
from autoprune.structure.structure import Structure

log = logging.getLogger(__name__)

Prior = Literal["auto", "criterion", "database", "reconstruction", "sensitivity"]
PRIORS = get_args(Prior)
MAGNITUDES = ("l1", "l2", "bn_scale", "activation_mean")
"""Criteria whose squares are energies."""
LOSSES = ("taylor",)
"""Criteria that are comparable between groups as they are."""


def expected_losses(
    kind: str,
    space: SearchSpace,
    scores: Mapping[str, Tensor],
    criterion: str | Criterion | None,
    calibration: Calibration,
) -> tuple[FloatArray, ...] | None:
    """Expected loss of every option of every dimension alone: d arrays of shape (sizes[j],), 0 for dense.

    Args:
        kind: ``"reconstruction"``: the squared error of the layers that read a group, relative to what they compute,
            in one forward pass over a few samples; where no such layer is seen, as ``"criterion"``.
            ``"sensitivity"``: the change of the outputs of the whole model, see `output_changes`; as
            ``"reconstruction"`` where the model has no gradients. ``"database"``: the loss of as many units in a layer
            database, whose order is that of the criterion ``"obs"``. ``"criterion"``: sums of the scores of the units
            removed, see `criterion_losses`. ``"auto"``: ``"reconstruction"`` for models with batch norm, which corrects
            much of the effect of an error on later layers, else ``"sensitivity"``.
        space: Gives the units or weights that each option removes.
        scores: Importance of the units of each group.
        criterion: Criterion of the scores; None where no unit is ranked.
        calibration: The dense model, and the samples for errors of layers and changes of outputs.

    Returns:
        None if a dimension neither removes units nor sets weights to zero, or drops what cannot be measured, so that it
        has no prior. Weights set to zero lose a share of their squared sum, for every kind, see `criterion_losses`.
        Branches that are dropped lose what all units inside them do, for errors and changes of outputs corrected by
        `dropped_losses`.
    """
    return next(iter(rival_losses(kind, space, scores, criterion, calibration, rivals=False).values()), None)


ESTIMATED = "estimated"
MEASURED = "branches measured"
REFITTED = "branches measured, re-fit foreseen"
PRICED = "layer database"
DEARER = {"branches 4 times": 4.0, "branches 16 times": 16.0}
"""Factors on the losses of dropped branches, which no re-fit was measured with, by name."""
_REFIT = 1.5  # power; losses of MiniLM's heads and neurons after a re-fit follow the share removed to the power 2.2


def rival_losses(
    kind: str,
    space: SearchSpace,
    scores: Mapping[str, Tensor],
    criterion: str | Criterion | None,
    calibration: Calibration,
    rivals: bool = True,
    fitted: Sequence[FloatArray | None] = (),
) -> dict[str, tuple[FloatArray, ...]]:
    """Expected losses as `expected_losses` gives them, with others to compare them with.

    Where the prior is ``"auto"`` and the sensitivity measures it, others are corrected by measured losses of the
    branches of the model, see `autoprune.importance.anchors.Anchors`, with and without the effect of a re-fit; one more
    is that of a layer database, where units are ranked by it. Of models with batch norm, others expect more of branches
    that are dropped: their losses are measured without a re-fit, and those of widths are what it leaves.

    Args:
        kind: As for `expected_losses`.
        space: As there.
        scores: As there.
        criterion: As there.
        calibration: As there.
        rivals: Look for others.
        fitted: Losses after a re-fit of the dimensions that have them, in the unit of errors of layers; empty, or None
            for each dimension that keeps its estimate.

    Returns:
        By name, `ESTIMATED` first; empty where there is no prior.
    """
    model = calibration.model
    if criterion is None:
        zeroed = _zeroed_losses(space, dict(model.named_parameters()))
        if zeroed is not None or kind == "criterion":
            return {} if zeroed is None else {ESTIMATED: zeroed}
    batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    corrected = rivals and kind == "auto" and not batch_norm
    if kind == "auto":
        kind = "reconstruction" if batch_norm else "sensitivity"
    estimates = _estimated(kind, space, scores, criterion, calibration)
    if estimates is None:
        return {}
    losses = estimates.losses(calibration)
    if kind == "reconstruction":
        losses = tuple(
            row if fit is None else fit for row, fit in zip(losses, fitted or [None] * len(losses), strict=True)
        )
    found = {ESTIMATED: losses}
    if rivals and batch_norm and estimates.drops:
        found |= {name: dearer(losses, estimates.drops, factor) for name, factor in DEARER.items()}
    dropped = [name for prunings in estimates.drops.values() for each in prunings for name in each.dropped]
    measured = anchors(calibration, dropped) if corrected else None
    if measured is not None:
        found |= {MEASURED: estimates.corrected(measured, 0.0), REFITTED: estimates.corrected(measured, _REFIT)}
    if corrected and criterion == "obs" and "database" in calibration.derived:
        priced = _estimated("database", space, scores, criterion, calibration)
        found |= {} if priced is None else {PRICED: priced.losses(calibration)}
    return found


@dataclass(frozen=True)
class _Estimates:
    """Estimated losses of the options of each dimension alone.

    Attributes:
        kind: Their kind.
        sizes: Number of options of each dimension.
        units: Number of units of each group.
        removals: Dimensions, each with a group and the units that its options remove there.
        errors: Of each removal, shape (options,).
        drops: Prunings of the options of each dimension that drops branches.
    """

    kind: str
    sizes: IntArray
    units: Mapping[str, int]
    removals: Sequence[tuple[int, Removal]]
    errors: Sequence[FloatArray]
    drops: Mapping[int, list[Pruning]]

    def losses(self, calibration: Calibration) -> tuple[FloatArray, ...]:
        """Sums over the groups of a dimension, with branches that are dropped in proportion to measured losses."""
        losses = self._summed(self.errors)
        if self.drops and self.kind in ("reconstruction", "sensitivity"):
            measure_drops(self.drops, losses, calibration)
        return losses

    def corrected(self, measured: Anchors, refit: float) -> tuple[FloatArray, ...]:
        """Sums over the groups of a dimension of estimates corrected by measured losses of branches."""
        errors = [
            measured.corrected(removal, error, self.units[removal[0]], refit)
            for (_, removal), error in zip(self.removals, self.errors, strict=True)
        ]
        losses = self._summed(errors)
        for j, prunings in self.drops.items():
            losses[j][1:] = [measured.dropped(pruning.dropped) for pruning in prunings]
        return losses

    def _summed(self, errors: Sequence[FloatArray]) -> tuple[FloatArray, ...]:
        losses = tuple(np.zeros(size) for size in self.sizes)
        for (j, _), error in zip(self.removals, errors, strict=True):
            losses[j][1:] += error
        return losses


def _estimated(
    kind: str,
    space: SearchSpace,
    scores: Mapping[str, Tensor],
    criterion: str | Criterion | None,
    calibration: Calibration,
) -> _Estimates | None:
    """Estimate the loss of every option; None if a dimension has no estimate."""
    structure = calibration.structure
    d = len(space.sizes)
    removals = [(j, removal) for j in range(d) for removal in _removals(space, structure, j)]
    drops = {j: prunings for j in range(d) if (prunings := drops_of(space, j))}
    if {j for j, _ in removals} | drops.keys() != set(range(d)):
        return None
    removals = [(j, removal) for j, removal in removals if removal[0] not in structure.unread]
    errors: list[FloatArray | None] = [None] * len(removals)
    if kind == "database":
        errors = _priced([removal for _, removal in removals], scores, criterion, calibration)
    elif kind != "criterion":
        errors = _measured(kind, calibration, [removal for _, removal in removals])
    found = []
    for (_, removal), error in zip(removals, errors, strict=True):
        if error is None:
            if criterion is None:
                return None
            error = criterion_losses(removal, scores, criterion)
        found.append(error)
    units = {group.name: group.size for group in structure.groups}
    return _Estimates(kind, space.sizes, units, removals, found, drops)


def _priced(
    removals: Sequence[Removal],
    scores: Mapping[str, Tensor],
    criterion: str | Criterion | None,
    calibration: Calibration,
) -> list[FloatArray | None]:
    """Losses in a layer database; groups without a price take the scores of their units, in the unit of the others."""
    database = layer_database(calibration)
    found: list[FloatArray | None] = []
    ratios = []
    for group, options in removals:
        table = database.tables.get(group)
        prices = None if table is None else table.losses[[len(units) for units in options]]
        found.append(prices)
        if prices is not None and criterion is not None:
            plain = criterion_losses((group, options), scores, criterion)
            known = (plain > 0) & (prices > 0)
            ratios += (prices[known] / plain[known]).tolist()
    if criterion is not None and any(prices is None for prices in found):
        log.warning("prior='database': %s; scores of units stand in", database.note)
        scale = float(np.median(ratios)) if ratios else 1.0
        for i, removal in enumerate(removals):
            if found[i] is None:
                found[i] = scale * criterion_losses(removal, scores, criterion)
    return found


def _measured(kind: str, calibration: Calibration, removals: Sequence[Removal]) -> list[FloatArray | None]:
    """Measure errors in one unit: by sensitivity only if all groups that layers read have one."""
    changes: list[FloatArray | None] | None = None
    if kind == "sensitivity":
        try:
            changes = output_changes(calibration, removals)
        except Exception as error:  # a user's forward may raise anything under autograd, and need not have gradients
            log.info("sensitivities cannot be measured, and reconstruction errors stand in: %s", error)
        if changes is not None and all(change is not None for change in changes):
            return changes
    return reconstruction_errors(calibration, removals)


def criterion_losses(removal: Removal, scores: Mapping[str, Tensor], criterion: str | Criterion) -> FloatArray:
    """Sums of unit scores, made comparable between groups, shape (options,).

    Taylor scores are squared changes of the loss, and add up as they are. Others have a different scale in each group,
    so they give the share f of the group's energy that is removed (of squares for magnitudes), as the ratio f / (1 - f)
    of the lost to the remaining energy: re-estimated batch norm scales the rest up again, and the ratio grows without
    bound as a layer empties, whereas the share alone lets a cheap layer vanish.
    """
    group, options = removal
    values = scores[group].double().cpu().numpy()
    if criterion in LOSSES:
        return np.array([values[units].sum() for units in options])
    energy = np.square(values) if criterion in MAGNITUDES else values - min(0.0, values.min())
    return _lost(np.array([energy[units].sum() for units in options]) / (energy.sum() or 1.0))


def _lost(share: FloatArray) -> FloatArray:
    return share / np.maximum(1 - share, 1e-3)


def _zeroed_losses(space: SearchSpace, parameters: Mapping[str, Tensor]) -> tuple[FloatArray, ...] | None:
    """Loss in the squared sum of weights whose least elements each option sets to zero."""
    losses = tuple(np.zeros(size) for size in space.sizes)
    energies: dict[str, FloatArray] = {}
    for j, row in enumerate(losses):
        for option in range(1, len(row)):
            alone = [option if i == j else 0 for i in range(len(losses))]
            zeroed = space.pruning(alone).zeroed
            if not zeroed:
                return None
            for name, count in zeroed.items():
                if name not in energies:
                    squares = np.sort(parameters[name].detach().double().cpu().numpy().ravel() ** 2)
                    energies[name] = np.cumsum(squares) / (squares.sum() or 1.0)
                row[option] += _lost(energies[name][[count - 1]])[0]
    return losses


def _removals(space: SearchSpace, structure: Structure, dimension: int) -> list[Removal]:
    """Units that the options of a dimension, without the dense one, remove from each group that they touch.

    A branch that is dropped loses all units of the groups inside it.
    """
    alone = np.zeros((space.sizes[dimension] - 1, len(space.sizes)), dtype=np.int64)
    alone[:, dimension] = np.arange(1, space.sizes[dimension])
    inside = {branch.name: branch.groups for branch in structure.branches}
    kept: list[dict[str, tuple[int, ...]]] = []
    for pruning in map(space.pruning, alone.tolist()):
        emptied = {group: () for branch in pruning.dropped for group in inside[branch]}
        kept.append({**pruning.kept, **emptied})
    sizes = {group.name: group.size for group in structure.groups}
    return [
        (name, [np.setdiff1d(np.arange(sizes[name]), each.get(name, range(sizes[name]))) for each in kept])
        for name in sorted({name for each in kept for name in each})
    ]
