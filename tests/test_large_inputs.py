"""Deep and wide networks: what is repeated is done once, and work grows with the network and not with its square."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import autoprune
from autoprune.costs import StructuralCosts
from autoprune.data.batch import default_forward
from autoprune.evaluators import AdaptiveBN, Context
from autoprune.evaluators.activation_cache import limits as room
from autoprune.evaluators.activation_cache.flow import flow_of
from autoprune.evaluators.refit import layers as layers_module
from autoprune.evaluators.refit import normalisation
from autoprune.evaluators.refit.layers import Layer, find_layers
from autoprune.importance.calibration import Calibration
from autoprune.importance.moments import Sample
from autoprune.protocols import Failure, IntArray, Measurement, Pruning
from autoprune.structure import analysis
from autoprune.structure import units as units_module
from autoprune.structure.analysis import analyse
from autoprune.structure.checks import checks
from autoprune.structure.example import Example, default_dtype
from autoprune.structure.labels import Edge
from autoprune.structure.owners import owners, swapped
from autoprune.structure.propagate import propagate
from autoprune.structure.python_state import python_state, same_state
from autoprune.structure.sizes.sizes import ROUNDS
from autoprune.structure.slicing import slicing
from autoprune.structure.slicing.skeleton import skeleton
from autoprune.structure.slicing.slicing import Edit, build
from autoprune.structure.tracing.known_shapes import KnownShapes, shapes_kept
from autoprune.structure.tracing.trace import trace
from autoprune.structure.units import find_units
from autoprune.study import mapped_weights as mapped


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    """Counts the operations that get through to it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def chain(layers: int, width: int = 8) -> nn.Module:
    middle = [each for _ in range(layers - 2) for each in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), *middle, nn.Linear(width, 2)).eval()


class TestKnownShapes:
    def test_a_repeated_operation_runs_once_on_the_meta_device(self):
        x, weight = torch.empty(2, 3, device="meta"), torch.ones(3, device="meta")
        with Counting() as below, KnownShapes():
            made = [torch.layer_norm(x, (3,), weight) for _ in range(5)]
        assert below.names.count("native_layer_norm") == 1
        assert all(each.shape == x.shape and each.stride() == x.stride() and each.is_meta for each in made)
        assert len({id(each) for each in made}) == 5

    @pytest.mark.parametrize("transposed", [False, True])
    def test_a_convolution_with_a_bias_of_another_size_is_refused_as_kernels_do(self, transposed: bool):
        x, weight = torch.empty(1, 4, 5, 5, device="meta"), torch.empty(4, 4, 1, 1, device="meta")
        convolve = F.conv_transpose2d if transposed else F.conv2d
        with KnownShapes():
            assert convolve(x, weight, torch.empty(4, device="meta")).shape == (1, 4, 5, 5)
            with pytest.raises(RuntimeError, match=r"to 4 channels got a bias of shape \(3,\)"):
                convolve(x, weight, torch.empty(3, device="meta"))

    def test_values_are_computed_each_time(self):
        x = torch.ones(3)
        with Counting() as below, KnownShapes():
            assert torch.equal(x + 1, torch.full((3,), 2.0))
            assert torch.equal(x + 1, torch.full((3,), 2.0))
        assert below.names.count("add") == 2

    def test_views_share_memory_and_what_is_in_place_returns_its_own(self):
        x = torch.empty(2, 3, device="meta")
        with KnownShapes():
            views = [x.view(6) for _ in range(2)]
            written = [x.add_(1) for _ in range(2)]
        assert all(view.untyped_storage()._cdata == x.untyped_storage()._cdata for view in views)
        assert all(each is x for each in written)

    @pytest.mark.parametrize("scalars", [(1, 1.0), (1.0, 1), (True, 1.5)])
    def test_arguments_that_are_equal_but_not_alike_are_told_apart(self, scalars: tuple[Any, Any]):
        x = torch.empty(2, dtype=torch.int64, device="meta")
        with KnownShapes():
            assert [(x + scalar).dtype for scalar in scalars] == [(x + scalar).dtype for scalar in scalars]
        plain = [(x + scalar).dtype for scalar in scalars]
        with KnownShapes():
            assert [(x + scalar).dtype for scalar in scalars] == plain

    def test_a_deep_network_is_traced_with_few_runs(self):
        with Counting() as below:
            trace(Example(chain(40), (torch.ones(2, 4),)))
        assert sum(name in ("addmm", "relu") for name in below.names) < 10

    def test_passes_of_an_analysis_share_what_they_learn(self):
        x = torch.empty(2, 3, device="meta")
        with Counting() as below, shapes_kept():
            for _ in range(3):
                with KnownShapes():
                    torch.relu(x)
        assert below.names.count("relu") == 1
        with Counting() as below, KnownShapes():
            torch.relu(x)
        assert below.names.count("relu") == 1

    def test_results_of_the_default_type_are_known_for_that_type_alone(self):
        x = torch.empty(2, dtype=torch.int64, device="meta")
        with shapes_kept():
            for kind in (torch.float32, torch.float64, torch.float32):
                with default_dtype(kind), KnownShapes():
                    assert (x / 2).dtype == kind


class Remembers(nn.Linear):
    """Keeps its latest output, as modules do that return it again when nothing has changed."""

    kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


class Opaque(nn.Linear):
    """Holds an object whose state Python cannot read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counts = np.zeros(1)


class TestFreshCuts:
    @pytest.mark.parametrize("kind", [nn.Linear, Remembers, Opaque])
    def test_modules_are_copied_again_only_where_a_run_may_have_left_something(self, kind: Any, monkeypatch: Any):
        copies = []
        monkeypatch.setattr(slicing, "skeleton", lambda model: copies.append(1) or skeleton(model))
        fresh = slicing.FreshCuts(nn.Sequential(kind(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        half = {"0.weight": {0: np.arange(4)}, "0.bias": {0: np.arange(4)}, "2.weight": {1: np.arange(4)}}
        for edit in (Edit(half, {}), Edit({}, {}), Edit(half, {})):
            module = fresh.cut(edit)
            assert getattr(module[0], "kept", None) is None
            assert module(torch.ones(1, 4)).shape == (1, 2)
            assert module[0].out_features == (4 if edit.slices else 8)
        assert len(copies) == (1 if kind is nn.Linear else 3)

    def test_every_way_to_keep_something_is_seen(self):
        holder = SimpleNamespace(seen=0)

        def changes(model: Any) -> list[Callable[[], Any]]:
            return [
                lambda: setattr(model, "more", 1),
                lambda: setattr(model, "scale", 2000),
                lambda: model.sizes["width"].append(3),
                lambda: setattr(model.holder, "seen", 1),
                lambda: model.register_buffer("cache", torch.ones(1)),
                lambda: setattr(model, "empty", torch.ones(1)),
                lambda: model.mask.add_(1),
                lambda: model.first.register_forward_hook(print),
                lambda: setattr(model, "again", nn.Linear(2, 2)),
                lambda: model.names.add("x"),
                lambda: setattr(model.listed[1], "bias", None),
            ]

        def made() -> Any:
            model: Any = Shared()
            model.holder, model.mask, model.names, model.scale = copy.copy(holder), torch.zeros(2), set(), 1000
            model.listed.append(nn.Linear(2, 2))
            model.register_buffer("empty", None)
            return model

        for i in range(len(changes(made()))):
            model = made()
            before = python_state(model)
            assert before is not None
            model.eval()
            model.scale = int("1000")  # another object, equal
            model(torch.ones(1, 2))
            assert same_state(before, python_state(model))
            changes(model)[i]()
            assert not same_state(before, python_state(model)), i

    def test_a_smaller_module_is_followed_once_for_each_draw(self, monkeypatch: Any):
        follow, passes = checks.Checker._follow, []
        monkeypatch.setattr(checks.Checker, "_follow", lambda *given: passes.append(1) or follow(*given))
        assert len(analyse(Example(chain(6), (torch.ones(2, 4),))).groups) == 5
        assert len(passes) == ROUNDS


class TestCorrection:
    @pytest.mark.parametrize("batches", [1, 3])
    def test_each_norm_is_corrected_once_a_batch_and_its_channels_are_taken_once_a_candidate(
        self, batches: int, monkeypatch: Any
    ):
        model = nn.Sequential(nn.Conv1d(2, 6, 1), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 1)).eval()
        data = [torch.randn(8, 2, 5) for _ in range(batches)]
        structure = analyse(Example(model, (data[0],)))
        correction = normalisation.Correction(Calibration(model, structure, data, lambda m, batch: m(batch)))
        names = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
        half = {name: {0: np.arange(3)} for name in names} | {"3.weight": {1: np.arange(3)}}
        cut = slicing.Slicer(model).cut(Edit(half, {})).eval()
        correct, calls = normalisation._correct, []
        monkeypatch.setattr(normalisation, "_correct", lambda *given: calls.append(1) or correct(*given))
        with Counting() as below:
            correction.apply(cut, Edit(half, {}), cut)
        assert len(calls) == (1 if batches == 1 else batches + 1)
        assert sum("index" in name for name in below.names) == batches + 1


class TestBestChoices:
    def test_each_choice_is_propagated_once_and_what_stays_is_found_at_the_end_alone(self, monkeypatch: Any):
        """The third factor of one view is chosen among all views, and again among those of its form."""

        class Heads(nn.Module):
            def __init__(self, *sizes: int) -> None:
                super().__init__()
                self.query, self.out, self.sizes = nn.Linear(8, 12), nn.Linear(12, 8), sizes

            def forward(self, x: Tensor) -> Tensor:
                return self.out(torch.softmax(self.query(x).view(2, 5, *self.sizes), -1).reshape(2, 5, 12))

        record = trace(Example(nn.Sequential(Heads(3, 4), Heads(3, 2, 2)).eval(), (torch.ones(2, 5, 8),)))
        tried, propagated = [], analysis.propagate

        def propagate(record: Any, choices: Any = None) -> Any:
            flow = propagated(record, choices)
            tried.append(frozenset((choices or flow.sites).items()))
            return flow

        monkeypatch.setattr(analysis, "propagate", propagate)
        monkeypatch.setattr(units_module, "_frozen", lambda *_: pytest.fail("nobody asked for it"))
        flow, units = analysis.best_choices(record)
        assert flow.sites
        assert len(tried) == len(set(tried)) > 1
        assert units.groups


class TestSwapped:
    def test_tied_tensors_are_replaced_together_and_come_back_even_if_code_replaced_them(self):
        model = Shared()
        model.register_buffer("count", torch.zeros(1))
        own = {owner.key: owner.tensor for owner in owners(model)}
        given = {"first.weight": torch.ones(2, 2), "count": torch.ones(1)}
        with swapped(model, given):
            assert model.first.weight is model.again.weight is given["first.weight"]
            assert model.first.bias is own["bias"]
            model.count = model.count + 1
        assert {owner.key: owner.tensor for owner in owners(model)} == own


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.again, self.listed, self.sizes = self.first, [self.first], {"width": [2]}

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x))


class Stateful(nn.Linear):
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "copied": True}  # type: ignore[no-untyped-call]  # torch does not annotate it


class TestSkeletons:
    def test_what_a_model_holds_twice_its_copy_holds_twice(self):
        model = Shared()
        model.first.register_forward_hook(lambda *_: None)
        copied = skeleton(model)
        assert copied.again is copied.first is copied.listed[0] is not model.first
        assert copied.first.weight is model.first.weight
        assert copied.sizes == model.sizes
        assert copied.sizes["width"] is not model.sizes["width"]
        assert len(copied.first._forward_hooks) == 1
        assert copied.first._forward_hooks is not model.first._forward_hooks
        assert not any(
            vars(copied)[key] is value for key, value in vars(model).items() if isinstance(value, dict | set)
        )

    def test_classes_that_say_how_they_are_copied_are_asked(self):
        copied = skeleton(nn.Sequential(Stateful(2, 2)))
        assert copied.get_submodule("0").copied is True


class TestUnits:
    def test_they_are_found_once_for_what_is_tied_and_frozen(self):
        flow = propagate(trace(Example(chain(5), (torch.ones(2, 4),))))
        units = find_units(flow)
        names = [group.name for group in units.groups]
        assert find_units(flow) is units
        assert [group.name for group in find_units(flow, {names[0]: "no"}).groups] == names[1:]
        labels = [flow.of(flow.record.named()[f"{name}.weight"])[0] for name in names[:2]]
        flow.edges.append(Edge(0, labels[0], labels[1]))
        assert len(find_units(flow).groups) == len(names) - 1
        flow.edges.pop()
        assert find_units(flow) is units


@pytest.mark.slow
def test_a_deep_network_shares_computation_behind_a_bounded_number_of_modules():
    flow = flow_of(chain(400), [(torch.ones(2, 4), torch.zeros(2))], default_forward)
    assert 200 <= len(flow.cuts) <= 256
    ends = np.array([0, *(cut.end for cut in flow.cuts)])
    assert np.diff(ends).max() <= 8


@pytest.mark.slow
def test_costs_of_a_deep_network_are_exact_and_take_work_in_proportion_to_it():
    model = chain(202)
    structure = analyse(Example(model, (torch.ones(2, 4),)), checks="on")
    costs = StructuralCosts(structure)
    rng = np.random.default_rng(0)
    widths = rng.integers(1, 9, size=(3, len(structure.groups)))
    for row, flops, params in zip(widths, costs.flops(widths * 1.0), costs.params(widths * 1.0), strict=True):
        kept = {g.name: tuple(range(n)) for g, n in zip(structure.groups, row.tolist(), strict=True)}
        small = build(model, structure.edit(Pruning(kept)))
        layers = [module for module in small.modules() if isinstance(module, nn.Linear)]
        assert params == sum(p.numel() for p in small.parameters())
        assert flops == sum(layer.weight.numel() for layer in layers)
    assert costs._each.size < 10 * len(structure.groups)


class CountingLookUps(dict):  # type: ignore[type-arg]  # of tensors
    """Counts how often it is asked for an entry, and how many it gives one after the other."""

    asked = 0

    def items(self) -> Any:
        for item in super().items():
            self.asked += 1
            yield item


@pytest.mark.slow
def test_an_edit_of_one_group_looks_at_its_tensors_and_modules_alone():
    structure = analyse(Example(chain(60), (torch.ones(2, 4),)), checks="on")
    halves = [Pruning({group.name: tuple(range(0, group.size, 2))}) for group in structure.groups]
    whole = Pruning({name: kept for each in halves for name, kept in each.kept.items()})
    together = structure.edit(whole)
    tensors = CountingLookUps(structure.units_of)
    watched = replace(structure, units_of=tensors)
    for half in halves:
        edit = watched.edit(half)
        (group,) = half.kept
        assert {name.rpartition(".")[0] for name in edit.slices} == {group, f"{int(group) + 2}"}
        for name, dims in edit.slices.items():
            for dim, index in dims.items():
                np.testing.assert_array_equal(index, together.slices[name][dim])
        changed = {
            name for name, values in edit.attributes.items() if values != watched.edit(Pruning({})).attributes[name]
        }
        assert changed <= {group, f"{int(group) + 2}"}
    assert tensors.asked <= 2 * len(tensors)


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every model as a large one."""
    monkeypatch.setattr(room, "LARGE_BYTES", 1)
    monkeypatch.setattr(mapped, "LARGE_BYTES", 1)
    monkeypatch.setattr(mapped, "_SMALL", 1)


def searched(model: nn.Module, **options: Any) -> autoprune.SearchResult:
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(64, 4, generator=draw), torch.randint(0, 2, (64,), generator=draw)
    return autoprune.search(model, "flops <= 60%", data, trials=6, progress=False, **options)


def seeded_chain() -> nn.Module:
    torch.manual_seed(0)
    return chain(4, width=24)


class TestMemory:
    def test_a_large_model_is_searched_without_a_copy_and_kept_in_a_file(self, small_is_large: None):
        model = seeded_chain()
        copied = mapped.own_copy(model)
        pairs = list(zip(model.parameters(), copied.parameters(), strict=True))
        assert all(own is not theirs and own.data_ptr() == theirs.data_ptr() for own, theirs in pairs)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        mapped.settle(copied, None)
        assert all(own.data_ptr() != theirs.data_ptr() for own, theirs in pairs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert all(torch.equal(value, before[name]) for name, value in copied.state_dict().items())

    @pytest.mark.slow
    @pytest.mark.parametrize("large", [True, False])
    @pytest.mark.parametrize("where", ["prepare", "evaluate"])
    def test_an_evaluator_that_writes_to_the_model_is_named_and_does_not_reach_that_of_the_user(
        self, large: bool, where: str, request: pytest.FixtureRequest
    ):
        if large:
            request.getfixturevalue("small_is_large")

        class Writing(AdaptiveBN):
            def prepare(self, context: Context) -> None:
                self.model = context.model
                super().prepare(context)
                self.write("prepare")

            def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
                self.write("evaluate")
                return super().evaluate(candidates, chunk)

            def write(self, here: str) -> None:
                if here == where:
                    with torch.no_grad():
                        next(self.model.parameters()).mul_(0.5)

        model = seeded_chain()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"evaluator must leave the model .* but Writing changed '0\.weight'"):
            searched(model, evaluator=Writing())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.slow
    def test_what_leaves_no_trace_does_not_reach_the_model_of_the_user_either(self, small_is_large: None):
        def halving(tensors: Any) -> torch.Tensor:
            for weight in tensors.weights:
                weight.data.mul_(0.5)
            return torch.arange(len(tensors.weights[0]), dtype=torch.float32)

        model = seeded_chain()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        searched(model, space=autoprune.Channels(criterion=halving))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_without_room_for_a_file_weights_are_copied(self, small_is_large: None, monkeypatch: pytest.MonkeyPatch):
        def full(**_: Any) -> Any:
            raise OSError("No space left on device")

        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        model = seeded_chain()
        copied = mapped.own_copy(model)
        mapped.settle(copied, None)
        with torch.no_grad():
            next(model.parameters()).zero_()
        assert next(copied.parameters()).any()

    def test_layouts_of_tensors_stay(self, small_is_large: None):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
        strides = [parameter.stride() for parameter in model.parameters()]
        copied = mapped.own_copy(model)
        mapped.settle(copied, None)
        assert [parameter.stride() for parameter in copied.parameters()] == strides
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))

    @pytest.mark.slow
    def test_a_search_finds_the_same_and_builds_what_was_scored_whatever_becomes_of_the_model(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        usual = searched(seeded_chain())
        monkeypatch.setattr(room, "LARGE_BYTES", 1)
        monkeypatch.setattr(mapped, "LARGE_BYTES", 1)
        monkeypatch.setattr(mapped, "_SMALL", 1)
        model = seeded_chain()
        large = searched(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert [(trial.candidate, trial.score, trial.signal) for trial in large.trials] == [
            (trial.candidate, trial.score, trial.signal) for trial in usual.trials
        ]
        built, expected = large.build().state_dict(), usual.build().state_dict()
        assert built.keys() == expected.keys()
        assert all(torch.equal(built[name], expected[name]) for name in built)

    def test_what_is_kept_grows_with_the_model_only_where_it_is_large(self):
        def of(mebibytes: int) -> int:
            return room.room_beside(nn.Linear(2**18, mebibytes, bias=False, device="meta"))

        assert of(1) == room.ROOM_BYTES - 4 * 2**20
        assert of(400) == 50 * 2**20
        assert of(100) == room.ROOM_BYTES - 400 * 2**20

    @pytest.mark.slow
    def test_rows_that_judge_ridges_are_few_where_memory_is_and_spread_over_all_held_out_samples(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        model = seeded_chain()
        structure = analyse(Example(model, (torch.ones(2, 4),)))
        draw = torch.Generator().manual_seed(1)
        batches = [(torch.randn(1024, 4, generator=draw), None) for _ in range(4)]
        half = {group.name: tuple(range(0, group.size, 2)) for group in structure.groups}
        typical = structure.edit(Pruning(half))
        passes: list[int] = []
        judged: list[int] = []
        best_ridge = layers_module._best_ridge

        def forward(module: nn.Module, batch: Any) -> Any:
            passes.append(len(batch[0]))
            return module(batch[0])

        def counting(layer: Layer, weight: Tensor, kept: Tensor, rows: Tensor, centred: Any) -> float:
            judged.append(len(rows))
            return best_ridge(layer, weight, kept, rows, centred)

        monkeypatch.setattr(layers_module, "_best_ridge", counting)

        def found() -> int:
            passes.clear()
            judged.clear()
            find_layers(Calibration(model, structure, batches, forward), 2**20, None, typical, lambda _: True)
            return sum(passes)

        usual = found()
        assert usual == layers_module.COUNTED + 3 * 1024 + 2 * 1024  # judged, and then taken in
        assert set(judged) == {1024}
        monkeypatch.setattr(layers_module, "JUDGED_BYTES", 1)
        monkeypatch.setattr(layers_module, "bytes_of", lambda _: 0)
        assert found() == usual
        assert all(40 <= rows <= 90 for rows in judged), judged

    def test_a_sample_does_not_depend_on_how_rows_are_divided_and_reaches_all_of_them(self):
        rows = torch.arange(1000.0)[:, None]
        whole, parts = Sample(10), Sample(10)
        whole.add(rows)
        for part in rows.split(7):
            parts.add(part)
        assert torch.equal(whole.rows, parts.rows)
        assert 70 <= len(whole.rows) <= 130
        assert all(int(((whole.rows >= low) & (whole.rows < low + 100)).sum()) >= 1 for low in range(0, 1000, 100))
