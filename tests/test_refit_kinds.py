"""Every kind of weight that reads units is re-fitted; padding, batching and stale statistics change nothing of it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoprune
from autoprune.evaluators import Compensated
from autoprune.importance.padding import positions_of
from autoprune.testing.contexts import study_for


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.enter, self.cell, self.head = (
            nn.Linear(5, 12),
            kind(12, 10, num_layers=2, batch_first=True),
            nn.Linear(10, 3),
        )

    def forward(self, x):
        return self.head(self.cell(self.enter(x).tanh())[0][:, -1])


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(0.3 * torch.randn(16, 3, 3, 3))
        self.second, self.shift = nn.Parameter(0.2 * torch.randn(8, 16, 3, 3)), nn.Parameter(torch.zeros(8))
        self.matrix = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        x = F.conv2d(F.conv2d(x, self.first).relu(), self.second, self.shift).relu()
        return x.mean((2, 3)) @ self.matrix


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.attention = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.enter(x).relu()
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Padded(nn.Module):
    """Sums over real positions; the values at the others are garbage."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.inner, self.outer, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, ids, attention_mask):
        x = self.inner(self.embed(ids)).relu().unflatten(-1, (4, -1)).transpose(1, 2).contiguous()
        x = self.outer(x.transpose(1, 2).flatten(2))  # as attention joins its heads
        weight = attention_mask[..., None].to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1))


def seeded(make, *arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*arguments).eval()


def context_of(model, data):
    return study_for(model, "flops <= 100%", data, evaluator="compensated").context


def halves(context, **settings):
    evaluator = Compensated(**settings)
    evaluator.prepare(context)
    return evaluator.build(np.array(context.space.sizes) // 2)


KINDS = [
    pytest.param(Recurrent, (nn.LSTM,), (9, 5), ("cell.weight_ih_l0", "cell.weight_hh_l1", "head.weight"), id="lstm"),
    pytest.param(Recurrent, (nn.GRU,), (9, 5), ("cell.weight_ih_l0", "cell.weight_ih_l1", "head.weight"), id="gru"),
    pytest.param(Bare, (), (3, 9, 9), ("second", "shift", "matrix"), id="bare parameters"),
    pytest.param(Attending, (), (7, 6), ("attention.in_proj_weight", "attention.out_proj.weight"), id="attention"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "arguments", "shape", "fitted"), KINDS)
def test_weights_of_every_kind_are_fitted_and_outputs_come_nearer_to_the_dense_ones(make, arguments, shape, fitted):
    model = seeded(make, *arguments)
    x = torch.randn(80, *shape, generator=torch.Generator().manual_seed(0))
    context = context_of(model, autoprune.Data(validation=(x,), calibration=(x,)))
    plain, small = halves(context, bias=False, least_squares=False), halves(context)
    for name in fitted:
        assert not torch.equal(small.get_parameter(name), plain.get_parameter(name)), name
    with torch.no_grad():
        errors = [float((each(x) - model(x)).square().mean()) for each in (small, plain)]
    assert errors[0] < 0.8 * errors[1]


def sentences(n=48):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (n,), generator=generator).tolist()
    return [torch.randint(1, 20, (length,), generator=generator) for length in lengths]


def batches_of(texts, size):
    made = []
    for i in range(0, len(texts), size):
        ids = nn.utils.rnn.pad_sequence(texts[i : i + size], batch_first=True)
        made.append({"ids": ids, "attention_mask": (ids > 0).long()})
    return made


@pytest.mark.slow
def test_unpadded_batches_of_one_and_padded_batches_of_many_give_the_same_network():
    model, found = seeded(Padded), []
    for size in (1, 12):
        batches = batches_of(sentences(), size)
        data = autoprune.Data(calibration=batches, validation=batches, test=batches)
        found.append(halves(context_of(model, data)).state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_masks_are_read_in_either_sense_and_only_where_they_go_with_another_input():
    ids, kept = torch.ones(3, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    for batch in (
        {"input_ids": ids, "attention_mask": kept},
        {"x": ids, "padding_mask": kept == 0},
        (ids, kept == 0, None),
    ):
        positions = positions_of(batch)
        assert positions is not None
        assert torch.equal(positions, kept.bool())
    assert positions_of({"input_ids": ids, "attention_mask": torch.ones_like(kept)}) is None
    assert positions_of((torch.eye(3), None)) is None


@pytest.mark.slow
def test_dead_units_identical_samples_and_nan_leave_inherited_weights():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    for rows in (x, x[:1].expand(40, 4).clone()):
        context = context_of(model, autoprune.Data(validation=(x,), calibration=(rows,)))
        small, plain = halves(context), halves(context, bias=False, least_squares=False)
        assert torch.equal(small[2].weight, plain[2].weight)
    broken = x.clone()
    broken[0] = float("nan")
    context = context_of(model, autoprune.Data(validation=(x,), calibration=(broken,)))
    assert all(torch.isfinite(each).all() for each in halves(context).parameters())


@pytest.mark.slow
def test_statistics_stay_where_nothing_was_removed_although_they_do_not_suit_the_samples():
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
        )
    )  # fmt: skip
    model[1].running_var *= 0.3
    x = 2 + torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    context = context_of(model, autoprune.Data(validation=(x,), calibration=(x,)))
    evaluator = Compensated()
    evaluator.prepare(context)
    candidate = np.zeros(len(context.space.sizes), dtype=np.int64)
    candidate[-1] = 4  # of the second convolution alone
    small = evaluator.build(candidate)
    torch.testing.assert_close(small[1].running_mean, model[1].running_mean)
    torch.testing.assert_close(small[1].running_var, model[1].running_var)


@pytest.mark.slow
def test_wide_weights_are_fitted_from_a_sketch_whose_work_is_in_proportion():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 3000), nn.ReLU(), nn.Linear(3000, 4)))
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    context = context_of(model, autoprune.Data(validation=(x,), calibration=(x,)))
    evaluator = Compensated()
    evaluator.prepare(context)
    (layer,) = evaluator._layers["2.weight"]
    assert 0 < layer.moments.sketch_rows <= 200
    small, plain = evaluator.build(np.array(context.space.sizes) // 2), halves(context, bias=False, least_squares=False)
    with torch.no_grad():
        errors = [float((each(x) - model(x)).square().mean()) for each in (small, plain)]
    assert errors[0] < 0.5 * errors[1]
