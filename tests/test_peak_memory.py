"""Peak memory, learned by running operations, against whole networks that are run."""

import gc
import os

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune.costs import StructuralCosts
from autoprune.costs.memory.peak import measure_memory
from autoprune.costs.memory.scratch import fit_scratch
from autoprune.costs.operations.allocations import Allocation, allocation_of
from autoprune.costs.operations.parts import Family, draw_widths, prefixes
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import build
from tests.measuring import peak_bytes, small

CPU = torch.device("cpu")
DATA = (torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 5)


class Mixed(nn.Module):
    """Convolutions of all kinds, a skip by concatenation and attention: every way of taking scratch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(20, 20, 3, padding=1, groups=20), nn.Conv2d(20, 36, 1), nn.SiLU())
        self.mix = nn.Conv2d(56, 33, 3, stride=2, padding=1)
        self.query, self.key, self.value = (nn.Linear(33, 24) for _ in range(3))
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.mix(torch.cat([x, self.depth(x)], dim=1)).flatten(2).transpose(1, 2)
        split = [f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        read = nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return self.head(read.mean(dim=1))


def mixed() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixed().eval()


@pytest.mark.slow
@pytest.mark.parametrize("make", [small, mixed])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_peak_of_pruned_networks_is_what_the_profiler_sees(make, batch):
    model, inputs = make(), torch.randn(batch, 3, 16, 16)
    structure = analyse(Example(model, (inputs,)))
    memory = measure_memory(Example(model, (inputs,)), structure)
    widths = draw_widths(structure, 6, np.random.default_rng(0))
    widths[0] = structure.sizes
    built = [build(model, structure.edit(prefixes(structure, row))).eval() for row in widths]
    measured = [peak_bytes(module, inputs) for module in built]
    np.testing.assert_allclose(memory.predict(widths.astype(float)), measured, rtol=0.05)
    # Without what convolutions allocate, predictions are far too low.
    assert (StructuralCosts(structure, batch).memory_bytes(widths.astype(float)) < 0.9 * np.array(measured)).any()


def test_an_allocation_counts_what_is_released_before_the_call_returns():
    found = allocation_of(lambda: torch.ones(1000).sin().sum(), CPU)
    assert (found.peak, found.kept) == (8000, 4)
    assert max(found.scratch) == 7996
    nothing = allocation_of(lambda: None, CPU)
    assert (nothing.peak, nothing.kept) == (0, 0)


def test_what_is_garbage_from_before_is_not_released_within_a_call():
    class Cycle:
        def __init__(self):
            self.me, self.held = self, torch.ones(100_000)

    def call():
        gc.set_threshold(1)  # collects at the first chance
        return [[[]] for _ in range(99)] and torch.ones(1000)

    threshold = gc.get_threshold()
    allocation_of(Cycle, CPU)
    try:
        found = allocation_of(call, CPU)
    finally:
        gc.set_threshold(*threshold)
    assert (found.peak, found.kept, found.pattern) == (4000, 4000, "+")
    assert gc.isenabled()


def test_a_device_without_counters_is_refused():
    with pytest.raises(ValueError, match="cpu and cuda, got a model on meta"):
        allocation_of(lambda: None, torch.device("meta"))


def test_measuring_writes_nothing_to_the_terminal_and_leaves_the_profiler_of_the_user_as_it_was(capfd):
    def lines_of(call):
        call()
        return [len(text.splitlines()) for text in capfd.readouterr()]

    def profile():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            torch.ones(9).sin()

    before, environment = lines_of(profile), dict(os.environ)
    assert lines_of(lambda: allocation_of(lambda: torch.ones(9), CPU)) == [0, 0]
    assert lines_of(profile) == before
    assert dict(os.environ) == environment


def test_while_the_user_profiles_nothing_is_measured_and_nothing_taken_from_them():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with pytest.raises(ValueError, match="while a profiler runs"):
            allocation_of(lambda: torch.ones(9), CPU)
        torch.ones(9).sin()
    assert any(event.name == "aten::sin" for event in profiler.events())


@pytest.mark.slow
def test_measuring_leaves_the_random_state_alone(global_rng_untouched):
    with global_rng_untouched():
        autoprune.search(small(), "memory <= 70%", DATA, trials=4, start=autoprune.Start(prior="criterion"))


def family(highest, steps=None) -> Family:
    return Family("a family", "convolution", (highest,), (1,) * len(highest), steps or (1,) * len(highest))


class Kernel:
    """Takes one way below 40 channels, and copies into blocks of 16 from there on."""

    runs = 0

    def take(self, a: int, b: int) -> Allocation:
        self.runs += 1
        if a < 40:
            return Allocation("++-", (36 * a * b + 8 * b,), 8 * b)
        blocks, weight = 640 * -(-a // 16), 90 * -(-a // 16) * -(-b // 16)
        return Allocation("+++--+-", (blocks + weight + 8 * b, 16 * -(-b // 16) * 9 + 8 * b), 8 * b)


def test_formulas_are_exact_on_both_sides_of_a_change_of_kernels():
    kernel = Kernel()
    found = fit_scratch(family((100, 70)), lambda values: kernel.take(*values))
    runs = kernel.runs
    assert runs < 120
    points = np.array([(a, b) for a in range(1, 101, 3) for b in (1, 15, 16, 17, 33, 70)], dtype=float)
    expected = [max(kernel.take(int(a), int(b)).scratch) for a, b in points]
    np.testing.assert_allclose(found.predict(points), expected, rtol=1e-6, atol=0.1)
    assert found.error < 1e-6


def test_steps_of_no_rule_are_found():
    def take(a, b):
        up = next(end for end in (16, 32, 64) if b <= end)
        return Allocation("++-", (36 * a * up + 640 * a + 8 * b,), 8 * b)

    found = fit_scratch(family((64, 64)), lambda values: take(*values))
    points = np.array([(a, b) for a in range(1, 65, 5) for b in range(1, 65)], dtype=float)
    expected = [max(take(int(a), int(b)).scratch) for a, b in points]
    np.testing.assert_allclose(found.predict(points), expected, rtol=1e-6)


def test_a_kernel_for_a_single_size_is_found_among_few():
    def take(a):
        return Allocation("+++--+-", (42_000 if a == 16 else 32_768 - 1500 * a, 32_768), 0)

    found = fit_scratch(family((16,)), lambda values: take(*values))
    expected = [max(take(a).scratch) for a in range(1, 17)]
    np.testing.assert_allclose(found.predict(np.arange(1.0, 17.0)[:, None]), expected, rtol=0.01)


def test_sizes_that_move_in_steps_are_run_at_their_multiples_only():
    seen = []

    def take(values):
        seen.append(values)
        return Allocation("++-", (values[0] * 3 + 5,), 5)

    found = fit_scratch(family((48,), (8,)), take)
    assert {value % 8 for (value,) in seen} == {0}
    assert found.predict(np.array([[8.0], [40.0]])).tolist() == pytest.approx([24, 120])


def test_what_no_formula_fits_is_cut_into_pieces_and_says_how_far_off_it_is():
    found = fit_scratch(family((1000,)), lambda values: Allocation("", (int(1000 * values[0] ** 0.5),), 0))
    points = np.arange(1.0, 1001.0)[:, None]
    off = np.abs(found.predict(points) / (1000 * points[:, 0] ** 0.5) - 1)
    assert len(found.cells) > 1
    assert off.max() < 0.06
    assert 0 < found.error < 0.02


def test_operations_that_take_nothing_besides_their_results_have_no_formula():
    assert fit_scratch(family((64,)), lambda values: Allocation("+", (4 * values[0],), 4 * values[0])) is None


@pytest.mark.slow
def test_an_operation_that_cannot_be_run_alone_counts_without_scratch_and_is_said_to(monkeypatch):
    def refuse(call, numbers):
        raise TypeError("not these numbers")

    monkeypatch.setattr("autoprune.costs.operations.torch_parts.TorchOperation.make", refuse)
    example = Example(small(), (torch.randn(1, 3, 8, 8),))
    memory = measure_memory(example, analyse(example))
    assert memory.left_out
    assert "could not be run alone" in str(memory)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["memory <= 70%", ["memory_bytes <= 70%", "flops <= 60%"]])
def test_what_is_offered_under_a_memory_budget_was_measured_to_be_within(budget):
    result = autoprune.search(
        small(), budget, DATA, trials=16, example=autoprune.Call(cost_batch=2), start=autoprune.Start(prior="criterion")
    )
    assert result.front
    for trial in result.front:
        measured = peak_bytes(result.build(trial).eval(), DATA[0][:2])
        assert trial.costs["memory_bytes"] == measured <= result.limits["memory_bytes"]
        assert trial.predicted["memory_bytes"] == pytest.approx(measured, rel=0.05)
    assert result.limits["memory_bytes"] == pytest.approx(0.7 * peak_bytes(small(), DATA[0][:2]), rel=0.05)
    assert any(note.startswith("memory_bytes: ") and "networks were measured" in note for note in result.notes)
    assert "memory_bytes  predicted" in str(result)


@pytest.mark.slow
def test_memory_that_no_budget_limits_is_not_measured():
    result = autoprune.search(small(), "flops <= 60%", DATA, trials=4, start=autoprune.Start(prior="criterion"))
    assert all(not trial.predicted for trial in result.trials)
    assert not any(note.startswith("memory_bytes") for note in result.notes)
