"""Page of a report: the template with the data, the style and the scripts, and a policy that forbids every request."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.files.access import write_text
from autoprune.result.report.data import data_of
from autoprune.result.report.packing import as_script
from autoprune.result.tables import engineering

if TYPE_CHECKING:
    from jinja2 import Template

    from autoprune.result.search_result import SearchResult

FOLDER = Path(__file__).parent
SCRIPTS = ("charts.js", "page.js")
"""Built from ``web/`` by ``npm run build``; a test builds them again and compares."""


def write_report(result: SearchResult, path: str | Path, candidates: bool = True) -> Path:
    """Write the report of a result to a file, see `SearchResult.report`.

    Raises:
        OSError: If it cannot be written.
    """
    return write_text(path, page_of(result, full=candidates))


def page_of(result: SearchResult, run_dir: str | None = None, model: str | None = None, full: bool = True) -> str:
    """Make the page of a file.

    Args:
        result: Finished, loaded, or read from a journal.
        run_dir: Folder that the build command names.
        model: ``FILE.py:NAME`` in that command.
        full: Include the options of all trials.
    """
    return assembled(result, data_of(result, run_dir, model, full).to_json())


def assembled(result: SearchResult, data: Mapping[str, Any], live: str = "") -> str:
    """Put data into the page.

    Args:
        result: What the data is of.
        data: The parts of a report, JSON-ready.
        live: Address at which a server gives the data again while a search runs; empty for a file.
    """
    scripts = [text_of(f"built/{name}") for name in SCRIPTS]
    style = text_of("built/page.css")
    page = _template().render(
        title=f"{result.outline.model if result.outline else 'Search'}: {result.budget}",
        policy=policy(scripts, style, bool(live)),
        style=style,
        scripts=scripts,
        data={name: as_script(part) for name, part in data.items()},
        live=live,
        rows=_rows(result),
        cost=next(iter(result.limits)),
        result=result,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # names of tensors may hold half of a character


def policy(scripts: list[str], style: str, live: bool = False) -> str:
    """Content-Security-Policy under which these scripts and this style run, and nothing is loaded or sent.

    Args:
        scripts: Texts of the script elements.
        style: Text of the style element.
        live: Allow requests to the server that the page came from.
    """
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(map(_hash, scripts)),
        "style-src": _hash(style),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        **({"connect-src": "'self'"} if live else {}),
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


@cache
def text_of(name: str) -> str:
    """Text of a file of this package."""
    return (FOLDER / name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def _rows(result: SearchResult) -> list[dict[str, Any]]:
    """Rows of the front for readers without scripts, the dense model last."""
    name = next(iter(result.limits))
    return [
        {
            "trial": "dense" if trial.id < 0 else trial.id,
            "cost": engineering(trial.costs[name]),
            "share": trial.costs[name] / result.dense.costs[name] if result.dense.costs[name] else None,
            "score": trial.score,
            "test": trial.test_score,
        }
        for trial in (*result.front, result.dense)
    ]
