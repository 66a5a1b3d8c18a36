"""Statistics are taken of as few calibration batches as they need."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.evaluators import Compensated
from autoprune.evaluators.refit.normalisation import Correction
from autoprune.protocols import Measurement
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for

WAYS = 6


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.end = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        scores: Tensor = self.head(torch.relu(self.end(self.second(y))).mean((2, 3)))
        return scores


def study(calibration: Tensor) -> Study:
    """A network whose running statistics are those of 64 images."""
    model = Convolutional().train()
    for norm in (model.norm, model.end):
        norm.momentum = None
    images = torch.randn(64, 1, WAYS, WAYS, generator=torch.Generator().manual_seed(2))
    model(images)
    data = autoprune.Data((calibration,), (images[:32],), (images[32:],))
    return study_for(model.eval(), "flops <= 50%", data, metric="agreement", evaluator="compensated")


def drawn(samples: int) -> Tensor:
    return torch.randn(samples, 1, WAYS, WAYS, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def alike() -> Study:
    return study(drawn(512))


def correction_of(found: Study) -> Correction:
    assert isinstance(found.evaluator, Compensated)
    correction = found.evaluator._correction
    assert correction is not None
    return correction


def test_one_batch_is_enough_of_samples_that_are_alike(alike: Study) -> None:
    assert len(alike.context.subsets.calibration) == 4
    assert len(correction_of(alike).batches) == 1


def test_scores_stay_near_those_of_all_batches(alike: Study) -> None:
    candidate = np.array([alike.problem.seeds[-1]])
    (few,) = alike.evaluator.evaluate(candidate)
    whole = Compensated(ridge=1e-2)
    whole.collect(alike.context)
    whole._correction = Correction(alike.context.calibration.of(whole._reference))
    whole.prepare(alike.context)
    (all_of_them,) = whole.evaluate(candidate)
    assert isinstance(few, Measurement)
    assert isinstance(all_of_them, Measurement)
    assert few.signal.mean() == pytest.approx(all_of_them.signal.mean(), rel=0.1, abs=1e-3)


def test_what_is_built_is_what_was_scored(alike: Study) -> None:
    candidate = alike.problem.seeds[-1]
    (scored,) = alike.evaluator.evaluate(candidate[None])
    module = alike.evaluator.build(candidate).eval()
    assert isinstance(scored, Measurement)
    with torch.no_grad():
        agreed = [
            (module(batch[0]).argmax(1) == alike.context.model(batch[0]).argmax(1)).double()
            for batch in alike.context.subsets.validation
        ]
    np.testing.assert_array_equal(scored.metric, torch.cat(agreed).numpy())


def test_batches_that_differ_are_all_taken() -> None:
    images = drawn(512)
    images[256:] = 3 * images[256:, :, :1, :1]  # noise first, then plain surfaces
    assert len(correction_of(study_with_batches(images)).batches) > 2


def test_few_samples_are_all_taken() -> None:
    assert len(correction_of(study_with_batches(drawn(64), size=16)).batches) == 4


def study_with_batches(images: Tensor, size: int = 128) -> Study:
    """A stream keeps the order of its batches."""
    model = Convolutional().eval()
    batches = [(part,) for part in images.split(size)]
    data = autoprune.Data(batches, [(images[:32],)], [(images[:32],)])
    return study_for(model, "flops <= 50%", data, metric="agreement", evaluator="compensated")


def test_the_first_batches_are_those_that_a_correction_of_them_alone_has(alike: Study) -> None:
    calibration = alike.context.calibration.of(alike.context.model.eval())
    cut = Correction(calibration).first(2)
    alone = Correction(calibration.on(calibration.batches[:2]))
    assert cut._norms.keys() == alone._norms.keys() != set()
    for name, norm in cut._norms.items():
        torch.testing.assert_close(norm.whole, alone._norms[name].whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.pooled(2), norm.whole, rtol=1e-6, atol=1e-9)
