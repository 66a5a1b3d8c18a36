"""A journal is only gone on with by the search that wrote it: functions, settings and scores are compared."""

import json
import sqlite3
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoprune
from autoprune.evaluators import AdaptiveBN, Compensated, FineTune
from autoprune.journal.sqlite_file import FILE_NAME
from autoprune.study.user_code import digest_of, forward_of
from tests.searching import quick

X = torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (120,), generator=torch.Generator().manual_seed(1))


def network(activation=torch.relu):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        if activation is torch.relu:

            def forward(self, x):
                return self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        else:

            def forward(self, x):
                return self.c(torch.relu(self.b(torch.nn.functional.leaky_relu(self.a(x), 1e-30))))

    torch.manual_seed(0)
    return Small().eval()


def search(run_dir, resume=False, model=None, **options):
    settings = {"optimizer": "random", "evaluator": "adaptive_bn", "trials": 4, "run_dir": str(run_dir), **options}
    return quick(model or network(), settings.pop("budget", "flops <= 80%"), (X, Y), resume=resume, **settings)


def right(outputs, batch):
    return (outputs.argmax(1) == batch[1]).float()


def wrong(outputs, batch):
    return (outputs.argmax(1) != batch[1]).float()


def score(fn, higher=True):
    return {"metric": autoprune.Metric(fn, higher, name="score")}


def plain(model, batch):
    return model(batch[0])


def scaled(model, batch):
    return model(batch[0] * 1.0)


def summed(weight, candidates):
    return 100.0 + weight * candidates.sum(axis=1)


def cost(weight):
    return {"costs": {"joules": lambda candidates: 100.0 - weight * candidates.indices.sum(axis=1)}}


def cost_of_dense(candidates):
    return 100.0 - 3.0 * candidates.indices.sum(axis=1)


def train(model, steps):
    return model


def train_more(model, steps):
    return model.train()


OTHERS = {
    "metric=": (score(right), score(lambda outputs, batch: (outputs.argmax(1) == batch[1]).float() + 0.0)),
    "higher_is_better (True before, False now)": (score(right), score(right, higher=False)),
    "the score of the dense model": (score(right), score(wrong)),
    "metric=, ": ({"metric": nn.CrossEntropyLoss()}, {"metric": nn.CrossEntropyLoss(label_smoothing=0.1)}),
    "forward=": ({"forward": plain}, {"forward": scaled}),
    "outputs=": ({"outputs": lambda made: made}, {"outputs": lambda made: made * 1.0}),
    "costs['joules']=": (cost(1.0), cost(2.0)),
    "joules of [": (cost(1.0), {"costs": {"joules": cost_of_dense}}),
    "train_fn of FineTune": (
        {"evaluator": FineTune(1, train_fn=train)},
        {"evaluator": FineTune(1, train_fn=train_more)},
    ),
    "start of FineTune": (
        {"evaluator": FineTune(1, start=AdaptiveBN())},
        {"evaluator": FineTune(1, start=Compensated())},
    ),
    "ridge of Compensated": ({"evaluator": Compensated()}, {"evaluator": Compensated(ridge=0.1)}),
    "the forward of the model": ({"model": network()}, {"model": network(None)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("named", OTHERS)
def test_another_search_is_refused_and_named(named, tmp_path):
    before, now = OTHERS[named]
    search(tmp_path, **before)
    with pytest.raises(ValueError, match="run_dir must hold the same search") as raised:
        search(tmp_path, True, **now)
    assert named in f"{raised.value}, "
    assert "resume='anyway'" in str(raised.value)
    assert len(str(raised.value)) < 900


SAME = {
    "the same function, written again": (
        score(lambda out, batch: (out.argmax(1) == batch[1]).float()),
        score(
            lambda out, batch: (
                # on other lines
                (out.argmax(1) == batch[1]).float()
            )
        ),
    ),
    "a partial": (cost(1.0), cost(1.0)),
    "more memory": ({"evaluator": Compensated()}, {"evaluator": Compensated(share_bytes=0)}),
    "an equal loss": ({"metric": nn.CrossEntropyLoss()}, {"metric": nn.CrossEntropyLoss()}),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SAME)
def test_the_same_search_goes_on(what, tmp_path):
    before, now = SAME[what]
    search(tmp_path, **before)
    assert len(search(tmp_path, True, **{**now, "trials": 6}).trials) == 6


@pytest.mark.slow
def test_counters_that_a_function_keeps_do_not_count(tmp_path):
    calls, times = [], 0

    def counting(outputs, batch):
        nonlocal times
        times += 1
        calls.append(times)
        return right(outputs, batch)

    search(tmp_path, **score(counting))
    assert len(search(tmp_path, True, **{**score(counting), "trials": 6}).trials) == 6


@pytest.mark.slow
def test_anyway_goes_on_and_says_so_then_and_later(tmp_path):
    search(tmp_path, **score(right))
    result = search(tmp_path, "anyway", **{**score(wrong), "trials": 6})
    assert len(result.trials) == 6
    assert any("resumed although it differed in metric=, the score of" in note for note in result.notes)
    later = search(tmp_path, True, **{**score(wrong), "trials": 6})
    assert any("resumed although it differed in metric=" in note for note in later.notes)


@pytest.mark.slow
def test_not_even_anyway_in_another_space(tmp_path):
    search(tmp_path)
    with pytest.raises(ValueError, match="differs in space"):
        search(tmp_path, "anyway", space=autoprune.Channels(step=4))


@pytest.mark.slow
def test_a_journal_that_says_nothing_of_functions_goes_on_but_its_dense_score_is_compared(tmp_path):
    search(tmp_path, **score(right))
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("DELETE FROM meta WHERE key IN ('code', 'settings', 'machine')")
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match="the score of the dense model"):
        search(tmp_path, True, **score(wrong))
    assert len(search(tmp_path, True, **{**score(right), "trials": 6}).trials) == 6


@pytest.mark.slow
def test_under_other_threads_small_differences_of_the_dense_model_are_expected(tmp_path):
    search(tmp_path)
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    (dense,) = connection.execute("SELECT value FROM meta WHERE key = 'dense'").fetchone()
    other = json.loads(dense)
    other["signal"] *= 1 + 1e-7
    connection.execute("UPDATE meta SET value = ? WHERE key = 'dense'", (json.dumps(other),))
    connection.commit()
    with pytest.raises(ValueError, match="the signal of the dense model"):
        search(tmp_path, True)
    connection.execute("UPDATE meta SET value = '64' WHERE key = 'threads'")
    connection.commit()
    connection.close()
    assert search(tmp_path, True).trials


@pytest.mark.parametrize("resume", ["yes", 1, None])
def test_resume_is_yes_no_or_anyway(resume, tmp_path):
    with pytest.raises(ValueError, match=r"resume must be True or False, or 'anyway', got"):
        search(tmp_path, resume)


class TestDigests:
    def test_what_a_function_refers_to_counts(self):
        def made(power, helper):
            return lambda x: helper(x) ** power

        same = digest_of(made(2, torch.relu))
        assert digest_of(made(2, torch.relu)) == same
        assert digest_of(made(3, torch.relu)) != same
        assert digest_of(made(2, lambda x: x)) != digest_of(made(2, lambda x: -x))
        assert digest_of(partial(summed, 1.0)) != digest_of(partial(summed, 2.0))
        assert digest_of(F.mse_loss) != digest_of(F.l1_loss)

    def test_tensors_and_objects_count_by_value(self):
        def weighted(weights):
            return lambda outputs: outputs * weights

        class Scale:
            def __init__(self, by):
                self.by = by

            def __call__(self, outputs):
                return outputs * self.by

        assert digest_of(weighted(torch.ones(3))) == digest_of(weighted(torch.ones(3)))
        assert digest_of(weighted(torch.ones(3))) != digest_of(weighted(torch.zeros(3)))
        assert digest_of(Scale(2)) == digest_of(Scale(2)) != digest_of(Scale(3))
        assert digest_of(Scale(2).__call__) != digest_of(Scale(3).__call__)

    def test_what_refers_to_itself_has_a_digest(self):
        def again(x):
            return again(x - 1) if x else 0

        assert digest_of(again)

    def test_a_method_that_the_forward_calls_counts(self):
        def made(by):
            class Model(nn.Module):
                def forward(self, x):
                    return self.helper(x)

                if by == 2:

                    def helper(self, x):
                        return x * 2
                else:

                    def helper(self, x):
                        return x * 3

            return Model()

        assert forward_of(made(2)) == forward_of(made(2)) != forward_of(made(3))
