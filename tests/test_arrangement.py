"""Samples are arranged for the caches of a processor, which leaves scores as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.data.arrangement import Arrangement
from autoprune.data.batch import batch_size
from autoprune.data.subsets import materialise
from autoprune.early_stopping.racing import Race
from autoprune.evaluators.adaptive_bn import moments_of
from autoprune.pareto import Direction
from autoprune.protocols import Measurement
from autoprune.study import arranging
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for

PIXELS = 24


class Convolutional(nn.Module):
    """Tensors of 36 KiB a sample, for which channels last are chosen; `strict` needs the usual order."""

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.strict = strict
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 8, 3, 2), nn.Linear(8 * 11 * 11, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(y.view(len(y), -1) if self.strict else y.flatten(1))


def images(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, PIXELS, PIXELS, generator=generator), torch.arange(samples) % 3


def study(model: nn.Module) -> Study:
    parts = [images(16), images(80), images(8)]
    return study_for(model.eval(), "flops <= 50%", autoprune.Data(*parts), metric="accuracy", evaluator="compensated")


def is_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def test_scores_of_arranged_samples_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    arranged = study(Convolutional())
    assert arranged.context.subsets.arrangement == Arrangement(32, channels_last=True)
    assert any("channels last" in note for note in arranged.notes)
    monkeypatch.setattr("autoprune.study.setup.arranged", lambda subsets, *_: subsets)
    plain = study(Convolutional())
    candidates = np.array([[3] * len(plain.problem.sizes), [1] * len(plain.problem.sizes)])
    for ours, theirs in zip(*(each.evaluator.evaluate(candidates) for each in (arranged, plain)), strict=True):
        assert isinstance(ours, Measurement)
        assert isinstance(theirs, Measurement)
        np.testing.assert_allclose(ours.signal, theirs.signal, atol=1e-5)


def test_a_model_that_needs_the_usual_order_of_channels_keeps_it() -> None:
    subsets = study(Convolutional(strict=True)).context.subsets
    assert subsets.arrangement == Arrangement(32, channels_last=False)
    assert not any(is_last(batch[0]) for batch in subsets.validation)


def test_small_tensors_stay_as_they_were_drawn() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = autoprune.Data((torch.randn(300, 6), torch.arange(300) % 3))
    subsets = study_for(model, "flops <= 50%", data, metric="accuracy", evaluator="compensated").context.subsets
    assert subsets.arrangement == Arrangement()
    assert subsets.looks == ()


def test_batches_are_cut_evenly_and_in_order_and_calibration_stays_whole() -> None:
    drawn = materialise(autoprune.Data(images(40), images(100), images(10), batch_size=50), seed=0)
    cut = drawn.arranged(Arrangement(16, channels_last=True))
    assert [batch_size(batch) for batch in cut.validation] == [13, 13, 13, 11] * 2
    assert cut.looks == (4, 8)
    assert len(cut.calibration) == len(drawn.calibration)
    for part in ("calibration", "validation", "test"):
        before, after = ([torch.cat(e) for e in zip(*getattr(s, part), strict=True)] for s in (drawn, cut))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(is_last(batch[0]) for batch in (*cut.calibration, *cut.validation, *cut.test))
    assert cut.fingerprint == drawn.fingerprint  # a resumed search has the same samples


def test_images_among_the_targets_stay_as_they_are() -> None:
    x, _ = images(4)
    ((inputs, target),) = Arrangement(channels_last=True).of([(x, x.clone())], cut=True)
    assert is_last(inputs)
    assert target.is_contiguous()


def test_a_worker_that_draws_its_samples_arranges_them_too() -> None:
    drawn = materialise(autoprune.Data(*(lambda n=n: images(n) for n in (8, 40, 8))), seed=0)
    cut = drawn.arranged(Arrangement(16, channels_last=True))
    received = cut.to_send().received()
    assert [batch_size(batch) for batch in received.validation] == [batch_size(batch) for batch in cut.validation]
    assert is_last(received.validation[0][0])
    assert received.looks == cut.looks


@pytest.mark.parametrize(
    ("largest", "weights", "macs", "samples"),
    [
        (2**16, 2**20, 40e6, 32),  # ResNet-20 at 32x32: two MiB
        (400_000, 2**20, 6e6, 32),  # MobileNetV2 at 32x32: not below 32 while that is little memory
        (2**20, 2**23, 30e6, 16),  # at 64x64: at most 16 MiB
        (2**23, 2**26, 4e9, 2),
        (2**26, 2**26, 4e9, 1),
        (2**16, 2**20, 2.6e5, 256),  # linear layers: each batch reads all weights
    ],
)
def test_batches_suit_tensors_and_weights(largest: int, weights: int, macs: float, samples: int) -> None:
    assert arranging.suited(largest, weights, macs) == samples


@pytest.mark.parametrize("shift", [0.0, 3.0, 1e3])
def test_moments_with_channels_last_are_those_of_float64(shift: float) -> None:
    x = (torch.randn(6, 5, 7, 8, generator=torch.Generator().manual_seed(0)) * 2 + shift).contiguous(
        memory_format=torch.channels_last
    )
    found = moments_of(x, torch.float64)
    assert found.var is not None
    var, mean = torch.var_mean(x.double(), [0, 2, 3], correction=0)
    torch.testing.assert_close(found.mean, mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.var, var, atol=0.0, rtol=2e-5)


def test_a_race_is_looked_at_after_whole_batches_as_drawn() -> None:
    values = np.zeros(8, dtype=np.float32)
    race = Race(0, values, values, Direction(higher_is_better=True), 0.0, 0, 0.1, looks=(3, 5))
    assert [race.chunk(0, 0), race.chunk(1, 3)] == [slice(0, 3), slice(3, 5)]
    assert Race(0, values, values, Direction(higher_is_better=True), 0.0, 0, 0.1).chunk(2, 2) == slice(2, 3)
