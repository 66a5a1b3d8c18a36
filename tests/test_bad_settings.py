"""Settings out of range: each is refused before the first trial, with the argument, the value and the way out."""

import math

import pytest
from torch import nn

import autoprune
from autoprune import Channels, Sparsity
from autoprune.evaluators import AdaptiveBN
from autoprune.execution import LocalExecutor
from tests.refusals import EIGHTHS, X, refused, search
from tests.searching import grouped


class TestBudgets:
    @pytest.mark.parametrize("budget", ["half of it", "flops = 50%", "flops <= many", ""])
    def test_one_that_cannot_be_read_shows_what_can(self, mlp, budget):
        with refused(autoprune.BudgetError, budget, "flops <= 50%"):
            search(mlp, budget)

    def test_one_that_is_no_text_shows_what_can(self, mlp):
        with refused(
            autoprune.BudgetError, "budget must be text, a list of texts or a Budget, got 0.5", "flops <= 50%"
        ):
            search(mlp, 0.5)

    @pytest.mark.slow
    def test_an_unknown_cost_is_named_with_the_nearest(self, mlp):
        with refused(autoprune.BudgetError, "budget must limit one of", "got 'flop'", "did you mean 'flops'?"):
            search(mlp, "flop <= 50%")

    @pytest.mark.slow
    def test_an_impossible_one_names_the_cheapest_reachable(self, mlp):
        cheapest = 64 * 6 + 6 * 4 + 4 * 3 + 3 * 10
        parts = f"flops must be at least {cheapest}, the cheapest reachable", "got 56.16", "Raise the limit"
        with refused(autoprune.InfeasibleBudgetError, *parts):
            search(mlp, "flops <= 1%", space=EIGHTHS)

    @pytest.mark.slow
    def test_a_limit_on_a_metric_that_is_not_the_one_says_how_to_score_by_it(self, mlp):
        with refused(autoprune.BudgetError, "got 'loss'; pass a cost of your own", "set by metric=") as raised:
            search(mlp, "loss <= 0.3")
        assert "did you mean" not in str(raised.value)

    @pytest.mark.slow
    def test_best_with_nothing_within_it_names_the_nearest_and_the_way_out(self, mlp):
        with refused(autoprune.InfeasibleBudgetError, "'flops <= 1%' is met by none of 2 trials", "search again"):
            search(mlp).best("flops <= 1%")

    @pytest.mark.slow
    def test_best_by_another_metric_than_was_scored_is_refused(self, mlp):
        with refused(autoprune.BudgetError, "budget limits 'acuracy'", "scored by 'accuracy'"):
            search(mlp).best("acuracy >= 0.5")


class TestNames:
    @pytest.mark.parametrize(
        ("argument", "known"),
        [
            ("optimizer", "'nsga2', 'random'"),
            ("evaluator", "'adaptive_bn', 'auto'"),
            ("space", "'auto', 'blocks', 'channels', 'depth', 'sparsity'"),
            ("metric", "'accuracy', 'agreement', 'auto'"),
            ("execution", "'local'"),
        ],
    )
    def test_an_unknown_one_is_refused_with_those_known(self, mlp, argument, known):
        with refused(ValueError, f"{argument} must be one of", known, "got 'bset'"):
            search(mlp, **{argument: "bset"})

    def test_an_unknown_criterion_is_refused_with_those_known(self, mlp):
        with refused(ValueError, "criterion must be one of", "'l2'", "'taylor'", "got 'l3'"):
            search(mlp, space=Channels(criterion="l3"))

    def test_an_unknown_way_to_check_is_refused_with_those_known(self, mlp):
        with refused(ValueError, "checks must be one of ['on', 'strict', 'isolated']", "got 'off'"):
            search(mlp, checks="off")

    @pytest.mark.parametrize(("argument", "value"), [("evaluator", AdaptiveBN), ("execution", LocalExecutor)])
    def test_a_class_in_place_of_an_instance_is_named(self, mlp, argument, value):
        with refused(ValueError, f"{argument} must be one of", "instance, got <class"):
            search(mlp, **{argument: value})

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("argument", "value"), [("optimizer", 3), ("evaluator", 3), ("space", 3), ("metric", 3), ("execution", 3)]
    )
    def test_something_of_another_kind_is_named(self, mlp, argument, value):
        with refused((ValueError, TypeError), f"{argument} must be ", "got "):
            search(mlp, **{argument: value})


class TestSpaces:
    @pytest.mark.parametrize("options", [(), (0.5, 1.0), (1.0, 0.5, 0.5), (0.9, 0.5), (1.0, 0.0)])
    def test_options_must_fall_from_one(self, options):
        with refused(ValueError, "options must be fractions falling from 1.0 to above 0", f"got {options}"):
            Channels(options=options)

    @pytest.mark.parametrize(
        ("name", "value", "rule"),
        [
            *(("step", value, "must be a fraction in (0, 1) or a whole") for value in ("x", None, 0, math.nan, True)),
            *(("min_fraction", value, "must be in (0, 1], got") for value in ("x", None, 0, 2, math.nan, True)),
            *(("min_width", value, "must be an integer of at least 1, got") for value in ("x", None, 0, 2.5, True)),
            *(
                ("round_to", value, "must be an integer of at least 1, or 'auto', got")
                for value in ("x", 2.5, True, [])
            ),
            *(("options", value, "must be fractions falling from 1.0") for value in (5, "x", ("a",), (1.0, None))),
            *(("ignore", value, "must be a list of names or globs, got") for value in (5, None, [5], "head")),
            *(("bounds", value, "must be (least, most) by name or glob, such as") for value in (5, None, [1])),
            ("bounds", {"0": 5}, "['0'] must be (least, most) with"),
            ("bounds", {"0": ("a", "b")}, "['0'] must be (least, most) with"),
            *(("criterion", value, "must be one of") for value in (5, [], nn.Linear, lambda: 0)),
            ("edges", 5, "must be widths by the name of the group, got 5"),
        ],
    )
    def test_what_channels_are_not_made_of_is_named(self, name, value, rule):
        with refused(ValueError, f"{name}{' ' * (not rule.startswith('['))}{rule}"):
            Channels(**{name: value})

    @pytest.mark.parametrize(
        ("name", "value", "rule"),
        [
            *(
                ("levels", value, "must be fractions rising from 0")
                for value in ("x", 5, ("a",), (0, 2), (0, math.nan))
            ),
            *(("ignore", value, "must be a list of names or globs, got") for value in (5, [5], "head")),
        ],
    )
    def test_what_sparsity_is_not_made_of_is_named(self, name, value, rule):
        with refused(ValueError, f"{name} {rule}"):
            Sparsity(**{name: value})

    @pytest.mark.slow
    def test_a_pattern_that_matches_nothing_is_named(self, mlp):
        with refused(ValueError, "ignore has 'head*', which matches no module", "there are 0,"):
            search(mlp, space=Channels(ignore=["head*"]))

    @pytest.mark.slow
    def test_a_space_without_a_choice_says_what_to_loosen(self, mlp):
        with refused(autoprune.NothingToPruneError, "space has nothing to search", "loosen ignore="):
            search(mlp, space=Channels(ignore=["*"]))


class TestLatency:
    @pytest.mark.parametrize("value", [0, -1, 2.5, "8"])
    @pytest.mark.parametrize("budget", ["flops <= 50%", "latency <= 50%"])
    def test_cost_batch_must_be_a_positive_integer(self, mlp, budget, value):
        with refused(ValueError, f"cost_batch must be an integer of at least 1, got {value!r}"):
            search(mlp, budget, cost_batch=value)

    @pytest.mark.slow
    @pytest.mark.parametrize("budget", ["latency <= 90%", "memory_bytes <= 90%"])
    def test_a_cost_batch_beyond_the_memory_is_refused_where_it_is_measured(self, mlp, budget):
        with refused(ValueError, "cost_batch must be a number of samples that fit into memory, got 1000000000"):
            search(mlp, budget, cost_batch=10**9)

    @pytest.mark.slow
    def test_a_cost_batch_that_no_cost_needs_makes_no_batch(self, mlp):
        assert search(mlp, cost_batch=10**9).trials

    @pytest.mark.slow
    def test_a_table_of_another_kind_is_named(self, mlp):
        with refused(
            ValueError,
            "costs['latency_ms'] must be a function of n candidates giving (n,), a table of autoprune.profile or",
            "got 3",
        ):
            search(mlp, "latency <= 50%", costs={"latency_ms": 3})

    def test_a_unit_that_is_not_known_names_that_of_the_cost(self, mlp):
        with refused(autoprune.BudgetError, "the unit of latency_ms must be % or one of", "'ms'", "got 's'"):
            search(mlp, "latency <= 1s")

    @pytest.mark.slow
    def test_an_impossible_throughput_names_what_can_be_reached(self, mlp):
        costs = {"latency_ms": lambda candidates: 30.0 - candidates.indices.sum(axis=1)}
        with refused(autoprune.InfeasibleBudgetError, "ms_per_sample must be at least 9 (111.111/s)", "got 1 (1000/s)"):
            search(mlp, "throughput >= 1000/s", costs=costs, space=EIGHTHS)

    @pytest.mark.slow
    def test_a_limit_on_latency_after_a_search_without_says_how_to_search(self, mlp):
        with refused(autoprune.BudgetError, "got 'latency_ms'", "pass it a table as costs={'latency_ms': table}"):
            search(mlp).best("latency <= 50%")

    @pytest.mark.parametrize(
        ("argument", "value", "named"),
        [
            ("batch", 0, "batch must be an integer of at least 1, got 0"),
            ("batch", "8", "batch must be an integer of at least 1, got '8'"),
            ("networks", 3, "networks must be an integer of at least 6, to fit to some and judge on others, got 3"),
            ("seed", -1, "seed must be an integer of at least 0, got -1"),
            ("runtime", "tensorrt", "runtime must be 'torch', 'onnxruntime' or 'onnxruntime:PROVIDER', got 'tensorrt'"),
            ("runtime", 5, "runtime must be 'torch', 'onnxruntime' or 'onnxruntime:PROVIDER', got 5"),
            ("inputs", X[:0], "example must hold at least one sample, got torch.float32"),
            ("batch", True, "batch must be an integer of at least 1, got True"),
            ("seed", 2**64, "seed must be an integer of at most"),
            ("forward", len, "forward must be a function forward(model, batch), or None, got <built-in function len>"),
            ("outputs", 1.5, "outputs must be a key, an index,"),
            ("batch", 10**12, "batch must be a number of samples that fit into memory, got 1000000000000"),
            ("inputs", (), "example must hold a tensor with a dimension for samples"),
        ],
    )
    def test_what_profile_cannot_use_is_named(self, mlp, argument, value, named):
        with refused((TypeError, ValueError), named):
            autoprune.profile(mlp, **grouped(**{"inputs": X[:2], argument: value}))

    def test_a_table_goes_to_a_file_in_a_folder_that_exists(self, mlp, tmp_path):
        with refused(IsADirectoryError, "path must be a file to write the table to, got the folder"):
            autoprune.profile(mlp, X[:2], path=tmp_path)
        with refused(FileNotFoundError, "path must lie in a folder that exists, got"):
            autoprune.profile(mlp, X[:2], path=tmp_path / "none" / "table.json")
        assert list(tmp_path.parent.glob(f"{tmp_path.name}*")) == [tmp_path]

    @pytest.mark.parametrize("model", [nn.Linear(64, 10), nn.ReLU()], ids=["linear", "no parameters"])
    def test_profile_refuses_a_model_with_nothing_to_prune(self, model, tmp_path):
        with refused(autoprune.NothingToPruneError, "nothing to prune"):
            autoprune.profile(model, X[:2], path=tmp_path / "table.json")
        assert list(tmp_path.iterdir()) == []

    def test_profile_refuses_what_is_no_module(self):
        with refused(autoprune.UnsupportedModelError, "model must be an nn.Module, got str"):
            autoprune.profile("model.pt", X[:2])


class TestRuns:
    @pytest.mark.parametrize("options", [{}, {"budget": "latency <= 50%", "resume": True}])
    def test_a_run_dir_that_is_a_file_is_refused(self, mlp, tmp_path, options):
        (tmp_path / "file").write_text("mine")
        with refused(FileExistsError, "run_dir must be a folder", "is a file", "pass another run_dir"):
            search(mlp, run_dir=tmp_path / "file", **options)
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.slow
    @pytest.mark.parametrize("budget", ["flops <= 50%", "latency <= 50%"])
    def test_a_run_dir_used_before_is_refused_and_left_alone(self, mlp, tmp_path, budget):
        search(mlp, run_dir=tmp_path)
        before = (tmp_path / "journal.sqlite").read_bytes()
        with refused(FileExistsError, "run_dir must be a folder of its own", "already holds", "pass another run_dir"):
            search(mlp, budget, run_dir=tmp_path)
        assert not (tmp_path / "latency.json").exists()
        assert (tmp_path / "journal.sqlite").read_bytes() == before

    @pytest.mark.parametrize("trials", [0, -1, 2.5, "10"])
    def test_trials_must_be_a_positive_integer(self, mlp, trials):
        with refused(ValueError, f"trials must be an integer of at least 1, or 'auto', got {trials!r}"):
            search(mlp, trials=trials)

    @pytest.mark.parametrize("seed", [-1, 0.5])
    def test_the_seed_must_not_be_negative(self, mlp, seed):
        with refused(ValueError, f"seed must be an integer of at least 0, got {seed}"):
            search(mlp, seed=seed)

    @pytest.mark.parametrize("seconds", [0, -3.0])
    def test_max_seconds_must_be_positive(self, mlp, seconds):
        with refused(ValueError, f"max_seconds must be positive or None, got {seconds}"):
            search(mlp, max_seconds=seconds)

    def test_resuming_needs_a_run_dir(self, mlp):
        with refused(ValueError, "resume=True needs the run_dir", "got run_dir=None"):
            search(mlp, resume=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("bad", [[0, 0], [0] * 6, [8, 0, 0], [-1, 0, 0], "abc", 7])
    def test_a_start_that_is_no_candidate_is_named(self, mlp, bad):
        with refused(ValueError, "start must hold results, trials,", "option indices below [8, 8, 8]", repr(bad)):
            search(mlp, start=[bad], space=EIGHTHS)

    @pytest.mark.slow
    def test_a_start_with_an_unknown_dimension_or_option_names_those_known(self, mlp):
        with refused(ValueError, "start must name dimensions of the space (0, 3, 6), got ['stem']"):
            search(mlp, start=[{"stem": 8}])
        with refused(ValueError, "start['3'] must be one of (32, 28", "got 31"):
            search(mlp, start=[{"3": 31}], space=EIGHTHS)
