"""Adaptive batch norm against statistics computed by hand, and against the statistics that pruning leaves behind."""

import copy
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, kl_divergence

import autoprune
from autoprune.evaluators import AdaptiveBN
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.optimizers import uniform_seeds
from autoprune.protocols import Failure, Measurement
from autoprune.testing.contexts import image_context
from autoprune.testing.contracts import EvaluatorContract
from tests.contexts import study_of
from tests.user_functions import raise_out_of_memory
from zoo import ZOO
from zoo.settle import BATCH_NORMS


@pytest.fixture(scope="module")
def study(digits, digits_model):
    data = autoprune.Data(calibration=digits.train, validation=digits.validation, test=digits.test)
    return study_of(digits_model, data, budget="flops <= 50%")


@pytest.fixture(scope="module")
def pruned(study):
    """Uniformly pruned candidates at 50, 40 and 30 % of the FLOPs, shape (3, d)."""
    candidates = uniform_seeds(study.problem, (1.0, 0.8, 0.6))
    shares = study.problem.costs(candidates)[:, 0] / (2 * study.problem.limits[0])
    assert ((shares > 0.25) & (shares <= 0.5)).all()
    return candidates


def norms_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)}


def batches_of(name, sizes, seed=3):
    """Batches of the given sizes, of shifted and scaled noise, so that batches differ."""
    generator = torch.Generator().manual_seed(seed)
    shape = ZOO[name].inputs()[0].shape[1:]
    return [torch.randn(size, *shape, generator=generator) * (1 + i) + i for i, size in enumerate(sizes)]


def expected_statistics(model, batches):
    """Means of what each batch-norm layer reads and unbiased variances, averaged over samples by definition."""
    copied, seen, hooks = copy.deepcopy(model), defaultdict(list), []
    for name, module in norms_of(copied).items():
        module.train()
        hooks.append(module.register_forward_hook(lambda m, args, out, name=name: seen[name].append(args[0].double())))
    with torch.no_grad():
        for batch in batches:
            copied(batch)
    found = {}
    for name, inputs in seen.items():
        dims = [dim for dim in range(inputs[0].ndim) if dim != 1]
        total = sum(len(x) for x in inputs)
        mean = sum(len(x) * x.mean(dims) for x in inputs) / total
        found[name] = mean, sum(len(x) * x.var(dims, unbiased=True) for x in inputs) / total
    return found


def assert_statistics(model, expected, tolerance=1e-5):
    norms = norms_of(model)
    assert norms.keys() == expected.keys()
    for name, (mean, variance) in expected.items():
        spread = variance.sqrt()
        assert ((norms[name].running_mean - mean).abs() / spread).max() < tolerance, name
        assert (norms[name].running_var / variance - 1).abs().max() < tolerance, name


@pytest.mark.parametrize("name", ["tied", "mlp", "vgg_plain"], scope="class")
class TestAdaptiveBN(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _network(self, name):
        self.entry = ZOO[name]

    def make_evaluator(self):
        return AdaptiveBN()

    def make_context(self):
        shape, generator = self.entry.inputs()[0].shape[1:], torch.Generator().manual_seed(0)
        data = torch.randn(120, *shape, generator=generator), torch.randint(0, 10, (120,), generator=generator)
        return study_of(self.entry.build(), autoprune.Data(validation=data, batch_size=16)).context


@pytest.mark.parametrize("name", ["resnet20", "mlp", "volume_3d", "shared", "mobilenet_v3"])
def test_statistics_are_the_average_over_samples_with_an_incomplete_last_batch(name):
    model, batches = ZOO[name].build(), batches_of(name, (16, 16, 5))
    expected = expected_statistics(model, batches)
    recalibrate(model, batches, model)
    assert_statistics(model, expected)


def test_statistics_do_not_depend_on_the_order_of_the_batches():
    first, second = ZOO["shared"].build(), ZOO["shared"].build()
    batches = batches_of("shared", (16, 3, 9))
    recalibrate(first, batches, first)
    recalibrate(second, batches[::-1], second)
    assert_statistics(first, {n: (m.running_mean, m.running_var) for n, m in norms_of(second).items()}, 1e-6)


def test_old_statistics_leave_no_trace():
    first, second = ZOO["resnet20"].build(), ZOO["resnet20"].build()
    for norm in norms_of(second).values():
        norm.reset_running_stats()
        norm.running_mean += 50
    batches = batches_of("resnet20", (8, 8))
    recalibrate(first, batches, first)
    recalibrate(second, batches, second)
    assert_statistics(first, {n: (m.running_mean, m.running_var) for n, m in norms_of(second).items()}, 1e-6)


@pytest.mark.parametrize(("name", "counts"), [("resnet20", True), ("mlp", False)])
def test_a_single_sample_counts_where_it_has_a_variance(name, counts):
    model, batches = ZOO[name].build(), batches_of(name, (8, 1))
    expected = expected_statistics(model, batches if counts else batches[:1])
    recalibrate(model, batches, model)
    assert_statistics(model, expected)


@pytest.mark.parametrize("broken", [False, True], ids=["success", "an error"])
def test_momentum_counters_modes_and_hooks_come_back_after(broken):
    model = ZOO["resnet20"].build().train()
    norms = list(norms_of(model).values())
    norms[0].eval()
    norms[1].momentum = None
    before = [(m.training, getattr(m, "momentum", 0), len(m._forward_pre_hooks)) for m in model.modules()]
    counters = [norm.num_batches_tracked.clone() for norm in norms]

    def forward(batch):
        model(batch)
        assert not broken

    try:
        recalibrate(model, batches_of("resnet20", (4, 4)), forward)
    except AssertionError:
        assert broken
    assert [(m.training, getattr(m, "momentum", 0), len(m._forward_pre_hooks)) for m in model.modules()] == before
    assert all(torch.equal(norm.num_batches_tracked, n) for norm, n in zip(norms, counters, strict=True))


def test_dropout_stays_off_while_statistics_are_taken():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(6))
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    recalibrate(model, [x], model)
    torch.testing.assert_close(model[1].running_mean, x.mean(0))


@pytest.mark.slow
def test_what_is_built_has_the_statistics_of_its_own_calibration_pass(study, pruned):
    built = study.evaluator.build(pruned[0])
    images = [batch[0] for batch in study.context.subsets.calibration]
    assert_statistics(built, expected_statistics(built, images))


@pytest.mark.slow
def test_what_is_built_gives_the_outputs_that_were_scored(study, pruned):
    images, labels = (torch.cat(part) for part in zip(*study.context.subsets.validation, strict=True))
    for candidate, outcome in zip(pruned, study.evaluator.evaluate(pruned), strict=True):
        with torch.no_grad():
            outputs = study.evaluator.build(candidate).eval()(images)
        losses = F.cross_entropy(outputs, labels, reduction="none").double().numpy()
        np.testing.assert_allclose(outcome.signal, losses, atol=1e-5)
        np.testing.assert_array_equal(outcome.metric, outputs.argmax(1) == labels)


@pytest.mark.slow
def test_the_distortion_is_the_divergence_from_the_dense_outputs(study, pruned, digits_model):
    images = torch.cat([batch[0] for batch in study.context.subsets.validation])
    with torch.no_grad():
        dense = digits_model(images)
        for candidate, outcome in zip(pruned, study.evaluator.evaluate(pruned), strict=True):
            outputs = study.evaluator.build(candidate).eval()(images)
            expected = kl_divergence(Categorical(logits=dense), Categorical(logits=outputs))
            np.testing.assert_allclose(outcome.distortion, expected, atol=1e-4)
    (unpruned,) = study.evaluator.evaluate(np.zeros_like(pruned[:1]))
    np.testing.assert_array_equal(unpruned.distortion, np.zeros(len(images)))


def test_the_dense_candidate_is_first_scored_on_the_outputs_that_others_are_compared_with():
    context, ran = image_context(), []

    def forward(model, batch):
        ran.append(len(batch[0]))
        return context.forward(model, batch)

    evaluator = AdaptiveBN(share_bytes=0)
    evaluator.prepare(replace(context, forward=forward))
    dense = np.zeros((1, len(context.space.sizes)), dtype=np.int64)
    ran.clear()
    (first,) = evaluator.evaluate(dense)
    assert not ran
    (again,) = evaluator.evaluate(dense)
    assert sum(ran) == len(again.signal)
    for field in ("signal", "metric", "distortion"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))


def test_the_dense_candidate_keeps_its_own_statistics(study, digits_model):
    built = study.evaluator.build(np.zeros(len(study.problem.sizes), dtype=np.int64))
    for name, tensor in digits_model.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor), name


@pytest.mark.slow
def test_it_beats_the_statistics_that_pruning_leaves_behind(study, pruned, digits):
    images, labels = digits.validation

    def accuracy(model):
        with torch.no_grad():
            return (model.eval()(images).argmax(1) == labels).float().mean().item()

    for candidate in pruned:
        pruning = study.context.space.pruning(candidate.tolist())
        stale = accuracy(study.context.structure.build(study.context.model, pruning))
        adapted = accuracy(study.evaluator.build(candidate))
        assert adapted > stale + 0.05, (adapted, stale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (raise_out_of_memory, "OutOfMemoryError: no memory left"),
        (lambda outputs: outputs * float("nan"), "the score of 24 of 24 samples is NaN or infinite"),
    ],
)
def test_a_fault_of_one_candidate_is_a_failure_with_its_reason(fault, reason):
    context = study_of(ZOO["mlp"].build(), (torch.randn(60, 64), torch.randint(0, 10, (60,)))).context

    def forward(model, batch):
        outputs = model(batch[0])
        return fault(outputs) if model[0].out_features < 48 else outputs

    evaluator = AdaptiveBN()
    evaluator.prepare(replace(context, forward=forward))
    failed, dense = evaluator.evaluate(np.array([[3, 0, 0], [0, 0, 0]]))
    assert isinstance(failed, Failure)
    assert failed.reason == reason
    assert isinstance(dense, Measurement)


def test_statistics_far_from_zero_lose_no_digits():
    model = nn.Sequential(nn.BatchNorm2d(3))
    images = 1000 + torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    recalibrate(model, [images], model)
    exact = images.double().transpose(0, 1).flatten(1)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean.double(), exact.mean(1), rtol=1e-6)
    assert torch.allclose(norm.running_var.double(), exact.var(1), rtol=1e-3)
