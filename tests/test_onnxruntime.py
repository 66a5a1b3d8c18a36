"""Latencies under onnxruntime: what is exported, what its parts are, and what a search does with such a table."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune.costs.latency.model import Latency
from autoprune.costs.latency.setting import setting_of
from autoprune.costs.operations import onnx_parts
from autoprune.costs.operations.onnx_sessions import OnnxRuntime, export
from autoprune.costs.operations.parts import draw_widths, part_values, prefixes
from autoprune.costs.operations.runtimes import runtime_of
from autoprune.errors import UnsupportedModelError
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import build
from tests.measuring import INPUTS, small

DATA = (torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 5)


class Counting:
    """A clock by which a network, and a node alone, takes a microsecond for each of its weights."""

    def __init__(self, monkeypatch):
        self._weights: dict[int, float] = {}
        self._kept = []
        network, make = OnnxRuntime.network, onnx_parts._Node.make

        def counted_network(runtime, example):
            return self._count(network(runtime, example), sum(p.numel() for p in example.model.parameters()))

        def counted_node(node, numbers):
            numbers = list(numbers)
            left = iter(numbers)
            sizes = [(given.role, [next(left) for _ in given.numbers]) for given in node.inputs]
            call = make(node, iter(numbers))
            return self._count(call, call.times * sum(math.prod(size) for role, size in sizes if role == "weight"))

        monkeypatch.setattr(OnnxRuntime, "network", counted_network)
        monkeypatch.setattr(onnx_parts._Node, "make", counted_node)
        for module in ("autoprune.costs.latency.profile", "autoprune.study.verification"):
            monkeypatch.setattr(f"{module}.clock_for", lambda *_: self)

    def _count(self, call, weights):
        self._kept.append(call)
        self._weights[id(call)] = weights
        return call

    def seconds(self, call, repeats):
        call()
        return repeats * 1e-6 * (self._weights.get(id(call), 1e3) + 1)


@pytest.fixture(scope="module")
def parts():
    """Families by key, and parts, of the small network."""
    model = small()
    structure = analyse(Example(model, (INPUTS,)))
    found, parts = runtime_of("onnxruntime").parts(Example(model, (INPUTS,)), structure, 0)
    return structure, {family.key: family for family in found}, parts


class TestNetwork:
    @pytest.mark.slow
    def test_the_session_returns_what_the_module_does(self):
        model = small()
        (ours,) = runtime_of("onnxruntime").network(Example(model, (INPUTS,)))()
        np.testing.assert_allclose(ours, model(INPUTS).detach().numpy(), rtol=1e-4, atol=1e-5)

    def test_keyword_inputs_and_all_tensors_of_the_outputs_are_exported(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 3)

            def forward(self, x, *, scale, flag):
                return {"a": self.layer(x) * scale, "b": [x.sum(1)], "c": flag}

        given = {"scale": torch.tensor([2.0]), "flag": True}
        outputs = runtime_of("onnxruntime").network(Example(Two(), (torch.ones(2, 4),), given))()
        assert [out.shape for out in outputs] == [(2, 3), (2,)]

    def test_an_export_that_computes_something_else_is_refused(self):
        class Changing(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.calls = nn.Linear(4, 3), 0

            def forward(self, x):
                self.calls += 1
                return self.layer(x) * self.calls

        with pytest.raises(UnsupportedModelError, match="Changing exported to ONNX gives other outputs"):
            runtime_of("onnxruntime").network(Example(Changing(), (torch.ones(2, 4),)))

    def test_a_module_that_cannot_be_exported_is_refused_by_name(self):
        class Odd(nn.Module):
            def forward(self, x):
                return torch.linalg.eigvals(x).real

        with pytest.raises(UnsupportedModelError, match="Odd cannot be exported to ONNX"):
            runtime_of("onnxruntime").network(Example(Odd(), (torch.eye(3)[None],)))

    def test_a_network_that_onnxruntime_cannot_run_is_refused_by_name(self, monkeypatch):
        def refuse(*_):
            raise RuntimeError("no kernel for this node")

        monkeypatch.setattr(OnnxRuntime, "session", refuse)
        with pytest.raises(UnsupportedModelError, match=r"Sequential exported to ONNX cannot be run.*no kernel"):
            OnnxRuntime().network(Example(small(), (INPUTS,)))

    def test_bfloat16_is_refused_with_the_way_out(self):
        with pytest.raises(UnsupportedModelError, match=r"takes no bfloat16.*pass model.float\(\)"):
            runtime_of("onnxruntime").network(Example(small().bfloat16(), (INPUTS.bfloat16(),)))

    def test_inputs_that_require_gradients_are_taken(self):
        runtime_of("onnxruntime").network(Example(small(), (INPUTS.clone().requires_grad_(),)))()

    def test_a_model_elsewhere_than_on_the_cpu_is_refused(self):
        with pytest.raises(UnsupportedModelError, match=r"this one is on meta; move it with model.cpu\(\)"):
            runtime_of("onnxruntime").network(Example(small().to("meta"), (INPUTS.to("meta"),)))

    def test_the_model_comes_back_as_it_was(self):
        model = small()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        export(Example(model, (INPUTS,)))
        assert not model.training
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class TestParts:
    @pytest.mark.slow
    def test_what_is_fused_is_no_part(self, parts):
        _, families, _ = parts
        kinds = sorted(key.partition("(")[0] for key in families)
        assert kinds == ["FusedConv", "FusedConv", "Gemm", "GlobalAveragePool"]

    def test_sizes_are_those_of_the_pruned_network(self, parts):
        structure, families, found = parts
        widths = np.array([[10.0, 33.0]])
        values = part_values(found, widths)
        sizes = {families[part.family].kind: [int(values[size][0]) for size in part.sizes] for part in found}
        assert sizes["convolution"] == [10, 33]
        assert sizes["matmul"] == [33]
        assert structure.sizes.tolist() == [24, 40]

    def test_every_part_runs_alone_at_odd_and_at_even_sizes(self, parts):
        _, families, _ = parts
        for family in families.values():
            for values in (family.highest, family.lowest, tuple(max(h - 3, 1) for h in family.highest)):
                call = family.make(values)
                call()
                assert call.times > 1

    def test_a_convolution_knows_what_reads_it(self, parts):
        _, families, _ = parts
        assert sorted(" read by a convolution" in key for key in families if "Conv(" in key) == [False, True]

    def test_only_convolutions_have_a_grid_for_blocks_of_channels(self, parts):
        _, families, _ = parts
        assert {f.kind: f.aligned > 1 for f in families.values()}["convolution"]
        assert not any(f.aligned > 1 for f in families.values() if f.kind != "convolution")


@pytest.fixture(scope="module")
def table() -> Latency:
    """A table whose networks take as long as they have weights."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        Counting(monkeypatch)
        return autoprune.profile(small(), INPUTS, batch=1, networks=9, runtime="onnxruntime")


@pytest.mark.slow
class TestTable:
    def test_runtime_and_version_are_part_of_its_identity(self, table, tmp_path):
        loaded = Latency.load(table.save(tmp_path / "table.json"))
        own = loaded.setting
        assert (own.runtime, own.runtime_version) == ("onnxruntime", OnnxRuntime().versions["onnxruntime"])
        assert f"onnxruntime {own.runtime_version}" in str(loaded)
        torch_here = setting_of(Example(small(), (INPUTS,)), runtime_of("torch"))
        assert own.elsewhere(torch_here) == ["runtime onnxruntime, here torch"]
        older = replace(own, versions={**own.versions, "onnxruntime": "1.0"})
        assert older.elsewhere(own) == [f"onnxruntime 1.0, here {own.runtime_version}"]

    def test_a_loaded_table_predicts_the_same(self, table, tmp_path):
        loaded = Latency.load(table.save(tmp_path / "table.json"))
        widths = draw_widths(analyse(Example(small(), (INPUTS,))), 9, np.random.default_rng(3)).astype(np.float64)
        np.testing.assert_array_equal(loaded.predict(widths), table.predict(widths))

    def test_predictions_are_those_of_the_clock(self, table):
        structure = analyse(Example(small(), (INPUTS,)))
        widths = draw_widths(structure, 20, np.random.default_rng(3))
        nets = [build(small(), structure.edit(prefixes(structure, row))) for row in widths]
        weights = np.array([sum(p.numel() for p in net.parameters()) for net in nets])
        dense = sum(p.numel() for p in small().parameters())
        predicted = table.predict(widths.astype(np.float64)) / table.dense_ms
        assert np.abs(predicted / (weights / dense) - 1).max() < 0.05

    def test_what_a_search_offers_is_measured_under_onnxruntime(self, table, monkeypatch):
        Counting(monkeypatch)
        result = autoprune.search(
            small(),
            "latency <= 60%",
            DATA,
            costs={"latency_ms": table},
            trials=12,
            start=autoprune.Start(prior="criterion"),
        )
        dense = sum(p.numel() for p in small().parameters())
        assert result.front
        for trial in result.front:
            weights = sum(p.numel() for p in result.build(trial).parameters())
            assert trial.costs["latency_ms"] / table.dense_ms == pytest.approx(weights / dense, rel=0.02)
            assert weights <= 0.6 * dense
        assert any("were measured against the dense one" in note for note in result.notes)

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ({"runtime": "tflite"}, "measured with runtime tflite"),
            ({"runtime": "onnxruntime:NoSuchProvider"}, "NoSuchProvider"),
            ({"versions": {"onnxruntime": "1.0"}}, "onnxruntime 1.0, here"),
        ],
    )
    def test_a_table_of_another_runtime_or_version_verifies_nothing_and_says_so(self, table, setting, said):
        other = replace(table, setting=replace(table.setting, **setting))
        result = autoprune.search(
            small(),
            "latency <= 60%",
            DATA,
            costs={"latency_ms": other},
            trials=6,
            start=autoprune.Start(prior="criterion"),
        )
        (note,) = (note for note in result.notes if "not verified here" in note)
        assert said in note


@pytest.mark.parametrize("name", ["tensorrt", "onnxruntime:", "torch:cpu", ""])
def test_an_unknown_runtime_is_refused_by_name(name):
    with pytest.raises(ValueError, match="runtime must be 'torch', 'onnxruntime' or"):
        runtime_of(name)


def test_a_provider_that_is_not_installed_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"one of \[.*'CPUExecutionProvider'.*got 'Abacus'"):
        runtime_of("onnxruntime:Abacus")


def test_without_the_libraries_the_error_names_the_extra(monkeypatch):
    for name in (
        "onnx",
        "onnxruntime",
        "autoprune.costs.operations.onnx_sessions",
        "autoprune.costs.operations.onnx_parts",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"install autoprune\[onnx\]"):
        autoprune.profile(small(), INPUTS, runtime="onnxruntime")
