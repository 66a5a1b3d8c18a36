"""Wrong return values of a user's optimizer or evaluator are refused by name, and cost at most the trial."""

import numpy as np
import pytest
import torch

import autoprune
from autoprune.evaluators import AdaptiveBN
from autoprune.protocols import FAILED, OK, Failure, Measurement
from tests.refusals import EIGHTHS, refused
from tests.searching import grouped

X = torch.randn(120, 64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(120) % 10
SIZES = 3  # dimensions of the space of the model under test


def proposing(*asks):
    """An optimizer that proposes these, one after the other, and then nothing."""

    class Careless:
        def __init__(self, problem, seed):
            self.left = list(asks)

        def ask(self, n):
            return self.left.pop(0) if self.left else np.zeros((0, SIZES), dtype=np.int64)

        def tell(self, evaluations):
            pass

    return Careless


def search(model, optimizer=None, evaluator=None, **options):
    chosen = {name: value for name, value in (("optimizer", optimizer), ("evaluator", evaluator)) if value is not None}
    settings = {"space": EIGHTHS, "trials": 8, **chosen, **options}
    return autoprune.search(model, "flops <= 90%", (X, Y), **grouped(**settings))


WRONG_PROPOSALS = {
    "negative": (np.array([[-1, -1, -1]]), "got [-1, -1, -1] in row 0"),
    "beyond the options": (np.array([[1, 1, 1], [0, 8, 0]]), "got [0, 8, 0] in row 1"),
    "floats": (np.ones((1, SIZES)), "of dtype float64"),
    "bools": (np.ones((1, SIZES), dtype=bool), "of dtype bool"),
    "a list": ([[1, 1, 1]], "got [[1, 1, 1]] (list)"),
    "a tensor": (torch.ones(1, SIZES, dtype=torch.int64), "(Tensor)"),
    "none": (None, "got None (NoneType)"),
    "one candidate without its row": (np.array([1, 1, 1]), "got shape (3,)"),
    "another number of dimensions": (np.ones((1, 2), dtype=np.int64), "got shape (1, 2)"),
    "more than asked for": (np.ones((20, SIZES), dtype=np.int64), "got shape (20, 3)"),
}


class TestProposals:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", WRONG_PROPOSALS)
    def test_a_wrong_one_is_refused_and_names_the_optimizer(self, mlp, kind):
        wrong, named = WRONG_PROPOSALS[kind]
        with refused((TypeError, ValueError), "Careless.ask(8) must return an int64 array of shape (<= 8, 3)", named):
            search(mlp, proposing(wrong))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["negative", "none"])
    def test_later_on_it_ends_the_search_with_what_was_found_and_a_note(self, mlp, kind):
        result = search(mlp, proposing(np.array([[1, 1, 1], [2, 2, 2]]), WRONG_PROPOSALS[kind][0]))
        assert [trial.status for trial in result.trials] == [OK, OK]
        assert result.stopped == "refused"
        assert any("stopped after 2 trials: Careless.ask(6)" in note for note in result.notes)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64])
    def test_integers_of_any_size_are_taken(self, mlp, dtype):
        result = search(mlp, proposing(np.array([[1, 2, 3]], dtype=dtype)))
        assert [trial.candidate for trial in result.trials] == [(1, 2, 3)]

    @pytest.mark.slow
    @pytest.mark.parametrize("empty", [np.zeros((0, SIZES), dtype=np.int64), np.array([])])
    def test_an_empty_array_ends_the_search(self, mlp, empty):
        assert search(mlp, proposing(np.array([[1, 1, 1]]), empty)).stopped == "exhausted"

    @pytest.mark.slow
    def test_what_makes_no_optimizer_is_named(self, mlp):
        with refused(TypeError, "optimizer must make an object with the methods ask and tell, got 5"):
            search(mlp, lambda problem, seed: 5)


class WordlessError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raising(error):
    raise error


GOOD = Measurement(np.zeros(48), np.ones(48), 0.1)
WRONG_OUTCOMES = {
    "none": (lambda: None, "Odd.evaluate must return a list"),
    "none in a list": (lambda: [None], "Odd.evaluate must give a Measurement or a Failure, got None"),
    "a number": (lambda: [0.5], "Odd.evaluate must give a Measurement or a Failure, got 0.5"),
    "two": (lambda: [GOOD, GOOD], "Odd.evaluate must return a list with one Measurement"),
    "lists": (lambda: [Measurement([0.0] * 48, np.ones(48), 0.1)], "its signal as an array of real numbers"),
    "tensors": (lambda: [Measurement(np.zeros(48), torch.ones(48), 0.1)], "its metric as an array of real numbers"),
    "complex": (lambda: [Measurement(np.zeros(48) + 1j, np.ones(48), 0.1)], "complex128 of shape (48,)"),
    "columns": (lambda: [Measurement(np.zeros((48, 1)), np.ones(48), 0.1)], "got float64 of shape (48, 1)"),
    "no samples": (lambda: [Measurement(np.zeros(0), np.zeros(0), 0.1)], "got shapes (0,) and (0,)"),
    "unequal": (lambda: [Measurement(np.zeros(48), np.zeros(47), 0.1)], "got shapes (48,) and (47,)"),
    "other samples": (lambda: [Measurement(np.zeros(9), np.zeros(9), 0.1)], "got 9 values and 48 of the dense model"),
    "seconds": (lambda: [Measurement(np.zeros(48), np.ones(48), np.nan)], "must give seconds as a finite number"),
    "seconds of a failure": (lambda: [Failure("odd", np.nan)], "must give seconds as a finite number"),
    "not finite": (lambda: [Measurement(np.full(48, np.inf), np.ones(48), 0.1)], "NaN or infinite"),
    "an error without words": (lambda: raising(WordlessError()), "WordlessError: (its message cannot be read)"),
}


class Odd(AdaptiveBN):
    """Gives something odd for the second candidate, or for the dense model."""

    def __init__(self, wrong, when):
        super().__init__()
        self.wrong, self.when, self.calls = wrong, when, 0

    def evaluate(self, candidates, chunk=None):
        self.calls += 1
        return self.wrong() if self.calls == self.when else super().evaluate(candidates, chunk)


class TestEvaluators:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", WRONG_OUTCOMES)
    def test_a_wrong_outcome_costs_one_trial_and_names_the_evaluator(self, mlp, kind):
        wrong, named = WRONG_OUTCOMES[kind]
        result = search(mlp, evaluator=Odd(wrong, 3), trials=4)
        assert [trial.status for trial in result.trials].count(FAILED) == 1
        (failed,) = (trial for trial in result.trials if trial.status == FAILED)
        assert named in failed.reason
        assert len(failed.reason) < 600

    @pytest.mark.slow
    def test_a_wrong_outcome_of_the_dense_model_is_refused(self, mlp):
        with refused(ValueError, "model cannot be scored on the validation data: TypeError: Odd.evaluate must return"):
            search(mlp, evaluator=Odd(lambda: None, 1))

    @pytest.mark.slow
    def test_a_message_without_end_is_cut(self, mlp):
        result = search(mlp, evaluator=Odd(lambda: raising(ValueError("x" * 10**6)), 3), trials=4)
        (failed,) = (trial for trial in result.trials if trial.status == FAILED)
        assert len(failed.reason) == 500

    @pytest.mark.slow
    def test_what_a_held_out_score_gives_wrongly_costs_that_score(self, mlp):
        class Silent(AdaptiveBN):
            def test(self, candidate):
                return None

        result = search(mlp, evaluator=Silent())
        assert result.front
        assert all(trial.test_score is None for trial in result.front)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("seed", True, "seed must be an integer of at least 0, got True"),
        ("seed", 2**64, "seed must be an integer of at most"),
        ("trials", True, "trials must be an integer of at least 1, or 'auto', got True"),
        ("trials", "many", "trials must be an integer of at least 1, or 'auto', got 'many'"),
        ("max_seconds", float("nan"), "max_seconds must be positive or None, got nan"),
        ("max_seconds", float("inf"), "max_seconds must be positive or None, got inf"),
        ("max_seconds", "5", "max_seconds must be positive or None, got '5'"),
        ("max_seconds", True, "max_seconds must be positive or None, got True"),
        ("cost_batch", True, "cost_batch must be an integer of at least 1, got True"),
        ("run_dir", 5, "run_dir must be the path of a folder or None, got 5"),
        ("progress", "no", "progress must be True or False, got 'no'"),
        ("forward", 5, "forward must be a function forward(model, batch), or None, got 5"),
        ("forward", AdaptiveBN, "forward must be a function forward(model, batch), or None, got <class"),
        ("outputs", 1.5, "outputs must be a key, an index, a list of these, a function"),
        ("outputs", [None], "outputs must be a key, an index, a list of these, a function"),
        (
            "prior",
            ["criterion"],
            "prior must be one of ['auto', 'criterion', 'database', 'reconstruction', 'sensitivity'], got ['",
        ),
        ("start", 5, "start must be a list of results, trials,"),
        ("start", "dense", "start must be a list of results, trials,"),
        ("start", [[7.9, 3.2, 0]], "option indices below [8, 8, 8], got [7.9, 3.2, 0]"),
        ("start", [[True, 0, 0]], "option indices below [8, 8, 8], got [True, 0, 0]"),
        ("start", [[1, 1]], "got [1, 1] of length 2 for 3 dimensions"),
        ("start", [1, 1, 1], "got 1; a single candidate is a list in a list"),
        ("start", [{"0": [48]}], "start['0'] must be one of (48, "),
        ("costs", [], "costs must be functions by name"),
        ("costs", {5: len}, "costs must have names of text"),
    ],
)
def test_what_counted_as_something_else_is_refused(mlp, argument, value, named):
    with refused((TypeError, ValueError), named):
        search(mlp, **{argument: value})


@pytest.mark.slow
def test_numbers_of_numpy_are_numbers(mlp):
    plain = search(mlp, seed=3, trials=4, max_seconds=1000, start=[[1, 2, 3]])
    other = search(mlp, seed=np.int64(3), trials=np.int32(4), max_seconds=np.float32(1000), start=np.array([[1, 2, 3]]))
    assert other.seed == 3
    assert [trial.candidate for trial in other.trials] == [trial.candidate for trial in plain.trials]


def test_a_message_shows_no_tensor_and_no_more_than_200_characters(mlp):
    for value in (torch.ones(1000, 3), [torch.ones(1000, 3)] * 50, {"x": np.ones((9, 9))}, "x" * 10**5, mlp):
        with pytest.raises((TypeError, ValueError)) as raised:
            search(mlp, forward=5 if value is mlp else value, costs=value)
        assert len(str(raised.value)) < 450
        assert "1., " not in str(raised.value)
