"""``autoprune report``: one web page of a search, as a file or while it runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import MODEL_HELP, Debug, Imports, RunDir
from autoprune.cli.user_objects import import_first
from autoprune.files.access import as_path, write_text
from autoprune.result import SearchResult


def report(
    run_dir: RunDir,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The file to write; by default report.html in RUN_DIR.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FILE.py:NAME", help=f"{MODEL_HELP} Only named in the build command.")
    ] = None,
    candidates: Annotated[bool, typer.Option(help="Include the options of all trials, not of the front alone.")] = True,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page of a search that runs, to this machine alone, until Ctrl-C.")
    ] = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Write one web page of a search that needs no network: the front, all trials, and the layers of each."""
    with errors_on_one_line(debug):
        import_first(imports)
        from autoprune.result.report import page_of

        folder = as_path(run_dir, "RUN_DIR")
        folder = folder.parent if folder.is_file() else folder  # a file of the run stands for it
        if watch:
            if output is not None:
                raise ValueError("give --output or --watch, not both: what is watched is not written")
            _serve(folder, model)
            return
        page = page_of(SearchResult.load(folder), str(folder), model, candidates)
        file = write_text(folder / "report.html" if output is None else output, page, "output")
        typer.echo(f"report in {file}")


def _serve(folder: Path, model: str | None) -> None:
    from autoprune.result.report.server import ReportServer

    with ReportServer(folder, model) as server, suppress(KeyboardInterrupt):
        typer.echo(f"report at {server.url}\nfor this machine alone; Ctrl-C ends it")
        server.wait()
