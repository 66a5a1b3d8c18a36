"""Deep and wide networks: work and memory grow with the network, and not with its square."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.costs import StructuralCosts
from autoprune.data.batch import default_forward
from autoprune.evaluators import AdaptiveBN, Context
from autoprune.evaluators.activation_cache import limits as room
from autoprune.evaluators.activation_cache.flow import flow_of
from autoprune.evaluators.refit import finding, ridges
from autoprune.importance.calibration import Calibration
from autoprune.importance.moments import Sample
from autoprune.protocols import Failure, IntArray, Measurement, Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import build
from autoprune.study import mapped_weights as mapped
from tests.searching import grouped
from tests.small_networks import chain


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
    return autoprune.search(model, "flops <= 60%", data, trials=6, **grouped(**options))


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
        best_ridges = ridges._best_ridges

        def forward(module: nn.Module, batch: Any) -> Any:
            passes.append(len(batch[0]))
            return module(batch[0])

        def counting(moments: Any, centred: bool, weights: Any, kept: Tensor, rows: Tensor) -> list[float]:
            judged.append(len(rows))
            return best_ridges(moments, centred, weights, kept, rows)

        monkeypatch.setattr(ridges, "_best_ridges", counting)

        def found() -> int:
            passes.clear()
            judged.clear()
            finding.find_layers(Calibration(model, structure, batches, forward), 2**20, None, typical, lambda _: True)
            return sum(passes)

        usual = found()
        assert usual == finding.COUNTED + 3 * 1024 + 1024  # judged, and taken in without another pass
        assert set(judged) == {1024}
        monkeypatch.setattr(ridges, "JUDGED_BYTES", 1)
        monkeypatch.setattr(ridges, "bytes_of", lambda _: 0)
        assert found() == usual + 1024  # which the few rows cannot replace
        assert all(40 <= rows <= 90 for rows in judged), judged

    def test_samples_held_out_to_judge_ridges_come_from_everywhere_and_do_not_depend_on_batches(self):
        numbers = torch.arange(40.0)
        for sizes in ([4] * 10, [40], [1] * 40, [3, 17, 20], [39, 1]):
            batches = [(part[:, None], None) for part in numbers.split(sizes)]
            parts = finding._divided(batches, 10)
            fitted, judged = ([x for batch in part for x in batch[0][:, 0].tolist()] for part in parts)
            assert sorted(fitted + judged) == numbers.tolist()
            assert judged == [4.0, 9.0, 14.0, 18.0, 19.0, 24.0, 29.0, 34.0, 38.0, 39.0]
        whole = [(torch.ones(7, 2), torch.ones(2, 9))] * 4  # such as graphs, which cannot be cut
        assert sum(map(len, finding._divided(whole, 7))) == 4
        assert [len(part) for part in finding._divided(whole[:1], 1)] == [1, 0]

    def test_a_sample_does_not_depend_on_how_rows_are_divided_and_reaches_all_of_them(self):
        rows = torch.arange(1000.0)[:, None]
        whole, parts = Sample(10), Sample(10)
        whole.add(rows)
        for part in rows.split(7):
            parts.add(part)
        assert torch.equal(whole.rows, parts.rows)
        assert 70 <= len(whole.rows) <= 130
        assert all(int(((whole.rows >= low) & (whole.rows < low + 100)).sum()) >= 1 for low in range(0, 1000, 100))
