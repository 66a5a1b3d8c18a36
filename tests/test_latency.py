"""The latency model, against a simulated machine whose speed is known."""

import ctypes
import dataclasses
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune.costs.latency.correction import Evidence
from autoprune.costs.latency.model import Latency
from autoprune.costs.latency.profile import note_on_memory
from autoprune.costs.latency.setting import setting_of
from autoprune.costs.latency.timing import NOISY, CpuClock, Effort, compare, note_of_noise
from autoprune.costs.operations.parts import draw_widths, part_values, prefixes
from autoprune.costs.operations.runtimes import Torch, network_call
from autoprune.costs.operations.torch_parts import find_parts
from autoprune.errors import FileFormatError
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import build
from tests.machine import STEP, Machine, stepped
from tests.measuring import INPUTS, measured, small
from zoo import ZOO


class Pulled(Machine):
    """A machine that is unplugged after a number of calls."""

    def __init__(self, after: int, **options):
        super().__init__(**options)
        self.after = after

    def seconds(self, call, repeats):
        if self.calls > self.after:
            raise KeyboardInterrupt
        return super().seconds(call, repeats)


@pytest.fixture(scope="module")
def latency() -> Latency:
    return measured()


@pytest.fixture(scope="module")
def truth():
    """Milliseconds of networks at widths (n, groups) on the machine that `latency` was measured on, batch 3."""
    model = small()
    structure = analyse(Example(model, (INPUTS,)))
    inputs = INPUTS[[0, 1, 0]]

    def of(widths):
        machine = Machine(cold=1.3, per_pass=2e-5)
        nets = [build(model, structure.edit(prefixes(structure, row))) for row in widths]
        return 1e3 * np.array([machine.seconds(network_call(Example(net, (inputs,))), 1) for net in nets])

    return structure, of


class TestTiming:
    def test_a_drifting_machine_cancels_out(self):
        calls = [lambda n=n: torch.zeros(n, 1000).add(1.0) for n in (5, 10, 40)]
        quiet, drifting = (
            compare(calls, lambda: torch.zeros(10, 1000).add(1.0), Machine(drift=d)) for d in (0.0, 5e-3)
        )
        assert [timing.ratio for timing in drifting] == pytest.approx([timing.ratio for timing in quiet], rel=0.02)
        assert quiet[1].ratio == pytest.approx(1.0)

    def test_a_noisy_machine_widens_the_interval_and_is_said_to_be_noisy(self):
        def timed(noise):
            return compare(
                [lambda: torch.zeros(9)] * 4, lambda: torch.zeros(9), Machine(noise=noise), Effort(most_rounds=9)
            )

        assert note_of_noise(timed(0.0)) == ""
        noisy = timed(1.0)
        assert max(timing.uncertainty for timing in noisy) > NOISY
        assert "noisy" in note_of_noise(noisy)
        assert all(timing.low <= timing.ratio <= timing.high for timing in noisy)

    def test_more_rounds_are_spent_where_the_interval_is_wide(self):
        (quiet,) = compare([lambda: torch.zeros(9)], lambda: torch.zeros(9), Machine())
        (noisy,) = compare([lambda: torch.zeros(9)], lambda: torch.zeros(9), Machine(noise=0.5))
        assert quiet.rounds < noisy.rounds

    def test_single_disturbed_blocks_do_not_move_the_median_and_are_reported(self):
        class Disturbed(Machine):
            def seconds(self, call, repeats):
                return super().seconds(call, repeats) * (50 if self.calls % 17 == 0 else 1)

        (timing,) = compare([lambda: torch.zeros(9)], lambda: torch.zeros(9), Disturbed(noise=0.01), Effort(rounds=27))
        assert timing.ratio == pytest.approx(1.0, rel=0.03)
        assert timing.outliers > 0
        assert "outliers" in note_of_noise([timing])

    def test_what_other_calls_left_in_the_caches_is_not_measured(self):
        class Step:
            last = []

            def __init__(self, seconds):
                self.own = seconds

            def __call__(self):
                Step.last = [*Step.last[-2:], self]

        class Cold:
            def seconds(self, call, repeats):
                warm = len(Step.last) == 3 and all(own is call for own in Step.last)
                for _ in range(repeats):
                    call()
                return repeats * call.own + (0.0 if warm else 1e-3)

        fast, slow = compare([Step(1e-4), Step(3e-4)], Step(2e-4), Cold(), Effort(block_seconds=1e-2))
        assert (fast.ratio, slow.ratio) == (pytest.approx(0.5), pytest.approx(1.5))

    def test_the_clock_of_the_cpu_counts_repeats(self):
        calls = []
        assert CpuClock().seconds(lambda: calls.append(1), 7) > 0
        assert len(calls) == 7

    def test_calls_that_took_long_enough_get_five_rounds_however_noisy(self):
        reference = lambda: torch.zeros(9)  # noqa: E731

        def compared(most_seconds):
            calls = [reference, lambda: torch.zeros(9000)]
            machine = Machine(noise=0.5)
            return compare(
                calls, reference, machine, Effort(most_rounds=18, block_seconds=1e-6, most_seconds=most_seconds)
            )

        assert [timing.rounds for timing in compared(math.inf)] == [18, 18]
        assert [timing.rounds for timing in compared(1e-4)] == [18, 5]  # 2 and 20 microseconds a call


class TestParts:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["resnet20_padded", "densenet"])
    def test_operations_at_the_sizes_of_a_pruned_network_take_what_it_takes(self, name):
        entry = ZOO[name]
        model, inputs = entry.build(), entry.inputs()
        structure = analyse(Example(model, inputs))
        found, parts = find_parts(Example(model, inputs), structure)
        families = {family.key: family for family in found}
        widths = draw_widths(structure, 1, np.random.default_rng(3))
        values = part_values(parts, widths.astype(np.float64))
        machine = Machine()
        alone = sum(
            part.count * machine.seconds(families[part.family].make([int(values[size][0]) for size in part.sizes]), 1)
            for part in parts
        )
        pruned = build(model, structure.edit(prefixes(structure, widths[0])))
        assert alone == pytest.approx(machine.seconds(network_call(Example(pruned, inputs)), 1), rel=0.02)
        assert len(families) < 0.7 * sum(part.count for part in parts)


class TestLatency:
    @pytest.mark.slow
    def test_predictions_are_those_of_the_machine(self, latency, truth):
        structure, of = truth
        widths = draw_widths(structure, 40, np.random.default_rng(9))
        errors = np.abs(latency.predict(widths.astype(np.float64)) / of(widths) - 1)
        assert np.median(errors) < 0.02
        assert np.quantile(errors, 0.95) < 0.06

    def test_the_times_of_the_modules_add_up_and_are_those_of_the_machine(self, latency, truth):
        widths = draw_widths(truth[0], 40, np.random.default_rng(9)).astype(np.float64)
        found = latency.by_module(widths)
        np.testing.assert_allclose(sum(found.values()), latency.predict(widths))
        dense = latency.by_module(truth[0].sizes[None].astype(np.float64))
        assert dense.keys() <= {"", *map(str, range(8))}
        net = small()
        for name, inputs in (("0", INPUTS[[0, 1, 0]]), ("3", torch.ones(3, 24, 8, 8))):
            alone = 1e3 * Machine().seconds(lambda name=name, x=inputs: net[int(name)](x), 1)
            assert dense[name][0] == pytest.approx(1.3 * alone, rel=0.1)  # colder by 1.3 inside a network

    def test_flops_predict_worse(self, latency, truth):
        structure, of = truth
        widths = draw_widths(structure, 40, np.random.default_rng(9))
        flops = autoprune.costs.StructuralCosts(structure).flops(widths.astype(np.float64))
        dense = autoprune.costs.StructuralCosts(structure).flops(structure.sizes[None].astype(np.float64))
        errors = np.abs(flops / dense * latency.dense_ms / of(widths) - 1)
        assert np.median(errors) > 0.1

    def test_the_grid_is_denser_at_steps(self, latency):
        (table,) = (t for t in latency.tables if t.kind == "convolution" and len(t.axes) == 2)
        steps = {edge for edge in range(STEP, 40, STEP) if {edge, edge + 1} <= set(table.axes[1])}
        assert len(steps) >= 2

    def test_errors_and_the_margin_are_those_of_networks_predicted_by_fits_without_them(self, latency):
        seen, how = latency.evidence, latency.correction
        predicted = np.zeros(15)
        for fold in range(3):
            own = np.arange(15) % 3 == fold
            others = Evidence(seen.widths[~own], seen.ratio[~own], seen.uncertainty[~own])
            fitted = dataclasses.replace(latency, evidence=others, correction=None)
            predicted[own] = fitted.predict(seen.widths[own].astype(np.float64))
        off = predicted / (seen.ratio * latency.dense_ms)
        assert how.networks == 15
        assert how.median_error == pytest.approx(np.median(np.abs(off - 1)), rel=1e-6)
        assert how.p95_error == pytest.approx(np.quantile(np.abs(off - 1), 0.95), rel=1e-6)
        assert 0 < how.p95_error < 0.1
        assert (off * (1 + how.margin) >= 1).mean() == pytest.approx(0.8, abs=0.07)

    def test_more_evidence_moves_predictions_towards_it(self, latency):
        widths = latency.evidence.widths[1:5]
        before = latency.predict(widths.astype(np.float64))
        slower = 1.3 * before / latency.dense_ms
        after = latency.refitted(np.repeat(widths, 9, axis=0), np.repeat(slower, 9), np.full(36, 0.005))
        errors = after.predict(widths.astype(np.float64)) / (1.3 * before) - 1
        assert np.abs(errors).mean() < 0.12
        assert after.correction.networks == latency.correction.networks + 36

    def test_a_saved_table_predicts_the_same(self, latency, tmp_path):
        loaded = Latency.load(latency.save(tmp_path / "table.json"))
        widths = latency.evidence.widths.astype(np.float64)
        np.testing.assert_array_equal(loaded.predict(widths), latency.predict(widths))
        assert loaded.setting == latency.setting
        assert json.loads((tmp_path / "table.json").read_text())["units"]["ms"].startswith("milliseconds")
        assert str(loaded) == str(latency)

    def test_a_file_that_is_no_table_is_refused(self, latency, tmp_path):
        (tmp_path / "a.json").write_text("{}")
        with pytest.raises(FileFormatError, match="not a latency table"):
            Latency.load(tmp_path / "a.json")
        with pytest.raises(FileNotFoundError, match=r"b\.json"):
            Latency.load(tmp_path / "b.json")

    def test_another_batch_size_or_model_is_refused_by_name(self, latency):
        structure = analyse(Example(small(), (INPUTS,)))
        latency.require_match(structure, 3, "Sequential")
        with pytest.raises(ValueError, match="its batch size is 3, and cost_batch is 1"):
            latency.require_match(structure, 1, "Sequential")
        with pytest.raises(ValueError, match="its model is Sequential, and this is ResNet"):
            latency.require_match(structure, 3, "ResNet")
        other = replace(latency, groups=(("0", 24), ("3", 48)))
        with pytest.raises(ValueError, match=r"its groups differ in 3 \(48 units, here 40\)"):
            other.require_match(structure, 3, "Sequential")

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("version",), 2),
            (("dense_ms",), None),
            (("dense_ms",), -1.0),
            (("tables", 0, "ms"), [1.0]),
            (("networks", "ratio"), [1.0]),
            (("networks", "ratio", 0), None),
            (("correction", "factors"), {}),
            (("parts", 0, "sizes"), [[0, [[7, 1]]]]),
            (("setting", "colour"), "red"),
        ],
    )
    def test_a_damaged_table_is_refused_when_it_is_read(self, latency, tmp_path, path, value):
        data = json.loads(json.dumps(latency.to_json()))
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (tmp_path / "table.json").write_text(json.dumps(data))
        with pytest.raises(FileFormatError, match=r"table\.json is not a latency table.*measure again"):
            Latency.load(tmp_path / "table.json")

    def test_a_table_that_cannot_be_saved_leaves_nothing_behind(self, latency, tmp_path):
        (tmp_path / "folder").mkdir()
        with pytest.raises(IsADirectoryError):
            latency.save(tmp_path / "folder")
        assert list(tmp_path.iterdir()) == [tmp_path / "folder"]

    def test_a_table_of_inputs_of_another_size_is_refused_whatever_targets_there_are(self, latency):
        structure = analyse(Example(small(), (INPUTS,)))
        x, y = INPUTS[[0, 1, 0]], torch.zeros(3)
        for batch in (x, (x, y), {"x": x, "labels": y}):
            latency.require_match(structure, 3, "Sequential", batch)
        with_targets = replace(latency, setting=replace(latency.setting, inputs=("float32 3x3x8x8", "int64 3x7")))
        with_targets.require_match(structure, 3, "Sequential", x)
        with pytest.raises(ValueError, match="its inputs are 3x3x8x8, and these are 3x3x16x16"):
            latency.require_match(structure, 3, "Sequential", (torch.zeros(3, 3, 16, 16), y))

    @pytest.mark.slow
    def test_interrupted_profiling_goes_on_where_it_stopped(self, tmp_path):
        path = tmp_path / "table.json"
        with pytest.raises(KeyboardInterrupt):
            measured(Pulled(1500), path=path, networks=6)
        rest, whole = Machine(), Machine()
        measured(rest, path=path, networks=6)
        measured(whole, networks=6)
        assert rest.calls < 0.7 * whole.calls
        assert Latency.load(path).dense_ms > 0
        assert not path.with_name("table.json.partial").exists()

    @pytest.mark.slow
    def test_networks_of_an_interrupted_run_with_another_seed_are_measured_anew(self, tmp_path):
        path = tmp_path / "table.json"
        whole = Machine()
        measured(whole, networks=24, path=tmp_path / "whole.json")
        with pytest.raises(KeyboardInterrupt):
            measured(Pulled(whole.calls - 40), path=path, networks=24, seed=1)
        assert json.loads((tmp_path / "table.json.partial").read_text())["networks"]
        rest = measured(Machine(), path=path, networks=24)
        np.testing.assert_allclose(rest.evidence.ratio, measured(Machine(), networks=24).evidence.ratio, rtol=0.01)

    @pytest.mark.slow
    def test_what_is_left_of_another_model_of_the_same_class_is_replaced(self, tmp_path):
        path = tmp_path / "table.json"
        other = small()
        other[2] = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
        with pytest.raises(KeyboardInterrupt):
            measured(Pulled(1500), path=path, networks=6, model=other)
        measured(path=path, networks=6)
        assert Latency.load(path).dense_ms == pytest.approx(measured(networks=6).dense_ms, rel=0.01)

    @pytest.mark.slow
    @pytest.mark.parametrize("left", ["", "[]", "{", '{"setting": 1}'])
    def test_what_is_left_and_cannot_be_read_is_replaced(self, tmp_path, left):
        (tmp_path / "table.json.partial").write_text(left)
        measured(path=tmp_path / "table.json", networks=6)
        assert [file.name for file in tmp_path.iterdir()] == ["table.json"]

    @pytest.mark.slow
    def test_noise_is_said_also_of_what_was_measured_before_an_interruption(self, tmp_path):
        path = tmp_path / "table.json"
        with pytest.raises(KeyboardInterrupt):
            measured(Pulled(2500, noise=1.0), path=path, networks=6)
        assert "the machine is noisy" in " ".join(measured(Machine(), path=path, networks=6).notes)

    @pytest.mark.slow
    def test_a_file_that_cannot_be_written_is_no_operation_that_cannot_be_run(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"table\.json"):
            measured(path=tmp_path / "none" / "table.json", networks=6)

    @pytest.mark.slow
    def test_profiling_leaves_the_random_state_alone(self, global_rng_untouched):
        with global_rng_untouched():
            measured(networks=6)

    def test_the_setting_says_what_times_depend_on(self):
        setting = setting_of(Example(small(), (INPUTS,)), Torch())
        assert setting.inputs == ("float32 2x3x8x8",)
        assert setting.elsewhere(setting) == []
        assert setting.elsewhere(replace(setting, threads=99)) == [f"threads {setting.threads}, here 99"]


def test_the_machine_of_these_tests_has_steps():
    assert [stepped(n) for n in (1, 8, 9, 16, 17)] == [8, 8, 16, 16, 24]


COUNT_BLOCKS = """
import ctypes, torch
from autoprune.costs.latency.timing import CpuClock, Effort, compare

class Counts(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]

count = ctypes.CDLL(None).mallinfo2
count.restype = Counts
found = []

def blocks(mib):
    before = getattr(count(), "3")  # blocks that come from the system and go back to it
    kept = torch.empty(mib * 2**20, dtype=torch.uint8)
    found.append(getattr(count(), "3") - before)
    in_the_way.append(bytes(100_000))  # as what else a process allocates: what lies below stays in the heap

in_the_way = []
torch.set_num_threads(1)
blocks(70)
compare([lambda: blocks(70)], lambda: None, CpuClock(), Effort(rounds=1, most_rounds=1))
blocks(300)  # more than was freed while timed: a hole of that size would be filled first
blocks(16)
print(found[0], max(found[1:-2]), *found[-2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33; others keep memory otherwise"
)
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [1, 0, 1, 0]),  # fresh; while timed; afterwards as in a process that has freed a large block
        ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, [1, 1, 1, 1]),
    ],
    ids=["as it comes", "as the user has it"],
)
def test_timed_calls_do_not_pay_for_memory_that_the_system_hands_out_anew(environment, expected):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    command = [sys.executable, "-c", COUNT_BLOCKS]
    done = subprocess.run(command, capture_output=True, check=True, env=own | environment)
    assert [int(word) for word in done.stdout.split()] == expected


class TestNoteOnMemory:
    class Clock:
        """Says how much a call takes by whether memory is kept."""

        def __init__(self, handed_back):
            self.handed_back = handed_back

        def seconds(self, call, repeats):
            return repeats * (2e-3 if KEEPING[0] else 2e-3 * self.handed_back)

    @pytest.fixture(autouse=True)
    def keeping(self, monkeypatch):
        @contextmanager
        def kept():
            KEEPING[0] = True
            yield
            KEEPING[0] = False

        monkeypatch.setattr("autoprune.costs.latency.profile.keeping_freed_memory", kept)

    def test_a_network_that_is_slower_elsewhere_is_said_to_be(self):
        note = note_on_memory(lambda: None, self.Clock(handed_back=3.0))
        assert "2 ms" in note
        assert "6 ms" in note
        assert "MALLOC_TRIM_THRESHOLD_" in note

    def test_one_that_is_hardly_slower_is_not(self):
        assert note_on_memory(lambda: None, self.Clock(handed_back=1.1)) == ""


KEEPING = [False]
