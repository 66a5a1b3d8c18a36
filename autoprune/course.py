"""What a search goes by: its study, optimizer and rivals, made anew whenever latencies are measured on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import final

from autoprune.errors import InfeasibleBudgetError
from autoprune.journal import Journal
from autoprune.measured import Measured
from autoprune.optimizers import Problem
from autoprune.protocols import Explains, Measurement, Optimizer
from autoprune.racing import Racing
from autoprune.result.trials import Trial
from autoprune.resume import History, recall
from autoprune.rivals import Rivals
from autoprune.rungs import Rungs
from autoprune.study import TIMED, Study, with_latency

log = logging.getLogger(__name__)

_SHARES = (0.5, 0.75)  # of the trials: after the scan that optimizers begin with, and with time to use what was learned
_KEY = "measured"  # in the journal


@final
class Course:
    """The study, the optimizer and the rivals of a search, which change when its front is measured on the way.

    A latency model that is fitted to random networks may be off by some percent, in one direction, on those that a
    search finds; then they miss the limit, or leave a part of it unused. So under a limit on latency, after half and
    after three quarters of the trials, the front is measured as at the end, the model is fitted to it too, and a new
    optimizer is told the whole history under the new costs. What was measured goes into the journal, and a search that
    is resumed begins with it.

    Args:
        study: The search.
        optimizer: Made for its problem.
        make: Makes another one of a problem.
        racing: Who races whom.
        journal: Of the run, which may hold an earlier part of it.
        dense: What an evaluation of the dense model saw.
        refit: Whether to measure on the way.

    Attributes:
        study: By what is known now.
        optimizer: For its problem.
        rivals: For its costs.
        history: What the journal knew at the beginning.
        measured: Of the trials.
    """

    def __init__(
        self,
        study: Study,
        optimizer: Optimizer,
        make: Callable[[Problem], Optimizer],
        racing: Racing | Rungs | None,
        journal: Journal,
        dense: Measurement,
        refit: bool,
    ) -> None:
        self.study, self.optimizer, self.measured = study, optimizer, Measured(study)
        self._make, self._racing, self._journal, self._dense = make, racing, journal, dense
        self._ends: list[int] = []
        self._begun, self._notes, self._refits = 0, list[str](), list[int]()
        if refit and self.measured.timing and any(name in TIMED for name in study.limits):
            self._ends = sorted({int(share * study.problem.trials) for share in _SHARES} - {0})
        if kept := journal.meta().get(_KEY):
            rows = {row.id: row.candidate for row in journal.trials()}
            self.measured.restore(study, kept["timings"], rows)
            self._refits = kept["after"]
            self._ends = [end for end in self._ends if end > self._refits[-1]]
            self._learn()
        self.rivals = Rivals(self.study, racing, journal, dense)
        known = recall(journal, self.study, self.optimizer)
        self.history = History(tuple(self.measured.corrected(self.study, known.found)), known.pending)
        if known:
            counts = len(known.found), len(known.pending)
            log.info("resumed: %d trials from the journal, and %d that were never scored again", *counts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the optimizers have to say, and when latencies were measured."""
        said = [*self._notes, *self._said()]
        if self._refits and self.measured.timings:
            after = " and ".join(map(str, self._refits))
            said.insert(0, f"latency: the front was measured after {after} trials too")
        return tuple(said)

    def room(self, asked: int, total: int) -> int:
        """How many more candidates may be asked for now."""
        return min([total, *self._ends[:1]]) - asked

    def due(self, asked: int, total: int) -> bool:
        """Whether to measure, once nothing is pending."""
        return bool(self._ends) and self._ends[0] <= asked < total

    def refit(self, found: Sequence[Trial]) -> list[Trial]:
        """Measure the front of these trials and go by what is known then; the trials with corrected costs."""
        before = self.measured.latency
        trials = self.measured.complete(self.study, found)
        self._ends.pop(0)
        self._refits.append(len(found))
        self._journal.record_meta(_KEY, {"after": self._refits, "timings": self.measured.to_json()})
        said = self._said()
        if self.measured.latency is not before and self._learn():
            self._notes, self._begun = [*self._notes, *said], len(found)
            self.rivals = Rivals(self.study, self._racing, self._journal, self._dense)
            recall(self._journal, self.study, self.optimizer)
        return trials

    def _learn(self) -> bool:
        """Go by the latency model as it is now, if it lets any candidate pass; whether it does."""
        if self.measured.latency is None:
            return False
        try:
            self.study = with_latency(self.study, self.measured.latency)
        except InfeasibleBudgetError:
            return False
        self.optimizer = self._make(self.study.problem)
        return True

    def _said(self) -> list[str]:
        """What the present optimizer has to say."""
        said = self.optimizer.notes if isinstance(self.optimizer, Explains) else ()
        return [f"after {self._begun} trials: {note}" if self._begun else note for note in said]
