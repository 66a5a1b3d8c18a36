"""What is repeated is done once: copies, passes, corrections, choices, and the search for units."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.evaluators.refit import normalisation
from autoprune.importance.calibration import Calibration
from autoprune.structure import analysis
from autoprune.structure import units as units_module
from autoprune.structure.analysis import analyse
from autoprune.structure.checks import checks
from autoprune.structure.example import Example
from autoprune.structure.labels import Edge
from autoprune.structure.owners import owners, swapped
from autoprune.structure.propagate import propagate
from autoprune.structure.python_state import python_state, same_state
from autoprune.structure.sizes.sizes import ROUNDS
from autoprune.structure.slicing import slicing
from autoprune.structure.slicing.skeleton import skeleton
from autoprune.structure.slicing.slicing import Edit
from autoprune.structure.tracing.trace import trace
from autoprune.structure.units import find_units
from tests.counting import Counting
from tests.small_networks import chain


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
