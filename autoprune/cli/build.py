"""``autoprune build``: one pruned model of a finished search, to load in Python or to run elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.arguments import one_of
from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import MODEL_HELP, Debug, Example, Imports, InputShape, RunDir
from autoprune.cli.user_objects import example_inputs, import_first, load_model
from autoprune.files.access import as_path

if TYPE_CHECKING:
    from torch import nn

    from autoprune.result import SearchResult
    from autoprune.result.trials import Trial

_OWN = "safetensors"


def build(
    run_dir: RunDir,
    model: Annotated[str, typer.Option(metavar="FILE.py:NAME", help=MODEL_HELP)],
    output: Annotated[Path, typer.Option(help="The file, or folder for hf, to write; an existing file is replaced.")],
    budget: Annotated[
        list[str] | None, typer.Option(help="Take the best within this budget instead of the best; may be repeated.")
    ] = None,
    trial: Annotated[int | None, typer.Option(help="Take this trial of the front.")] = None,
    format: Annotated[  # noqa: A002  # the name of the option
        str | None,
        typer.Option(
            metavar="safetensors|onnx|torch|hf",
            help="safetensors: weights and recipe, for autoprune.load. onnx, torch (torch.export): for other runtimes, "
            "compared with the model. hf: a folder for autoprune.from_pretrained. By default by the ending: .onnx, "
            ".pt2, or else safetensors.",
        ),
    ] = None,
    input_shape: InputShape = None,
    example: Example = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Write a pruned model of a finished search to one file, to load in Python or to run elsewhere."""
    with errors_on_one_line(debug):
        import_first(imports)
        from autoprune.result import SearchResult

        wanted = _format(output, format)
        if trial is not None and budget:
            raise ValueError("give --trial or --budget, not both: a trial has the costs it has")
        if as_path(output, "output").is_dir() and wanted != "hf":
            raise IsADirectoryError(f"output must be a file to write, got the folder {output}")
        if not output.absolute().parent.is_dir():
            raise FileNotFoundError(f"output must lie in a folder that exists, got {output}")
        dense = load_model(model, option="--model")
        result = SearchResult.load(as_path(run_dir, "RUN_DIR"), dense)
        given = None if wanted == _OWN else example_inputs(dense, input_shape, example)
        chosen = _choose(result, run_dir, budget, trial)
        written = _write(result.build(chosen), output, wanted, given)
        typer.echo(_describe(result, chosen))
        typer.echo(written)


def _format(output: Path, given: str | None) -> str:
    """Format to write: the one given, or that of the ending.

    Raises:
        ValueError: If it is unknown.
    """
    from autoprune.result.exporting.export import ENDINGS, FORMATS

    return ENDINGS.get(output.suffix, _OWN) if given is None else one_of("format", given, (_OWN, *FORMATS))


def _write(small: nn.Module, output: Path, format: str, example: Any) -> str:  # noqa: A002
    """Write a pruned model, and say what was written and how to read it."""
    from autoprune.result.exporting.export import export
    from autoprune.result.recipe import save

    if format == _OWN:
        save(small, output)
        return f"saved as {output}; in Python: autoprune.load({str(output)!r}, fresh_model)"
    read = {
        "onnx": "onnxruntime.InferenceSession({!r})",
        "torch": "torch.export.load({!r}).module()",
        "hf": "autoprune.from_pretrained({!r})",
    }
    return f"{export(small, output, example, format=format)}\nin Python: {read[format].format(str(output))}"


def _choose(result: SearchResult, run_dir: Path, budget: list[str] | None, number: int | None) -> Trial:
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
