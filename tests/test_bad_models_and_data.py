"""Models and data that a search cannot use: each is refused before the first trial, with what is wrong with it."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoprune
from autoprune import Data
from tests.refusals import X, Y, refused, search
from zoo import ZOO


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

    @pytest.mark.slow
    def test_stubs_of_a_model_that_will_be_quantised_are_no_preparation(self, mlp):
        stubs = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        assert autoprune.inspect(nn.Sequential(stubs[0], mlp, stubs[1]), X[:2]).groups

    @pytest.mark.slow
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

    @pytest.mark.slow
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

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_missing_labels_are_named_with_the_way_out(self, mlp):
        with refused(autoprune.DataError, "metric='accuracy' needs labels", "'agreement'"):
            search(mlp, data=X, metric="accuracy")

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_labels_that_a_loss_leaves_out_are_no_mistake(self, mlp):
        y = Y.masked_fill(torch.arange(len(Y)) < 9, 255)
        assert search(mlp, data=(X, y), metric=nn.CrossEntropyLoss(ignore_index=255)).trials

    @pytest.mark.slow
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
        with refused(autoprune.DataError, "forward must run on the data, or the example", named, "forward="):
            calls[call]()

    @pytest.mark.slow
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
    @pytest.mark.parametrize("value", [True, 0, 2.5, "8"])
    def test_sizes_of_data_must_be_positive_integers(self, name, value):
        with refused(ValueError, f"{name} must be an integer of at least 1, got {value!r}"):
            Data(**{name: value})

    def test_labels_must_be_a_key(self):
        with refused(TypeError, "labels must be the key of the target in dict batches, or None, got 5"):
            Data(labels=5)

    def test_a_metric_without_data_is_refused(self, mlp):
        with refused(autoprune.DataError, "metric 'accuracy' needs data", "pass data=", "metric='agreement'"):
            search(mlp, data=None, metric="accuracy", example=X)

    def test_neither_data_nor_an_example_is_refused(self, mlp):
        with refused(ValueError, "example must be given", "Sequential carries no example", "pass a tensor"):
            search(mlp, data=None)

    @pytest.mark.parametrize("example", [{"x": 5}, (5,), torch.tensor(3.0)])
    def test_an_example_without_samples_is_refused(self, mlp, example):
        with refused(autoprune.DataError, "example must hold a tensor with a dimension for samples, got"):
            search(mlp, data=None, example=example)

    def test_an_empty_example_is_refused(self, mlp):
        with refused(autoprune.DataError, "example must hold at least one input, got ()"):
            search(mlp, data=None, example=())
        with refused(ValueError, "example must hold at least one sample, got torch.float32 of shape (0, 64)"):
            autoprune.inspect(mlp, X[:0])

    @pytest.mark.slow
    def test_outputs_that_the_model_does_not_return_are_named(self, mlp):
        with refused(ValueError, "outputs must select from what the model returns (Tensor), got 0"):
            search(mlp, outputs=0)
        images = torch.randn(40, 3, 16, 16)
        with refused(ValueError, "outputs must select from what the model returns (['scores', 'boxes']), got 'nope'"):
            search(ZOO["detector"].build(), data=images, outputs=["boxes", "nope"])
