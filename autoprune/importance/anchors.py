"""Anchors of the prior: measured losses of whole branches, which set the scale of what is estimated inside them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.importance.calibration import WORK, Calibration
from autoprune.importance.dropped import dropped_losses
from autoprune.importance.reconstruction import Removal
from autoprune.importance.sensitivity import output_changes
from autoprune.protocols import FloatArray, Pruning
from autoprune.structure.structure import Structure

log = logging.getLogger(__name__)

FEWEST_SAMPLES = 4
MOST_WORK = 8 * WORK
"""Multiply-accumulates that measuring every branch may take where no option drops one: some ten seconds of a core."""


@dataclass(frozen=True)
class Anchors:
    """Measured losses of dropped branches, next to the estimates for all units inside them.

    Estimates of second order tell the shape of a group's curve, and are off by as much as ten times from one branch to
    the next: what they leave out grows with what is removed. A dropped branch is measured as it is, in forward passes.
    So the curves inside a branch are scaled to end where the measurement is.

    Attributes:
        measured: Loss of each branch, by name, in the unit of `autoprune.importance.dropped.dropped_losses`.
        estimated: Estimate for all units inside it.
        branch_of: Name of the smallest branch around each group that lies in one.
    """

    measured: Mapping[str, float]
    estimated: Mapping[str, float]
    branch_of: Mapping[str, str]

    @property
    def scale(self) -> float:
        """Unit of the measurements in that of the estimates: their median ratio over the branches."""
        pairs = [(self.measured[name], each) for name, each in self.estimated.items()]
        return float(np.median([one / other for one, other in pairs if one > 0 and other > 0] or [1.0]))

    def corrected(self, removal: Removal, estimates: FloatArray, size: int, refit: float) -> FloatArray:
        """Correct the estimates for the options of a group, shape (options,), in the unit of the measurements.

        Args:
            removal: The group, and the units that each option removes.
            estimates: Of each option.
            size: Units in the group.
            refit: Power of the share of the units removed that a loss inside a branch is multiplied with: 0 without a
                re-fit. Least squares lets kept units stand in for removed ones, the better the more are kept.
        """
        group, options = removal
        name = self.branch_of.get(group)
        if name is None:  # such as the width of the residual stream: no re-fit makes up for much of it
            return self.scale * estimates
        share = np.array([len(units) for units in options]) / size
        whole = self.estimated[name]
        part = np.minimum(estimates / whole, 1.0) if whole > 0 else share
        return self.measured[name] * part * share**refit

    def dropped(self, branches: Sequence[str]) -> float:
        """Sum of the measured losses of branches."""
        return sum(self.measured[name] for name in branches)


def anchors(calibration: Calibration, dropped: Iterable[str] = ()) -> Anchors | None:
    """Measure the model without each of the smallest branches around its groups.

    Args:
        calibration: Labels only tell what the outputs are.
        dropped: Branches to measure in any case, by name, because options drop them.

    Returns:
        None if no group lies in a branch, if measuring takes more than `MOST_WORK` and no option drops a branch, or if
        outputs or gradients cannot be compared.
    """
    structure = calibration.structure
    branch_of = _branch_of(structure)
    asked = list(dict.fromkeys(dropped))
    names = list(dict.fromkeys((*branch_of.values(), *asked)))
    work = FEWEST_SAMPLES * len(names) * structure.macs
    if not branch_of or (work > MOST_WORK and not asked):
        return None
    measured = dropped_losses(calibration, [Pruning(dropped=(name,)) for name in names])
    if measured is None or not np.isfinite(measured).all():
        return None
    whole = [(group, [np.arange(size)]) for group, size in _sizes(structure).items() if group in branch_of]
    try:
        estimates = output_changes(calibration, whole)
    except Exception as error:  # a user's forward may raise anything under autograd, and need not have gradients
        log.info("branches are measured, but not the units inside them: %s", error)
        return None
    estimated = dict.fromkeys(branch_of.values(), 0.0)
    for (group, _), estimate in zip(whole, estimates, strict=True):
        estimated[branch_of[group]] += 0.0 if estimate is None else float(estimate[0])
    return Anchors(dict(zip(names, measured.tolist(), strict=True)), estimated, branch_of)


def _sizes(structure: Structure) -> dict[str, int]:
    return {group.name: group.size for group in structure.groups}


def _branch_of(structure: Structure) -> dict[str, str]:
    """Name of the smallest branch that holds each group, for groups that lie in one."""
    ordered = sorted(structure.branches, key=lambda branch: -len(branch.groups))
    return {group: branch.name for branch in ordered for group in branch.groups}
