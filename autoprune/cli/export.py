"""``autoprune export``: a pruned model for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.chosen import Budgets, Source, TrialNumber, pruned_model
from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import MODEL_HELP, Debug, Example, Imports, InputShape
from autoprune.cli.user_objects import example_inputs, import_first, load_model
from autoprune.cli.written import require_writable, write_model


def export(
    source: Source,
    model: Annotated[str, typer.Option(metavar="FILE.py:NAME", help=MODEL_HELP)],
    output: Annotated[Path, typer.Option(help="The file, or folder for hf, to write; an existing file is replaced.")],
    format: Annotated[  # noqa: A002  # the name of the option
        str | None,
        typer.Option(
            metavar="onnx|torch|hf",
            help="onnx, torch (torch.export): compared with the model. hf: a folder for autoprune.from_pretrained. By "
            "default by the ending: .onnx or .pt2.",
        ),
    ] = None,
    budget: Budgets = None,
    trial: TrialNumber = None,
    input_shape: InputShape = None,
    example: Example = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Write a pruned model for another runtime, from a finished search or a saved file; its outputs are compared."""
    with errors_on_one_line(debug):
        import_first(imports)
        from autoprune.result.exporting.export import format_of

        wanted = format_of(output, format)
        require_writable(output, folder=wanted == "hf")
        dense = load_model(model, option="--model")
        given = example_inputs(dense, input_shape, example)
        small, told = pruned_model(source, dense, budget, trial)
        written = write_model(small, output, wanted, given)
        typer.echo(told)
        typer.echo(written)
