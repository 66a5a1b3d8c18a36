"""Commands that build a trial: for a shell where its weights are saved, and for Python."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoprune.result.builders import FromEvaluator, FromJournal, SavedWeights

if TYPE_CHECKING:
    from autoprune.result.search_result import SearchResult

MODEL = "MODEL.py:NAME"
NUMBER = "{trial}"
"""Stands for the number of the trial, or for its position in ``result.trials``."""


@dataclass(frozen=True)
class Commands:
    """Texts in which `NUMBER` is replaced.

    Attributes:
        shell: Command line; empty if no folder with weights is known.
        python: Lines of Python; empty if there are no weights to build from.
        saved: Trials that the shell command can build; None if no weights are saved.
        hint: Advice to the user, such as what to fill in; empty where there is none.
    """

    shell: str
    python: str
    saved: list[int] | None
    hint: str


def commands_of(result: SearchResult, run_dir: str | None, model: str | None) -> Commands:
    """Find the commands that fit what a result can build."""
    builder = result._builder
    build = f"small = result.build(result.trials[{NUMBER}])"
    if isinstance(builder, FromJournal):
        hint = "this is read from a journal, which holds no weights: let the search end, or resume it, and report again"
        return Commands("", "", None, hint)
    if isinstance(builder, SavedWeights):
        folder = str(builder.folder) if run_dir is None else run_dir
        load = f"result = autoprune.SearchResult.load({folder!r}, model)  # your dense model"
        words = ["autoprune", "build", folder, "--model", model or MODEL, "--trial"]
        shell = f"{shlex.join(words)} {NUMBER} --output trial-{NUMBER}.safetensors"
        hint = "" if model else f"put the place of your model for {MODEL}"
        return Commands(shell, f"{load}\n{build}", sorted(builder.there()), hint)
    if isinstance(builder, FromEvaluator):
        return Commands("", build, None, "in the process of the search; result.save(folder) keeps the weights")
    return Commands("", build, None, "")
