"""Loop of a search: ask, evaluate, record, tell."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autoprune.border import proposals, same_samples
from autoprune.execution import ANYWAY, Executor
from autoprune.execution.local import Hurries
from autoprune.journal.journal import Journal
from autoprune.protocols import FAILED, Explains, IntArray, Optimizer
from autoprune.result.trials import Trial, find_front
from autoprune.study.calls import Calls
from autoprune.study.convergence import why_converged, why_not_converged
from autoprune.study.progress import Progress
from autoprune.study.resume import recall
from autoprune.study.rivals import Rivals
from autoprune.study.study import Study
from autoprune.study.trials import finished, proposed, rows_of

log = logging.getLogger(__name__)


class Ended(NamedTuple):
    """End of a loop.

    Attributes:
        trials: The finished trials, in the order in which their results came.
        stopped: Reason why it ended, as in `SearchResult`.
        notes: The reason in full, with notes of the journal and of the optimizer.
    """

    trials: list[Trial]
    stopped: str
    notes: tuple[str, ...]


class Loop:
    """Loop of one search; `run` it once.

    Args:
        study: The search.
        optimizer: Proposes candidates.
        executor: Evaluates them.
        journal: Records them; what it holds already comes first.
        rivals: Pairs candidates with the trials that they must not be worse than.
        progress: Shows the state.
        calls: Calls the user's callbacks.
    """

    def __init__(
        self,
        study: Study,
        optimizer: Optimizer,
        executor: Executor,
        journal: Journal,
        rivals: Rivals,
        progress: Progress,
        calls: Calls,
    ) -> None:
        self._study = study
        self._optimizer = optimizer
        self._executor = executor
        self._journal = journal
        self._rivals = rivals
        self._progress = progress
        self._calls = calls
        self._pending: dict[int, Trial] = {}
        self._found: list[Trial] = []
        self._asked = 0
        self._stopped = ""  # a word, as in `SearchResult`; empty while candidates are asked for
        self._why = ""
        self._executed: tuple[str, ...] = ()  # decisions of an executor that has any

    def run(self) -> Ended:
        """Run until the trials or the time are over; Ctrl-C ends it with the trials so far."""
        in_spite: Sequence[str] = self._journal.meta().get(ANYWAY, ())
        history = recall(self._journal, self._study, self._optimizer)
        self._found += history.found
        self._asked = len(history)
        request = self._study.request
        if isinstance(self._executor, Hurries):
            self._executor.until = self._study.deadline.end
        try:
            if not history.pending and self._asked < request.most:
                self._end_if_converged()
            if history.pending or (self._asked < request.most and not self._stopped):
                self._executor.start(self._study.evaluator, self._study.context, self._study.fresh)
            with self._progress:
                try:
                    self._calls.tell(history.found)
                    self._submit(history.pending)
                    self._repeat()
                except KeyboardInterrupt:
                    done = len(self._found)
                    log.warning("interrupted after %d of %d trials; returning the front so far", done, request.most)
                    self._stopped = "interrupted"
        finally:
            self._executed = tuple(getattr(self._executor, "notes", ()))
            self._executor.stop()
        self._calls.flush()
        if not self._why and request.adaptive:
            self._why = why_not_converged(self._stopped, len(self._found))
        why = (self._why,) if self._why else ()
        told = self._optimizer.notes if isinstance(self._optimizer, Explains) else ()
        told = (*told, *self._executed)
        return Ended(self._found, self._stopped, (*in_spite, *self._journal.notes, *why, *told))

    def _repeat(self) -> None:
        while self._pending or not self._stopped:
            if self._study.deadline.passed:
                self._stopped = "time"
                if isinstance(self._executor, Hurries):
                    self._gather()  # what has come in meanwhile
                break
            self._ask()
            self._gather()

    def _ask(self) -> None:
        """Ask for as many candidates as there is room for, record them, and hand them to the executor."""
        most = self._study.request.most
        room = min(self._executor.room(), most - self._asked)
        if room > 0 and not self._stopped:
            self._end_if_converged()
        if room > 0 and not self._stopped:
            candidates = self._proposals(room)
            costs = self._study.costs_of(candidates)
            self._submit(proposed(self._study, self._journal.record_ask(candidates, costs), candidates, costs))
            self._asked += len(candidates)
            if not len(candidates) and not self._stopped:
                self._stopped = "exhausted"
        if self._asked >= most:
            self._stopped = "trials"

    def _proposals(self, room: int) -> IntArray:
        """Ask for candidates, shape (<= room, d); none if they are refused, which ends the search.

        Raises:
            TypeError: If they are refused before anything was found; names the optimizer.
            ValueError: As above.
        """
        sizes = self._study.problem.sizes
        returned = self._optimizer.ask(room)
        try:
            return proposals(self._optimizer, returned, room, sizes)
        except (TypeError, ValueError) as error:  # of the border: the trials so far must not be lost
            if not self._found:
                raise
            log.warning("the search ends here: %s", error)
            self._stopped = "refused"
            self._why = f"stopped after {len(self._found)} trials: {error}"
            return np.zeros((0, len(sizes)), dtype=np.int64)

    def _submit(self, trials: Sequence[Trial]) -> None:
        if not trials:
            return
        self._pending |= {trial.id: trial for trial in trials}
        candidates = np.array([trial.candidate for trial in trials], dtype=np.int64)
        self._executor.submit([trial.id for trial in trials], candidates, self._rivals.races(trials, self._found))

    def _gather(self) -> None:
        """Wait for outcomes, record them, and tell the optimizer, one after the other."""
        gathered = self._executor.gather()
        self._study.untouched.require()
        for number, returned, worker in gathered:
            outcome = same_samples(self._study.evaluator, returned, self._study.dense)
            trial = finished(self._study, self._pending[number], outcome)
            self._journal.record_evaluation(number, outcome, trial.evaluations, worker=worker)
            del self._pending[number]
            self._found.append(trial)
            self._optimizer.tell(rows_of(self._study, [trial]))
            self._journal.record_tell([number])
            self._calls.tell([trial])
            if self._progress.due(len(self._found)):
                self._show()

    def _end_if_converged(self) -> None:
        if not self._study.request.adaptive:
            return
        direction = self._study.context.judge.direction
        self._why = why_converged(self._found, self._study.problem, self._study.worst_score, direction)
        self._stopped = "converged" if self._why else ""

    def _show(self) -> None:
        phase = self._optimizer.phase if isinstance(self._optimizer, Explains) else ""
        front = find_front(self._found, tuple(self._study.limits), self._study.context.judge.direction)
        failed = sum(trial.status == FAILED for trial in self._found)
        self._progress.update(len(self._found), failed, front[-1] if front else None, len(front), phase)
