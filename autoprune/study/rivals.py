"""Rivals: the finished trials that candidates are raced against, and a note on saved samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from autoprune.arguments import shown
from autoprune.data.batch import batch_size
from autoprune.early_stopping.interim import Interim, Interrupted, looks_of
from autoprune.early_stopping.racing import Contest, Race, Racing, Rule
from autoprune.early_stopping.successive_halving import Ladder, Rungs
from autoprune.evaluators import AdaptiveBN, Compensated, Context, Evaluator
from autoprune.journal.journal import Journal
from autoprune.protocols import OK, RACED
from autoprune.result.trials import Trial, costs_of
from autoprune.study.promotion import Promotion, note_of_rungs, require_training
from autoprune.study.study import Study


def find_racing(spec: bool | Racing | Rungs | str) -> Rule | None:
    """Make the settings of ``search(early_stopping=)``; None for none.

    Raises:
        ValueError: If it is neither ``"auto"`` nor a bool nor a `Racing` nor `Rungs`.
    """
    if isinstance(spec, bool):
        return Racing() if spec else None
    if isinstance(spec, str) and spec == "auto":
        return Interim()
    if not isinstance(spec, Racing | Rungs):
        raise ValueError(
            f"early_stopping must be 'auto', True, False, an autoprune.Racing or autoprune.Rungs, got {shown(spec)}"
        )
    return spec


def why_not_applicable(racing: Rule | None, evaluator: Evaluator, context: Context, worst_score: float | None) -> str:
    """Reason why this search cannot stop candidates early, in plain words; empty if it can, or should not.

    Raises:
        ValueError: If there are rungs, but no trainings for them.
    """
    subsets, judge = context.subsets, context.judge
    if isinstance(racing, Rungs):
        require_training(evaluator, racing)
        if worst_score is not None:
            return "a limit on the score needs full scores: one that is stopped early may yet come to meet it"
        return ""
    if racing is None:
        return ""
    if not judge.per_sample:
        return f"metric {judge.name!r} scores the whole set at once"
    if worst_score is not None:
        return "a limit on the score needs full scores: what is worse than another may be the cheapest that meets it"
    if not subsets.shuffled:
        return "validation samples come in the order of a stream, and the test needs a random one"
    if isinstance(racing, Interim):
        if not isinstance(evaluator, AdaptiveBN | Compensated):
            return "scoring is a small part of what this evaluator does"
        return "" if _looks(context) else "there are few validation samples"
    if len(subsets.looks or subsets.validation) < 2:
        return "there is but one batch of validation samples; give more samples or smaller batches"
    return ""


def _looks(context: Context) -> tuple[int, ...]:
    return looks_of([batch_size(batch) for batch in context.subsets.validation])


@final
class Rivals:
    """Finds the rival of each candidate: the trial that it must not be worse than.

    A candidate is dominated if any trial that costs no more in every limited cost has a better signal, so it is
    compared with the best of these alone. Only trials of earlier asks count: then a synchronous search on many workers
    decides as one on a single worker does, and a resumed one as if it had never stopped. Probes of single dimensions
    run no race, because the tables made from them need full scores; with interim looks, those over a limit end at the
    first, all after the same samples.

    Args:
        study: The search, with its rule; without one, nobody is paired.
        journal: Source of the values per sample.
    """

    def __init__(self, study: Study, journal: Journal) -> None:
        self._study = study
        self._journal = journal
        self._racing = study.racing if isinstance(study.racing, Racing | Interim) else None
        self._promotion = Promotion(study, study.racing) if isinstance(study.racing, Rungs) else None

    def races(self, trials: Sequence[Trial], found: Sequence[Trial]) -> Sequence[Contest | None]:
        """Make the contest of each of the trials that are to be scored; None without a rival."""
        if self._promotion is not None:
            return self._ladders(self._promotion, trials, found)
        done = [trial for trial in found if trial.status == OK and trial.feasible]
        racing = self._racing
        if racing is None or not done:
            return [None] * len(trials)
        names = self._study.problem.cost_names
        ids = np.array([trial.id for trial in done])
        known, costs = costs_of(done, names), costs_of(trials, names)
        signal = np.array([trial.signal for trial in done])
        probes = self._study.problem.probes(np.array([trial.candidate for trial in trials], dtype=np.int64))
        races: list[Contest | None] = []
        for trial, cost, probe in zip(trials, costs, probes, strict=True):
            fits = (known <= cost).all(axis=1) & (ids < self._journal.first_of_ask(trial.id))
            best = min(np.flatnonzero(fits), key=lambda i: (signal[i], ids[i]), default=None)
            rival = None if best is None else int(ids[best])
            if isinstance(racing, Interim):
                races.append(self._interrupted(racing, rival if trial.feasible else None, probe and not trial.feasible))
            else:
                races.append(None if probe or rival is None else self._race(trial.id, rival, racing))
        return races

    def _interrupted(self, rule: Interim, rival: int | None, probe: bool) -> Interrupted | None:
        """Evaluation with interim looks against a rival, or of a probe; None with neither."""
        context = self._study.context
        signal, metric = (np.empty(0), np.empty(0)) if rival is None else self._journal.values(rival)
        if not (probe or len(signal)):  # the latter are lost with the file of the journal
            return None
        return Interrupted(
            batches=(*_looks(context), len(context.subsets.validation)),
            total=len(self._study.dense.signal),
            distances=len(self._study.dense.distortion),
            direction=context.judge.direction,
            errors=rule.errors,
            rival=-1 if rival is None else rival,
            signal=signal,
            metric=metric,
        )

    def _ladders(self, promotion: Promotion, trials: Sequence[Trial], found: Sequence[Trial]) -> list[Ladder]:
        first = [self._journal.first_of_ask(trial.id) for trial in trials]
        ladders: dict[int, Ladder] = {}
        for ask in sorted(set(first)):  # several only where a resumed search evaluates pending candidates
            asked = [trial for trial, begin in zip(trials, first, strict=True) if begin == ask]
            made = promotion.ladders(asked, [trial for trial in found if trial.id < ask])
            ladders |= {trial.id: ladder for trial, ladder in zip(asked, made, strict=True)}
        return [ladders[trial.id] for trial in trials]

    def _race(self, trial: int, rival: int, racing: Racing) -> Race | None:
        signal, metric = self._journal.values(rival)
        dense = self._study.dense
        if not len(signal):  # lost with the file of the journal
            return None
        return Race(
            rival=rival,
            signal=signal,
            metric=metric,
            direction=self._study.context.judge.direction,
            floor=min(0.0, float(signal.min()), float(dense.signal.min())),
            distances=len(dense.distortion),
            error=racing.share(trial),
            looks=self._study.context.subsets.looks,
        )


def note_of_racing(study: Study, found: Sequence[Trial]) -> tuple[str, ...]:
    """Note on the number of dropped candidates and the samples saved, in plain words; empty without racing."""
    racing = study.racing
    if isinstance(racing, Rungs):
        return note_of_rungs(racing, study, found)
    done = [trial for trial in found if trial.status in (OK, RACED)]
    if racing is None or not done:
        return ()
    counts = study.context.subsets.samples
    whole = counts["validation"]
    seen = [trial.evaluations[-1].samples for trial in done]
    share = (np.mean(seen) + counts["calibration"]) / (whole + counts["calibration"])
    dropped = [trial for trial in done if trial.status == RACED]
    scored = f"{np.mean(seen) / whole:.0%} of the validation samples were scored, which with calibration is {share:.0%}"
    if isinstance(racing, Interim):
        behind = sum(trial.feasible for trial in dropped)
        note = (
            f"dropped early, {racing.errors:g} standard errors behind one that costs no more: {behind} of {len(done)} "
            f"candidates; scored on a part: {len(dropped) - behind} probes; {scored} of all"
        )
        return (note,) if dropped else ()
    return (
        f"racing dropped {len(dropped)} of {len(done)} candidates early; {scored} of all; with a probability of at "
        f"least {1 - racing.delta:g} each that was dropped is dominated",
    )
