"""Recovery: what it trains, what it leaves alone, what it learns from, and how it ends."""

import itertools
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import autoprune
from autoprune import Recovery
from autoprune.data.batch import default_forward
from autoprune.errors import DataError, FileFormatError, UnsupportedModelError
from autoprune.evaluators.recovery.nested import Samples, cut_on, nested_edits, refit
from autoprune.evaluators.training.checkpoint import read_checkpoint
from autoprune.evaluators.training.course import _factor
from autoprune.evaluators.training.features import Features
from autoprune.evaluators.training.parameters import Trained
from autoprune.structure.slicing.kept import kept_units
from autoprune.structure.slicing.slicing import Edit, build
from tests.recovering import data_of, halved, network, same, samples, weights

TRAIN = ("all", "norm+bias", "lora")
PLAIN = Recovery(every=2)
AVERAGED = Recovery(every=2, ema=0.8, accumulate=2, batch_size=8)


@pytest.fixture
def dense():
    return network()


@pytest.fixture
def small(dense):
    return halved(dense)


def fitting_samples(dense):
    return Samples([samples(dense, 256)], default_forward)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def interrupted(calls, most, outputs):
    """The outputs, or Ctrl-C at the call after `most`."""
    calls.append(None)
    if len(calls) == most + 1:
        raise KeyboardInterrupt
    return outputs


class TestWhatComesOut:
    @pytest.mark.parametrize("train", TRAIN)
    def test_the_pruned_network_comes_nearer_to_its_task_and_the_receipt_says_how_far(self, dense, small, train):
        receipt = autoprune.recover(small, data_of(dense), dense, train=train, steps=40, recipe=Recovery(batch_size=16))
        x, y = samples(dense, 48, 2)
        accuracy = (small(x).argmax(1) == y).float().mean().item()
        assert receipt.after.mean == pytest.approx(accuracy)
        assert receipt.after.mean > receipt.before.mean
        low, high = receipt.after.interval
        assert low < receipt.after.mean <= high
        assert receipt.teacher.mean == 1.0
        assert (receipt.steps, receipt.stopped, receipt.held_out) == (40, "", "test")
        assert receipt.losses[0][0] == 2
        assert receipt.losses[-1][1] < receipt.losses[0][1]
        assert "accuracy on test samples" in str(receipt)
        assert receipt.to_json()["steps"] == 40

    def test_without_samples_to_validate_on_the_last_weights_are_kept_and_a_note_says_so(self, dense, small):
        receipt = autoprune.recover(small, samples(dense), dense, steps=3)
        assert (receipt.before, receipt.held_out, receipt.best_step) == (None, "", 3)
        assert any("no validation samples" in note for note in receipt.notes)

    def test_everything_around_the_weights_comes_back_as_it_was(self, dense, small, global_rng_untouched):
        small.train()
        small[1].eval()
        small[0].weight.requires_grad_(False)
        before, teacher = weights(small), weights(dense)
        hooks = [len(module._forward_hooks) for module in (*small.modules(), *dense.modules())]
        with global_rng_untouched():
            autoprune.recover(small, data_of(dense), dense, steps=2)
        assert [module.training for module in small.modules()] == [True, True, False] + [True] * (len(small) - 2)
        assert not dense.training
        assert not small[0].weight.requires_grad
        assert all(parameter.grad is None for parameter in (*small.parameters(), *dense.parameters()))
        assert [len(module._forward_hooks) for module in (*small.modules(), *dense.modules())] == hooks
        assert same(weights(dense), teacher)
        assert torch.equal(small[0].weight, before["0.weight"])

    def test_it_repeats_to_the_last_bit(self, dense):
        found = []
        for _ in range(2):
            module = halved(dense)
            autoprune.recover(module, data_of(dense), dense, steps=5)
            found.append(weights(module))
        assert same(*found)


class TestWhatIsTrained:
    def test_norms_and_biases_alone(self, dense, small):
        before = weights(small)
        receipt = autoprune.recover(small, samples(dense), dense, train="norm+bias", steps=3)
        changed = {name for name, tensor in weights(small).items() if not torch.equal(tensor, before[name])}
        parameters = dict(small.named_parameters())
        assert changed & parameters.keys() == {name for name, each in parameters.items() if each.ndim == 1}
        assert receipt.parameters == sum(each.numel() for each in parameters.values() if each.ndim == 1)
        assert receipt.share == receipt.parameters / sum(each.numel() for each in parameters.values())

    def test_low_rank_changes_are_those_of_an_explicit_product_under_the_same_optimizer(self):
        """The oracle keeps both factors as parameters, and computes each weight from them in the forward pass."""
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(9, 8, bias=False), nn.Tanh(), nn.Linear(8, 7, bias=False))
        x, y = torch.randn(12, 9), torch.randn(12, 7)
        trained = Trained(module, "lora", 2, {}, seed=0)
        factors = [leaf.detach().clone().requires_grad_() for leaf in trained.leaves]
        starts = [module[0].weight.detach().clone(), module[2].weight.detach().clone()]
        ours, theirs = plain_sgd(trained.leaves), plain_sgd(factors)
        for _ in range(5):
            with trained.collecting():
                ours.zero_grad()
                nn.functional.mse_loss(module(x), y).backward()
                assert module[0].weight.grad is None
                ours.step()
                trained.merge()
            theirs.zero_grad()
            first, second = starts[0] + factors[0] @ factors[1], starts[1] + factors[2] @ factors[3]
            nn.functional.mse_loss(torch.tanh(x @ first.T) @ second.T, y).backward()
            theirs.step()
        for weight, start, left, right in zip(
            (module[0].weight, module[2].weight), starts, factors[::2], factors[1::2], strict=True
        ):
            torch.testing.assert_close(weight.detach(), start + (left @ right).detach())
            assert torch.linalg.matrix_rank(weight.detach() - start, rtol=1e-3) <= 2

    def test_embeddings_and_what_is_tied_to_them_get_no_low_rank_change(self):
        module = nn.ModuleDict({"words": nn.Embedding(20, 8), "head": nn.Linear(8, 20), "own": nn.Linear(8, 8)})
        module["head"].weight = module["words"].weight
        assert Trained(module, "lora", 2, {}, 0).count == 20 + 8 + 2 * (8 + 8)

    @pytest.mark.parametrize("train", TRAIN)
    def test_zeros_of_weights_stay_zero(self, dense, small, train):
        with torch.no_grad():
            small[0].weight[:, ::2] = 0
            small[3].weight[0] = 0
        zero = {name: tensor == 0 for name, tensor in small.named_parameters() if tensor.ndim > 1}
        before = weights(small)
        autoprune.recover(small, samples(dense), dense, train=train, steps=4, recipe=Recovery(ema=0.5))
        for name, where in zero.items():
            assert not small.get_parameter(name)[where].any()
            assert train == "norm+bias" or not torch.equal(small.get_parameter(name), before[name])
        autoprune.recover(small, samples(dense), dense, steps=2, recipe=Recovery(keep_zeros=False))
        assert small[0].weight[zero["0.weight"]].any()

    def test_parts_of_a_batch_add_up_to_the_whole(self, dense):
        found = []
        for size, parts in ((16, 1), (4, 4)):
            module = halved(network(norm=False))
            x, y = samples(dense, 16)
            batches = [(x[i : i + size], y[i : i + size]) for i in range(0, 16, size)]
            recipe = Recovery(optimizer=plain_sgd, accumulate=parts, most_norm=None, distill="none")
            autoprune.recover(module, batches, steps=3, recipe=recipe)
            found.append(module)
        for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
            torch.testing.assert_close(one, other)

    def test_the_average_of_weights_is_what_is_kept(self, dense):
        seen = []

        def loss(outputs, batch):
            seen.append([parameter.detach().clone() for parameter in module.parameters()])
            return outputs.square().mean()

        module = halved(network(norm=False))
        recipe = Recovery(loss=loss, ema=0.7, optimizer=plain_sgd, schedule="constant", warmup=0)
        autoprune.recover(module, samples(dense), steps=4, recipe=recipe)
        kept = [parameter.detach().clone() for parameter in module.parameters()]
        module = halved(network(norm=False))
        seen.clear()
        autoprune.recover(module, samples(dense), steps=5, recipe=recipe)
        expected = seen[1]
        for later in seen[2:5]:
            expected = [0.7 * old + 0.3 * new for old, new in zip(expected, later, strict=True)]
        for one, other in zip(kept, expected, strict=True):
            torch.testing.assert_close(one, other)

    def test_running_statistics_follow_the_weights_in_few_steps_and_momentum_comes_back(self, dense):
        small = halved(network())
        norms = [layer for layer in small if isinstance(layer, nn.BatchNorm1d)]
        for norm in norms:
            norm.momentum = 1e-3
        before = [norm.running_mean.clone() for norm in norms]
        inputs, labels = samples(dense)
        autoprune.recover(small, (3 * inputs + 2, labels), steps=30, recipe=Recovery(lr=1e-9))
        assert norms
        with torch.no_grad():
            seen = small[0](3 * inputs + 2).mean(0)
        assert (norms[0].running_mean - seen).norm() < 0.3 * (before[0] - seen).norm()
        assert [norm.momentum for norm in norms] == [1e-3] * len(norms)

    def test_the_learning_rate_rises_and_falls(self):
        cosine = [_factor("cosine", 2, 10)(step) for step in range(11)]
        assert cosine[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
        assert cosine[6] == pytest.approx(0.5)
        assert cosine[10] == pytest.approx(0)
        assert [_factor("linear", 0, 4)(step) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
        assert _factor("constant", 0, 4)(3) == 1


class TestWhatItLearnsFrom:
    def test_features_agree_where_the_removed_units_were_idle(self):
        """Where units that go have no readers, all that stays computes what it did."""
        dense = network(norm=False)
        with torch.no_grad():
            dense[2].weight[:, 1::2] = 0
            dense[4].weight[:, 1::2] = 0
        small = halved(dense)
        features = Features(dense, small, kept_units(small))
        x, _ = samples(dense)
        with features.watching(small) as ours, features.watching(dense) as theirs:
            small(x)
            dense(x)
            assert {name: len(found) for name, found in ours.items()} == {"0": 1, "2": 1, "4": 1}
            assert features.distance(ours, theirs).item() < 1e-10
            ours.clear()
            small(x + 1)
            assert features.distance(ours, theirs).item() > 0.01

    def test_features_are_compared_behind_norms_where_there_are_any(self, dense, small):
        assert Features(dense, small, kept_units(small)).names == ["1", "4"]

    def test_inner_features_come_nearer_only_where_they_are_learned(self, dense):
        def gap(distill):
            module = halved(dense)
            recipe = Recovery(distill=distill, optimizer=plain_sgd, schedule="constant")
            autoprune.recover(module, samples(dense), dense, steps=40, recipe=recipe)
            features = Features(dense, module, kept_units(module))
            x, _ = samples(dense, 64, 5)
            with features.watching(module) as ours, features.watching(dense) as theirs, torch.no_grad():
                module(x)
                dense(x)
                return features.distance(ours, theirs).item()

        assert gap("inner") < 0.9 * min(gap("logits"), gap("none"))

    def test_without_labels_the_outputs_of_the_teacher_are_enough(self, dense, small):
        x, _ = samples(dense)
        with torch.no_grad():
            before = (small(x) - dense(x)).square().mean()
            autoprune.recover(small, x, dense, steps=60, recipe=Recovery(distill="logits", lr=0.01))
            assert (small(x) - dense(x)).square().mean() < before

    def test_without_labels_and_a_teacher_there_is_nothing_to_learn(self, dense, small):
        x, _ = samples(dense)
        with pytest.raises(ValueError, match=r"neither labels.*pass teacher="):
            autoprune.recover(small, x, steps=2)
        with pytest.raises(DataError, match=r"'agreement' compares with the dense model.*pass teacher="):
            autoprune.recover(small, autoprune.Data(x, samples(dense, 20, 1)[0]), steps=2)


class TestNestedNetworks:
    def test_each_keeps_what_the_next_keeps_and_the_last_is_the_pruned_one(self, dense, small):
        edits = nested_edits(small, dense, fitting_samples(dense), 3)
        widths = [[len(edit.slices[name][0]) for name in ("0.weight", "3.weight")] for edit in edits]
        assert widths == [[10, 8], [8, 7], [6, 5]]
        for wide, narrow in itertools.pairwise(edits):
            assert all(set(narrow.slices[name][0]) < set(wide.slices[name][0]) for name in ("0.weight", "3.weight"))
        norms = dense[0].weight.square().sum(1) + dense[3].weight.square().sum(0)
        gone_first = set(range(12)) - set(edits[0].slices["0.weight"][0].tolist())
        assert gone_first <= set(range(1, 12, 2))
        assert norms[list(gone_first)].max() < norms[range(1, 12, 2)].max()
        assert {name: dims.keys() for name, dims in edits[-1].slices.items()} == {
            name: dims.keys() for name, dims in kept_units(small).items()
        }

    def test_a_network_cut_on_computes_what_a_cut_of_a_trained_dense_one_does(self, dense, small):
        x = samples(dense)[0]
        first, second = nested_edits(small, dense, fitting_samples(dense), 2)
        wide = build(dense, first)
        with torch.no_grad():
            for parameter in wide.parameters():
                parameter.add_(0.1)
        narrow = cut_on(dense, wide, first, second)
        inside = [int(i) for i, unit in enumerate(first.slices["0.weight"][0]) if unit in second.slices["0.weight"][0]]
        assert torch.equal(narrow[0].weight, wide[0].weight[inside])
        assert torch.equal(narrow[1].running_var, wide[1].running_var[inside])
        assert narrow(x).shape == (64, 4)

    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "normalised"])
    def test_what_copies_of_units_gave_is_made_up_for_in_every_network(self, norm):
        """Units that go are copies of units that stay, before and after the weights have changed."""
        dense = network(norm)
        with torch.no_grad():
            for name, tensor in dense.state_dict().items():
                if tensor.ndim and name[0] in ("0", "1", "2", "3") and len(tensor) in (12, 10):
                    tensor[1::2] = tensor[::2]
        small = halved(dense)
        x = samples(dense, 256)[0]
        before, wide = Edit({}, {}), dense
        for after in nested_edits(small, dense, fitting_samples(dense), 2):
            narrow = cut_on(dense, None if wide is dense else wide, before, after)
            with torch.no_grad():
                cut = (narrow(x) - wide(x)).square().mean()
                assert refit(narrow, wide, before, after, fitting_samples(dense))
                assert (narrow(x) - wide(x)).square().mean() < 1e-3 * cut
                for parameter in narrow[len(narrow) - 1].parameters():
                    parameter.mul_(1.5)
            before, wide = after, narrow

    def test_all_of_them_are_trained_from_weights_that_fit_the_network_before(self, dense, small):
        def distance(module):
            x = samples(dense, 256, 5)[0]
            with torch.no_grad():
                return (module(x) - dense(x)).square().mean()

        recipe = Recovery(lr=1e-9, distill="logits")
        autoprune.recover(small, samples(dense), dense, steps=2, steps_to=2, recipe=recipe)
        assert distance(small) < 0.5 * distance(halved(dense))

    @pytest.mark.parametrize("train", TRAIN)
    def test_an_interrupted_one_ends_as_an_uninterrupted_one(self, dense, tmp_path, train):
        recipe = Recovery(train=train, every=2, steps=9, steps_to=3)
        whole, part, resumed = halved(dense), halved(dense), halved(dense)
        expected = autoprune.recover(whole, data_of(dense), dense, recipe=recipe)
        assert expected.steps == 9
        assert [step for step, _ in expected.losses] == [2, 3, 5, 6, 8, 9]
        calls, file = [], tmp_path / "nested.safetensors"
        stopping = replace(recipe, forward=lambda model, batch: interrupted(calls, 17, model(batch[0])))
        assert autoprune.recover(part, data_of(dense), dense, checkpoint=file, recipe=stopping).steps < 9
        autoprune.recover(resumed, data_of(dense), dense, checkpoint=file, recipe=recipe)
        assert same(weights(resumed), weights(whole))

    def test_what_was_not_built_or_not_from_this_model_is_refused(self, dense, small):
        with pytest.raises(UnsupportedModelError, match="carries no recipe"):
            autoprune.recover(network(), samples(dense), dense, steps_to=2, steps=4)
        other = network(norm=False)
        with pytest.raises(UnsupportedModelError, match="differ in"):
            autoprune.recover(small, samples(dense), other, steps_to=2, steps=4)


class TestHowItEnds:
    def test_a_loss_that_is_no_number_ends_it_with_the_step_and_the_last_good_weights(self, dense):
        calls = []

        def loss(outputs, batch):
            calls.append(outputs)
            return outputs.square().mean() * (math.nan if len(calls) == 8 else 1)

        module, until = halved(dense), halved(dense)
        recipe = Recovery(loss=loss, every=3)
        receipt = autoprune.recover(module, samples(dense), steps=20, recipe=recipe)
        assert "nan at step 7" in receipt.stopped
        assert receipt.best_step == receipt.steps == 6
        calls.clear()
        again = Recovery(loss=lambda outputs, batch: interrupted(calls, 7, outputs).square().mean(), every=3)
        autoprune.recover(until, samples(dense), steps=20, recipe=again)
        assert same(weights(module), weights(until))

    def test_the_best_weights_on_validation_samples_are_kept_and_patience_ends_it(self, dense, small):
        before = weights(small)
        recipe = Recovery(lr=100.0, every=1, patience=3, warmup=0)
        receipt = autoprune.recover(small, data_of(dense), dense, steps=50, recipe=recipe)
        assert (receipt.steps, receipt.best_step) == (3, 0)
        assert "no better validation for 3 times" in receipt.stopped
        assert same(weights(small), before)

    @pytest.mark.parametrize("train", TRAIN)
    @pytest.mark.parametrize("recipe", [PLAIN, AVERAGED], ids=["plain", "averaged"])
    def test_an_interrupted_recovery_ends_as_an_uninterrupted_one(self, dense, tmp_path, train, recipe):
        whole, part = halved(dense), halved(dense)
        common = {"train": train, "steps": 9}
        expected = autoprune.recover(whole, data_of(dense), dense, recipe=recipe, **common)
        file = tmp_path / "recovery.safetensors"
        calls = []
        forward = lambda model, batch: interrupted(calls, 17, model(batch[0]))  # noqa: E731
        first = autoprune.recover(
            part, data_of(dense), dense, checkpoint=file, recipe=replace(recipe, forward=forward), **common
        )
        assert first.stopped == "interrupted"
        assert first.steps < 9
        resumed = halved(dense)
        receipt = autoprune.recover(resumed, data_of(dense), dense, checkpoint=file, recipe=recipe, **common)
        assert same(weights(resumed), weights(whole))
        assert receipt.losses == expected.losses
        assert receipt.validations == expected.validations
        once_more = halved(dense)
        autoprune.recover(once_more, data_of(dense), dense, checkpoint=file, recipe=recipe, **common)
        assert same(weights(once_more), weights(whole))

    def test_a_checkpoint_of_another_training_or_a_pickle_is_refused_by_name(self, dense, tmp_path):
        file = tmp_path / "recovery.safetensors"
        autoprune.recover(halved(dense), samples(dense), dense, steps=2, checkpoint=file)
        with pytest.raises(ValueError, match=r"another train, another steps"):
            autoprune.recover(halved(dense), samples(dense), dense, train="lora", steps=3, checkpoint=file)
        torch.save({"state": 1}, file)
        with pytest.raises(FileFormatError, match=r"recovery.safetensors"):
            autoprune.recover(halved(dense), samples(dense), dense, steps=2, checkpoint=file)

    def test_as_a_training_function_it_lets_an_interruption_through(self, dense, small):
        calls = []
        recipe = Recovery(samples(dense), dense, forward=lambda model, batch: interrupted(calls, 9, model(batch[0])))
        with pytest.raises(KeyboardInterrupt):
            recipe(small, 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "half"}, "train must be one of"),
        ({"steps": 0}, "steps must be"),
        ({"steps_to": 3, "steps": 2}, "steps_to must be at most steps"),
        ({"ema": 1.0}, "ema must be a number of at least 0 and below 1"),
        ({"lr": -1}, "lr must be positive or None"),
        ({"distill": "outer"}, "distill must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recovery(**settings)


@pytest.mark.parametrize("settings", [{"distill": "inner"}, {"distill": "logits"}, {"steps_to": 2}])
def test_what_needs_a_teacher_says_so(dense, small, settings):
    with pytest.raises(ValueError, match="needs teacher="):
        autoprune.recover(small, samples(dense), recipe=Recovery(steps=4, **settings))


def test_samples_to_train_on_are_no_samples_to_choose_by(dense, small):
    drawn = samples(dense)
    with pytest.raises(DataError, match="validation data must not be what is trained on"):
        autoprune.recover(small, autoprune.Data(drawn, drawn), dense)
    with pytest.raises(DataError, match="calibration samples, which recover trains on"):
        autoprune.recover(small, autoprune.Data(validation=drawn), dense)


CHILD = """
import sys, time
import torch
import autoprune
from tests.recovering import halved, network, samples

def loss(outputs, batch):
    with open(sys.argv[2], "a") as file:
        file.write(".")
    time.sleep(0.05)
    return outputs.square().mean()

torch.set_num_threads(1)
dense = network()
recipe = autoprune.Recovery(samples(dense), loss=loss, every=3, steps=15, checkpoint=sys.argv[1])
recipe(halved(dense))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_loses_at_most_one_interval(dense, tmp_path):
    file, counter = tmp_path / "state.safetensors", tmp_path / "steps"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(file), str(counter)], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 120
    while not (counter.exists() and counter.stat().st_size >= 7) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    taken = read_checkpoint(file)["course"]["taken"]
    assert 0 <= counter.stat().st_size - taken <= 4  # three, and the one that was under way
    whole, resumed = halved(dense), halved(dense)
    recipe = Recovery(samples(dense), loss=lambda outputs, batch: outputs.square().mean(), every=3, steps=15)
    recipe(whole)
    replace(recipe, checkpoint=file)(resumed)
    assert same(weights(resumed), weights(whole))
