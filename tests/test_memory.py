"""Memory that runs out: batches are halved, and neither scores nor estimates depend on how they were divided."""

import logging
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune import Metric
from autoprune.evaluators import AdaptiveBN, Compensated
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.evaluators.scoring.out_of_memory import Halving, Passes, fitting, is_out_of_memory, joined, split
from autoprune.protocols import Measurement
from tests.contexts import classes_context, halved


class Small(nn.Module):
    """Passes a tensor on, and runs out of memory where it holds too many samples."""

    def __init__(self, most):
        super().__init__()
        self.most = most
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"no memory for {len(x)} samples")
        return x


def network(most, at=4):
    """Two batch norms, with a bottleneck of memory in front of, between or behind them."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    tail = [nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)]
    layers.insert(at, Small(most))
    return nn.Sequential(*layers, *tail).eval()


@pytest.fixture(scope="module")
def images():
    """Two batches whose halves differ clearly in their statistics."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(90, 3, 8, 8, generator=generator)
    return [
        (x * torch.linspace(0.2, 3, 90).view(-1, 1, 1, 1) + torch.linspace(-1, 1, 90).view(-1, 1, 1, 1))[i]
        for i in (slice(0, 60), slice(60, 90))
    ]


def statistics(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "running" in name}


@pytest.mark.parametrize("at", [0, 2, 4, 5])
@pytest.mark.parametrize("most", [40, 7, 1])
def test_statistics_do_not_depend_on_how_a_batch_was_divided(images, at, most):
    whole, divided = network(1000, at), network(most, at)
    recalibrate(whole, images, whole)
    recalibrate(divided, images, divided)
    assert max(divided[at].seen) > most
    assert min(divided[at].seen) <= most
    for name, expected in statistics(whole).items():
        torch.testing.assert_close(statistics(divided)[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_statistics_of_plain_smaller_batches_would_differ(images):
    """The test above can fail: plain smaller batches give other statistics."""
    whole, halves = network(1000), network(1000)
    recalibrate(whole, images, whole)
    recalibrate(halves, [half for batch in images for half in batch.split(15)], halves)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(statistics(halves), statistics(whole), rtol=1e-2, atol=1e-3)


def test_layers_without_positions_and_single_samples_divide_too():
    x = torch.randn(13, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 14.0).view(-1, 1)
    found = []
    for most in (1000, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), Small(most), nn.BatchNorm1d(5))
        recalibrate(model, [x], model)
        found.append(statistics(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def limited(context, most):
    """The context with a forward that has memory for `most` samples; the numbers it was called with."""
    seen = []

    def forward(model, batch):
        seen.append(len(batch[0]))
        if len(batch[0]) > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return context.forward(model, batch)

    return replace(context, forward=forward), seen


@pytest.mark.slow
@pytest.mark.parametrize("make", [AdaptiveBN, Compensated])
@pytest.mark.parametrize("name", ["mlp", "vgg_plain"])
def test_scores_and_what_is_built_do_not_depend_on_it(make, name, caplog):
    context = classes_context(name, "adaptive_bn")
    candidate = halved(context)[None]
    small, seen = limited(context, 7)
    found = []
    for each in (context, small):
        evaluator = make()
        evaluator.prepare(each)
        with caplog.at_level(logging.WARNING):
            found.append((*evaluator.evaluate(candidate), evaluator.test(candidate[0]), evaluator.build(candidate[0])))
    (whole, whole_test, whole_built), (parts, parts_test, parts_built) = found
    assert min(seen) <= 7 < max(seen)
    for a, b in ((whole, parts), (whole_test, parts_test)):
        assert isinstance(b, Measurement)
        for values in ("signal", "metric", "distortion"):
            np.testing.assert_allclose(getattr(b, values), getattr(a, values), rtol=1e-4, atol=1e-5)
    for key, tensor in whole_built.state_dict().items():
        torch.testing.assert_close(parts_built.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)
    assert "out of memory on batches of" in caplog.text
    assert "CUDA out of memory. Tried to allocate" in caplog.text


@pytest.mark.slow
def test_a_metric_of_the_whole_set_sees_whole_batches(digits, digits_model):
    def batches_and_mean(forward, batches):
        return sum(float(forward(batch).mean()) for batch in batches)  # would double with twice as many batches

    def forward(model, batch):
        if len(batch[0]) > most:
            raise torch.OutOfMemoryError("no memory")
        return model(batch[0])

    scores = []
    for most in (1000, 50):  # noqa: B007  forward reads it
        result = autoprune.search(
            digits_model,
            "flops <= 50%",
            digits.validation,
            metric=Metric(batches_and_mean, True, per_sample=False),
            example=autoprune.Call(forward=forward),
            trials=4,
            optimizer="random",
        )
        scores.append([trial.score for trial in result.trials])
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


@pytest.mark.slow
def test_a_search_goes_on_where_single_samples_do_not_fit(digits, digits_model):
    """Every second candidate has no memory for anything; the others none for more than 60 samples."""
    calls, seen = [], []

    def forward(model, batch):
        width = sum(parameter.numel() for parameter in model.parameters())
        seen.append(len(batch[0]))
        if max(seen) <= 2:  # the structure is looked at, with two samples
            return model(batch[0])
        if len(batch[0]) > 2 and (len(batch[0]) > 60 or (width < dense and width % 2)):
            raise torch.OutOfMemoryError("no memory")
        if len(batch[0]) <= 2 and width < dense and width % 2:
            calls.append(len(batch[0]))
            raise torch.OutOfMemoryError("no memory for one")
        return model(batch[0])

    dense = sum(parameter.numel() for parameter in digits_model.parameters())
    result = autoprune.search(
        digits_model,
        "flops <= 50%",
        digits.validation,
        example=autoprune.Call(forward=forward),
        trials=8,
        optimizer="random",
    )
    failed = [trial for trial in result.trials if trial.status == "failed"]
    assert len(result.trials) == 8
    assert 0 < len(failed) < 8
    assert {trial.reason for trial in failed} == {"OutOfMemoryError: no memory for one"}
    assert 1 in calls
    assert result.front


def test_errors_that_say_there_is_no_memory_are_known_and_others_are_not():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_other_errors_and_batches_of_one_are_not_tried_again():
    calls = []

    def fail(parts):
        calls.append([len(part) for part in parts])
        raise torch.OutOfMemoryError("none") if len(calls) < 3 else ValueError("another")

    with pytest.raises(ValueError, match="another"):
        Halving()(fail, [torch.zeros(5), torch.zeros(2)])
    assert calls == [[5, 2], [3, 2, 2], [2, 2, 1, 2]]
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError, match="none"):
        Halving()(fail, [torch.zeros(2)])
    assert calls == [[2], [1, 1]]


def test_what_fits_is_remembered_for_the_next_batch():
    seen = []

    def forward(batch):
        seen.append(len(batch))
        if len(batch) > 10:
            raise torch.OutOfMemoryError("none")
        return batch

    run = fitting(forward)
    batch = torch.arange(32.0)
    assert torch.equal(run(batch), batch)
    seen.clear()
    assert torch.equal(run(batch), batch)
    assert seen == [8] * 4


Pair = namedtuple("Pair", ["logits", "states"])


def test_outputs_of_parts_join_to_those_of_the_whole():
    def forward(x):
        return {
            "pair": Pair(x * 2, [x, x + 1]),
            "each": [{"box": row} for row in x],
            "name": "detector",
            "nothing": None,
        }

    x = torch.arange(10.0).view(5, 2)
    whole, parts = forward(x), split(x, 2)
    found = joined([forward(part) for part in parts], [len(part) for part in parts])
    assert isinstance(found["pair"], Pair)
    assert (found.pop("name"), whole.pop("name")) == ("detector", "detector")
    torch.testing.assert_close(found, whole, allow_subclasses=False)


@pytest.mark.parametrize("outputs", [lambda x: x.mean(), lambda x: x.mean(0), lambda x: (x, len(x))])
def test_outputs_that_do_not_join_are_refused(outputs):
    parts = torch.arange(7.0).view(7, 1).split(4)
    with pytest.raises(ValueError, match="do not join to those of the whole; use smaller batches"):
        joined([outputs(part) for part in parts], [4, 3])


def test_a_model_that_calls_other_layers_for_other_samples_is_not_divided():
    first, second, norm = Small(1000), Small(3), nn.BatchNorm1d(4)

    def forward(x):
        return second(first(norm(x)) if x.mean() > 0 else first(x))

    x = torch.cat([torch.ones(4, 4), -torch.ones(4, 4)]) + torch.randn(8, 4) / 10
    model = nn.ModuleList([norm])
    with pytest.raises(ValueError, match="cannot be divided"):
        recalibrate(model, [x + 0.5 - 2 * (x + 0.5).mean()], forward)


def test_outside_a_run_a_batch_is_whole():
    assert Passes().moments(lambda: "moments") == ("moments", True)
