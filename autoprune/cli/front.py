"""``autoprune front``: the front of a search that has ended, still runs, or was killed."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from autoprune.cli.mistakes import errors_on_one_line
from autoprune.cli.options import AsJson, Debug, Imports, RunDir
from autoprune.cli.user_objects import import_first
from autoprune.files.access import as_path, shortened
from autoprune.result import SearchResult

_WATCH_SECONDS = 1.0
_LOOKS_ALONE = 5  # at a journal that no search holds, until its search counts as killed


def front(
    run_dir: RunDir,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the front into this file.")] = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it as trials come, until the search ends.")] = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Print the front of a search: finished, still running, or killed."""
    with errors_on_one_line(debug):
        import_first(imports)
        result = _watch(run_dir) if watch else SearchResult.load(as_path(run_dir, "RUN_DIR"))
        if plot is not None:
            _plot(result, plot)
        typer.echo(json.dumps(_front_json(result), indent=1) if as_json else result)


def _watch(run_dir: Path) -> SearchResult:
    """Show the trials in the journal until the search has all of them, saves its result or was killed, or Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    from autoprune.journal.sqlite_file import FILE_NAME, is_written

    saved = run_dir / "result.json"
    before = saved.stat().st_mtime_ns if saved.exists() else 0  # of the search before it was resumed
    result = SearchResult.from_journal(run_dir)
    with Live(Text(str(result)), auto_refresh=False, transient=True) as live, suppress(KeyboardInterrupt):
        alone = 0
        while result.stopped == "unfinished" and not (saved.exists() and saved.stat().st_mtime_ns > before):
            began = time.monotonic()
            alone = 0 if is_written(run_dir / FILE_NAME) else alone + 1
            result = SearchResult.from_journal(run_dir)
            if alone >= _LOOKS_ALONE:
                break
            live.update(Text(str(result)), refresh=True)
            time.sleep(max(_WATCH_SECONDS, time.monotonic() - began))  # a long journal takes long to read
    return result


def _front_json(result: SearchResult) -> dict[str, Any]:
    """The result without the trials off the front, which it counts instead."""
    whole = result.to_json()
    dropped = ("format", "version", "space", "trials", "front")
    status = [trial.status for trial in result.trials]
    return {
        **{name: value for name, value in whole.items() if name not in dropped},
        "trials": {name: status.count(name) for name in ("ok", "raced", "failed", "pending")},
        "probes": sum(not trial.feasible for trial in result.trials),
        "front": [trial.to_json() for trial in result.front],
    }


def _plot(result: SearchResult, path: Path) -> None:
    try:
        result.plot(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"plot cannot be written to {shortened(path)}: {error!s:.200}") from error
    typer.echo(f"picture in {path}", err=True)
