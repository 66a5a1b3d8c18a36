"""``autoprune build``: one pruned model of a finished search, to load in Python or to run elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune.arguments import one_of
from autoprune.cli.chosen import Budgets, TrialNumber, from_run
from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import MODEL_HELP, Debug, Example, Imports, InputShape, RunDir
from autoprune.cli.user_objects import example_inputs, import_first, load_model
from autoprune.cli.written import OWN, next_command, require_writable, write_model


def build(
    run_dir: RunDir,
    model: Annotated[str, typer.Option(metavar="FILE.py:NAME", help=MODEL_HELP)],
    output: Annotated[Path, typer.Option(help="The file, or folder for hf, to write; an existing file is replaced.")],
    budget: Budgets = None,
    trial: TrialNumber = None,
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
        wanted = _format(output, format)
        require_writable(output, folder=wanted == "hf")
        dense = load_model(model, option="--model")
        given = None if wanted == OWN else example_inputs(dense, input_shape, example)
        small, told = from_run(run_dir, dense, budget, trial)
        written = write_model(small, output, wanted, given)
        typer.echo(told)
        typer.echo(written)
        if wanted == OWN:
            data = ("--data", "data.py:load")
            typer.echo(next_command("recover", str(output), model, *data, output="recovered.safetensors"))


def _format(output: Path, given: str | None) -> str:
    """Format to write: the one given, or that of the ending.

    Raises:
        ValueError: If it is unknown.
    """
    from autoprune.result.exporting.export import ENDINGS, FORMATS

    return ENDINGS.get(output.suffix, OWN) if given is None else one_of("format", given, (OWN, *FORMATS))
