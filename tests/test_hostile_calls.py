"""Wrong arguments for every public call and every command: refused in a sentence that names one, or taken by design."""

import logging
import os
from functools import partial
from itertools import islice

import numpy as np
import pytest

from tests.hostile import settled
from tests.hostile_calls import Wrong, make_calls, outcome, several, single
from tests.hostile_commands import answer, commands, make_module

CALLS, TOGETHER, COMMANDS = 30, 100, 60
LONG = ("search", "inspect", "profile")
"""Calls that trace a model: some of their values are drawn; `benchmarks.execution.hostile_calls` tries all."""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Every public call, in a folder of its own, and silent."""
    folder, before = tmp_path_factory.mktemp("calls"), os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        os.chdir(folder)
        patch.syspath_prepend(folder)
        logging.disable(logging.CRITICAL)
        made = make_calls(folder)
        make_module(folder)
        yield made
        logging.disable(logging.NOTSET)
        os.chdir(before)


def wrong_among(calls, tried) -> list[str]:
    found = [(wrong, *settled(partial(outcome, calls[wrong.call], wrong))) for wrong in tried]
    assert any(fate == "refused" for _, fate, *_ in found)
    return [f"{wrong}: {why}" for wrong, fate, why, _ in found if fate == "WRONG"]


@pytest.mark.slow
def test_a_wrong_value_is_refused_by_the_name_of_its_argument_or_taken_by_design(calls):
    assert wrong_among(calls, (wrong for wrong in single(calls) if wrong.call not in LONG)) == []


@pytest.mark.slow
@pytest.mark.parametrize("call", LONG)
def test_so_it_is_where_a_model_is_traced(calls, call):
    tried = list(single({call: calls[call]}))
    drawn = np.random.default_rng(0).choice(len(tried), 4 * CALLS if call == "search" else CALLS, replace=False)
    assert wrong_among(calls, [tried[i] for i in drawn]) == []


@pytest.mark.slow
def test_of_several_wrong_values_one_is_named(calls):
    assert wrong_among(calls, islice(several(calls, np.random.default_rng(0)), TOGETHER)) == []


@pytest.mark.slow
def test_a_wrong_word_on_a_command_line_is_one_line_that_names_its_option(calls):
    tried = list(commands())
    drawn = np.random.default_rng(0).choice(len(tried), COMMANDS, replace=False)
    found = [(tried[i], *settled(partial(answer, tried[i]))) for i in drawn]
    assert [f"{command}: {why}" for command, fate, why, _ in found if fate == "WRONG"] == []
    assert sum(fate == "refused" for _, fate, *_ in found) > COMMANDS // 2


@pytest.mark.slow
def test_what_hangs_raises_anything_else_or_is_taken_quietly_is_found(calls, monkeypatch):
    monkeypatch.setattr("tests.hostile.MOST_SECONDS", 1)
    call = calls["Racing"]

    def told(run, value="nan"):
        fate, why, _ = settled(partial(outcome, type(call)(call.of, run, dict), Wrong("Racing", {"delta": value})))
        return fate, why.partition(":")[0]

    def hangs(delta):
        while True:
            pass

    def fails(delta):
        raise KeyError(delta)

    def tells(message):
        def run(delta):
            raise ValueError(message)

        return run

    assert told(call.run) == ("refused", "ValueError")
    assert told(hangs) == ("WRONG", "TooSlowError")
    assert told(fails) == ("WRONG", "KeyError")
    assert told(tells("bad value")) == ("WRONG", "does not name delta")
    assert told(tells("delta " + "x" * 1_000)) == ("WRONG", "too long")
    assert told(tells("delta must not be tensor([1.])")) == ("WRONG", "too long")
    assert told(lambda delta: None) == ("WRONG", "took delta without a word")
