"""Patterns in the sparsity space, and costs of zeros against counting."""

import copy
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import autoprune
from autoprune.costs import make_costs
from autoprune.protocols import Pruning, SearchSpace
from autoprune.result.recipe import attach
from autoprune.search_spaces import Channels, Product, Sparsity, space_from_json
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.zeros import Pattern
from autoprune.structure.structure import Structure
from autoprune.testing.contracts import SpaceContract
from tests.candidates import outputs_of
from zoo import ZOO

PATTERNS = ("unstructured", "2:4", "1:4", "1x8", "4x4")
COUNTED = [name for name in ZOO if not name.startswith(("resnet56", "resnet20_"))][:20]


@cache
def known(name: str) -> tuple[nn.Module, Structure]:
    """A network without any element that is zero."""
    model = ZOO[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter[parameter == 0] = 0.1
    return model, analyse(Example(model, ZOO[name].inputs()))


def bound(structure: Structure, *settings: Any) -> SearchSpace:
    order = {group.name: tuple(range(group.size)) for group in structure.groups}
    return (settings[0] if len(settings) == 1 else Product(*settings)).bind(structure, order)


SPACES = {
    "mixed": [Sparsity(levels=(0, 0.3, 0.75, 0.9), patterns=PATTERNS)],
    "2:4 or dense": [Sparsity(patterns=["2:4"])],
    "product": [Channels(step=0.5), Sparsity(levels=(0, 0.5, 0.8), patterns=["unstructured", "2:4"])],
}


@pytest.mark.parametrize("space", SPACES, scope="class")
class TestPatternsInTheSpace(SpaceContract):
    @pytest.fixture(autouse=True)
    def _space(self, space: str):
        self.space = SPACES[space]

    def make_space(self) -> SearchSpace:
        return bound(self.make_structure(), *self.space)

    def make_structure(self) -> Structure:
        return known("mlp")[1]


class Multiplications(TorchDispatchMode):
    """Counts the multiplications by zeros of parameters, each found by its memory."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.saved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "convolution", "addmm"):
            x, weight = args[1:3] if name == "addmm" else args[:2]
            if weight.untyped_storage().data_ptr() in self.places:
                places = x if name == "convolution" and args[6] else out  # a transposed one multiplies each input
                rows = places.shape[0] * places.shape[2:].numel() if name == "convolution" else x.shape[-2]
                self.saved += rows * int((weight == 0).sum())
        return out


def counted_bytes(model: nn.Module, zeroed: dict[str, int]) -> int:
    """Bytes of a state dict whose zeroed weights are in the smallest of three forms."""
    total = sum(t.nbytes for t in (*dict(model.named_parameters()).values(), *dict(model.named_buffers()).values()))
    for name in zeroed:
        matrix = model.get_parameter(name).detach().flatten(1)
        rows = csr_array(matrix.numpy())
        bits = np.packbits((matrix != 0).numpy()).nbytes + rows.data.nbytes
        compressed = sum(part.nbytes for part in (rows.data, rows.indices, rows.indptr))
        total -= matrix.nbytes - min(matrix.nbytes, bits, compressed)
    return total


@pytest.mark.parametrize("name", COUNTED)
def test_costs_of_zeros_equal_counting(name: str):
    model, structure = known(name)
    inputs = ZOO[name].inputs()
    settings = [Sparsity(levels=(0, 0.3, 0.75, 0.95), patterns=PATTERNS)]
    if structure.groups and not structure.graphs:
        settings.insert(0, Channels(step=0.5))
    space = bound(structure, *settings)
    drawn = np.random.default_rng(3).integers(0, space.sizes, (2, len(space.sizes)))
    candidates = space.canonical(drawn)
    costs = make_costs(structure, space)
    counted: dict[str, list[float]] = {cost: [] for cost in ("nonzero_params", "sparse_flops", "stored_bytes")}
    for candidate in candidates:
        pruning = space.pruning(candidate.tolist())
        built = structure.build(model, pruning).eval()
        for weight, pattern in pruning.patterns.items():
            assert Pattern.parse(pattern).holds(built.get_parameter(weight))
        counted["nonzero_params"].append(sum(int((p != 0).sum()) for p in built.parameters()))
        with torch.no_grad(), (counting := Multiplications(built)):
            built(*copy.deepcopy(inputs))
        flops = costs["flops"](candidate[None])[0]
        counted["sparse_flops"].append(flops - counting.saved / structure.terms.batch)
        counted["stored_bytes"].append(counted_bytes(built, dict(pruning.zeroed)))
    for cost, expected in counted.items():
        assert costs[cost](candidates).tolist() == pytest.approx(expected, rel=1e-12), cost


class TestPatternsOfWhatIsBuilt:
    @pytest.mark.parametrize("pattern", ["2:4", "4:8", "1x8", "4x4"])
    def test_they_hold_after_saving_and_loading(self, pattern: str, tmp_path):
        model, structure = known("mlp")
        space = bound(structure, Sparsity(levels=(0, 0.5), patterns=[pattern]))
        pruning = space.pruning([1] * len(space.sizes))
        assert set(pruning.patterns.values()) == {pattern}
        edit = structure.edit(pruning)
        built = attach(structure.build(model, pruning), edit, model)
        autoprune.save(built, tmp_path / "sparse.safetensors")
        loaded = autoprune.load(tmp_path / "sparse.safetensors", ZOO["mlp"].build())
        for name, zeros in pruning.zeroed.items():
            weight = loaded.get_parameter(name)
            assert Pattern.parse(pattern).holds(weight)
            assert int((weight == 0).sum()) == zeros
        inputs = ZOO["mlp"].inputs()
        assert torch.equal(outputs_of(loaded.eval(), inputs)[0], outputs_of(built.eval(), inputs)[0])

    def test_one_kernel_position_does_not_reach_into_another(self):
        conv = nn.Conv2d(8, 4, 3)
        structure = analyse(Example(conv, (torch.randn(1, 8, 5, 5),)))
        built = structure.build(conv, bound(structure, Sparsity(patterns=["2:4"])).pruning([1]))
        assert torch.equal((built.weight == 0).view(4, 2, 4, 3, 3).sum(2), torch.full((4, 2, 3, 3), 2))

    def test_a_number_that_a_pattern_cannot_have_is_refused(self):
        structure = known("mlp")[1]
        name, shape = next(iter(structure.weights.items()))
        for count, pattern in ((3, "2:4"), (5, "4x4"), (shape[0] * shape[1], "1:4")):
            with pytest.raises(ValueError, match=rf"must be a number of zeros that {pattern} can have in a weight of"):
                structure.edit(Pruning(zeroed={name: count}, patterns={name: pattern}))


class TestSettings:
    def test_options_are_named_by_pattern_and_level(self):
        space = bound(known("mlp")[1], Sparsity(levels=(0, 0.25, 0.9), patterns=["unstructured", "2:4", "4x4"]))
        assert space.dimensions[0].options == (0.0, 0.25, "4x4 0.25", "2:4", "4x4 0.9", 0.9)
        assert not space.dimensions[0].ordered
        assert bound(known("mlp")[1], Sparsity(patterns=["2:4", "1:4"])).dimensions[0].ordered

    @pytest.mark.parametrize(
        ("patterns", "message"),
        [
            (["4:2"], "pattern must be 'unstructured', N of M"),
            ([], "patterns must hold at least one form of zeros, such as 'unstructured' or '2:4', got none"),
            ("2:4", "patterns must be a list of names or globs, got the string '2:4'"),
        ],
    )
    def test_unknown_patterns_are_refused(self, patterns: Any, message: str):
        with pytest.raises(ValueError, match=message):
            Sparsity(patterns=patterns)

    @pytest.mark.parametrize("options", [[0.0, "4:2"], [0.0, "1x8 1.5"], [0.0, "2:4", "2:4"], ["2:4"], [0.0, "1x8"]])
    def test_a_damaged_file_is_refused(self, options: list[Any]):
        data = json.loads(json.dumps(bound(known("mlp")[1], Sparsity(patterns=["2:4"])).to_json()))
        data["dimensions"][0]["options"] = options
        with pytest.raises(ValueError, match=r"space.dimensions\['0.weight'\]"):
            space_from_json(data)
