import pytest

from autoprune.budget import Budget, Limit, ScoreLimit
from autoprune.errors import BudgetError
from autoprune.pareto import Direction

DENSE = {"flops": 8e6, "params": 3e6, "memory_bytes": 4e8, "latency_ms": 10.0, "energy_mj": 5.0}


@pytest.mark.parametrize(
    ("text", "absolute"),
    [
        ("flops <= 50%", {"flops": 4e6}),
        ("flops<=12.5 %", {"flops": 1e6}),
        ("flops ≤ 100%", {"flops": 8e6}),
        ("params <= 1.2M", {"params": 1.2e6}),
        ("params <= 900k", {"params": 9e5}),
        ("params <= 1_200_000", {"params": 1.2e6}),
        ("flops <= .5G", {"flops": 5e8}),
        ("flops <= 1e6", {"flops": 1e6}),
        ("memory_bytes <= 200MB", {"memory_bytes": 2e8}),
        ("memory <= 2 MiB", {"memory_bytes": 2.0 * 2**20}),
        ("memory <= 4096", {"memory_bytes": 4096.0}),
        ("latency_ms <= 4", {"latency_ms": 4.0}),
        ("latency <= 4 ms", {"latency_ms": 4.0}),
        ("latency <= 60%", {"latency_ms": 6.0}),
        ("energy_mj <= 3", {"energy_mj": 3.0}),
        ("energy_mj <= 3 mJ", {"energy_mj": 3.0}),
        ("flops <= 50%, params <= 1.2M", {"flops": 4e6, "params": 1.2e6}),
        ("flops <= 50%,latency <= 4 and params <= 1M", {"flops": 4e6, "latency_ms": 4.0, "params": 1e6}),
        (["flops <= 50%", "params <= 1M, latency <= 4"], {"flops": 4e6, "params": 1e6, "latency_ms": 4.0}),
        (["flops <= 50%", Budget((Limit("params", 1e6),))], {"flops": 4e6, "params": 1e6}),
        (Budget((Limit("latency", 0.5, relative=True),)), {"latency_ms": 5.0}),
    ],
)
def test_limits_on_costs_become_absolute_numbers(text, absolute):
    resolved = Budget.parse(text).resolve(DENSE)
    assert resolved == pytest.approx(absolute)
    assert list(resolved) == list(absolute)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("accuracy drop <= 1pp", ScoreLimit("accuracy", 0.01, drop=True)),
        ("accuracy drop ≤ 0.5 pp", ScoreLimit("accuracy", 0.005, drop=True)),
        ("accuracy drop <= 0.02", ScoreLimit("accuracy", 0.02, drop=True)),
        ("accuracy >= 0.98", ScoreLimit("accuracy", 0.98, drop=False)),
        ("accuracy >= 98%", ScoreLimit("accuracy", 0.98, drop=False)),
    ],
)
def test_limits_on_the_score_are_kept_apart_from_those_on_costs(text, limit):
    budget = Budget.parse(["flops <= 50%", text])
    assert budget.score_limits == (limit,)
    assert budget.limits == (Limit("flops", 0.5, relative=True),)
    assert Budget.parse(text).resolve(DENSE) == {}


def test_the_text_of_a_budget_reads_back_as_the_same_budget():
    budget = Budget.parse("flops <= 7%, params <= 1.2M, memory <= 3MiB, accuracy drop <= 1pp, accuracy >= 0.9")
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half the flops", r"cannot read 'half the flops'.*'flops <= 50%'.*'accuracy drop <= 1pp'"),
        ("flops < 50%", "cannot read"),
        ("flops <= 50% or params <= 1M", "cannot read"),
        ("flops <= nan", "cannot read"),
        ("", "budget is empty.*'flops <= 50%'"),
        ([], "budget is empty"),
        (0.5, "budget must be text, a list of texts or a Budget, got 0.5"),
        ("flops >= 50%", "flops is a cost and takes an upper limit"),
        ("latency >= 4", "latency_ms is a cost and takes an upper limit"),
        ("flops <= 0%", "flops must be positive and finite, got 0"),
        ("flops <= -5%", "flops must be positive"),
        ("params <= 1e999", "params must be positive and finite, got inf"),
        ("flops <= 150%", "at most 100%, got 150%"),
        ("params <= 5 apples", r"unit of params must be % or one of \['K', 'M', 'G', 'T'\], got 'apples'"),
        ("params <= 5MB", "unit of params"),
        ("latency <= 4 s", "unit of latency_ms"),
        ("flops <= 50%, flops <= 1M", "limits flops more than once"),
        ("latency <= 4, latency_ms <= 5", "limits latency_ms more than once"),
        ("accuracy drop <= 1%", "in points, for example '1pp'"),
        ("accuracy drop >= 1pp", "upper limit"),
        ("accuracy drop <= -1pp", "finite and not negative"),
        ("accuracy >= 3M", "a plain number or a percentage"),
    ],
)
def test_a_budget_that_makes_no_sense_says_what_would(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


def test_an_unknown_cost_is_refused_with_the_known_ones_and_the_nearest():
    with pytest.raises(BudgetError, match=r"one of \['energy_mj', 'flops'.*got 'flop'; did you mean 'flops'\?"):
        Budget.parse("flop <= 50%").resolve(DENSE)
    with pytest.raises(BudgetError, match="got 'xyz'; pass a cost of your own under this name"):
        Budget.parse("xyz <= 50%").resolve(DENSE)


def test_a_lower_limit_on_a_cost_of_the_users_own_is_refused_once_the_costs_are_known():
    with pytest.raises(BudgetError, match="energy_mj is a cost and takes an upper limit"):
        Budget.parse("energy_mj >= 3").resolve(DENSE)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("70% <= params <= 80%", Limit("params", 0.8, True, 0.7)),
        ("1M<=params<=2.5M", Limit("params", 2.5e6, False, 1e6)),
        ("0 <= latency <= 4 ms", Limit("latency_ms", 4.0, False, 0.0)),
        ("900k ≤ params ≤ 1.2M", Limit("params", 1.2e6, False, 9e5)),
    ],
)
def test_a_range_says_where_the_front_is_wanted(text, limit):
    budget = Budget.parse(text)
    assert budget.limits == (limit,)
    assert Budget.parse(str(budget)) == budget
    assert budget.resolve(DENSE) == Budget.parse(text.replace("≤", "<=").split("<=", 1)[1]).resolve(DENSE)


@pytest.mark.parametrize(
    "text",
    [
        "80% <= params <= 70%",
        "70% <= params <= 2M",
        "1M <= params <= 80%",
        "70% <= params >= 80%",
        "1 <= accuracy drop <= 2",
        "70% <= throughput >= 900/s",
        "-1 <= params <= 1M",
    ],
)
def test_a_range_that_makes_no_sense_is_refused(text):
    with pytest.raises(BudgetError, match=r"range|lower end"):
        Budget.parse(text)


def test_a_metric_has_no_range():
    with pytest.raises(BudgetError, match="range is of a cost"):
        Budget.parse("0.1 <= loss <= 0.3").judged_by("loss", Direction(higher_is_better=False), DENSE)
