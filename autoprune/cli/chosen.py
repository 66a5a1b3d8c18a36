"""Pruned models that commands work on: a trial of a finished search, or a file that was saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.files.access import as_path

if TYPE_CHECKING:
    from torch import nn

    from autoprune.result import SearchResult
    from autoprune.result.trials import Trial

Budgets = Annotated[
    list[str] | None, typer.Option(help="Take the best within this budget instead of the best; may be repeated.")
]
TrialNumber = Annotated[int | None, typer.Option(help="Take this trial of the front.")]
Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="The --run-dir of a search, or a file that build or recover wrote.")
]


def pruned_model(source: Path, dense: nn.Module, budget: list[str] | None, trial: int | None) -> tuple[nn.Module, str]:
    """Take a pruned model from a finished search or a saved file, with a line that describes it.

    Args:
        source: The run directory, or the file.
        dense: The dense model, for its class.
        budget: Limits of the trial wanted; None for the best.
        trial: Its number.

    Raises:
        ValueError: If `budget` or `trial` are given with a file, or see `from_run`.
        FileNotFoundError: If there is nothing at `source`.
        FileFormatError: If it is of another kind, or damaged.
    """
    from autoprune.result.recipe import load

    path = as_path(source, "SOURCE")
    if not path.is_file() or path.suffix == ".json":
        return from_run(source, dense, budget, trial, "SOURCE")
    if trial is not None or budget:
        raise ValueError("--trial and --budget choose from the --run-dir of a search, but a file holds one model")
    return load(path, dense), f"model of {source}"


def from_run(
    run_dir: Path, dense: nn.Module, budget: list[str] | None, trial: int | None, argument: str = "RUN_DIR"
) -> tuple[nn.Module, str]:
    """Build a pruned model of a finished search, with a line that describes it.

    Args:
        run_dir: The run directory.
        dense: The dense model, for its class.
        budget: Limits of the trial wanted; None for the best.
        trial: Its number.
        argument: Name of `run_dir` in messages.

    Raises:
        ValueError: If both are given, or there is no such trial with weights.
        FileNotFoundError: If there is no run.
        FileFormatError: If it is damaged.
    """
    from autoprune.result import SearchResult

    if trial is not None and budget:
        raise ValueError("give --trial or --budget, not both: a trial has the costs it has")
    result = SearchResult.load(as_path(run_dir, argument), dense)
    chosen = choose(result, run_dir, budget, trial)
    return result.build(chosen), described(result, chosen)


def choose(result: SearchResult, run_dir: Path, budget: list[str] | None, number: int | None) -> Trial:
    """The trial to build, among those that were saved with weights."""
    from autoprune.result.builders import FromJournal, SavedWeights

    builder = result._builder
    if isinstance(builder, FromJournal):
        raise ValueError(
            f"{run_dir} holds a journal but no saved result that is whole, so no weights to build from; "
            "let its search end or stop it with Ctrl-C, which saves; if it was killed, go on with --resume"
        )
    there = builder.there() if isinstance(builder, SavedWeights) else set()
    saved = tuple(trial for trial in result.trials if trial.id in there)
    if not saved:
        raise ValueError(f"{run_dir} was saved without weights; search again, or save the result with weights='front'")
    if number is None:
        return replace(result, trials=saved).best(budget or None)
    for trial in saved:
        if trial.id == number:
            return trial
    raise ValueError(f"trial must be one saved with weights, {[trial.id for trial in saved]}, got {number}")


def described(result: SearchResult, trial: Trial) -> str:
    """Describe a trial with its costs and scores in one line."""
    from autoprune.result.tables import engineering

    costs = ", ".join(
        f"{name} {engineering(value)} ({value / result.dense.costs[name]:.1%} of dense)"
        for name, value in trial.costs.items()
    )
    scores = f"{result.metric} {trial.score:.4f} (dense {result.dense.score:.4f})"
    if trial.test_score is not None and result.dense.test_score is not None:
        scores += f", held out {trial.test_score:.4f} (dense {result.dense.test_score:.4f})"
    return f"trial {trial.id}: {costs}; {scores}"
