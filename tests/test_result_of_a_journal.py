"""Results that cannot be read: the journal next to them gives the trials, and says so."""

import json
import shutil

import pytest
import torch

import autoprune
from autoprune import SearchResult
from zoo import ZOO

TORN = '{"format": "autoprune-result", "tri'


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The folder of a search that saved its result, and what it returned."""
    run_dir = tmp_path_factory.mktemp("searched")
    inputs = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    result = autoprune.search(
        ZOO["mlp"].build(),
        "flops <= 60%",
        inputs,
        trials=4,
        optimizer="random",
        execution=autoprune.Execution(run_dir=run_dir),
    )
    result.save(run_dir)
    return run_dir, result


@pytest.fixture
def folder(searched, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(searched[0], tmp_path / "run")


def newer(text):
    return json.dumps({**json.loads(text), "version": 2})


@pytest.mark.parametrize("damage", [lambda _: TORN, lambda _: "", lambda _: "[1, 2]", newer])
@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_result_that_cannot_be_read_is_read_from_the_journal_next_to_it(named, damage, folder, searched, caplog):
    file = folder / "result.json"
    file.write_text(damage(file.read_text()))
    loaded = SearchResult.load(file if named == "file" else folder, ZOO["mlp"].build())
    assert [trial.candidate for trial in loaded.trials] == [trial.candidate for trial in searched[1].trials]
    assert [trial.score for trial in loaded.trials] == [trial.score for trial in searched[1].trials]
    assert "result.json is not a result of autoprune, or is damaged" in loaded.notes[0]
    assert loaded.notes[0].endswith("this is read from the journal next to it")
    assert "reading the journal next to it" in caplog.text
    with pytest.raises(autoprune.FileFormatError, match="a journal, which holds no weights; resume the search"):
        loaded.build()


def test_a_search_that_saved_no_result_is_read_from_its_journal(folder, searched, caplog):
    (folder / "result.json").unlink()
    loaded = SearchResult.load(folder)
    assert loaded == SearchResult.from_journal(folder)
    assert loaded.notes[0] == "from the journal: 4 of 4 trials finished, 0 pending"
    assert not caplog.text


def test_a_whole_result_is_read_without_its_journal(folder, searched):
    (folder / "journal.sqlite").write_bytes(b"damaged")
    assert SearchResult.load(folder).trials == searched[1].trials


def test_where_both_are_damaged_both_are_named(folder):
    (folder / "result.json").write_text(TORN)
    (folder / "journal.sqlite").write_bytes(b"damaged" * 1000)
    with pytest.raises(
        autoprune.FileFormatError, match=r"result\.json is not .*journal next to it cannot be read either"
    ):
        SearchResult.load(folder)


def test_the_journal_does_not_stand_in_for_another_file(folder):
    with pytest.raises(FileNotFoundError, match=r"path must be a folder written by result\.save, or the run_dir"):
        SearchResult.load(folder / "results.json")
