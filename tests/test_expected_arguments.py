"""Arguments as users of text expect them: one forward, labels under any key, sizes that costs are stated at, time."""

import logging
import time

import pytest
import torch
from torch import nn

import autoprune
from autoprune.study.convergence import Deadline
from autoprune.study.progress import Progress
from tests.searching import grouped


def quick(model, budget, data, **options):
    return autoprune.search(model, budget, data, **grouped(**{"trials": 4, "optimizer": "random", **options}))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, words):
        return {"scores": self.head(self.body(self.embedding(words)).relu().mean(1)), "all": words}


def texts(length=5, n=36):
    words = torch.randint(0, 20, (n, length), generator=torch.Generator().manual_seed(0))
    return [{"words": words[i : i + 6], "target": words[i : i + 6, 0] % 3} for i in range(0, n, 6)]


def labelled(key):
    return autoprune.Data(validation=texts(), labels=key)


def forward(model, batch):
    return model(batch["words"])["scores"]


@pytest.mark.slow
def test_labels_are_found_under_any_key():
    result = quick(Tagger().eval(), "flops <= 80%", labelled("target"), outputs="scores")
    assert result.metric == "accuracy"


def test_a_key_that_batches_lack_is_named():
    with pytest.raises(autoprune.DataError, match=r"labels='y' must be a key of every batch.*'target', 'words'"):
        quick(Tagger().eval(), "flops <= 80%", labelled("y"))


@pytest.mark.slow
def test_one_forward_serves_search_inspect_and_profile(tmp_path):
    model, example = Tagger().eval(), {"words": texts()[0]["words"]}
    searched = quick(model, "flops <= 80%", labelled("target"), forward=forward)
    found = autoprune.inspect(model, autoprune.Call(inputs=example, forward=forward))
    assert found.dense["flops"] == searched.dense.costs["flops"]
    table = autoprune.profile(model, autoprune.Call(inputs=example, forward=forward), networks=6)
    assert quick(model, "flops <= 80%", labelled("target"), forward=forward, costs={"latency_ms": table}).front


def test_several_inputs_reach_the_forward_as_in_a_batch_without_a_target():
    model = nn.Bilinear(4, 4, 6)
    seen = []

    def run(model, batch):
        seen.append(len(batch))
        first, second, target = batch
        assert target is None
        return model(first, second)

    autoprune.inspect(
        nn.Sequential(model),
        autoprune.Call(inputs=(torch.ones(2, 4), torch.ones(2, 4)), forward=lambda m, b: run(m[0], b)),
    )
    assert set(seen) == {3}


@pytest.mark.slow
def test_example_inputs_next_to_data_say_at_what_size_costs_are_stated():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    x = torch.randn(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = quick(model, "flops <= 80%", (x, torch.arange(30) % 3))
    large = quick(model, "flops <= 80%", (x, torch.arange(30) % 3), example=torch.zeros(1, 3, 16, 16))
    conv = 3 * 8 * 9
    assert plain.dense.costs["flops"] == conv * 64 + 24
    assert large.dense.costs["flops"] == conv * 256 + 24
    assert large.dense.score == plain.dense.score


def test_an_impossible_budget_says_the_percentage_and_the_setting():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    data = (torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4)
    space = autoprune.Channels(min_fraction=0.25)
    with pytest.raises(
        autoprune.InfeasibleBudgetError,
        match=r"leaves 25.00% of the dense flops; what stops there is min_fraction=0.25",
    ):
        quick(model, "flops <= 10%", data, space=space)


@pytest.mark.slow
def test_max_seconds_holds_for_held_out_scores_too_and_the_time_is_the_whole():
    class Slow(nn.Sequential):
        def forward(self, x):
            time.sleep(0.05)
            return super().forward(x)

    model = Slow(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    data = (torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 4)
    began = time.monotonic()
    result = quick(model, "flops <= 80%", data, trials=10_000, max_seconds=0.01)
    whole = time.monotonic() - began
    assert (result.stopped, result.trials) == ("time", ())
    assert result.dense.test_score is None
    assert any("no candidate was scored within max_seconds=0.01" in note for note in result.notes)
    assert 0.8 * whole < result.seconds <= whole


def test_a_deadline_passes():
    assert not Deadline(time.monotonic()).passed
    assert not Deadline(time.monotonic(), 100.0).passed
    assert Deadline(time.monotonic() - 2.0, 1.0).passed


def test_without_a_terminal_every_tenth_of_the_trials_is_logged_with_the_time_left(caplog):
    bar = Progress(50, "accuracy", show=True)
    with caplog.at_level(logging.INFO, logger="autoprune.search"), bar:
        for done in range(1, 51):
            if bar.due(done):
                bar.update(done, 0, None, 3)
    lines = [record.message for record in caplog.records]
    assert [line.partition(" ")[0] for line in lines] == [str(done) for done in range(5, 51, 5)]
    assert all(line.endswith("s left") for line in lines[:-1])
    assert "left" not in lines[-1]
