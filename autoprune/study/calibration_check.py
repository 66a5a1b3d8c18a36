"""Calibration check: choose the parts of the re-fit and the criterion that help this model on this data.

Before a search, uniform pruning at the budget is scored with each criterion and without each part of the re-fit, on
validation samples. Parts that make the score worse there are switched off; a note gives the choice with its figures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch, batch_size, beginning, divisible, slice_batch
from autoprune.data.sampling import seeded
from autoprune.evaluators import Compensated, Context
from autoprune.evaluators.activation_cache.limits import give_back
from autoprune.evaluators.adaptive_bn import recalibrate, statistics
from autoprune.evaluators.compensated import middle_of
from autoprune.evaluators.scoring.out_of_memory import Halving, fitting
from autoprune.evaluators.scoring.scorer import bound_forward
from autoprune.files.access import make_folder, write_json
from autoprune.files.formats import Format
from autoprune.importance.calibration import Calibration, affordable, private_copy, ranked_on
from autoprune.importance.criteria import order_units, score_units, score_units_by
from autoprune.importance.database.build import work_of_database
from autoprune.importance.unit_products import UnitProducts
from autoprune.metrics.judge import Weighing
from autoprune.protocols import FloatArray, IntArray, Pruning
from autoprune.search_spaces import Settings
from autoprune.structure.slicing.slicing import Edit, Slicer

log = logging.getLogger(__name__)

FEWEST_SAMPLES = 64
MOST_SAMPLES = 1024
"""Validation samples of the check: all of a small model's, by default; fewer for a large one."""
CRITERIA = (("taylor",), ("fluctuation", "contribution"))
"""Criteria tried in addition to l2; those that need the same passes over the samples are grouped."""
RACED = 8
"""Fewest validation samples after which a way that is clearly worse than another is given up."""
RACED_FIRST = 4
"""The same of a large model, for what is worse by three standard errors."""
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
    trial = _Trial(context)
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
    base: dict[str, FloatArray] = {}
    best: FloatArray | None = None
    pick = ""
    for name in (*reversed(ranked), ""):  # l2 comes last: in large models it is the one that is given up
        order = order_units(ranked[name] if name else scores)
        bound = replace(context, space=settings.bind(context.structure, order)) if name else context
        base[name] = trial.score(refit, bound, candidate, best)
        if best is None or (len(base[name]) >= len(best) and base[name].mean() < best.mean()):
            best, pick = base[name], name
    figures = [trial.told({name or "l2": base[name] for name in ("", *ranked)})] if ranked else []
    criterion = "l2" if settings.criterion == "auto" else str(settings.criterion)
    importance, chosen, whole = scores, context, base[""]
    if pick and _better(base[pick], base[""]):
        criterion, importance, whole = pick, ranked[pick], base[pick]
        chosen = replace(context, space=settings.bind(context.structure, order_units(importance)))
    off: list[str] = []
    without = {}
    for part in refit.parts:
        lesser = refit.with_parts(**{part: False})
        without[part] = trial.score(lesser, chosen, candidate, whole)
        if part == "bn" and renew:
            continue
        if _better(without[part], whole):
            off.append(part)
    if len(off) > 1:  # parts may replace each other: only the one with the least effect is switched off
        off = [min(off, key=lambda part: without[part].mean())]
    figures = figures or [f"{whole.mean():.4g}"]
    if without:
        figures.append("without " + trial.told({_PARTS[part]: values for part, values in without.items()}, ", "))
    final = refit.with_parts(**dict.fromkeys(off, False))
    on = [_PARTS[part] for part in final.parts]
    note = (
        f"calibration check on {trial.samples} validation samples, uniform pruning at the budget, "
        f"{context.judge.name}'s signal (lower is better): {'; '.join(figures)}{told}; chosen: "
        f"{criterion if scores else 'no ranking'}, re-fit of {', '.join(on) or 'nothing'}"
    )
    return Choice(criterion, final.settings, note), final, importance


_PARTS = {"least_squares": "weights", "bias": "biases", "bn": "statistics"}


class _Trial:
    """Scores pruned networks on a few validation samples."""

    def __init__(self, context: Context) -> None:
        self._context = context
        most = affordable(context.structure, FEWEST_SAMPLES, MOST_SAMPLES)
        self._batches = tuple(beginning(context.subsets.validation, most))
        first = self._batches[0]
        self._large = most < MOST_SAMPLES
        if self._large and divisible(first) and batch_size(first) > RACED_FIRST:
            cuts = (0, RACED_FIRST, batch_size(first))
            self._batches = (*(slice_batch(first, *ends) for ends in pairwise(cuts)), *self._batches[1:])
        self.samples = sum(map(batch_size, self._batches))
        self._slicer = Slicer(context.model)
        dense = self._slicer.cut(Edit({}, {})).eval()
        run = fitting(bound_forward(context, dense))
        with seeded(0):
            self._dense = context.judge.dense_outputs(run, self._batches, 0)
            self._weighing = self._weighed(run)

    def _weighed(self, run: Callable[[Batch], object]) -> Weighing | None:
        """Weights of the samples, found once: else every measurement would run its module twice."""
        try:
            return self._context.judge.weigh(run, self._batches, self._dense)
        except Exception as error:  # of a user's metric; measurements raise it again, where it rules out a choice
            log.info("calibration check: %s: %s", type(error).__name__, error)
            return None

    def measure(self, module: nn.Module, best: FloatArray | None = None) -> FloatArray:
        """Signal of a module, one value a sample; infinite where it cannot be scored.

        Args:
            module: In evaluation mode.
            best: Signals of another one: where this is worse by two standard errors on the first samples, a quarter but
                at least `RACED`, the others are left out; of a large model also by three on the first `RACED_FIRST`.
        """
        judge = self._context.judge
        run = fitting(bound_forward(self._context, module))
        signals = np.empty(0)
        with seeded(0):
            for part in self._parts(best is not None):
                weighing = None if self._weighing is None else self._weighing.of(part)
                found = judge.measure(run, self._batches[part], self._dense[part], weighing).signal
                signals = np.concatenate([signals, np.where(np.isfinite(found), found, np.inf)])
                errors = 2.0 if len(signals) >= RACED else 3.0
                if best is not None and len(best) > len(signals) and _better(best, signals, errors):
                    break
        return signals

    def _parts(self, raced: bool) -> list[slice]:
        """Batches to score before it is asked whether more are needed, and the others."""
        judge = self._context.judge
        if raced and judge.per_sample and (judge.parts is None or self._weighing is not None):
            counts = np.cumsum([batch_size(batch) for batch in self._batches])
            looks = [max(RACED, self.samples / 4), *([RACED_FIRST] if self._large else [])]
            ends = {0, len(counts), *(min(int(np.searchsorted(counts, least)) + 1, len(counts)) for least in looks)}
            return [slice(*each) for each in pairwise(sorted(ends))]
        return [slice(None)]

    def told(self, signals: Mapping[str, FloatArray], between: str = "; ") -> str:
        """Means of signals, with their number where not all samples were scored."""
        return between.join(
            f"{name} {each.mean():.4g}" + (f" ({len(each)} samples)" if 1 < len(each) < self.samples else "")
            for name, each in signals.items()
        )

    def score(
        self, refit: Compensated, context: Context, candidate: IntArray, best: FloatArray | None = None
    ) -> FloatArray:
        """Signal of a candidate of the space of `context`, re-fitted; `best` as in `measure`."""
        edit = context.structure.edit(context.space.pruning(candidate.tolist()))
        try:
            module = self._slicer.cut(edit).eval()
            with seeded(0):
                refit.adapt(module, edit, bound_forward(context, module))
            return self.measure(module, best)
        except Exception as error:  # an error of a user's model or metric rules out this choice alone
            log.info("calibration check: %s: %s", type(error).__name__, error)
            return np.full(1, np.inf)
        finally:
            self._slicer.release()
            refit.forget()
            give_back(context.model)


def _renewed(context: Context, trial: _Trial) -> tuple[bool, str]:
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
    return _better(new, own, errors=2.0), figures


def _better(a: FloatArray, b: FloatArray, errors: float = 1.0) -> bool:
    """Return whether signal a is lower than b by more than this number of standard errors of the paired difference.

    Where one has fewer samples, on these.
    """
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        return float(a.mean()) < float(b.mean())
    common = min(len(a), len(b))
    gain = b[:common] - a[:common]
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return bool(gain.mean() > errors * error and gain.mean() > 0)


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
