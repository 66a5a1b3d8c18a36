"""Results in notebooks: small tables without scripts, whose names cannot become HTML, and a bar that moves."""

import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import autoprune
from autoprune.result.audit_report import Audit, Trained, Variant
from autoprune.study.progress import Progress
from tests.resuming import search

EVIL = "</table></style><script>alert('x')</script>\"'&"


class Reading(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def result():
    return search(None, trials=8)


def audit_of(metric="accuracy", note="a note"):
    rows = tuple(Trained(i, 10.0 * i, 0.5 + 0.1 * i, {"auto": 0.4 + 0.1 * i}, {"auto": -i}) for i in range(5))
    variants = {"as found": Variant(10.0, (0.9, 0.8)), "uniform widths": Variant(10.0, (0.7, 0.6))}
    return Audit(rows, ("auto",), metric, True, 100, "flops", None, 4, variants, 3.0, (note,))


def test_a_result_shows_its_front_and_the_dense_model(result):
    read = Reading(result._repr_html_())
    assert not read.open
    text = " ".join(read.text)
    for trial in (*result.front, result.dense):
        assert f"{trial.score:.4f}" in text
    assert all(note in text for note in result.notes)
    assert len(result._repr_html_()) < 20_000


def test_an_audit_shows_its_tables_and_conclusions():
    audit = audit_of()
    read = Reading(audit._repr_html_())
    assert not read.open
    assert {audit.verdict(), audit.origin(), "a note", "uniform widths"} <= set(read.text)


def test_an_inspection_shows_costs_and_what_stays():
    found = autoprune.inspect(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(2, 4))
    read = Reading(found._repr_html_())
    assert not read.open
    assert "Sequential: 8 removable units in 1 group" in read.text
    assert "weights, buffers and peak of activations, one sample" in read.text


def test_hundreds_of_groups_make_a_small_cell():
    layers = [layer for _ in range(150) for layer in (nn.Linear(8, 8), nn.ReLU())]
    found = autoprune.inspect(nn.Sequential(*layers), torch.ones(2, 8))
    assert len(found.groups) > 100
    assert len(found._repr_html_()) < 60_000


def test_ipython_shows_the_text_in_a_terminal(result):
    shown = []
    for each in (result, audit_of(), autoprune.inspect(Named(), torch.ones(2, 4))):
        each._repr_pretty_(SimpleNamespace(text=shown.append), False)
        assert shown[-1] == str(each)


@pytest.mark.parametrize("kind", ["result", "audit", "inspection"])
def test_names_are_text_whatever_they_hold(kind, result):
    shown = {
        "result": replace(result, metric=EVIL, notes=(EVIL,), budget=result.budget, audit=None),
        "audit": audit_of(metric=EVIL, note=EVIL),
        "inspection": autoprune.inspect(Named(), torch.ones(2, 4)),
    }[kind]
    read = Reading(shown._repr_html_())
    assert "script" not in read.tags
    assert not read.open
    assert any("alert" in text for text in read.text)


class Named(nn.Module):
    """Holds a layer whose name is HTML, and which no output depends on being prunable."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({EVIL.replace(".", ""): nn.Linear(4, 8)})
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x).relu()
        return self.last(x)


@pytest.fixture
def pictures(monkeypatch):
    """Every picture that a notebook would have shown in the cell, in order."""
    shown = []
    handle = SimpleNamespace(update=shown.append)

    def display(what, display_id):
        assert display_id is True
        shown.append(what)
        return handle

    shell = SimpleNamespace(kernel=object())
    ipython = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(HTML=str, display=display))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    return shown


def test_a_search_in_a_notebook_moves_one_bar_to_its_end(pictures):
    search(None, trials=6)
    assert all(picture.startswith("<progress max='6'") for picture in pictures)
    assert "value='0'" in pictures[0]
    assert "value='6'" in pictures[-1]
    assert "6 of 6 trials" in pictures[-1]
    assert not Reading(pictures[-1]).open


def test_progress_that_is_not_wanted_is_not_shown(pictures):
    search(None, trials=3, progress=False)
    assert pictures == []


def test_the_state_in_a_bar_is_text(pictures):
    with Progress(10, EVIL, show=True) as bar:
        bar.update(5, 1, SimpleNamespace(score=0.5), 3, "refining")
    assert "script" not in Reading(pictures[-1]).tags


@pytest.mark.parametrize("ipython", [None, SimpleNamespace(get_ipython=lambda: None), SimpleNamespace()])
def test_without_a_kernel_there_is_no_bar(ipython, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    with Progress(3, "accuracy", show=True) as bar:
        assert bar._bar is None
