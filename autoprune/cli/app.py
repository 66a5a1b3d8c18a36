"""The command line: ``autoprune search``, ``front``, ``report``, ``build``, ``recover``, ``export`` and others."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from autoprune.cli.build import build
from autoprune.cli.export import export
from autoprune.cli.front import front
from autoprune.cli.inspect import inspect
from autoprune.cli.plan import plan
from autoprune.cli.profile import profile
from autoprune.cli.recover import recover
from autoprune.cli.report import report
from autoprune.cli.search import search

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: no boxes, and nothing lost in a narrow terminal
    pretty_exceptions_enable=False,  # prints the values of locals, whole tensors among them
    help="Search how much of each layer of a PyTorch model to remove.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from autoprune import __version__

        typer.echo(f"autoprune {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("autoprune").setLevel(logging.INFO)


for command in (search, plan, front, report, build, recover, export, inspect, profile):
    app.command()(command)
