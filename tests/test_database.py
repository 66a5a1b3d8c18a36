"""Layer database: against explicit least squares for every set of units, on equations alone and on whole networks."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import autoprune
from autoprune import Channels
from autoprune.data.batch import default_forward
from autoprune.importance.calibration import Calibration
from autoprune.importance.criteria import rank_units, score_units
from autoprune.importance.database import build as building
from autoprune.importance.database import observation
from autoprune.importance.database.build import build_database, equations_of, layer_database
from autoprune.importance.database.database import Database
from autoprune.importance.database.downdates import remove_greedily
from autoprune.importance.database.parts import Part, refitted
from autoprune.importance.expected_loss import expected_losses
from autoprune.metrics.scorers import sampled_loss
from autoprune.search_spaces.depth import Depth
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from tests.candidates import state_of
from zoo import draw, settled

RIDGE = 1e-3


def positive(columns, rows, seed):
    x = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / rows


def part(units, columns, members, fits, seed):
    """Equations of random inputs, in fewer dimensions than columns, for units whose columns lie anywhere."""
    places = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))[: units * members]
    products, slopes = positive(columns, max(4, columns // 2), seed), positive(columns, 2 * columns, seed + 1)
    return Part(products, slopes, places.reshape(units, members), fits)


def explicit(each, units, fit=True):
    """Loss without some units, by a least squares of its own: the change as an unknown, and the error as a matrix."""
    gone = each.owned[units].reshape(-1)
    stays = np.setdiff1d(np.arange(len(each.products)), gone.numpy())
    weight = torch.linalg.cholesky(each.slopes).T  # any W and G with this W^T G W
    error = torch.zeros_like(weight)
    error[:, gone] = -weight[:, gone]
    ridge = RIDGE * each.products.diagonal().mean() if fit and each.refitted else 0.0
    if fit and each.refitted:
        root = torch.linalg.eigh(each.products)
        rows = root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt()  # H = R R^T
        stacked = torch.cat([rows[stays].T, ridge**0.5 * torch.eye(len(stays), dtype=torch.float64)])
        wanted = torch.cat(
            [rows[gone].T @ weight[:, gone].T, torch.zeros(len(stays), len(weight), dtype=torch.float64)]
        )
        error[:, stays] = torch.linalg.lstsq(stacked, wanted).solution.T
    held = ridge * error[:, stays].square().sum()
    return float((error @ each.products * error).sum() + held)


CASES = {
    "neurons": (9, [(12, 1, True)]),
    "a kernel of three, and two layers of one": (6, [(20, 3, True), (6, 1, True), (6, 1, True)]),
    "a tied layer, which keeps its weights": (7, [(9, 1, True), (8, 1, False)]),
    "a tied layer alone": (5, [(8, 1, False)]),
    "heads": (4, [(140, 35, True)]),
    "more columns than a panel": (40, [(90, 2, True)]),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    units, each = CASES[request.param]
    parts = [part(units, *options, seed=7 * i) for i, options in enumerate(each)]
    return parts, *remove_greedily(parts, RIDGE)


def test_every_step_removes_the_unit_that_costs_least_at_the_exact_loss(case):
    parts, removal, losses = case
    units = len(removal)
    for step in range(0, units, 1 if units < 20 else 17):
        gone = removal[:step].tolist()
        left = removal[step:].tolist()
        exact = {unit: sum(explicit(each, [*gone, unit]) for each in parts) for unit in left}
        assert losses[step + 1] == pytest.approx(min(exact.values()), rel=1e-6)
        assert exact[int(removal[step])] == pytest.approx(min(exact.values()), rel=1e-6)


def test_losses_are_never_above_those_of_the_same_units_without_a_change(case):
    parts, removal, losses = case
    for step in range(1, len(removal)):
        gone = removal[:step].tolist()
        assert losses[step] <= sum(explicit(each, gone, fit=False) for each in parts) * (1 + 1e-9)


def test_every_unit_is_removed_once_and_the_loss_begins_at_zero(case):
    _, removal, losses = case
    assert sorted(removal.tolist()) == list(range(len(removal)))
    assert len(losses) == len(removal) + 1
    assert losses[0] == 0
    assert (np.diff(losses) >= 0).all()


def test_weights_on_demand_have_the_loss_of_the_table():
    each = part(9, 12, 1, True, seed=3)
    removal, losses = remove_greedily([each], RIDGE)
    gone = each.owned[removal[:5]].reshape(-1)
    kept = torch.from_numpy(np.setdiff1d(np.arange(12), gone.numpy()))
    weight = torch.linalg.cholesky(each.slopes).T
    error = -weight.clone()
    error[:, kept] += refitted(weight, each.products, kept, RIDGE)
    change = error[:, kept]
    ridge = RIDGE * each.products.diagonal().mean()
    found = (error @ each.products * error).sum() + ridge * change.square().sum()
    assert float(found) == pytest.approx(losses[5], rel=1e-9)


class Net(nn.Module):
    """Group a is read by two convolutions, b by one with a stride and a kernel of two, c by a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False)
        self.skip = nn.Conv2d(6, 4, 1)
        self.c = nn.Conv2d(5, 4, 2, padding=1, dilation=2, bias=False)
        self.after, self.head = nn.BatchNorm2d(4), nn.Linear(4 * 16, 3)

    def forward(self, x):
        a = self.norm(self.a(x)).relu()
        c = self.after(self.c(self.b(a).tanh())) + F.avg_pool2d(self.skip(a), 2)
        return self.head(c.relu().flatten(1))


def network():
    model = settled(Net, ((3, 8, 8),)).double()
    x = draw(((3, 8, 8),), 12, seed=3)[0].double()
    structure = analyse(Example(model, (x[:1],)))
    return model, x, structure


CENTRED = {"b": False, "skip": True, "c": True, "head": True}  # a bias, or batch norm after it


def by_hand(model, x, name):
    """Inputs as rows, gradients as rows, and the matrix of a layer, from hooks and `F.unfold`."""
    layer = model.get_submodule(name)
    seen = {}
    hook = layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out) or out.retain_grad())
    generator = torch.Generator().manual_seed(0)
    rows, slopes = [], []
    draws = 0
    for samples in x.split(4):
        loss, drawn = sampled_loss(model(samples), samples, generator)
        loss.backward()
        draws += drawn
        if isinstance(layer, nn.Conv2d):
            options = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
            rows.append(F.unfold(seen["x"].detach(), layer.kernel_size, **options).mT.flatten(0, 1))
            slopes.append(seen["y"].grad.flatten(2).mT.flatten(0, 1))
        else:
            rows.append(seen["x"].detach())
            slopes.append(seen["y"].grad)
    hook.remove()
    return torch.cat(rows), torch.cat(slopes), layer.weight.detach().flatten(1), draws


@pytest.mark.parametrize("long", [observation._LONG, 0])
@pytest.mark.parametrize(("group", "readers"), [("a", ("b", "skip")), ("b", ("c",)), ("c", ("head",))])
def test_errors_of_a_network_are_those_of_its_own_inputs_and_gradients(monkeypatch, group, readers, long):
    monkeypatch.setattr(observation, "_LONG", long)  # where 0, each sample has a pass of its own
    model, x, structure = network()
    found = build_database(Calibration(model, structure, [x], default_forward))
    table = found.tables[group]
    units = len(table.removal)
    parts = []
    for reader in readers:
        rows, slopes, weight, draws = by_hand(model, x, reader)
        rows = rows - rows.mean(0) if CENTRED[reader] else rows
        curvature = 0.5 / draws * weight.T @ slopes.T @ slopes @ weight
        curvature.diagonal().add_(1e-13 * curvature.diagonal().mean())  # so that it has a factor
        owned = torch.arange(weight.shape[1]).reshape(units, -1)
        parts.append(Part(rows.T @ rows / len(rows), curvature, owned))
    for step in range(1, units):
        assert table.errors[step] == pytest.approx(
            sum(explicit(each, table.removal[:step].tolist()) for each in parts), rel=1e-5
        )


def test_losses_are_those_of_inputs_times_gradients_less_what_the_refit_saves():
    model, x, structure = network()
    table = build_database(Calibration(model, structure, [x], default_forward)).tables["a"]
    total, errors, freedom = torch.zeros(6, 12, dtype=torch.float64), [], []
    for reader in ("b", "skip"):
        rows, slopes, weight, draws = by_hand(model, x, reader)
        rows = rows - rows.mean(0) if CENTRED[reader] else rows
        products = (rows * (slopes @ weight)).unflatten(0, (12, -1)).sum(1)
        total += products.unflatten(1, (6, -1)).sum(2).T
        pairs = 0.5 / draws * (rows.T @ rows / len(rows)) * (weight.T @ slopes.T @ slopes @ weight)
        whole = rows.T @ rows / len(rows)
        held = whole + RIDGE * whole.diagonal().mean() * torch.eye(len(whole), dtype=torch.float64)
        freedom.append(float(torch.linalg.solve(held, whole).trace()) / len(rows))
        errors.append(pairs.unflatten(0, (6, -1)).unflatten(2, (6, -1)).sum((1, 3)))
    for step in range(1, 7):
        gone = table.removal[:step]
        plain = float(sum(errors)[gone][:, gone].sum())
        loss = 0.5 / 12 * float(total[gone].sum(0).square().sum())
        free = max(freedom) * (6 - step) / 6
        left = min(1.0, table.errors[step] / plain * (1 + free) / (1 - free))
        assert table.losses[step] == pytest.approx(max(table.losses[step - 1], loss * left), rel=1e-6)


def calibration():
    model, x, structure = network()
    return Calibration(model, structure, [x[:8], x[8:]], default_forward)


def same(one, other):
    return (
        [*one.tables] == [*other.tables]
        and all((one.tables[name].removal == other.tables[name].removal).all() for name in one.tables)
        and all((one.tables[name].errors == other.tables[name].errors).all() for name in one.tables)
        and all((one.tables[name].losses == other.tables[name].losses).all() for name in one.tables)
        and (one.unpriced, one.weighted, one.identity) == (other.unpriced, other.weighted, other.identity)
    )


def test_a_file_holds_what_was_built(tmp_path):
    built = build_database(calibration(), tmp_path / "layers.safetensors")
    assert same(Database.load(tmp_path / "layers.safetensors"), built)
    assert (tmp_path / "layers.safetensors").stat().st_size < 4096


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "layers.safetensors"
    priced = []

    def stop_at(most):
        def remove(parts, ridge):
            if len(priced) == most:
                raise KeyboardInterrupt
            priced.append(len(parts))
            return remove_greedily(parts, ridge)

        return remove

    monkeypatch.setattr(building, "remove_greedily", stop_at(2))
    with pytest.raises(KeyboardInterrupt):
        build_database(calibration(), path)
    assert len(Database.load(path).tables) == 2
    monkeypatch.setattr(building, "remove_greedily", stop_at(3))
    resumed = build_database(calibration(), path)
    assert len(priced) == 3
    assert same(resumed, build_database(calibration(), path))
    monkeypatch.undo()
    assert same(resumed, build_database(calibration()))


def test_a_file_of_other_data_is_replaced(tmp_path, caplog):
    path = tmp_path / "layers.safetensors"
    first = build_database(calibration(), path)
    other = calibration()
    with caplog.at_level(logging.WARNING):
        second = build_database(other.on([batch + 1 for batch in other.batches]), path)
    assert "is of other weights, data or settings" in caplog.text
    assert first.identity != second.identity
    assert same(Database.load(path), second)


@pytest.mark.parametrize("damage", ["", "order", "bytes"])
def test_a_damaged_or_foreign_file_is_refused(tmp_path, damage):
    path = tmp_path / "layers.safetensors"
    built = build_database(calibration(), path)
    if damage == "order":
        built.tables["a"].removal[0] = built.tables["a"].removal[1]
        built.save(path)
    elif damage == "bytes":
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    else:
        save_file({"a/removal": torch.zeros(2)}, path)
    with pytest.raises(autoprune.FileFormatError, match="layer database"):
        Database.load(path)


def test_moments_beyond_the_memory_are_collected_in_several_passes(monkeypatch):
    passes = []
    observed = building.observe

    def observe(calibration, sources, samples, seed):
        passes.append(len(sources))
        return observed(calibration, sources, samples, seed)

    monkeypatch.setattr(building, "observe", observe)
    whole = build_database(calibration())
    assert passes == [4]
    passes.clear()
    parted = build_database(calibration(), memory_bytes=2 * 8 * 64**2)
    assert passes == [3, 1]
    assert same(whole, parted)


def test_a_group_whose_layers_take_too_much_memory_has_no_price():
    found = build_database(calibration(), memory_bytes=2 * 8 * 64**2 - 1)
    assert [*found.tables] == ["a", "b"]
    assert "memory_bytes" in found.unpriced["c"]
    assert "without a price: c" in found.note


def test_the_model_and_the_random_states_come_back_unchanged(global_rng_untouched):
    each = calibration()
    before = state_of(each.model)
    with global_rng_untouched():
        build_database(each)
    assert state_of(each.model) == before
    assert all(parameter.grad is None for parameter in each.model.parameters())


class Tied(nn.Module):
    """Its head is its embedding, and one group has no layer that reads it."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, 6), nn.Linear(6, 8)
        self.outer, self.scale = nn.Linear(8, 6), nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) * self.scale
        return self.head(x + self.outer(self.inner(x).relu()))


def tied():
    torch.manual_seed(0)
    model = Tied().eval()
    tokens = torch.randint(0, 11, (8, 5))
    return Calibration(model, analyse(Example(model, (tokens[:1],))), [tokens], default_forward)


def test_a_tied_head_counts_and_keeps_its_weights():
    found = build_database(tied())
    assert {name: len(table.removal) for name, table in found.tables.items()} == {"embed": 6, "inner": 8}
    assert found.weighted


def test_without_gradients_errors_are_relative_to_what_layers_compute():
    each = tied()

    def blind(model, batch):
        with torch.no_grad():
            return model(batch)

    found = build_database(Calibration(each.model, each.structure, each.batches, blind))
    assert not found.weighted
    assert "no gradients" in found.note
    assert all(0 < table.losses[-1] < 3 for table in found.tables.values())


def test_the_criterion_keeps_longest_what_is_removed_last():
    each = calibration()
    assert rank_units(each, "obs") == build_database(each).order


def test_a_calibration_builds_its_database_once(monkeypatch):
    built = []
    monkeypatch.setattr(building, "build_database", lambda *given: built.append(given) or build_database(*given))
    each = calibration()
    score_units(each, "obs")
    assert layer_database(each) is layer_database(each)
    assert len(built) == 1
    assert layer_database(each.on(each.batches[:1])) is not layer_database(each)


def space_of(structure, order):
    return Channels(options=(1.0, 0.75, 0.5, 0.25)).bind(structure, order)


@pytest.mark.parametrize("criterion", ["obs", "l2"])
def test_the_prior_is_the_loss_of_as_many_units(criterion):
    each = calibration()
    scores = score_units(each, criterion)
    space = space_of(each.structure, rank_units(each, criterion))
    expected = expected_losses("database", space, scores, criterion, each)
    tables = build_database(each).tables
    for dimension, losses in zip(space.dimensions, expected, strict=True):
        assert losses.tolist() == pytest.approx([tables[dimension.name].loss(kept) for kept in dimension.options])


class Mixed(Net):
    """Its last group is read by a product of two of its own values, not by a layer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        a = self.norm(self.a(x)).relu()
        c = self.after(self.c(self.b(a).tanh())) + F.avg_pool2d(self.skip(a), 2)
        return self.head(c.relu()).square().mean((1, 2, 3))[:, None]


def test_groups_without_a_price_get_scores_in_the_unit_of_the_others(caplog):
    model, x = settled(Mixed, ((3, 8, 8),)).double(), draw(((3, 8, 8),), 8)[0].double()
    structure = analyse(Example(model, (x[:1],)))
    each = Calibration(model, structure, [x], default_forward)
    (name,) = build_database(each).unpriced
    space = space_of(structure, rank_units(each, "l2"))
    with caplog.at_level(logging.WARNING):
        expected = expected_losses("database", space, score_units(each, "l2"), "l2", each)
    assert f"without a price: {name}" in caplog.text
    most = {d.name: losses[-1] for d, losses in zip(space.dimensions, expected, strict=True)}
    others = [loss for group, loss in most.items() if group != name]
    assert 1e-2 * min(others) < most[name] < 1e2 * max(others)


def test_a_search_by_the_database_keeps_it_in_its_folder(tmp_path):
    model, x, _ = network()
    result = autoprune.search(
        model.float(),
        "flops <= 70%",
        autoprune.Data(x.float(), x.float(), batch_size=6),
        space=Channels(criterion="obs"),
        optimizer="knapsack",
        trials=6,
        start=autoprune.Start(prior="database"),
        execution=autoprune.Execution(run_dir=tmp_path / "run"),
    )
    assert result.front
    assert [*Database.load(tmp_path / "run" / "database.safetensors").tables] == ["a", "b", "c"]


def test_weights_on_demand_keep_the_outputs_of_a_layer_best():
    each = calibration()
    ((found, _),) = [equations.parts for equations in equations_of(each, ["a"])]
    (reader,) = found.readers
    assert reader.name == "b.weight"
    rows, _, weight, _ = by_hand(each.model, torch.cat([*each.batches]), "b")
    kept = found.owned[[0, 2, 3, 5]].reshape(-1)
    error = rows @ weight.T - rows[:, kept] @ refitted(weight, found.products, kept, RIDGE).T
    plain = torch.linalg.lstsq(rows[:, kept], rows @ weight.T)
    best = (rows @ weight.T - rows[:, kept] @ plain.solution).square().sum()
    assert best < error.square().sum() < 1.02 * best


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm, self.inner, self.outer = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        x = self.enter(x)
        return self.head(x + self.outer(self.inner(self.norm(x)).relu()))


def test_a_dropped_branch_costs_what_its_groups_cost_without_any_unit():
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(32, 4)
    structure = analyse(Example(model, (x[:1],)))
    each = Calibration(model, structure, [x], default_forward)
    space = Depth(min_kept=0).bind(structure, {})
    (losses,) = expected_losses("database", space, {}, None, each)
    assert losses.tolist() == [0.0, build_database(each).tables["inner"].loss(0)]
    assert losses[1] > 0


def test_the_loss_without_any_unit_is_the_curvature_of_the_divergence_as_they_fade():
    model, _, structure = network()
    x = draw(((3, 8, 8),), 64, seed=4)[0].double()
    loss = build_database(Calibration(model, structure, [x], default_forward)).tables["c"].losses[-1]
    read = []
    hook = model.head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        dense = model(x).log_softmax(1)
        hook.remove()
        step = 1e-3 * (read[0] - read[0].mean(0))  # the bias makes up for the mean
        faded = model.head(read[0] - step).log_softmax(1)
    divergence = F.kl_div(faded, dense, reduction="batchmean", log_target=True) / 1e-6
    assert loss == pytest.approx(float(divergence), rel=0.5)  # 64 drawn labels: 18 % of noise


class Attending(nn.Module):
    """Reads its units by projections of attention, and by a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.enter, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 4, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        x = self.enter(x).relu()
        return self.attention(x, x, x, need_weights=False)[0].mean(1) @ self.matrix


def test_projections_of_attention_and_bare_parameters_count_as_layers():
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(12, 5, 6)
    structure = analyse(Example(model, (x[:1],)))
    found = build_database(Calibration(model, structure, [x], default_forward))
    assert {name: len(table.removal) for name, table in found.tables.items()} == {
        group.name: group.size for group in structure.groups
    }
    assert found.weighted
    assert all(table.losses[-1] > 0 for table in found.tables.values())
