"""Mistakes in the arguments: each is refused before the first trial, with the argument, the value and the way out."""

import copy
import math
import re
import threading
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoprune
from autoprune import Channels, Data, Metric, Racing, Rungs, Sparsity
from autoprune.evaluators import AdaptiveBN, Compensated, FineTune, Supernet
from autoprune.execution import LocalExecutor
from tests.zoo import ZOO

GENERATOR = torch.Generator().manual_seed(0)
EIGHTHS = Channels(step=0.125, min_fraction=0.125)
X, Y = torch.randn(120, 64, generator=GENERATOR), torch.randint(0, 10, (120,), generator=GENERATOR)


def search(model, budget="flops <= 50%", data=(X, Y), trials=2, **options):
    return autoprune.search(model, budget, data, trials=trials, progress=False, **options)


def refused(error, *parts):
    """Expect an error whose message holds all parts, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


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

    def test_an_unknown_cost_is_named_with_the_nearest(self, mlp):
        with refused(autoprune.BudgetError, "budget must limit one of", "got 'flop'", "did you mean 'flops'?"):
            search(mlp, "flop <= 50%")

    def test_an_impossible_one_names_the_cheapest_reachable(self, mlp):
        cheapest = 64 * 6 + 6 * 4 + 4 * 3 + 3 * 10
        parts = f"flops must be at least {cheapest}, the cheapest reachable", "got 56.16", "Raise the limit"
        with refused(autoprune.InfeasibleBudgetError, *parts):
            search(mlp, "flops <= 1%", space=EIGHTHS)

    def test_a_limit_on_a_metric_that_is_not_the_one_says_how_to_score_by_it(self, mlp):
        with refused(autoprune.BudgetError, "got 'loss'; pass a cost of your own", "set by metric=") as raised:
            search(mlp, "loss <= 0.3")
        assert "did you mean" not in str(raised.value)

    def test_best_with_nothing_within_it_names_the_nearest_and_the_way_out(self, mlp):
        with refused(autoprune.InfeasibleBudgetError, "'flops <= 1%' is met by none of 2 trials", "search again"):
            search(mlp).best("flops <= 1%")

    def test_best_by_another_metric_than_was_scored_is_refused(self, mlp):
        with refused(autoprune.BudgetError, "budget limits 'acuracy'", "scored by 'accuracy'"):
            search(mlp).best("acuracy >= 0.5")


class TestModels:
    def test_something_that_is_no_module_is_named(self):
        with refused(autoprune.UnsupportedModelError, "model must be an nn.Module, got str", "load or build it"):
            search("model.pt")

    def test_one_spread_over_several_devices_is_refused(self, mlp):
        mlp[9].to("meta")
        with refused(autoprune.UnsupportedModelError, "one device, got ['cpu', 'meta']", "model.to(device)"):
            search(mlp)

    def test_one_without_values_is_refused(self, mlp):
        with refused(autoprune.UnsupportedModelError, "model must hold values", "meta device", "load its weights"):
            search(mlp.to("meta"))

    def test_a_scripted_one_is_refused(self, mlp):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            scripted = torch.jit.script(mlp)
        with refused(autoprune.UnsupportedModelError, "ordinary nn.Module", "ScriptModule", "pass the module that was"):
            search(scripted)

    def test_a_quantised_one_is_refused(self, mlp):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantised = torch.ao.quantization.quantize_dynamic(mlp, {nn.Linear}, dtype=torch.qint8)
        with refused(autoprune.UnsupportedModelError, "must not be quantised", "'0'", "prune first, then quantise"):
            search(quantised)

    def test_a_sparse_parameter_is_named(self, mlp):
        mlp.register_parameter("mixer", nn.Parameter(torch.eye(4).to_sparse()))
        with refused(autoprune.UnsupportedModelError, "'mixer' is torch.sparse_coo", "to_dense()"):
            search(mlp)

    def test_one_that_was_never_run_is_refused(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lazy = nn.Sequential(nn.LazyLinear(20), nn.ReLU(), nn.LazyLinear(10))
        with refused(autoprune.UnsupportedModelError, "uninitialised parameter '0.weight'", "run it once"):
            search(lazy)

    def test_one_with_nothing_to_prune_is_refused_with_the_reasons(self):
        with refused(autoprune.NothingToPruneError, "nothing to prune", "returned by the model", "the model's input"):
            search(nn.Linear(64, 10))

    @pytest.mark.parametrize("call", [autoprune.inspect, autoprune.profile])
    @pytest.mark.parametrize(("given", "named"), [("x", "got str; load"), (nn.Linear, "got the class Linear; make")])
    def test_what_is_no_model_is_named_by_every_call(self, call, given, named):
        with refused(autoprune.UnsupportedModelError, "model must be an nn.Module, ", named):
            call(given, X[:2])

    @pytest.mark.parametrize("kind", ["qat", "observed"])
    def test_one_that_is_prepared_for_quantisation_is_refused(self, mlp, kind):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "qat":
                mlp.train().qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
                prepared = torch.ao.quantization.prepare_qat(mlp)
            else:
                mlp.eval().qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
                prepared = torch.ao.quantization.prepare(mlp)
        with refused(autoprune.UnsupportedModelError, "must not be prepared", "module '0", "prepare afterwards"):
            search(prepared)

    def test_stubs_of_a_model_that_will_be_quantised_are_no_preparation(self, mlp):
        stubs = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        assert autoprune.inspect(nn.Sequential(stubs[0], mlp, stubs[1]), X[:2]).groups

    def test_one_made_under_inference_mode_is_refused_and_its_copy_is_not(self):
        with torch.inference_mode():
            model = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
        with refused(autoprune.UnsupportedModelError, "'0.weight' was made under", "copy.deepcopy(model)"):
            search(model)
        assert search(copy.deepcopy(model)).trials

    def test_one_without_any_output_value_is_refused(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 0))
        with refused(autoprune.UnsupportedModelError, "at least one value, got tensors of float32 (2, 0)"):
            search(model)

    @pytest.mark.parametrize(
        ("forward", "named"),
        [
            (
                lambda model, batch: model(batch[0]) + 1j,
                "output must be real to be scored by 'auto'",
            ),
            (
                lambda model, batch: model(batch[0])[:3],
                "one row for each sample to be scored by",
            ),
        ],
    )
    def test_outputs_that_no_metric_takes_are_named(self, mlp, forward, named):
        with refused(autoprune.DataError, named):
            search(mlp, forward=forward)

    def test_one_that_returns_nan_is_refused(self, mlp):
        with torch.no_grad():
            mlp[9].weight[0, 0] = torch.nan
        with refused(ValueError, "model must return finite outputs", "NaN", "check its weights"):
            search(mlp)

    def test_one_that_returns_nan_for_some_samples_is_refused(self, mlp):
        x = X.clone()
        x[7] = torch.inf
        with refused(
            ValueError, "model cannot be scored on the validation data", "the score of 1 of 100 samples is NaN"
        ):
            search(mlp, data=Data(calibration=(X, Y), validation=(x[:100], Y[:100]), test=(X, Y)))


class TestData:
    @pytest.mark.parametrize(
        "data", [[], (X[:0], Y[:0]), torch.utils.data.DataLoader(X[:0])], ids=["list", "xy", "loader"]
    )
    def test_an_empty_source_is_refused(self, mlp, data):
        with refused(autoprune.DataError, "validation data must hold at least", "is empty", "give more samples"):
            search(mlp, data=data)

    @pytest.mark.parametrize("data", ["digits.pt", 5, {"x": X}])
    def test_an_unknown_kind_is_named(self, mlp, data):
        with refused(autoprune.DataError, "must be a DataLoader, a Dataset,", f"got {type(data).__name__}"):
            search(mlp, data=data)

    def test_missing_labels_are_named_with_the_way_out(self, mlp):
        with refused(autoprune.DataError, "metric='accuracy' needs labels", "'agreement'"):
            search(mlp, data=X, metric="accuracy")

    @pytest.mark.parametrize(
        ("metric", "name"),
        [
            ("accuracy", "accuracy"),
            ("loss", "loss"),
            (nn.CrossEntropyLoss(), "CrossEntropyLoss"),
            (partial(F.cross_entropy, label_smoothing=0.1), "cross_entropy"),
        ],
        ids=["accuracy", "loss", "module", "function"],
    )
    @pytest.mark.parametrize("label", [255, -1])
    def test_a_label_beyond_the_classes_is_named_by_its_value(self, mlp, metric, name, label):
        y = Y.masked_fill(torch.arange(len(Y)) == 7, label)
        data = Data(calibration=(X, Y), validation=(X, y))
        with refused(autoprune.DataError, f"metric={name!r} needs labels from 0 to 9", f"got {label};"):
            search(mlp, data=data, metric=metric)

    def test_labels_that_a_loss_leaves_out_are_no_mistake(self, mlp):
        y = Y.masked_fill(torch.arange(len(Y)) < 9, 255)
        assert search(mlp, data=(X, y), metric=nn.CrossEntropyLoss(ignore_index=255)).trials

    def test_a_label_that_keeps_auto_from_accuracy_is_named_in_the_notes(self, mlp):
        result = search(mlp, data=(X, Y.masked_fill(torch.arange(len(Y)) < 60, 255)))
        assert result.metric == "agreement"
        assert any("labels from 0 to 9, the classes of the outputs, got 255" in note for note in result.notes)

    @pytest.mark.parametrize("call", ["search", "inspect", "profile"])
    @pytest.mark.parametrize(
        ("inputs", "named"),
        [(X[:, :3], "float32 (2, 3)"), (X.long(), "int64 (2, 64)"), (X + 1j, "complex64 (2, 64)")],
        ids=["shape", "integers", "complex"],
    )
    def test_inputs_that_the_model_does_not_take_are_named(self, mlp, call, inputs, named):
        calls = {
            "search": lambda: search(mlp, data=(inputs, Y)),
            "inspect": lambda: autoprune.inspect(mlp, inputs[:2]),
            "profile": lambda: autoprune.profile(mlp, inputs[:2]),
        }
        with refused(autoprune.DataError, "forward must run on the data, or the example_inputs", named, "forward="):
            calls[call]()

    def test_validation_data_of_another_size_than_calibration_is_named(self, mlp):
        with refused(autoprune.DataError, "data must hold batches that the model takes", "float32 (60, 3)"):
            search(mlp, data=Data(calibration=(X, Y), validation=(X[:, :3], Y)))

    @pytest.mark.parametrize("first", [0, 60])
    def test_a_stream_of_empty_batches_ends(self, mlp, first):
        def stream():
            yield X[:first], Y[:first]
            while True:
                yield X[:0], Y[:0]

        with refused(autoprune.DataError, "batches without any in a row", f"after {first} samples of 2560 wanted"):
            search(mlp, data=stream())

    @pytest.mark.parametrize("name", ["calibration_samples", "validation_samples", "test_samples", "batch_size"])
    @pytest.mark.parametrize("value", [True, 0, 2.5, "8", None])
    def test_sizes_of_data_must_be_positive_integers(self, name, value):
        with refused(ValueError, f"{name} must be an integer of at least 1, got {value!r}"):
            Data(**{name: value})

    def test_labels_must_be_a_key(self):
        with refused(TypeError, "labels must be the key of the target in dict batches, or None, got 5"):
            Data(labels=5)

    def test_a_metric_without_data_is_refused(self, mlp):
        with refused(autoprune.DataError, "metric 'accuracy' needs data", "pass data=", "metric='agreement'"):
            search(mlp, data=None, metric="accuracy", example_inputs=X)

    def test_neither_data_nor_an_example_is_refused(self, mlp):
        with refused(ValueError, "example_inputs must be given", "Sequential carries no example", "pass a tensor"):
            search(mlp, data=None)

    def test_an_empty_example_is_refused(self, mlp):
        with refused(autoprune.DataError, "example_inputs must hold at least one input, got ()"):
            search(mlp, data=None, example_inputs=())
        with refused(ValueError, "example_inputs must hold at least one sample, got torch.float32 of shape (0, 64)"):
            autoprune.inspect(mlp, X[:0])

    def test_outputs_that_the_model_does_not_return_are_named(self, mlp):
        with refused(ValueError, "outputs must select from what the model returns (Tensor), got 0"):
            search(mlp, outputs=0)
        images = torch.randn(40, 3, 16, 16)
        with refused(ValueError, "outputs must select from what the model returns (['scores', 'boxes']), got 'nope'"):
            search(ZOO["detector"].build(), data=images, outputs=["boxes", "nope"])


class TestNames:
    @pytest.mark.parametrize(
        ("argument", "known"),
        [
            ("optimizer", "'nsga2', 'random'"),
            ("evaluator", "'adaptive_bn', 'auto'"),
            ("space", "'channels', 'sparsity'"),
            ("metric", "'accuracy', 'agreement', 'auto'"),
            ("executor", "'local'"),
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

    @pytest.mark.parametrize(("argument", "value"), [("evaluator", AdaptiveBN), ("executor", LocalExecutor)])
    def test_a_class_in_place_of_an_instance_is_named(self, mlp, argument, value):
        with refused(ValueError, f"{argument} must be one of", "instance, got <class"):
            search(mlp, **{argument: value})

    @pytest.mark.parametrize(
        ("argument", "value"), [("optimizer", 3), ("evaluator", 3), ("space", 3), ("metric", 3), ("executor", 3)]
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

    def test_a_pattern_that_matches_nothing_is_named(self, mlp):
        with refused(ValueError, "ignore has 'head*', which matches no module", "there are 0,"):
            search(mlp, space=Channels(ignore=["head*"]))

    def test_a_space_without_a_choice_says_what_to_loosen(self, mlp):
        with refused(autoprune.NothingToPruneError, "space has nothing to search", "loosen ignore="):
            search(mlp, space=Channels(ignore=["*"]))


class TestLatency:
    @pytest.mark.parametrize("value", [0, -1, 2.5, "8"])
    @pytest.mark.parametrize("budget", ["flops <= 50%", "latency <= 50%"])
    def test_cost_batch_must_be_a_positive_integer(self, mlp, budget, value):
        with refused(ValueError, f"cost_batch must be an integer of at least 1, got {value!r}"):
            search(mlp, budget, cost_batch=value)

    @pytest.mark.parametrize("budget", ["latency <= 90%", "memory_bytes <= 90%"])
    def test_a_cost_batch_beyond_the_memory_is_refused_where_it_is_measured(self, mlp, budget):
        with refused(ValueError, "cost_batch must be a number of samples that fit into memory, got 1000000000"):
            search(mlp, budget, cost_batch=10**9)

    def test_a_cost_batch_that_no_cost_needs_makes_no_batch(self, mlp):
        assert search(mlp, cost_batch=10**9).trials

    def test_a_table_of_another_kind_is_named(self, mlp):
        with refused(ValueError, "latency must be a table of autoprune.profile or the file of one, got 3"):
            search(mlp, "latency <= 50%", latency=3)

    def test_a_unit_that_is_not_known_names_that_of_the_cost(self, mlp):
        with refused(autoprune.BudgetError, "the unit of latency_ms must be % or one of", "'ms'", "got 's'"):
            search(mlp, "latency <= 1s")

    def test_an_impossible_throughput_names_what_can_be_reached(self, mlp):
        costs = {"latency_ms": lambda candidates: 30.0 - candidates.sum(axis=1)}
        with refused(autoprune.InfeasibleBudgetError, "ms_per_sample must be at least 9 (111.111/s)", "got 1 (1000/s)"):
            search(mlp, "throughput >= 1000/s", costs=costs, space=EIGHTHS)

    def test_a_limit_on_latency_after_a_search_without_says_how_to_search(self, mlp):
        with refused(autoprune.BudgetError, "got 'latency_ms'", "pass it a table with latency="):
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
            ("example_inputs", X[:0], "example_inputs must hold at least one sample, got torch.float32"),
            ("batch", True, "batch must be an integer of at least 1, got True"),
            ("seed", 2**64, "seed must be an integer of at most"),
            ("forward", len, "forward must be a function forward(model, batch), or None, got <built-in function len>"),
            ("outputs", 1.5, "outputs must be a key, an index,"),
            ("batch", 10**12, "batch must be a number of samples that fit into memory, got 1000000000000"),
            ("example_inputs", (), "example_inputs must hold a tensor with a dimension for samples"),
        ],
    )
    def test_what_profile_cannot_use_is_named(self, mlp, argument, value, named):
        with refused((TypeError, ValueError), named):
            autoprune.profile(mlp, **{"example_inputs": X[:2], argument: value})

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

    @pytest.mark.parametrize("bad", [[0, 0], [0] * 6, [8, 0, 0], [-1, 0, 0], "abc", 7])
    def test_a_start_that_is_no_candidate_is_named(self, mlp, bad):
        with refused(ValueError, "start must hold results, trials,", "option indices below [8, 8, 8]", repr(bad)):
            search(mlp, start=[bad], space=EIGHTHS)

    def test_a_start_with_an_unknown_dimension_or_option_names_those_known(self, mlp):
        with refused(ValueError, "start must name dimensions of the space (0, 3, 6), got ['stem']"):
            search(mlp, start=[{"stem": 8}])
        with refused(ValueError, "start['3'] must be one of (32, 28", "got 31"):
            search(mlp, start=[{"3": 31}], space=EIGHTHS)


class TestFunctionsOfTheUser:
    def test_a_cost_of_the_wrong_shape_is_named(self, mlp):
        with refused(ValueError, "costs['energy_mj'] must return 1 finite numbers", "got shape (1, 3)"):
            search(mlp, costs={"energy_mj": lambda candidates: candidates * 1.0})

    def test_a_cost_that_is_not_finite_is_named(self, mlp):
        with refused(ValueError, "costs['energy_mj'] must return 1 finite numbers"):
            search(mlp, costs={"energy_mj": lambda candidates: np.full(len(candidates), np.nan)})

    def test_a_cost_with_the_name_of_a_built_in_one_is_refused(self, mlp):
        with refused(ValueError, "costs must not redefine", "got 'flops'", "choose another name"):
            search(mlp, costs={"flops": lambda candidates: candidates.sum(axis=1)})

    @pytest.mark.parametrize("name", ["latency", "memory", "throughput", "ms_per_sample"])
    def test_a_cost_with_a_name_that_budgets_take_for_another_is_refused(self, mlp, name):
        with refused(ValueError, f"costs must not hold '{name}'", "call a latency 'latency_ms'"):
            search(mlp, costs={name: lambda candidates: candidates.sum(axis=1)})

    @pytest.mark.parametrize(("costs", "named"), [([len], "costs must be functions"), ({"j": 5}, "costs['j'] must be")])
    def test_costs_that_are_no_functions_are_named(self, mlp, costs, named):
        with refused(ValueError, named, "got "):
            search(mlp, costs=costs)

    def test_a_cost_that_returns_no_numbers_is_named(self, mlp):
        with refused(ValueError, "costs['energy_mj'] must return real numbers, got ['much']"):
            search(mlp, costs={"energy_mj": lambda candidates: ["much"] * len(candidates)})

    def test_a_cost_that_writes_to_its_candidates_changes_nothing(self, mlp):
        def careless(candidates):
            total = 100.0 - candidates.sum(axis=1)
            candidates[:] = 0
            return total

        result = search(mlp, "energy_mj <= 90%", costs={"energy_mj": careless}, trials=6)
        assert all(trial.costs["energy_mj"] == 100 - sum(trial.candidate) <= 90 for trial in result.front)

    @pytest.mark.parametrize("returned", [1.0, torch.tensor(1.0), torch.ones(5), torch.ones(20, 10)])
    def test_a_metric_of_the_wrong_shape_is_named(self, mlp, returned):
        with refused(ValueError, "metric 'mine' must return a tensor of shape", "per_sample=False"):
            search(mlp, metric=Metric(lambda outputs, batch: returned, True, name="mine"))

    def test_a_whole_set_metric_that_returns_no_number_costs_no_trial(self, mlp):
        metric = Metric(lambda forward, batches: torch.ones(3), True, per_sample=False, name="mine")
        with refused(ValueError, "metric 'mine' must return one number", "per_sample=True"):
            search(mlp, metric=metric)

    @pytest.mark.parametrize(
        ("argument", "value", "named"),
        [
            ("forward", lambda model: model, "forward must be a function forward(model, batch), or None, got"),
            ("outputs", lambda: 0, "outputs must be a key, an index, a list of these, a function"),
            ("costs", {"j": lambda: 0}, "costs['j'] must be a function of candidates (n, d) giving (n,), got"),
            ("optimizer", lambda problem: problem, "optimizer must be a name, a function of (problem, seed) or"),
        ],
    )
    def test_a_function_of_other_arguments_is_named_with_what_it_takes(self, mlp, argument, value, named):
        with refused((TypeError, ValueError), named, ", which takes ("):
            search(mlp, **{argument: value})

    def test_a_metric_of_other_arguments_is_named(self):
        for options in ({}, {"needs_dense": True}):
            with refused(TypeError, "fn must be a function fn(outputs, batch", "which takes (outputs)"):
                Metric(lambda outputs: outputs, True, **options)

    def test_a_class_that_makes_no_optimizer_is_named(self, mlp):
        with refused(TypeError, "optimizer must be a name,", "got <class 'torch.nn.modules.linear.Linear'>"):
            search(mlp, optimizer=nn.Linear)

    def test_a_criterion_that_returns_no_tensor_is_named(self, mlp):
        with refused(TypeError, "criterion must return a tensor of 48 scores, got None"):
            search(mlp, space=Channels(criterion=lambda group: None))

    def test_a_criterion_of_the_wrong_shape_is_named(self, mlp):
        with refused(ValueError, "criterion must return 48 finite scores for group '0'", "got shape (2,)"):
            search(mlp, space=Channels(criterion=lambda group: torch.ones(2)))


@pytest.mark.parametrize(
    ("make", "name", "value", "rule"),
    [
        (Racing, "delta", "x", "must be a probability between 0 and 1"),
        (Racing, "delta", True, "must be a probability between 0 and 1"),
        (Rungs, "count", True, "must be an integer of at least 2"),
        (Rungs, "reduction", "3", "must be a number above 1"),
        (FineTune, "steps", True, "must be an integer of at least 1"),
        (FineTune, "lr", "x", "must be positive"),
        (FineTune, "lr", math.inf, "must be positive"),
        (FineTune, "train_fn", lambda model: model, "must be a function train_fn(model, steps), or None"),
        (Supernet, "steps", "x", "must be an integer of at least 1"),
        (Supernet, "lr", None, "must be positive"),
        (Supernet, "loss", 5, "must be a function loss(outputs, batch), or None"),
        (Supernet, "optimizer", lambda: 0, "must be a function optimizer(parameters), or None"),
        (Compensated, "ridge", "x", "must be positive, a share of the mean square of inputs, or None"),
        (Compensated, "bias", "no", "must be True or False"),
        (Compensated, "memory_bytes", 2.5, "must be an integer of at least 0"),
        (AdaptiveBN, "share_bytes", "x", "must be an integer of at least 0, which shares nothing"),
    ],
)
def test_what_a_setting_of_an_evaluator_or_a_race_is_not_is_named(make, name, value, rule):
    with refused((TypeError, ValueError), f"{name} {rule}", "got "):
        make(**{name: value})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train_fn": 5}, "train_fn must be a function train_fn(model), got 5"),
        ({"train_fn": lambda model: None, "steps": 5}, "train_fn must be a function train_fn(model, steps), got"),
        ({"k": True}, "k must be an integer of at least 4, got True"),
        ({"repeats": 1.5}, "repeats must be an integer of at least 0, got 1.5"),
        ({"seed": 2**64}, "seed must be an integer of at most"),
        ({"steps": 0}, "train_fn must be a function train_fn(model, steps)"),
        ({"evaluators": "adaptive_bn"}, "evaluators must be a list of names or evaluators, got 'adaptive_bn'"),
        ({"initialise": 5}, "initialise must be a function initialise(model), or None, got 5"),
    ],
)
def test_what_an_audit_cannot_use_is_named(mlp, options, named):
    with refused((TypeError, ValueError), named):
        autoprune.audit(search(mlp), **{"train_fn": lambda model: None, **options})


def test_nothing_is_evaluated_before_a_mistake_is_found(mlp):
    class Untouched(AdaptiveBN):
        def evaluate(self, candidates, chunk=None):
            pytest.fail("evaluated a candidate")

    for options in ({"budget": "flops <= 1%"}, {"start": [[9, 9, 9]]}, {"metric": "bset"}, {"costs": {"flops": len}}):
        with pytest.raises(ValueError, match="must"):
            search(mlp, evaluator=Untouched(), space=EIGHTHS, **options)


def test_a_trial_of_a_result_without_its_model_says_how_to_build_it(mlp):
    alone = replace(search(mlp), _builder=None)
    with refused(autoprune.RecipeError, "build needs the model", "SearchResult.load(path, model=model)"):
        alone.build()


def test_an_evaluator_that_cannot_be_copied_is_named(mlp):
    evaluator = AdaptiveBN()
    evaluator.lock = threading.Lock()
    with refused(TypeError, "evaluator must be something that can be copied", "AdaptiveBN cannot", "__deepcopy__"):
        search(mlp, evaluator=evaluator)
