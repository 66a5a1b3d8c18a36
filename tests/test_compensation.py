"""Compensation against NumPy's least squares, against layers run by hand, and against what pruning leaves behind."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoprune
from autoprune.evaluators import AdaptiveBN, Compensated
from autoprune.evaluators.refit.least_squares import least_squares
from autoprune.importance.reading import unfolded
from autoprune.protocols import Failure, Measurement
from autoprune.testing.contracts import EvaluatorContract
from tests.contexts import classes_context, halved, regression_context, study_of
from tests.user_functions import raise_out_of_memory
from zoo import ZOO, draw, settled

SHAPES = ((3, 12, 12),)


class Net(nn.Module):
    """Convolutions of all kinds; only `b` is followed by batch norm, `c` has no bias, and `tied` is called twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b, self.norm = (
            nn.Conv2d(8, 10, 3, stride=2, padding=2, dilation=2, padding_mode="reflect"),
            nn.BatchNorm2d(10),
        )
        self.c = nn.Conv2d(10, 6, (1, 3), bias=False)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.d, self.tied = nn.Linear(6, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm(self.b(self.a(x).relu())).relu()
        x = self.d(self.up(self.c(x).tanh()).relu().mean((2, 3))).relu()
        return self.head(self.tied(self.tied(x).relu()).relu())


LAYERS = ("b", "c", "d", "tied", "head")


GENERATOR = torch.Generator().manual_seed(0)
SAMPLES = torch.randn(90, 3, 12, 12, generator=GENERATOR), torch.randint(0, 5, (90,), generator=GENERATOR)


@pytest.fixture(scope="module")
def context():
    return study_of(settled(Net, SHAPES), autoprune.Data(validation=SAMPLES, batch_size=16), "compensated").context


def columns_of(layer, x):
    """Inputs of a layer, as the rows that its flattened weight multiplies."""
    if isinstance(layer, nn.Linear):
        return [x.reshape(-1, x.shape[-1])]
    space = len(layer.kernel_size)
    x = x if x.ndim == space + 2 else x.unsqueeze(0)
    if layer.padding_mode != "zeros" or layer.padding == "same":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
        return list(unfolded(padded, layer.kernel_size, layer.stride, (0,) * space, layer.dilation))
    return list(unfolded(x, layer.kernel_size, layer.stride, layer.padding, layer.dilation))


def built(context, candidate, **settings):
    evaluator = Compensated(**settings)
    evaluator.prepare(context)
    return evaluator.build(candidate)


def rows_of(model, context, name):
    """Inputs of a layer on all calibration samples, unfolded, float64, shape (n, columns)."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda layer, args: seen.extend(columns_of(layer, args[0]))
    )
    with torch.no_grad():
        for batch in context.subsets.calibration:
            model(batch[0])
    hook.remove()
    return torch.cat(seen).double().numpy()


def slices_of(context, candidate, name):
    """Output rows and columns of the flattened weight that stay."""
    weight = context.model.get_parameter(f"{name}.weight")
    slices = context.structure.edit(context.space.pruning(candidate.tolist())).slices.get(f"{name}.weight", {})
    columns = np.arange(weight[0].numel()).reshape(weight.shape[1], -1)
    return slices.get(0, np.arange(len(weight))), columns[slices.get(1, np.arange(weight.shape[1]))].ravel()


def flat(model, name):
    return model.get_parameter(f"{name}.weight").detach().double().flatten(1).numpy()


CONVOLUTIONS = [
    (nn.Conv1d(3, 4, 3, padding=2, dilation=2), (5, 3, 9)),
    (nn.Conv1d(3, 4, 3, stride=2), (3, 9)),
    (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (5, 3, 9, 7)),
    (nn.Conv2d(3, 4, 3, padding="same", dilation=2, padding_mode="circular"), (5, 3, 9, 7)),
    (nn.Conv3d(2, 4, 3, stride=2, padding=1), (2, 2, 5, 6, 7)),
    (nn.Linear(6, 4), (5, 2, 6)),
    (nn.Linear(6, 4), (6,)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS)
def test_rows_times_the_flattened_weight_are_what_the_layer_gives(layer, shape, monkeypatch):
    monkeypatch.setattr("autoprune.importance.reading.CHUNK_BYTES", 2000)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = torch.cat(columns_of(layer, x))
    expected = layer(x)
    if isinstance(layer, nn.Linear):
        expected = expected.reshape(-1, 4)
    else:
        expected = expected.movedim(-layer.weight.ndim + 1, -1).reshape(-1, 4)
    torch.testing.assert_close(rows @ layer.weight.flatten(1).T + layer.bias, expected)


@pytest.mark.parametrize("ridge", [1e-9, 1e-3, 10.0])
def test_least_squares_is_what_numpy_finds_and_is_no_worse_than_the_inherited_weights(ridge):
    rng = np.random.default_rng(0)
    x, weight, kept = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(5, 12)), [0, 3, 4, 9, 11]
    gone = np.setdiff1d(np.arange(12), kept)
    penalty = np.sqrt(ridge * (x[:, kept] ** 2).mean(0).mean() * len(x)) * np.eye(5)
    design = np.concatenate([x[:, kept], penalty])
    wanted = np.concatenate([x[:, gone] @ weight[:, gone].T, np.zeros((5, 5))])
    expected = weight[:, kept] + np.linalg.lstsq(design, wanted, rcond=None)[0].T
    change = next(least_squares(torch.tensor(weight), torch.tensor(x.T @ x / len(x)), torch.tensor(kept), [ridge]))
    found = weight[:, kept] + change.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)

    def error(w):
        return np.square(x @ weight.T - x[:, kept] @ w.T).sum()

    assert error(found) < error(weight[:, kept])


def test_inputs_that_are_always_zero_keep_their_weights():
    weight = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = next(least_squares(weight, torch.zeros(6, 6, dtype=torch.float64), torch.tensor([0, 2]), [1e-3]))
    assert not change.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "settings", [{"ridge": 1e-3}, {"ridge": 1e-3, "bn": False, "bias": False}], ids=["about the mean", "as it is"]
)
def test_every_layer_gets_the_weights_that_numpy_finds_and_never_a_larger_error(context, name, settings):
    candidate = halved(context)
    rows, kept = slices_of(context, candidate, name)
    x, dense = rows_of(context.model, context, name), flat(context.model, name)[rows]
    if "bn" not in settings and name != "c":  # a bias, or batch norm, takes care of the mean
        x = x - x.mean(0)
    gone = np.setdiff1d(np.arange(x.shape[1]), kept)
    penalty = np.sqrt(1e-3 * np.square(x[:, kept]).mean() * len(x)) * np.eye(len(kept))
    wanted = np.concatenate([x[:, gone] @ dense[:, gone].T, np.zeros((len(kept), len(rows)))])
    change = np.linalg.lstsq(np.concatenate([x[:, kept], penalty]), wanted, rcond=None)[0].T
    found = flat(built(context, candidate, **settings), name)
    assert len(gone) > 0
    np.testing.assert_allclose(found, dense[:, kept] + change, rtol=1e-6, atol=1e-6)

    def error(w):
        return np.square(x @ dense.T - x[:, kept] @ w.T).sum()

    assert error(found) < error(dense[:, kept])


def test_biases_restore_the_mean_that_the_dense_layers_give_on_inputs_that_stay(context):
    candidate = halved(context)
    small = built(context, candidate, bn=False, least_squares=False)
    for name in ("b", "d", "tied", "head"):
        rows, kept = slices_of(context, candidate, name)
        mean = rows_of(context.model, context, name).mean(0)
        means = [
            flat(model, name) @ inputs + model.get_parameter(f"{name}.bias").detach().numpy()
            for model, inputs in ((context.model, mean), (small, mean[kept]))
        ]
        np.testing.assert_allclose(means[1], means[0][rows], atol=1e-5)


@pytest.mark.slow
def test_what_is_off_stays_as_inherited(context):
    candidate = halved(context)
    plain = context.structure.build(context.model, context.space.pruning(candidate.tolist())).state_dict()
    for settings, same in [
        ({"bn": False, "bias": False, "least_squares": False}, list(plain)),
        ({"bias": False, "least_squares": False}, [name for name in plain if "running" not in name]),
        ({"least_squares": False}, [name for name in plain if name.endswith("weight")]),
        ({"bias": False}, [name for name in plain if name.endswith("bias")]),
    ]:
        found = built(context, candidate, **settings).state_dict()
        assert found.keys() == plain.keys()
        assert {name for name in plain if torch.equal(found[name], plain[name])} >= set(same)
        assert len(same) == len(plain) or any(not torch.equal(found[name], plain[name]) for name in plain)


def test_weights_with_channels_last_get_the_same_values_and_stay_so(context):
    model = settled(Net, SHAPES).to(memory_format=torch.channels_last)
    last = study_of(model, autoprune.Data(validation=SAMPLES, batch_size=16), "compensated").context
    expected, found = built(context, halved(context)), built(last, halved(last))
    for name, parameter in expected.named_parameters():
        value = found.get_parameter(name)
        torch.testing.assert_close(value, parameter, rtol=1e-4, atol=1e-5)
        assert value.ndim != 4 or value.is_contiguous(memory_format=torch.channels_last)


def test_transposed_convolutions_and_the_layers_behind_batch_norm_keep_weights_and_biases(context):
    candidate = halved(context)
    plain = context.structure.build(context.model, context.space.pruning(candidate.tolist())).state_dict()
    found = built(context, candidate).state_dict()
    for name in ("up.weight", "up.bias", "b.bias", "a.weight"):
        assert torch.equal(found[name], plain[name]), name


def test_layers_beyond_the_memory_limit_keep_their_weights_and_the_log_says_so(context, caplog):
    candidate = halved(context)
    plain = context.structure.build(context.model, context.space.pruning(candidate.tolist())).state_dict()
    with caplog.at_level(logging.WARNING):
        found = built(context, candidate, memory_bytes=8 * (6**2 + 12**2 + 12**2)).state_dict()
    assert [record.message.split()[0] for record in caplog.records] == ["c.weight", "b.weight"]
    changed = {
        name
        for name in ("b", "c", "d", "tied", "head")
        if not torch.equal(*(s[f"{name}.weight"] for s in (found, plain)))
    }
    assert changed == {"d", "tied", "head"}


@pytest.mark.slow
def test_a_weight_that_two_layers_share_is_left_alone():
    model = ZOO["tied"].build()
    images = torch.randn(60, *ZOO["tied"].inputs()[0].shape[1:], generator=torch.Generator().manual_seed(0))
    context = study_of(model, images, "compensated").context
    plain = context.structure.build(context.model, context.space.pruning(halved(context).tolist()))
    small = dict(built(context, halved(context)).named_parameters(remove_duplicate=False))
    names = [name for name, _ in plain.named_parameters(remove_duplicate=False)]
    tied = set(names) - {name for name, _ in plain.named_parameters()}
    assert tied
    for name in tied:
        assert torch.equal(small[name], plain.get_parameter(name)), name
        assert sum(parameter is small[name] for parameter in small.values()) == 2


@pytest.mark.slow
def test_elements_set_to_zero_stay_zero_and_biases_make_up_for_their_mean(context):
    data = autoprune.Data(validation=(draw(SHAPES, 90)[0] + 1, torch.arange(90) % 5), batch_size=90)
    sparse = study_of(settled(Net, SHAPES), data, "compensated", space="sparsity").context
    candidate = halved(sparse)
    plain = sparse.structure.build(sparse.model, sparse.space.pruning(candidate.tolist()))
    small = built(sparse, candidate)
    for name in LAYERS:
        assert torch.equal(small.get_parameter(f"{name}.weight"), plain.get_parameter(f"{name}.weight")), name
    assert not torch.equal(small.head.bias, plain.head.bias)


@pytest.mark.slow
def test_what_is_built_gives_the_outputs_that_were_scored(context):
    evaluator = Compensated()
    evaluator.prepare(context)
    images, labels = (torch.cat(part) for part in zip(*context.subsets.validation, strict=True))
    candidate = halved(context)
    (outcome,) = evaluator.evaluate(candidate[None])
    with torch.no_grad():
        outputs = evaluator.build(candidate).eval()(images)
    losses = F.cross_entropy(outputs, labels, reduction="none").double().numpy()
    np.testing.assert_allclose(outcome.signal, losses, atol=1e-5)


@pytest.mark.slow
def test_least_squares_beats_statistics_alone_and_a_search_saves_what_it_built(digits, digits_model, tmp_path):
    data = autoprune.Data(calibration=digits.train, validation=digits.validation, test=digits.test)
    study = study_of(digits_model, data, "compensated", metric="accuracy")
    candidate = halved(study.context)
    statistics = AdaptiveBN()
    statistics.prepare(study.context)
    (fitted,), (adapted,) = study.evaluator.evaluate(candidate[None]), statistics.evaluate(candidate[None])
    assert fitted.metric.mean() > adapted.metric.mean() + 0.05
    result = autoprune.search(digits_model, "flops <= 50%", data, evaluator="compensated", trials=2)
    small = result.build()
    autoprune.save(small, tmp_path / "small.safetensors")
    loaded = autoprune.load(tmp_path / "small.safetensors", digits_model)
    with torch.no_grad():
        assert torch.equal(loaded(digits.test[0]), small(digits.test[0]))


@pytest.mark.parametrize("name", ["tied", "mlp", "vgg_plain", "dilated_1d"], scope="class")
class TestCompensated(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _network(self, name):
        self.name = name

    def make_evaluator(self):
        return Compensated()

    def make_context(self):
        return classes_context(self.name, "compensated")


class TestCompensatedOnKeywordsFloatsAndAMetricOfTheWholeSet(EvaluatorContract):
    def make_evaluator(self):
        return Compensated()

    def make_context(self):
        return regression_context("compensated")

    def test_chunks_of_the_validation_batches_join_up_to_the_whole(self):
        """A metric of the whole set has no chunks."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (raise_out_of_memory, "OutOfMemoryError: no memory left"),
        (lambda outputs: outputs * float("nan"), "NaN or infinite"),
    ],
)
def test_a_fault_of_one_candidate_is_a_failure_with_its_reason(context, fault, reason):
    def forward(model, batch):
        outputs = model(batch[0])
        return fault(outputs) if model.d.out_features < 12 else outputs

    evaluator = Compensated()
    evaluator.prepare(replace(context, forward=forward))
    failed, dense = evaluator.evaluate(np.stack([halved(context), np.zeros_like(halved(context))]))
    assert isinstance(failed, Failure)
    assert reason in failed.reason
    assert isinstance(dense, Measurement)


@pytest.mark.parametrize(
    ("settings", "message"), [({"ridge": 0}, "ridge must be"), ({"memory_bytes": -1}, "at least 0")]
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Compensated(**settings)
