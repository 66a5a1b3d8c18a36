"""``autoprune build``: one pruned model of a finished search, in a file of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import MODEL_HELP, Debug, Imports, RunDir
from autoprune.cli.user_objects import import_first, load_model
from autoprune.files.access import as_path

if TYPE_CHECKING:
    from autoprune.result import SearchResult
    from autoprune.result.trials import Trial


def build(
    run_dir: RunDir,
    model: Annotated[str, typer.Option(metavar="FILE.py:NAME", help=MODEL_HELP)],
    output: Annotated[Path, typer.Option(help="The safetensors file to write; an existing one is replaced.")],
    budget: Annotated[
        list[str] | None, typer.Option(help="Take the best within this budget instead of the best; may be repeated.")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="Take this trial of the front.")] = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Write a pruned model of a finished search to one file."""
    with errors_on_one_line(debug):
        import_first(imports)
        from autoprune.result import SearchResult
        from autoprune.result.recipe import save

        if trial is not None and budget:
            raise ValueError("give --trial or --budget, not both: a trial has the costs it has")
        if as_path(output, "output").is_dir():
            raise IsADirectoryError(f"output must be a file to write, got the folder {output}")
        if not output.absolute().parent.is_dir():
            raise FileNotFoundError(f"output must lie in a folder that exists, got {output}")
        as_path(run_dir, "RUN_DIR")
        if not (run_dir / "result.json").exists() and (run_dir / "journal.sqlite").exists():
            raise ValueError(
                f"{run_dir} holds a journal but no saved result, so no weights to build from; "
                "let its search end or stop it with Ctrl-C, which saves; if it was killed, go on with --resume"
            )
        result = SearchResult.load(run_dir, load_model(model, option="--model"))
        chosen = _choose(result, run_dir, budget, trial)
        save(result.build(chosen), output)
        typer.echo(_describe(result, chosen))
        typer.echo(f"saved as {output}; in Python: autoprune.load({str(output)!r}, fresh_model)")


def _choose(result: SearchResult, run_dir: Path, budget: list[str] | None, number: int | None) -> Trial:
    """The trial to build, among those that were saved with weights."""
    from autoprune.result.builders import SavedWeights

    builder = result._builder
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


def _describe(result: SearchResult, trial: Trial) -> str:
    from autoprune.result.tables import engineering

    costs = ", ".join(
        f"{name} {engineering(value)} ({value / result.dense.costs[name]:.1%} of dense)"
        for name, value in trial.costs.items()
    )
    scores = f"{result.metric} {trial.score:.4f} (dense {result.dense.score:.4f})"
    if trial.test_score is not None and result.dense.test_score is not None:
        scores += f", held out {trial.test_score:.4f} (dense {result.dense.test_score:.4f})"
    return f"trial {trial.id}: {costs}; {scores}"
