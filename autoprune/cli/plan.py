"""``autoprune plan``: the time, the memory and the expectation of a search before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import AsJson, Debug, Example, Imports, InputShape, Model, Rewrite
from autoprune.cli.user_objects import example_inputs, import_first


def plan(
    model: Model,
    budget: Annotated[list[str], typer.Option(help="Limit, as of autoprune search; may be repeated.")],
    data: Annotated[str | None, typer.Option(metavar="FILE.py:NAME", help="As of autoprune search.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="State dict to load into the model: .safetensors, or from torch.save.")
    ] = None,
    trials: Annotated[str, typer.Option(metavar="N|auto", help="Candidates to evaluate.")] = "200",
    metric: Annotated[str, typer.Option(help="As of autoprune search.")] = "auto",
    evaluator: Annotated[str, typer.Option(help="As of autoprune search.")] = "auto",
    space: Annotated[str, typer.Option(metavar="NAME|FILE.py:NAME", help="As of autoprune search.")] = "channels",
    rewrite: Rewrite = "auto",
    input_shape: InputShape = None,
    example: Example = None,
    as_json: AsJson = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Time two candidates of a search, and tell how long all would take, in what memory, and what to expect."""
    with errors_on_one_line(debug):
        import_first(imports)
        from autoprune.cli.search import space_of
        from autoprune.cli.user_objects import load_model, load_object
        from autoprune.structure.call import Call
        from autoprune.study.plan import plan as plan_search

        dense = load_model(model, weights)
        call: dict[str, Any] = {"rewrite": rewrite}
        found = plan_search(
            dense,
            budget,
            None if data is None else load_object(data, "--data"),
            trials=int(trials) if trials.lstrip("-").isdecimal() else trials,
            metric=metric,
            evaluator=evaluator,
            space=space_of(space, {}),
            example=Call(inputs=example_inputs(dense, input_shape, example, needed=data is None), **call),
        )
        typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else found)
