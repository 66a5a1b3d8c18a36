"""Callbacks see every trial once and in order, whatever happens to the search, and never harm it."""

import logging

import numpy as np
import pytest

import autoprune
from autoprune.execution import LocalExecutor
from tests.resuming import Counting, search, seen

TRIALS = 6


class Following:
    """Remembers what it is called with."""

    def __init__(self):
        self.trials, self.results = [], []

    def on_trial(self, trial):
        self.trials.append(trial)

    def on_end(self, result):
        self.results.append(result)

    @property
    def numbers(self):
        return [trial.id for trial in self.trials]


class Raising(Following):
    """Raises in every call, after it was made."""

    def on_trial(self, trial):
        super().on_trial(trial)
        raise ConnectionError(f"no server for trial {trial.id}")

    def on_end(self, result):
        super().on_end(result)
        raise ConnectionError("no server at the end")


class Backwards(LocalExecutor):
    """Returns the outcomes of each batch of four in reverse order."""

    def room(self):
        return 4 if super().room() else 0

    def gather(self):
        found = []
        while len(found) < 4 and (more := super().gather()):
            found += more
        return found[::-1]


def short(run_dir=None, resume=False, **options):
    return search(run_dir, resume, **{"trials": TRIALS, **options})


def test_a_callback_is_called_for_each_trial_and_once_at_the_end():
    following = Following()
    result = short(callbacks=[following])
    assert following.numbers == [trial.id for trial in result.trials] == list(range(TRIALS))
    assert [(trial.status, trial.score, trial.costs) for trial in following.trials] == [
        (trial.status, trial.score, trial.costs) for trial in result.trials
    ]
    assert following.results == [result]
    assert following.results[0].front[0].test_score is not None


def test_callbacks_change_nothing_in_the_search():
    assert seen(short(callbacks=[Following(), Raising()], storage="sqlite://")) == seen(short())


def test_a_callback_that_raises_costs_no_trial_and_is_logged_once_and_noted(caplog):
    raising, following = Raising(), Following()
    with caplog.at_level(logging.WARNING, "autoprune"):
        result = short(callbacks=[raising, following])
    assert raising.numbers == following.numbers == list(range(TRIALS))
    assert len(result.trials) == TRIALS
    assert len(result.front) > 0
    (note,) = [note for note in result.notes if "Raising" in note]
    assert note.startswith(f"callback Raising raised in {TRIALS + 1} of {TRIALS + 1} calls, first: ConnectionError")
    (record,) = [record for record in caplog.records if "Raising" in record.message]
    assert "the search goes on" in record.message


def test_failed_trials_are_called_for_too():
    class Failing(Counting):
        def evaluate(self, candidates, chunk=None):
            if self.count == 2:
                self.count += 1
                raise ValueError("no such candidate")
            return super().evaluate(candidates, chunk)

    following = Following()
    short(callbacks=[following], evaluator=Failing())
    assert [trial.status for trial in following.trials].count("failed") == 1
    assert following.numbers == list(range(TRIALS))


def test_trials_that_end_out_of_order_are_called_for_in_order():
    following, executor = Following(), Backwards()
    result = short(callbacks=[following], execution=executor, trials=8)
    assert following.numbers == list(range(8)) == [trial.id for trial in result.trials]


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_resumed_search_calls_for_no_trial_again(after, tmp_path):
    first, second = Following(), Following()
    stopped = short(tmp_path, callbacks=[first], evaluator=Counting(after))
    assert stopped.stopped == "interrupted"
    assert first.results == [stopped]
    ended = short(tmp_path, True, callbacks=[second], evaluator=Counting())
    assert len(first.numbers) == after
    assert all(numbers == sorted(numbers) for numbers in (first.numbers, second.numbers))
    assert sorted(first.numbers + second.numbers) == list(range(TRIALS))
    assert second.results == [ended]


def test_a_callback_that_comes_with_the_resumption_sees_the_trials_before_it_too(tmp_path):
    short(tmp_path, evaluator=Counting(3))
    following = Following()
    short(tmp_path, True, callbacks=[following], evaluator=Counting())
    assert following.numbers == list(range(TRIALS))


def test_trials_that_ended_before_an_interrupted_one_are_called_for_at_once_and_never_again(tmp_path):
    class Stops(Backwards):
        """Returns the last of four outcomes, and then is interrupted."""

        def gather(self):
            if getattr(self, "left", None) is None:
                self.left = super().gather()
                return self.left[:1]
            raise KeyboardInterrupt

    first, second = Following(), Following()
    assert short(tmp_path, callbacks=[first], execution=Stops(), trials=8).stopped == "interrupted"
    short(tmp_path, True, callbacks=[second], trials=8)
    assert first.numbers == [3]
    assert second.numbers == [0, 1, 2, 4, 5, 6, 7]


def test_ctrl_c_inside_a_callback_ends_the_search_with_the_trials_so_far():
    class Interrupting(Following):
        def on_trial(self, trial):
            super().on_trial(trial)
            if trial.id == 2:
                raise KeyboardInterrupt

    following = Interrupting()
    result = short(callbacks=[following])
    assert result.stopped == "interrupted"
    assert following.numbers[:3] == [0, 1, 2]
    assert {trial.id for trial in result.trials} == set(following.numbers)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Following(), "must be a list"),
        ("mlflow", "must be a list"),
        ([Following], "which is a class"),
        ([print], "whose on_trial is none"),
        ([type("Half", (), {"on_trial": lambda self, trial: None})()], "whose on_end is none"),
        ([type("Wide", (Following,), {"on_trial": lambda self, a, b: None})()], "which takes"),
    ],
)
def test_what_is_no_list_of_callbacks_is_refused_at_once(given, said):
    with pytest.raises(TypeError, match="callbacks must be a list of objects with the methods on_trial") as raised:
        autoprune.Execution(callbacks=given)
    assert said in str(raised.value)


def test_global_random_states_are_as_without_callbacks():
    np.random.seed(0)  # noqa: NPY002
    short(storage="sqlite://")
    after = np.random.rand()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert after == np.random.rand()  # noqa: NPY002
