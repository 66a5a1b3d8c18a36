"""A folder with a model and data, and a finished search in it."""

import shutil
import sqlite3
import sys

import pytest

import autoprune
from tests.cli.commands import CODE, SEARCH, ok


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_example.py").write_text(CODE)
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)


@pytest.fixture(scope="session")
def searched(folder):
    """A finished search and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        return folder / "runs" / "a", ok(*SEARCH, "--run-dir", "runs/a", "--round-to", 2, "--ignore", "8")


@pytest.fixture
def journal_only(searched, tmp_path):
    """The run as a kill in the middle of the last trial on the front leaves it, and the id of that trial."""
    shutil.copy(searched[0] / "journal.sqlite", tmp_path)
    trial = autoprune.SearchResult.load(searched[0]).front[-1].id
    with sqlite3.connect(tmp_path / "journal.sqlite") as connection:
        connection.execute("DELETE FROM tells WHERE trial = ?", (trial,))
        connection.execute("DELETE FROM evaluations WHERE trial = ?", (trial,))
        connection.execute("UPDATE trials SET status = 'pending' WHERE id = ?", (trial,))
    connection.close()
    return tmp_path, trial
