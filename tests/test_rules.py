"""Operations between two layers: what passes through them can be removed, and what is built is right."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprune
from autoprune.costs import StructuralCosts
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.macs import dense_macs, uncounted
from autoprune.structure.rules import registry
from autoprune.structure.rules.registry import OPERATIONS as OPERATIONS_KNOWN
from autoprune.structure.tracing.trace import trace
from tests.candidates import gap, oracle_outputs, outputs_of, random_pruning, widths_of
from tests.counting import counted_macs

TRIANGLE = torch.eye(8) + 0.1 * torch.ones(8, 8).tril(-1)

GRID = torch.rand(2, 5, 6, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1

TURNED = torch.tensor([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0]]).repeat(2, 1, 1)


def pooled_and_put_back(x: Tensor) -> Tensor:
    pooled, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(pooled * 2, places, 2)


def pooled_in_space(x: Tensor) -> Tensor:
    pooled, places = F.max_pool3d(x.unsqueeze(2), (1, 2, 2), return_indices=True)
    return F.max_unpool3d(pooled, places, (1, 2, 2)).squeeze(2)


def turned_by_a_complex_number(x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(3, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.tensor(1.0), torch.tensor(0.5))).flatten(3)


def filtered(x: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x) * 0.5j, s=x.shape[-2:])


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "grid_sample": lambda x: F.grid_sample(x, GRID, align_corners=False),
    "affine_grid": lambda x: F.grid_sample(x, F.affine_grid(TURNED, [2, 1, 4, 4], False), align_corners=False),
    "max_unpool2d": pooled_and_put_back,
    "max_unpool3d": pooled_in_space,
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(
        x, 2, output_size=4, _random_samples=torch.full((2, x.shape[1], 2), 0.3)
    ),
    "unfold and fold": lambda x: F.fold(F.unfold(x, 3, padding=1).relu(), x.shape[2:], 3, padding=1),
    "unfold": lambda x: F.unfold(x, 2, stride=2).unflatten(1, (-1, 4)).amax(2).unflatten(2, (4, 4)),
    "windows of a tensor": lambda x: x.unfold(2, 3, 1).amax(-1),
    "fft": lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real,
    "rfft": filtered,
    "complex": turned_by_a_complex_number,
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "rrelu": F.rrelu,
    "aminmax": lambda x: x.aminmax(dim=3, keepdim=True).max - x.aminmax(dim=3, keepdim=True).min,
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([-0.5, 0.5])),
    "searchsorted": lambda x: x * torch.searchsorted(torch.tensor([-0.5, 0.5]), x),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
    "solve_triangular": lambda x: torch.linalg.solve_triangular(TRIANGLE, x, upper=False),
    "solve_triangular from the right": lambda x: torch.linalg.solve_triangular(TRIANGLE, x, upper=False, left=False),
    "a system for each channel": lambda x: torch.linalg.solve_triangular(
        (x @ x.mT) / 8, x, upper=False, unitriangular=True
    ),
    "replication pad in space": lambda x: F.pad(x.unsqueeze(2), (1, 1, 1, 1, 1, 1), "replicate").amax(2),
}


class Between(nn.Module):
    """A convolution, an operation, and another convolution."""

    def __init__(self, operation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(self.first(x)))


class TokensMixed(nn.Module):
    """A convolution with a kernel of one whose channels are positions: features lie along its space."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix, self.leave = nn.Linear(5, 12), nn.Conv1d(6, 6, 1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.gelu(self.mix(self.enter(x))))


def assert_free_and_right(model: nn.Module, args: tuple[Tensor, ...], groups: int) -> None:
    structure, rng = analyse(Example(model, args)), np.random.default_rng(0)
    assert [group.size for group in structure.groups] == [groups]
    prunings = [random_pruning(structure, rng) for _ in range(3)]
    built = [structure.build(model, pruning) for pruning in prunings]
    for small, pruning in zip(built, prunings, strict=True):
        expected = oracle_outputs(model, structure.edit(pruning), args)
        assert gap(outputs_of(small, args), expected) < 1e-5
    flops = StructuralCosts(structure).flops(widths_of(structure, prunings)) * len(args[0])
    assert flops.tolist() == [counted_macs(small, lambda made: made(*args)) for small in built]


@pytest.mark.parametrize("name", OPERATIONS)
def test_channels_pass_through(name: str):
    torch.manual_seed(0)
    assert_free_and_right(Between(OPERATIONS[name]).eval(), (torch.randn(2, 3, 8, 8),), groups=8)


def test_space_passes_through_a_convolution_that_reads_one_place_at_a_time():
    torch.manual_seed(0)
    assert_free_and_right(TokensMixed().eval(), (torch.randn(2, 6, 5),), groups=12)


MIXED = {
    "neighbours": nn.Conv1d(6, 6, 3, padding=1),
    "places around the edge": nn.Conv1d(6, 6, 1, padding=1),
    "every other place": nn.Conv1d(6, 6, 1, stride=2),
    "places between": nn.ConvTranspose1d(6, 6, 1, stride=2, output_padding=1),
}


@pytest.mark.parametrize("kind", MIXED)
def test_space_stays_where_a_convolution_does_not_read_each_place_once(kind: str):
    """Its output has other places than its input, so that removing some of these is no removal of the same there."""
    torch.manual_seed(0)
    model, args = TokensMixed(), (torch.randn(2, 6, 5),)
    model.mix = MIXED[kind]
    model.leave = nn.Linear(model.mix(model.enter(args[0])).shape[2], 3)
    structure = analyse(Example(model.eval(), args))
    assert not structure.groups
    assert any("used as space" in frozen.reason for frozen in structure.frozen)


EARLY = """
import torch
import autoprune

def stays(flow, op):
    for value in op.inputs():
        for labels in flow.of(value):
            flow.freeze(op, labels, "stays")
    return [[None] * len(flow.record.values[value].shape) for value in op.results()]

autoprune.register_rule("aten::convolution", stays)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1))
print(len(autoprune.inspect(model, torch.randn(1, 3, 8, 8)).groups))
"""


@pytest.mark.slow
def test_a_rule_registered_before_the_first_trace_counts():
    finished = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True)
    assert (finished.stdout, finished.stderr) == ("0\n", "")


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("glu", None, "name must be namespace::name"),
        ("::glu", None, "name must be namespace::name"),
        ("aten::glu.default", None, "name must be namespace::name"),
        (torch.ops.aten.glu, None, "name must be namespace::name"),
        ("mine::glu", 3, "rule must be a function of two arguments, got 3"),
        ("mine::glu", lambda flow: [], "rule must be a function of two arguments, got .*which takes"),
    ],
)
def test_rules_that_could_not_be_found_or_called_are_refused(name: Any, rule: Any, message: str):
    before = dict(OPERATIONS_KNOWN)
    with pytest.raises(TypeError, match=message):
        autoprune.register_rule(name, rule)
    assert before == OPERATIONS_KNOWN


def test_what_is_known_of_an_operation_stays_where_nothing_else_is_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "OPERATIONS", dict(OPERATIONS_KNOWN))
    before = registry.OPERATIONS["mm"]

    def count(record: Any, op: Any) -> list[Any]:
        return []

    autoprune.register_rule("aten::mm", macs=count)
    assert registry.operation_named(torch.ops.aten.mm.default) == replace(before, macs=count)
    autoprune.register_rule("mine::mm", macs=count, weights=["w"])  # of a library: it is not PyTorch's
    assert registry.OPERATIONS["mine::mm"] == registry.Operation(macs=count, weights=("w",))
    assert registry.OPERATIONS["mm"] == before


SIZE, COLUMNS = 6, 4
SYSTEMS = {
    "triangular": (lambda a, b: torch.linalg.solve_triangular(a, b, upper=False), SIZE**2 * COLUMNS / 2),
    "solve": (torch.linalg.solve, SIZE**3 / 3 + SIZE**2 * COLUMNS),
    "inverse": (lambda a, b: torch.linalg.inv(a), SIZE**3),
    "cholesky": (lambda a, b: torch.linalg.cholesky(a), SIZE**3 / 6),
    "cholesky solve": (lambda a, b: torch.cholesky_solve(b, a), SIZE**2 * COLUMNS),
    "lu": (lambda a, b: torch.linalg.lu_factor(a)[0], SIZE**3 / 3),
    "lu solve": (lambda a, b: torch.linalg.lu_solve(a, torch.arange(1, 7, dtype=torch.int32).expand(3, 6), b), 144),
    "determinant": (lambda a, b: torch.linalg.det(a), SIZE**3 / 3),
    "its logarithm": (lambda a, b: torch.linalg.slogdet(a)[1], SIZE**3 / 3),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_equations_count_what_a_direct_method_multiplies(name: str):
    solve, macs = SYSTEMS[name]
    matrices, sides = 6 * torch.eye(SIZE).repeat(3, 1, 1), torch.ones(3, SIZE, COLUMNS)

    class Solving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), solve(a, b)

    record = trace(Example(Solving().eval(), (torch.ones(3, 2), matrices, sides)))
    counted = [dense_macs(record, op) for op in record.ops if op.name not in ("linear", "addmm")]
    assert sum(counted) == pytest.approx(3 * macs)
    assert uncounted(record) == ()
