"""Searches under latency and throughput budgets, on a simulated machine."""

import re
import subprocess
import sys
from collections import UserDict
from dataclasses import replace

import numpy as np
import pytest
import torch

import autoprune
from autoprune.budget import Budget
from autoprune.costs.latency.model import Latency
from autoprune.costs.operations.runtimes import network_call
from autoprune.errors import BudgetError, InfeasibleBudgetError, NothingToPruneError, UnsupportedModelError
from autoprune.result import SearchResult
from autoprune.structure.example import Example
from tests.machine import Machine
from tests.measuring import INPUTS, measured, small

DATA = (torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 5)
QUICK = {"trials": 24, "start": autoprune.Start(prior="criterion"), "evaluator": "adaptive_bn"}


@pytest.fixture
def machine(monkeypatch) -> Machine:
    """Stands in for every clock."""
    found = Machine(cold=1.3, per_pass=2e-5)
    for module in ("autoprune.costs.latency.profile", "autoprune.study.verification"):
        monkeypatch.setattr(f"{module}.clock_for", lambda *_: found)
    return found


def make_table() -> Latency:
    return measured(Machine(cold=1.3, per_pass=2e-5), batch=1)


@pytest.fixture(scope="module")
def table() -> Latency:
    return make_table()


def true_ms(module) -> float:
    return 1e3 * Machine(cold=1.3, per_pass=2e-5).seconds(network_call(Example(module, (INPUTS[:1],))), 1)


class TestBudget:
    def test_throughput_is_a_limit_on_the_time_of_a_sample(self):
        budget = Budget.parse("throughput >= 800/s and flops <= 50%")
        assert budget.resolve({"ms_per_sample": 2.0, "flops": 10.0}) == {"ms_per_sample": 1.25, "flops": 5.0}
        assert str(budget) == "throughput >= 800/s and flops <= 50%"
        assert Budget.parse(str(budget)) == budget

    def test_a_percentage_of_throughput_is_of_the_dense_model(self):
        budget = Budget.parse("throughput >= 200%")
        assert budget.resolve({"ms_per_sample": 2.0}) == {"ms_per_sample": 1.0}
        assert Budget.parse(str(budget)) == budget

    @pytest.mark.parametrize("text", ["throughput <= 5/s", "throughput >= 5ms", "throughput >= 50%", "throughput >= 0"])
    def test_what_is_no_lower_limit_is_refused(self, text):
        with pytest.raises(BudgetError, match="limit"):
            Budget.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["auto", "knapsack", "nsga2"])
def test_what_is_offered_is_within_the_budget_as_measured(machine, table, optimizer):
    result = autoprune.search(
        small(), "latency <= 50%", DATA, costs={"latency_ms": table}, optimizer=optimizer, **QUICK
    )
    assert result.front
    for trial in result.front:
        built = true_ms(result.build(trial))
        assert built <= 0.5 * true_ms(small()) * (1 + 1e-6)
        assert trial.costs["latency_ms"] == pytest.approx(built, rel=1e-6)
        assert trial.predicted["latency_ms"] == pytest.approx(built, rel=0.1)
        low, high = trial.cost_intervals["latency_ms"]
        assert low <= trial.costs["latency_ms"] <= high
    assert "latency_ms  predicted" in str(result)


@pytest.mark.slow
def test_the_latency_of_each_layer_is_known_of_the_dense_model_and_the_front(machine, table, tmp_path):
    result = autoprune.search(small(), "latency <= 60%", DATA, costs={"latency_ms": table}, **QUICK)
    times = result.outline.latency
    assert times.trials == (-1, *(trial.id for trial in result.front))
    predicted = [table.dense_ms, *(trial.predicted["latency_ms"] for trial in result.front)]
    assert np.sum(times.layers, axis=1) + times.rest == pytest.approx(predicted, rel=0.1)
    by_name = dict(zip((layer.name for layer in result.outline.layers), np.transpose(times.layers), strict=True))
    assert by_name["3"].argmax() == 0  # the second convolution is slowest in the dense model
    assert (by_name["3"] > by_name["7"]).all()
    result.save(tmp_path)
    assert autoprune.SearchResult.load(tmp_path).outline == result.outline


def optimistic(table: Latency) -> Latency:
    """A table that promises too much."""
    factors = {kind: 0.7 * factor for kind, factor in table.correction.factors.items()}
    return replace(table, correction=replace(table.correction, factors=factors, margin=0.0))


@pytest.mark.slow
def test_a_wrong_table_is_corrected_by_what_is_measured(machine, table):
    result = autoprune.search(small(), "latency <= 60%", DATA, costs={"latency_ms": optimistic(table)}, **QUICK)
    missed = [trial for trial in result.trials if trial.predicted and not trial.feasible]
    assert missed
    assert all(trial.costs["latency_ms"] <= result.limits["latency_ms"] for trial in result.front)
    assert any(f"{len(missed)} missed a limit" in note for note in result.notes)
    assert result.front


@pytest.mark.slow
def test_a_network_that_may_be_over_the_limit_by_its_interval_gives_way(machine, table, monkeypatch):
    from autoprune.study import verification as verify

    timed = verify.time_networks
    called = []

    def unsure(*given):
        """Timings, in the first call of which the slowest network's interval ends above the limit."""
        timings = timed(*given)
        called.append(len(timings))
        slowest = max(timings, key=lambda timing: timing.ratio)
        return [replace(each, high=0.61) if each is slowest and len(called) == 1 else each for each in timings]

    monkeypatch.setattr(verify, "time_networks", unsure)
    result = autoprune.search(small(), "latency <= 60%", DATA, costs={"latency_ms": table}, **QUICK)
    limit = result.limits["latency_ms"]
    gave_way = [trial for trial in result.trials if trial.predicted and not trial.feasible]
    assert len(gave_way) == 1
    assert gave_way[0].costs["latency_ms"] <= limit < gave_way[0].cost_intervals["latency_ms"][1]
    assert result.front
    assert gave_way[0] not in result.front
    assert all(trial.predicted and trial.cost_intervals["latency_ms"][1] <= limit for trial in result.front)
    assert any("1 missed a limit and gave way to the next" in note for note in result.notes)


@pytest.mark.slow
def test_latencies_are_measured_first_where_no_table_is_given(machine, tmp_path):
    result = autoprune.search(
        small(), "throughput >= 150%", DATA, execution=autoprune.Execution(run_dir=str(tmp_path)), **QUICK
    )
    limit = result.dense.costs["ms_per_sample"] / 1.5
    assert result.best().costs["ms_per_sample"] <= limit
    assert Latency.load(tmp_path / "latency.json").dense_ms == pytest.approx(true_ms(small()), rel=0.01)
    again = autoprune.search(
        small(),
        "throughput >= 150%",
        DATA,
        execution=autoprune.Execution(run_dir=str(tmp_path), resume=True),
        **{**QUICK, "trials": 28},
    )
    assert len(again.trials) == 28


@pytest.mark.slow
def test_a_result_from_the_journal_says_that_its_latencies_are_those_predicted(machine, table, tmp_path):
    autoprune.search(
        small(),
        "latency <= 50%",
        DATA,
        costs={"latency_ms": optimistic(table)},
        execution=autoprune.Execution(run_dir=str(tmp_path)),
        **QUICK,
    )
    read = SearchResult.from_journal(tmp_path)
    assert not any(trial.predicted for trial in read.trials)
    assert "costs are those that trials were proposed with" in read.notes[-1]


@pytest.mark.slow
def test_a_table_of_another_process_gives_the_same_search(machine, table, tmp_path):
    path = tmp_path / "table.json"
    made = "from tests.test_latency_budget import make_table; import sys; make_table().save(sys.argv[1])"
    subprocess.run([sys.executable, "-c", made, str(path)], check=True)
    budget = ["latency <= 50%", "params <= 60%"]
    first, second = (
        autoprune.search(small(), budget, DATA, costs={"latency_ms": given}, **QUICK) for given in (table, str(path))
    )
    assert [t.candidate for t in first.trials] == [t.candidate for t in second.trials]
    assert [t.costs for t in first.front] == [t.costs for t in second.front]


@pytest.mark.slow
def test_a_table_of_another_machine_predicts_and_says_that_nothing_was_verified(machine, table):
    elsewhere = replace(table, setting=replace(table.setting, machine="a phone"))
    result = autoprune.search(small(), "latency <= 50%", DATA, costs={"latency_ms": elsewhere}, **QUICK)
    assert any("not verified here" in note and "a phone" in note for note in result.notes)
    assert all(not trial.predicted for trial in result.trials)


@pytest.mark.slow
def test_a_table_that_an_earlier_search_left_is_named_where_it_does_not_fit(table, tmp_path):
    table.save(tmp_path / "latency.json")
    with pytest.raises(ValueError, match=r"run_dir holds .*latency\.json of an earlier search.*cost_batch is 8"):
        autoprune.search(
            small(),
            "latency <= 50%",
            DATA,
            execution=autoprune.Execution(run_dir=str(tmp_path)),
            example=autoprune.Call(cost_batch=8),
            **QUICK,
        )


@pytest.mark.slow
def test_a_table_of_inputs_of_another_size_is_refused_unless_the_user_makes_them(machine, table):
    large = torch.nn.functional.interpolate(DATA[0], scale_factor=2)
    with pytest.raises(ValueError, match="its inputs are 1x3x8x8, and these are 1x3x16x16"):
        autoprune.search(small(), "latency <= 50%", (large, DATA[1]), costs={"latency_ms": table}, **QUICK)
    forward = lambda model, batch: model(batch[0][:, :, ::2, ::2])  # noqa: E731
    assert autoprune.search(
        small(),
        "latency <= 50%",
        (large, DATA[1]),
        costs={"latency_ms": table},
        example=autoprune.Call(forward=forward),
        **QUICK,
    ).front


@pytest.fixture
def ticking(machine, monkeypatch) -> Machine:
    """The machine, on which each call that is timed takes a second of the time that there is."""
    monkeypatch.setattr("autoprune.study.convergence.Deadline.spent", property(lambda _: float(machine.calls)))
    return machine


@pytest.fixture(scope="module")
def whole() -> int:
    """Calls that a whole table takes."""
    clock = Machine(cold=1.3, per_pass=2e-5)
    measured(clock, batch=1, networks=36)
    return clock.calls


@pytest.mark.slow
def test_measuring_latencies_stops_between_networks_and_the_result_says_so(ticking, whole, tmp_path):
    run_dir = str(tmp_path)
    result = autoprune.search(
        small(),
        "latency <= 50%",
        DATA,
        max_seconds=0.85 * whole,
        execution=autoprune.Execution(run_dir=run_dir),
        **QUICK,
    )
    assert ticking.calls < 0.95 * whole
    assert result.stopped == "time"
    assert result.trials == ()
    (note,) = [note for note in result.notes if note.startswith("time was over when")]
    measured = int(re.search(r"(\d+) of 36 networks were measured", note).group(1))
    assert len(Latency.load(tmp_path / "latency.json").evidence.ratio) == measured < 36
    again = autoprune.search(
        small(), "latency <= 50%", DATA, execution=autoprune.Execution(resume=True, run_dir=run_dir), **QUICK
    )
    assert len(again.trials) == QUICK["trials"]
    assert note in again.notes


@pytest.mark.slow
def test_too_little_time_for_a_table_is_an_error_that_keeps_what_was_measured(ticking, whole, tmp_path):
    run_dir = str(tmp_path)
    with pytest.raises(TimeoutError, match=r"max_seconds=.* was over before latencies were measured: \d+ of \d+ kinds"):
        autoprune.search(
            small(),
            "latency <= 50%",
            DATA,
            max_seconds=0.4 * whole,
            execution=autoprune.Execution(run_dir=run_dir),
            **QUICK,
        )
    assert ticking.calls < 0.5 * whole
    kept, ticking.calls = ticking.calls, 0
    assert (tmp_path / "latency.json.partial").exists()
    one = {**QUICK, "trials": 1}
    result = autoprune.search(
        small(), "latency <= 50%", DATA, execution=autoprune.Execution(resume=True, run_dir=run_dir), **one
    )
    assert ticking.calls <= whole - 0.7 * kept
    assert not any("time was over" in note for note in result.notes)
    assert not (tmp_path / "latency.json.partial").exists()


@pytest.mark.slow
def test_a_table_of_other_groups_says_to_profile_with_the_same_example(machine, table):
    other = replace(table, groups=(("0", 12), *table.groups[1:]))
    with pytest.raises(
        ValueError, match=r"its groups differ in 0 \(12 units, here 24\).*with the same example= as here"
    ):
        autoprune.search(small(), "latency <= 50%", DATA, costs={"latency_ms": other}, **QUICK)


@pytest.mark.slow
def test_mappings_that_are_no_dicts_cost_what_dicts_cost(machine):
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = small()

        def forward(self, pixels):
            return self.layers(pixels)

    def searched(kind):
        data = [kind({"pixels": x}) for x in DATA[0].split(16)]
        budget = ["latency <= 60%", "memory <= 90%", "flops <= 80%"]
        return autoprune.search(Named(), budget, data, example=autoprune.Call(cost_batch=3), **{**QUICK, "trials": 6})

    first, second = searched(dict), searched(UserDict)
    assert first.dense.costs == second.dense.costs
    assert [trial.costs for trial in first.front] == [trial.costs for trial in second.front] != []


@pytest.mark.slow
def test_a_function_of_the_user_is_a_latency_too():
    def on_my_phone(candidates):
        return 10.0 - candidates.indices.sum(axis=1)

    result = autoprune.search(
        small(), ["latency_ms <= 6", "throughput >= 200/s"], DATA, costs={"latency_ms": on_my_phone}, **QUICK
    )
    assert all(trial.costs["ms_per_sample"] == trial.costs["latency_ms"] <= 5 for trial in result.front)


@pytest.mark.slow
def test_a_search_is_not_resumed_with_another_function_for_its_cost(tmp_path):
    def searched(dense, resume=False):
        costs = {"latency_ms": lambda candidates: dense - candidates.indices.sum(axis=1)}
        return autoprune.search(
            small(),
            "latency_ms <= 8",
            DATA,
            costs=costs,
            execution=autoprune.Execution(run_dir=tmp_path, resume=resume),
            **QUICK,
        )

    searched(10.0)
    with pytest.raises(
        ValueError, match=r"differs in costs \(\{'latency_ms': 10.0\} before, \{'latency_ms': 12.0\} now"
    ):
        searched(12.0, resume=True)
    assert searched(10.0, resume=True).front


def test_a_model_without_a_choice_of_widths_is_refused_before_anything_is_timed():
    with pytest.raises(NothingToPruneError, match="nothing to prune"):
        autoprune.search(torch.nn.Linear(6, 3), "latency <= 60%", DATA[0][:, 0, 0, :6], **QUICK)


@pytest.mark.slow
def test_an_impossible_latency_names_the_lowest_reachable(machine, table):
    with pytest.raises(InfeasibleBudgetError, match="latency_ms must be at least"):
        autoprune.search(small(), "latency_ms <= 0.0001", DATA, costs={"latency_ms": table}, **QUICK)


def test_a_table_for_another_batch_size_is_refused_before_anything_is_searched(table):
    with pytest.raises(ValueError, match="batch size is 1, and cost_batch is 8"):
        autoprune.search(
            small(), "latency <= 50%", DATA, costs={"latency_ms": table}, example=autoprune.Call(cost_batch=8), **QUICK
        )


@pytest.mark.slow
def test_all_costs_of_a_result_survive_saving(machine, table, tmp_path):
    result = autoprune.search(small(), "latency <= 50%", DATA, costs={"latency_ms": table}, **QUICK)
    loaded = autoprune.SearchResult.load(result.save(tmp_path / "a", weights="none"))
    assert [t.predicted for t in loaded.front] == [t.predicted for t in result.front]
    assert [t.cost_intervals for t in loaded.front] == [t.cost_intervals for t in result.front]
    assert np.isfinite([t.costs["latency_ms"] for t in loaded.front]).all()


@pytest.mark.slow
def test_round_to_auto_takes_widths_at_the_right_edges_of_steps(machine, table):
    edges = table.right_edges([1, 1])
    assert set(edges["3"]) >= {8, 16, 24, 32, 40}
    assert not {9, 17, 25, 33} & set(edges["3"])
    space = autoprune.Channels(round_to="auto")
    result = autoprune.search(small(), "latency <= 50%", DATA, costs={"latency_ms": table}, space=space, **QUICK)
    (options,) = (d.options for d in result.space.dimensions if d.name == "3")
    assert set(options) <= set(edges["3"])
    assert result.front


def test_round_to_auto_needs_latencies_and_says_so():
    with pytest.raises(ValueError, match="round_to must be an integer of at least 1, or 'auto', got 'eight'"):
        autoprune.Channels(round_to="eight")
    costs = {"latency_ms": lambda candidates: 10.0 - candidates.indices.sum(axis=1)}
    with pytest.raises(ValueError, match="round_to='auto' needs measured latencies"):
        autoprune.search(
            small(), "latency_ms <= 6", DATA, costs=costs, space=autoprune.Channels(round_to="auto"), **QUICK
        )


@pytest.mark.slow
def test_an_interrupted_verification_returns_what_was_measured(machine, table, monkeypatch):
    from autoprune.study import verification as verify

    def pulled(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "time_networks", pulled)
    result = autoprune.search(small(), "latency <= 50%", DATA, costs={"latency_ms": table}, **QUICK)
    assert result.front
    assert any("interrupted: some latencies" in note for note in result.notes)


@pytest.mark.slow
@pytest.mark.parametrize("error", [UnsupportedModelError, RuntimeError])
def test_memory_is_measured_also_where_latency_cannot_be(machine, table, monkeypatch, error):
    from autoprune.study import verification as verify

    def refused(*_):
        raise error("no export of this one\nand its whole graph")

    monkeypatch.setattr(verify, "time_networks", refused)
    budget = ["latency <= 60%", "memory <= 90%"]
    result = autoprune.search(small(), budget, DATA, costs={"latency_ms": table}, **QUICK)
    assert result.front
    assert all(trial.predicted.keys() == {"memory_bytes"} for trial in result.front)
    said = [note for note in result.notes if "predictions" in note]
    assert "some latencies on the front are predictions: no export of this one" in said
    assert any(note.startswith("memory_bytes: ") and "were measured" in note for note in said)


@pytest.mark.slow
def test_a_network_over_one_limit_is_not_said_to_miss_another(machine, table):
    result = autoprune.search(
        small(), ["latency <= 60%", "memory <= 95%"], DATA, costs={"latency_ms": optimistic(table)}, **QUICK
    )
    (timed,) = (note for note in result.notes if note.startswith("latency: ") and "were measured" in note)
    (weighed,) = (note for note in result.notes if note.startswith("memory_bytes: ") and "were measured" in note)
    assert "missed a limit and gave way" in timed
    assert "none missed a limit" in weighed


@pytest.mark.slow
def test_what_a_corrected_table_puts_over_the_limit_is_no_probe(machine, table):
    result = autoprune.search(
        small(), "latency <= 60%", DATA, costs={"latency_ms": optimistic(table)}, optimizer="random", **QUICK
    )
    over = [trial for trial in result.trials if not trial.feasible and not trial.predicted]
    single = sum(np.count_nonzero(trial.candidate) <= 1 for trial in over)
    assert single < len(over)
    (told,) = (note for note in result.notes if "are probes" in note)
    assert told.startswith(f"{single} of {len(result.trials)} trials")


@pytest.mark.slow
def test_where_all_networks_miss_the_error_says_by_how_much(machine, table, monkeypatch):
    from autoprune.study import verification as verify

    slow = Machine(cold=1.3, per_pass=1.0)
    monkeypatch.setattr(verify, "clock_for", lambda *_: slow)
    result = autoprune.search(small(), "latency <= 50%", DATA, costs={"latency_ms": table}, **QUICK)
    with pytest.raises(InfeasibleBudgetError, match="were measured to be over, the nearest by"):
        result.best()


class TestBest:
    """`SearchResult.best` among measured networks."""

    @pytest.mark.slow
    def test_a_later_limit_on_latency_is_met_by_a_network_that_was_measured(self, machine, table):
        result = autoprune.search(small(), "flops <= 80%", DATA, costs={"latency_ms": table}, **QUICK)
        assert all(trial.predicted for trial in result.front)
        fast = result.best("latency <= 60%")
        assert fast.costs["latency_ms"] == pytest.approx(true_ms(result.build(fast)), rel=1e-6)

    @pytest.mark.slow
    def test_a_better_trial_that_was_only_predicted_is_passed_over(self, machine, table):
        result = autoprune.search(small(), "latency <= 80%", DATA, costs={"latency_ms": table}, **QUICK)
        best = result.best()
        rumour = replace(best, id=999, score=1.1, predicted={}, cost_intervals={})
        assert replace(result, trials=(*result.trials, rumour)).best().id == best.id
        assert replace(result, trials=(*result.trials, rumour)).best("flops <= 99%").predicted

    @pytest.mark.slow
    def test_a_time_is_within_a_limit_only_with_its_whole_interval(self, machine, table):
        result = autoprune.search(small(), "latency <= 80%", DATA, costs={"latency_ms": table}, **QUICK)
        best = result.best()
        ms = best.costs["latency_ms"]
        unsure = replace(best, cost_intervals={"latency_ms": (0.9 * ms, 1.1 * ms)})
        others = [trial for trial in result.trials if trial.id != best.id]
        assert replace(result, trials=(*others, unsure)).best(f"latency_ms <= {1.11 * ms}").id == best.id
        known = replace(unsure, cost_intervals={"latency_ms": (ms, ms)})
        assert replace(result, trials=(*others, known)).best(f"latency_ms <= {1.05 * ms}").id == best.id
        with pytest.raises(InfeasibleBudgetError, match="the nearest is trial"):
            replace(result, trials=(unsure,)).best(f"latency_ms <= {1.05 * ms}")

    @pytest.mark.slow
    def test_without_measurements_predictions_count(self, machine, table):
        elsewhere = replace(table, setting=replace(table.setting, machine="a phone"))
        result = autoprune.search(small(), "latency <= 50%", DATA, costs={"latency_ms": elsewhere}, **QUICK)
        assert result.best("latency <= 50%").costs["latency_ms"] <= 0.5 * result.dense.costs["latency_ms"]
