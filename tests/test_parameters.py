"""Parameters: few enough that a reader meets all of them at once, and groups that say where their parts belong."""

import ast
import re
from dataclasses import fields
from inspect import signature
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import nn

import autoprune
from autoprune.cli.app import app
from autoprune.study.request import PLACES, Request

PACKAGE = Path(autoprune.__file__).parent
MOST = 8
MORE = {"search.py: search": 16, "audit/audit.py: audit": 9}
"""Functions that may have more, since their users write the arguments by name."""

COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback is not None}


def counts():
    """Number of parameters of every function, by file and name; those of a command line are its options."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                if not (path.parent.name == "cli" and node.name in COMMANDS):  # typer makes an option of each
                    name = f"{path.relative_to(PACKAGE).as_posix()}: {node.name}"
                    found[name] = len([each for each in names if each not in ("self", "cls")])
    return found


def test_no_function_has_more_parameters_than_a_reader_holds_in_mind():
    found = counts()
    assert {name: count for name, count in found.items() if count > MORE.get(name, MOST)} == {}
    assert found["search.py: search"] == len(signature(autoprune.search).parameters) == 15


def test_a_request_has_the_arguments_of_search():
    assert [field.name for field in fields(Request)] == list(signature(autoprune.search).parameters)


@pytest.mark.parametrize("name", PLACES)
def test_a_part_of_a_group_that_is_given_to_search_is_refused_with_the_place_it_belongs_to(name):
    with pytest.raises(TypeError, match="no argument") as raised:
        autoprune.search(nn.Linear(3, 2), "flops <= 50%", **{name: None})
    place = PLACES[name]
    assert str(raised.value) == f"search() has no argument {name}; write {place}"
    group, _, inner = place.partition("=")
    assert group in signature(autoprune.search).parameters
    if inner.startswith("autoprune."):
        kind, _, part = inner.removeprefix("autoprune.").partition("(")
        assert part == f"{name}=...)"
        assert name in signature(attrgetter(kind)(autoprune)).parameters


@pytest.mark.parametrize(
    ("name", "hint"),
    [("budgets", "did you mean budget?"), ("n_trials", "did you mean trials?"), ("q", "it takes model,")],
)
def test_what_is_no_part_of_anything_is_refused_with_what_may_have_been_meant(name, hint):
    with pytest.raises(TypeError, match=re.escape(f"search() has no argument {name}; {hint}")):
        autoprune.search(nn.Linear(3, 2), **{name: 5})


@pytest.mark.parametrize("verb", [autoprune.inspect, autoprune.profile])
def test_the_other_verbs_that_take_a_call_say_so_too(verb):
    with pytest.raises(TypeError, match=rf"{verb.__name__}\(\) has no argument outputs, forward; write example="):
        verb(nn.Linear(3, 2), torch.ones(2, 3), outputs=0, forward=print)


def test_recovery_names_its_recipe_for_what_only_that_takes():
    with pytest.raises(TypeError, match=re.escape("no argument lr; write recipe=autoprune.Recovery(lr=...)")):
        autoprune.recover(nn.Linear(3, 2), steps=3, lr=0.1)


@pytest.mark.parametrize("group", [autoprune.Call, autoprune.Start, autoprune.Execution])
def test_groups_are_frozen_and_name_all_of_their_fields(group):
    assert all(
        one.kind is one.KEYWORD_ONLY and one.default is not one.empty for one in signature(group).parameters.values()
    )
    with pytest.raises(AttributeError):
        setattr(group(), fields(group)[0].name, None)
