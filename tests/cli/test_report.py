"""``autoprune report``: the page of a folder, where it is asked for."""

import pytest

from tests.cli.commands import ok, run
from tests.reporting import Page


def test_it_writes_the_page_next_to_the_result(searched):
    told = ok("report", "runs/a")
    assert "report in runs/a/report.html" in told
    page = Page((searched[0] / "report.html").read_text())
    assert page.data["data-head"]["commands"]["shell"].startswith("autoprune build runs/a --model MODEL.py:NAME")
    assert page.data["data-candidates"]["bits"] == 4


def test_it_writes_where_it_is_told_to_with_the_model_in_the_command(searched, tmp_path):
    ok("report", "runs/a", "--output", tmp_path / "a b.html", "--model", "cli_example.py:build", "--no-candidates")
    page = Page((tmp_path / "a b.html").read_text())
    assert "--model cli_example.py:build" in page.data["data-head"]["commands"]["shell"]
    assert page.data["data-candidates"] is None


@pytest.mark.parametrize("file", ["journal.sqlite", "result.json"])
def test_a_file_of_the_run_stands_for_it(searched, file):
    assert "report in runs/a/report.html" in ok("report", f"runs/a/{file}")
    page = Page((searched[0] / "report.html").read_text())
    assert page.data["data-head"]["commands"]["shell"].startswith("autoprune build runs/a --model")


def test_a_killed_search_has_a_page_from_its_journal(journal_only):
    folder, _ = journal_only
    ok("report", folder)
    page = Page((folder / "report.html").read_text())
    assert page.data["data-head"]["run"]["stopped"] == "unfinished"
    assert page.bulk["outline"]["layers"]


def test_a_folder_without_a_search_is_refused_in_one_line(tmp_path):
    finished = run("report", tmp_path)
    assert finished.exit_code == 2
    assert "no result.json and no journal.sqlite there" in finished.output
