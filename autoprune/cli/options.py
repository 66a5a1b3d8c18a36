"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.user_objects import IMPORT

MODEL_HELP = "The dense model, as FILE.py:NAME or package.module:NAME; a function or class is called without arguments."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The --run-dir of a search.")]
InputShape = Annotated[
    str | None, typer.Option(metavar="N,C,H,W", help="Shape of an example input, batch included; it holds noise.")
]
Example = Annotated[
    str | None,
    typer.Option(metavar="FILE.py:NAME", help="Example input: a tensor, a tuple, or a dict of keyword inputs."),
]
Rewrite = Annotated[
    str,
    typer.Option(
        metavar="auto|off",
        help="Modules whose code ties sizes: auto delivers them as graphs of what they ran, off leaves them.",
    ),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        IMPORT,
        metavar="FILE.py|MODULE",
        help="Import this first: a module that registers a space, rule or adapter of your own; may be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
