"""Calibration check: choose the parts of the re-fit and the criterion that help this model on this data.

Before a search, uniform pruning at the budget is scored with each criterion and without each part of the re-fit, on
validation samples. Parts that make the score worse there are switched off; a note gives the choice with its figures.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoprune.data.batch import Batch, batch_size
from autoprune.data.sampling import seeded
from autoprune.evaluators import Compensated, Context
from autoprune.evaluators.activation_cache.limits import give_back
from autoprune.evaluators.adaptive_bn import recalibrate, statistics
from autoprune.evaluators.compensated import middle_of
from autoprune.evaluators.scoring.out_of_memory import Halving
from autoprune.evaluators.scoring.scorer import bound_forward
from autoprune.files.access import make_folder, write_json
from autoprune.files.formats import Format
from autoprune.importance.calibration import Calibration, private_copy, ranked_on
from autoprune.importance.criteria import order_units, score_units, score_units_by
from autoprune.importance.database.build import work_of_database
from autoprune.importance.unit_products import UnitProducts
from autoprune.protocols import FloatArray, IntArray, Pruning
from autoprune.search_spaces import Settings
from autoprune.study.uniform_trial import UniformTrial, better

log = logging.getLogger(__name__)

LEVELS = (1.0, 0.75, 0.5)
"""Shares of the levels of uniform pruning at the budget to compare at, until one is closer to dense than to chance."""
CRITERIA = (("taylor",), ("fluctuation", "contribution"))
"""Criteria tried in addition to l2; those that need the same passes over the samples are grouped."""
DATABASE_SHARE = 0.07
"""Most work of a layer database, as a share of the forward passes of all candidates, for which `obs` is tried."""
FILE_NAME = "refit.json"
FORMAT = Format("autoprune-refit", 1, "the choice of a calibration check")

_MOST_BYTES = 2**20
_FORM = {
    "criterion": str,
    "parts": {"bn": bool, "bias": bool, "least_squares": bool, "renew": bool},
    "note": str,
}


@dataclass(frozen=True)
class Choice:
    """Outcome of a check, as plain settings.

    Attributes:
        criterion: Ranks the units.
        parts: Arguments of `Compensated`.
        note: The reason, with figures.
    """

    criterion: str
    parts: Mapping[str, bool]
    note: str

    def save(self, run_dir: str | Path | None) -> None:
        """Write the choice next to the journal, where a resumed search finds it."""
        if run_dir is not None:
            kept = {"criterion": self.criterion, "parts": dict(self.parts), "note": self.note}
            write_json(make_folder(run_dir, "run_dir") / FILE_NAME, {**FORMAT.stamp(), **kept}, "run_dir")

    @classmethod
    def load(cls, run_dir: str | Path | None) -> Choice | None:
        """Read the choice of an earlier call of the same search; None if there is none.

        Raises:
            FileFormatError: If the file is damaged.
        """
        path = None if run_dir is None else Path(run_dir) / FILE_NAME
        if path is None or not path.exists():
            return None
        way_out = "delete it to have the check made again, with the same outcome"
        data = FORMAT.read_json(path, f"run_dir must hold a readable {FILE_NAME}", way_out, _MOST_BYTES, _FORM)
        return cls(data["criterion"], data["parts"], data["note"])

    def refit(self, typical: Pruning) -> Compensated:
        """Make an evaluator, not prepared yet, whose scores equal those of the check to the last bit.

        Args:
            typical: The pruning that the check chose ridges for: the space has another order of units by now.
        """
        parts = dict(self.parts)
        return Compensated(renew=parts.pop("renew")).judged_on(typical).with_parts(**parts)


def unchecked(settings: Settings) -> Choice:
    """Choice where there is no time for a check."""
    criterion = "l2" if settings.criterion == "auto" else str(settings.criterion)
    note = f"the calibration check was left out, because max_seconds was over: {criterion}, and the whole re-fit"
    return Choice(criterion, Compensated().settings, note)


def check(
    context: Context,
    settings: Settings,
    scores: Mapping[str, Tensor],
    candidate: IntArray,
    seed: int,
    calibration: Calibration,
    trials: int,
) -> tuple[Choice, Compensated, Mapping[str, Tensor]]:
    """Score a few ways to prune a model uniformly, and choose one.

    The signal of the search decides. A step away from the default (all parts, l2) must gain more than one standard
    error of the paired difference.

    Args:
        context: With a space bound to the order by l2; ridges are chosen for the middle of that space.
        settings: Of the space; with the criterion ``"auto"`` others than l2 are tried.
        scores: Importance of units by l2; empty where no unit is removed.
        candidate: The candidate to score, shape (d,).
        seed: For criteria that draw.
        calibration: The dense model on all calibration samples, and the file of its layer database.
        trials: Number of candidates that the search plans for.

    Returns:
        The choice, an evaluator that has collected its inputs, and the importance of units by the chosen criterion.
    """
    trial = UniformTrial(context)
    halfway = trial.halfway()
    renew, told = _renewed(context, trial)
    ranked = {}
    if settings.criterion == "auto" and scores:  # first, because gradients take as much memory as the model
        ranked = _tried(context, [name for names in CRITERIA for name in names], seed, calibration) or {
            name: found for names in CRITERIA for name, found in _tried(context, names, seed, calibration).items()
        }
        ranked |= _by_surgeon(context, calibration, trials)
    refit = Compensated(renew=renew).judged_on(middle_of(context.space))
    refit.collect(context)
    if {"bias", "bn"}.isdisjoint(refit.parts):  # it leaves means to them, and differs from contribution in nothing else
        ranked.pop("fluctuation", None)
    for share in LEVELS:
        some = np.rint(share * candidate).astype(np.int64)
        base, pick = _by_criterion(trial, refit, context, settings, {"": scores, **ranked}, some)
        if halfway is None or better(base[pick], halfway, errors=2.0):
            break
    figures = [trial.told({name or "l2": base[name] for name in ("", *ranked)})] if ranked else []
    criterion = "l2" if settings.criterion == "auto" else str(settings.criterion)
    importance, chosen, whole = scores, context, base[""]
    if pick and better(base[pick], base[""]):
        criterion, importance, whole = pick, ranked[pick], base[pick]
        chosen = replace(context, space=settings.bind(context.structure, order_units(importance)))
    off: list[str] = []
    without = {}
    for part in refit.parts:
        lesser = refit.with_parts(**{part: False})
        without[part] = trial.score(lesser, chosen, some, whole)
        if part == "bn" and renew:
            continue
        if better(without[part], whole):
            off.append(part)
    if len(off) > 1:  # parts may replace each other: only the one with the least effect is switched off
        off = [min(off, key=lambda part: without[part].mean())]
    figures = figures or [f"{whole.mean():.4g}"]
    if without:
        figures.append("without " + trial.told({_PARTS[part]: values for part, values in without.items()}, ", "))
    final = refit.with_parts(**dict.fromkeys(off, False))
    on = [_PARTS[part] for part in final.parts]
    note = (
        f"calibration check on {trial.samples} validation samples, uniform pruning {_where(share, halfway)}, "
        f"{context.judge.name}'s signal (lower is better): {'; '.join(figures)}{told}; chosen: "
        f"{criterion if scores else 'no ranking'}, re-fit of {', '.join(on) or 'nothing'}"
    )
    return Choice(criterion, final.settings, note), final, importance


def _by_criterion(
    trial: UniformTrial,
    refit: Compensated,
    context: Context,
    settings: Settings,
    ranked: Mapping[str, Mapping[str, Tensor]],
    candidate: IntArray,
) -> tuple[dict[str, FloatArray], str]:
    """Signals of a candidate with the units in the order of each criterion, and the criterion with the best.

    Args:
        trial: Scores them.
        refit: With all its parts.
        context: With the space in the order of the first criterion.
        settings: Of the space.
        ranked: Importance of units by each criterion.
        candidate: The candidate, shape (d,).
    """
    first = next(iter(ranked))
    signals: dict[str, FloatArray] = {}
    best: FloatArray | None = None
    pick = first
    for name in reversed([*ranked]):  # l2 comes last: in large models it is the one that is given up
        bound = context
        if name != first:
            bound = replace(context, space=settings.bind(context.structure, order_units(ranked[name])))
        signals[name] = trial.score(refit, bound, candidate, best)
        if best is None or (len(signals[name]) >= len(best) and signals[name].mean() < best.mean()):
            best, pick = signals[name], name
    return signals, pick


def _where(share: float, halfway: FloatArray | None) -> str:
    """Words for the levels at which was compared."""
    if share == LEVELS[0] or halfway is None:
        return "at the budget"
    reason = f"where all came closer to a constant output than to the dense model, beyond {halfway.mean():.4g}"
    return f"by {share:.0%} of the levels at the budget, {reason}"


_PARTS = {"least_squares": "weights", "bias": "biases", "bn": "statistics"}


def _renewed(context: Context, trial: UniformTrial) -> tuple[bool, str]:
    """Return whether the dense model is better with statistics of the calibration samples, and a note with figures."""
    dense = private_copy(context.model)
    if not statistics(dense):
        return False, ""
    try:
        own = trial.measure(dense)
        with seeded(0):
            recalibrate(dense, context.subsets.calibration, bound_forward(context, dense))
        new = trial.measure(dense)
    except Exception as error:  # as above
        log.info("calibration check: %s: %s", type(error).__name__, error)
        return False, ""
    figures = f"; the dense model {own.mean():.4g}, {new.mean():.4g} with statistics of the calibration samples"
    return better(new, own, errors=2.0), figures


def _by_surgeon(context: Context, calibration: Calibration, trials: int) -> dict[str, dict[str, Tensor]]:
    """Importance by a layer database, if that is a small part of the work of the search; else nothing.

    Models with batch norm do without: their statistics, estimated on the pruned network, correct much of an error.
    """
    samples = sum(batch_size(batch) for batch in (*context.subsets.calibration, *context.subsets.validation))
    if statistics(context.model):
        return {}
    try:
        if work_of_database(calibration) > DATABASE_SHARE * trials * samples * context.structure.macs:
            return {}
        with seeded(0):
            return {"obs": score_units(calibration, "obs")}
    except Exception as error:  # of a user's forward under autograd, or of memory
        log.info("calibration check without obs: %s: %s", type(error).__name__, error)
        return {}


def ranking(context: Context, criterion: str, seed: int, calibration: Calibration) -> dict[str, Tensor]:
    """Importance by a criterion as the check computes it: all but ``"obs"`` on few samples."""
    if criterion == "obs":
        with seeded(0):
            return score_units(calibration, criterion)
    return _ranked(context, (criterion,), seed, calibration)[criterion]


def _ranked(
    context: Context, criteria: Sequence[str], seed: int, calibration: Calibration
) -> dict[str, dict[str, Tensor]]:
    copied = context.calibration.of(private_copy(context.model))
    some = ranked_on(copied)

    def score(parts: Sequence[Batch]) -> Sequence[dict[str, Tensor]]:
        observers: list[UnitProducts] = []

        def observing(observed: Calibration) -> UnitProducts:
            observers.append(UnitProducts(observed))
            return observers[0]

        with seeded(0), torch.enable_grad():
            found = score_units_by(copied.on(parts), criteria, seed, logging.DEBUG, observing)
        if len(parts) == len(some):  # else memory ran out, and the prior would differ from that of a resumed search
            for products in observers:
                products.keep(calibration)
        return found

    found = Halving()(score, some)
    give_back(context.model)
    return dict(zip(criteria, found, strict=True))


def _tried(
    context: Context, criteria: Sequence[str], seed: int, calibration: Calibration
) -> dict[str, dict[str, Tensor]]:
    """Importance by several criteria, without those that cannot be computed for the model."""
    try:
        return _ranked(context, criteria, seed, calibration)
    except Exception as error:  # gradients may not exist, or not fit into memory
        log.info("calibration check without %s: %s: %s", ", ".join(criteria), type(error).__name__, error)
        return {}
