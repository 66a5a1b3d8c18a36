"""Calls of callbacks: each trial once, in the order of their numbers; an error of theirs never ends a search."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from autoprune.arguments import said
from autoprune.execution import Callback, Execution
from autoprune.journal.journal import Journal
from autoprune.result import SearchResult
from autoprune.result.optuna_study import Recorder, Sought, opened
from autoprune.result.trials import Trial
from autoprune.study.study import Study

log = logging.getLogger(__name__)

CALLED = "called"
"""Entry of a journal: the first trial that callbacks were not called for, then later ones that they were called for."""


def open_storage(execution: Execution) -> Any:
    """Open the storage of Optuna that an execution names, before anything is computed; None without one.

    Raises:
        ValueError: If it cannot be opened.
    """
    return None if execution.storage is None else opened(execution.storage)


def callbacks_of(study: Study, storage: Any) -> list[Callback]:
    """List the callbacks of a search, with one that writes to the storage if there is one."""
    execution = study.request.execution
    if storage is None:
        return list(execution.callbacks)
    judge = study.context.judge
    sought = Sought(study.context.space, study.limits, judge.name, judge.higher_is_better, str(study.budget))
    return [*execution.callbacks, Recorder(storage, sought, execution.run_dir, bool(execution.resume))]


class Calls:
    """Calls the callbacks of one search, and remembers in its journal what they were called for.

    Args:
        callbacks: Called one after the other.
        journal: Of the search. One that was never searched with callbacks makes them begin with its first trial.
    """

    def __init__(self, callbacks: Sequence[Callback], journal: Journal) -> None:
        first, *ahead = journal.meta().get(CALLED, [0]) if callbacks else [0]
        self._callbacks = callbacks
        self._journal = journal
        self._next = int(first)
        self._ahead = set(ahead)
        self._waiting: dict[int, Trial] = {}
        self._errors: list[list[str]] = [[] for _ in callbacks]
        self._made = 0

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take finished trials; each is called for as soon as all trials before it are."""
        if not self._callbacks:
            return
        self._waiting |= {one.id: one for one in trials if one.id >= self._next and one.id not in self._ahead}
        while self._next in self._waiting or self._next in self._ahead:
            number = self._next
            self._next += 1
            if number in self._ahead:
                self._ahead.remove(number)
            else:
                self._call_for(self._waiting.pop(number))

    def flush(self) -> None:
        """Call for the trials that still wait for others, because the search ended before those did."""
        for number in sorted(self._waiting):
            self._ahead.add(number)
            self._call_for(self._waiting.pop(number))

    def end(self, result: SearchResult) -> SearchResult:
        """Hand out the result; return it with a note on each callback that raised."""
        self._call(lambda callback: callback.on_end(result))
        notes = [
            f"callback {_name(callback)} raised in {len(errors)} of {self._made} calls, first: {errors[0]}"
            for callback, errors in zip(self._callbacks, self._errors, strict=True)
            if errors
        ]
        return replace(result, notes=(*result.notes, *notes)) if notes else result

    def _call_for(self, trial: Trial) -> None:
        self._call(lambda callback: callback.on_trial(trial))
        # After the call: a kill in between repeats this trial, and loses none.
        self._journal.record_meta(CALLED, [self._next, *sorted(self._ahead)])

    def _call(self, call: Callable[[Callback], Any]) -> None:
        self._made += 1
        for callback, errors in zip(self._callbacks, self._errors, strict=True):
            try:
                call(callback)
            except Exception as error:  # a tracker may raise anything, and its server may be out of reach
                errors.append(said(error))
                if len(errors) == 1:
                    log.warning("callback %s raised, and the search goes on: %s", _name(callback), errors[0])


def _name(callback: Callback) -> str:
    return type(callback).__name__
