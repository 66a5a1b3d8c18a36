"""``autoprune inspect``: the prunable groups of a model, and why the rest stays."""

from __future__ import annotations

import json
from typing import Any

import typer

from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import AsJson, Debug, Example, Imports, InputShape, Model, Rewrite
from autoprune.cli.user_objects import example_inputs, import_first


def inspect(
    model: Model,
    rewrite: Rewrite = "auto",
    input_shape: InputShape = None,
    example: Example = None,
    as_json: AsJson = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Report the prunable groups of a model with their costs, and the reasons why the rest stays."""
    with errors_on_one_line(debug):
        import_first(imports)
        from autoprune.cli.user_objects import load_model
        from autoprune.inspection import inspect as inspect_model
        from autoprune.structure.call import Call

        dense = load_model(model)
        options: dict[str, Any] = {"rewrite": rewrite}  # checked by the call
        found = inspect_model(dense, Call(inputs=example_inputs(dense, input_shape, example), **options))
        typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else found)
