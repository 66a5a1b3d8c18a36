"""Shared weights: whose gradients they get, that training can stop and go on anywhere, and what is scored with them."""

import copy
import multiprocessing
import os
import pickle
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import autoprune
from autoprune.errors import DataError, RecipeError
from autoprune.evaluators import FineTune, Supernet
from autoprune.evaluators.rounds import Rounds
from autoprune.evaluators.sandwich import Sandwich, random_candidates
from autoprune.sources import training_loader
from autoprune.testing.contracts import EvaluatorContract
from tests.contexts import classes_context, halved, regression_context, study_of
from tests.zoo.attention import EinsumVit


class Plain(nn.Sequential):
    """Linear layers; a hidden unit whose weights and bias are zero is as good as removed."""

    def __init__(self):
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


class Dropping(nn.Sequential):
    """Draws in training, and normalises."""

    def __init__(self):
        super().__init__(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 4))


def made(kind, *args):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*args).eval()


def rows(n=90, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :4].argmax(1)


def context_of(kind=Dropping, data=None, **settings):
    data = autoprune.Data(validation=rows(), batch_size=16) if data is None else data
    return study_of(made(kind), data, evaluator="adaptive_bn", **settings).context


def prepared(context, **settings):
    evaluator = Supernet(**settings)
    evaluator.prepare(context)
    return evaluator


def weights(evaluator):
    """The weights of the largest candidate."""
    return evaluator.build(np.zeros(len(evaluator._context.space.sizes), dtype=np.int64)).state_dict()


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def context():
    return context_of()


CONTEXTS = {
    "tied": partial(classes_context, "tied", "adaptive_bn"),
    "drawing": context_of,
    "sparse": partial(context_of, Plain, space="sparsity"),
}


class Keyword(Plain):
    """Takes its input by name, and nothing else."""

    def forward(self, x):
        return super().forward(x)


@pytest.mark.slow
def test_the_key_of_the_target_holds_for_the_training_data_too():
    x, y = rows()
    batches = [{"x": x[i : i + 15], "kind": y[i : i + 15]} for i in range(0, 90, 15)]
    named = [{"x": batch["x"], "labels": batch["kind"]} for batch in batches]
    data = autoprune.Data(validation=batches, labels="kind")
    found = weights(prepared(context_of(Keyword, data), steps=3, data=batches))
    expected = weights(prepared(context_of(Keyword, autoprune.Data(validation=named)), steps=3, data=named))
    assert_equal(found, expected)
    with pytest.raises(DataError, match="labels='kind' must be a key of every batch"):
        prepared(context_of(Keyword, data), steps=3, data=named)


@pytest.mark.parametrize("name", CONTEXTS, scope="class")
class TestSupernet(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _network(self, name):
        self.name = name

    def make_evaluator(self):
        return Supernet(steps=2)

    def make_context(self):
        return CONTEXTS[self.name]()


class TestSupernetOnKeywordsFloatsAndAMetricOfTheWholeSet(EvaluatorContract):
    def make_evaluator(self):
        return Supernet(steps=2)

    def make_context(self):
        return regression_context("adaptive_bn")

    def test_chunks_of_the_validation_batches_join_up_to_the_whole(self):
        """A metric of the whole set has no chunks."""


def masked(model, context, candidate):
    """Parameters of the whole model, zero where the candidate has none, as functions of the whole ones."""
    edit = context.structure.edit(context.space.pruning(candidate.tolist()))
    found = {}
    for name, whole in model.named_parameters():
        mask = torch.ones_like(whole)
        for dim, kept in edit.slices.get(name, {}).items():
            gone = np.setdiff1d(np.arange(whole.shape[dim]), kept)
            mask.index_fill_(dim, torch.from_numpy(gone), 0)
        if name in edit.zeroed:
            least = whole.detach().abs().flatten().argsort()[: edit.zeroed[name]]
            mask.view(-1)[least] = 0
        found[name] = whole * mask
    return found


@pytest.mark.slow
@pytest.mark.parametrize("space", ["channels", "sparsity"])
def test_shared_weights_get_the_gradients_of_the_masked_model(space):
    context = context_of(Plain, space=space)
    model, other = made(Plain), made(Plain)
    with torch.no_grad():
        for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            same.copy_(parameter)
    candidates, batch = np.stack([halved(context), context.space.sizes - 1]), rows()
    losses = Sandwich(context, model, None, nullcontext).step(batch, candidates)

    logits = other(batch[0])
    given = context.model(batch[0]).log_softmax(1).detach()
    divergence = partial(F.kl_div, reduction="batchmean", log_target=True)
    expected = [F.cross_entropy(logits, batch[1]) + divergence(logits.log_softmax(1), given)]
    for candidate in candidates:
        smaller = functional_call(other, masked(other, context, candidate), (batch[0],))
        expected.append(divergence(smaller.log_softmax(1), logits.log_softmax(1).detach()))
    sum(expected).backward()
    np.testing.assert_allclose(losses, [loss.item() for loss in expected], rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(name).grad, msg=name)


@pytest.mark.slow
def test_a_short_training_makes_candidates_better_and_keeps_the_largest(digits, digits_model):
    data = autoprune.Data(calibration=digits.train, validation=digits.validation, test=digits.test)
    study = study_of(digits_model, data, metric="accuracy", evaluator="adaptive_bn")
    supernet = prepared(study.context, steps=60, data=digits.train, lr=3e-3)
    candidates = np.stack([np.zeros_like(halved(study.context)), halved(study.context)])
    before, after = study.evaluator.evaluate(candidates), supernet.evaluate(candidates)
    assert after[0].metric.mean() > before[0].metric.mean() - 0.02
    assert after[1].metric.mean() > before[1].metric.mean() + 0.1


@pytest.mark.slow
def test_candidates_have_slices_of_the_shared_weights_and_exact_statistics_of_their_own(context):
    supernet, candidate = prepared(context, steps=3), halved(context)
    shared = supernet._learned.weights
    edit = context.structure.edit(context.space.pruning(candidate.tolist()))
    small = supernet.build(candidate)
    for name, parameter in small.named_parameters():
        expected = shared[name]
        for dim, kept in edit.slices.get(name, {}).items():
            expected = expected[kept] if dim == 0 else expected[:, kept]
        assert torch.equal(parameter, expected), name
    x = small[0](torch.cat([batch[0] for batch in context.subsets.calibration]))
    torch.testing.assert_close(small[1].running_mean, x.mean(0))
    torch.testing.assert_close(small[1].running_var, x.var(0, correction=1), rtol=0.1, atol=0)  # averaged over batches


@pytest.mark.slow
def test_heads_and_inner_widths_of_a_transformer_share_weights():
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = autoprune.Data(validation=(images, torch.arange(60) % 4), batch_size=16)
    context = study_of(made(EinsumVit), data, evaluator="adaptive_bn").context
    supernet = prepared(context, steps=2)
    candidates = np.stack([np.zeros_like(halved(context)), halved(context), context.space.sizes - 1])
    outcomes = supernet.evaluate(candidates)
    for candidate, outcome in zip(candidates, outcomes, strict=True):
        logits = supernet.build(candidate).eval()(torch.cat([batch[0] for batch in context.subsets.validation]))
        labels = torch.cat([batch[1] for batch in context.subsets.validation])
        losses = F.cross_entropy(logits, labels, reduction="none").detach().double().numpy()
        np.testing.assert_allclose(outcome.signal, losses, atol=1e-4)


SGD = {
    "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "schedule": lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps),
}


class Augmented(torch.utils.data.Dataset):
    """Adds noise from the global generator of PyTorch, and raises or dies when it has given `most` samples."""

    def __init__(self, most=10**9, end=None):
        self.most, self.end = most, end

    def __len__(self):
        return 45

    def __getitem__(self, i):
        self.most -= 1
        if self.most < 0:
            self.end()
        x, y = rows()
        return x[i] + 0.1 * torch.randn(6), y[i]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, SGD], ids=["default", "of the user's"])
def test_a_training_killed_in_the_middle_goes_on_to_the_same_weights(context, recipe, tmp_path):
    settings = {"steps": 12, "batch_size": 10, "checkpoint_steps": 5, **recipe}
    uninterrupted = prepared(context, data=Augmented(), **settings)
    file = tmp_path / "new folder" / "supernet.safetensors"
    for most in (30, 70, 60):  # samples: before the first checkpoint, two steps after it, and just after the second
        killed = multiprocessing.get_context("fork").Process(
            target=prepared, args=(context,), kwargs={"data": Augmented(most, kill), "checkpoint": file, **settings}
        )
        killed.start()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        assert file.exists() == (most > 30)
    assert_equal(
        weights(prepared(context, data=Augmented(), checkpoint=file, **settings)),
        weights(uninterrupted),
    )
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.slow
def test_the_calibration_samples_are_taken_up_where_they_were_left(context, tmp_path):
    def forward(model, batch, count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] > 80:
            interrupt()
        return model(batch[0])

    settings = {"steps": 20, "checkpoint_steps": 3, "checkpoint": tmp_path / "a"}
    with pytest.raises(KeyboardInterrupt):
        prepared(replace(context, forward=forward), **settings)
    resumed = prepared(context, **settings)
    assert_equal(weights(resumed), weights(prepared(context, **settings | {"checkpoint": None})))


def test_a_finished_checkpoint_is_not_trained_again(context, tmp_path):
    settings = {"steps": 3, "checkpoint": tmp_path / "a", "batch_size": 10}
    first = prepared(context, data=Augmented(), **settings)
    again = prepared(context, data=Augmented(0, interrupt), **settings)
    assert_equal(weights(first), weights(again))
    _same = first.evaluate(halved(context)[None]), again.evaluate(halved(context)[None])
    np.testing.assert_array_equal(_same[0][0].signal, _same[1][0].signal)


@pytest.mark.slow
def test_checkpoints_of_other_trainings_and_damaged_ones_are_refused(context, tmp_path):
    file = tmp_path / "a"
    prepared(context, steps=2, checkpoint=file)
    with pytest.raises(ValueError, match="made with another steps, another seed;"):
        prepared(context, steps=3, seed=1, checkpoint=file)
    with pytest.raises(ValueError, match="made with another data, another space;"):
        prepared(context_of(data=rows(seed=1), space=autoprune.Channels(step=0.5)), steps=2, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RecipeError, match="cannot be read"):
        prepared(context, steps=2, checkpoint=file)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(RecipeError, match="must have the format"):
        prepared(context, steps=2, checkpoint=file)


def test_what_cannot_be_written_without_pickle_is_named(context, tmp_path):
    def strange(optimizer, steps):
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        schedule.history = {1, 2}
        return schedule

    with pytest.raises(ValueError, match="got set at schedule/history"):
        prepared(context, steps=2, schedule=strange, checkpoint=tmp_path / "a", checkpoint_steps=1)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_the_step_and_leaves_the_last_checkpoint(context, tmp_path):
    def loss(outputs, batch, count=[0]):  # noqa: B006
        count[0] += 1
        return outputs.square().mean() * (float("nan") if count[0] > 4 else 1)

    settings = {"steps": 8, "checkpoint": tmp_path / "a", "checkpoint_steps": 2}
    with pytest.raises(ValueError, match=r"that of the largest candidate is nan at step 4; lower lr \(now 0.0005\)"):
        prepared(context, loss=loss, **settings)
    resumed = prepared(context, loss=lambda outputs, batch: outputs.square().mean(), **settings)
    whole = prepared(context, loss=lambda outputs, batch: outputs.square().mean(), steps=8)
    assert_equal(weights(resumed), weights(whole))


@pytest.mark.slow
def test_the_largest_learns_from_the_loss_of_the_user(context):
    zero = prepared(context, steps=60, lr=0.01, loss=lambda outputs, batch: 100 * outputs.square().mean())
    outputs = zero.build(np.zeros_like(halved(context)))(rows()[0])
    assert outputs.square().mean() < 0.2 * context.model(rows()[0]).square().mean()


def test_a_loss_is_asked_for_where_there_is_nothing_to_learn_and_serves_all_candidates(context):
    blind = replace(context, judge=replace(context.judge, distance=None, proportion=None))
    with pytest.raises(ValueError, match="pass Supernet"):
        prepared(blind, steps=1)
    seen = []

    def loss(outputs, batch):
        seen.append(len(outputs))
        return outputs.square().mean()

    prepared(blind, steps=1, subnets=1, loss=loss)
    assert len(seen) == 3


@pytest.mark.slow
def test_searches_of_one_evaluator_and_its_copies_share_one_training(context):
    evaluator = Supernet(steps=2, data=Augmented(100, interrupt), batch_size=45)
    fresh, started = copy.deepcopy(evaluator), copy.deepcopy(FineTune(start=evaluator, steps=1))
    evaluator.prepare(context)
    for other in (evaluator, fresh, started, pickle.loads(pickle.dumps(fresh))):
        other.prepare(context)
    assert_equal(weights(fresh), weights(evaluator))
    assert started.identity.endswith(f" of {evaluator.identity}")
    with pytest.raises(KeyboardInterrupt):
        evaluator.prepare(context_of(data=rows(seed=1), space=autoprune.Channels(step=0.5)))


class Unpicklable(Augmented):
    def __reduce__(self):
        raise TypeError("not to be sent")


@pytest.mark.ray
def test_workers_get_the_weights_and_neither_train_nor_see_the_training_data():
    def search(executor):
        evaluator = Supernet(steps=3, data=Unpicklable(135, interrupt), batch_size=45)
        data = autoprune.Data(validation=rows(), batch_size=16)
        return autoprune.search(
            made(Dropping), "flops <= 60%", data, evaluator=evaluator, executor=executor, trials=8, progress=False
        )

    local, remote = search("local"), search(autoprune.execution.RayExecutor(workers=1, synchronous=True))
    assert {t.status for t in remote.trials} == {"ok"}
    assert [(t.candidate, t.signal) for t in remote.trials] == [(t.candidate, t.signal) for t in local.trials]


@pytest.mark.slow
def test_what_was_pickled_for_one_search_refuses_another(context):
    sent = pickle.loads(pickle.dumps(prepared(context, steps=2, data=rows())))
    with pytest.raises(ValueError, match="without its training data"):
        sent.prepare(context_of(Plain))


@pytest.mark.slow
def test_a_search_says_what_its_dense_network_is_and_builds_what_it_scored(tmp_path):
    data, model = autoprune.Data(validation=rows(), batch_size=16), made(Dropping)
    settings = {"trials": 4, "progress": False, "run_dir": tmp_path / "run"}
    result = autoprune.search(model, "flops <= 60%", data, evaluator=Supernet(steps=4), **settings)
    (note,) = [note for note in result.notes if "largest of the supernet" in note]
    assert f"validation accuracy {result.dense.score:.4f}" in note
    autoprune.save(result.build(), tmp_path / "small.safetensors")
    loaded = autoprune.load(tmp_path / "small.safetensors", model)
    x = torch.cat([batch[0] for batch in result._builder.context.subsets.validation])
    y = torch.cat([batch[1] for batch in result._builder.context.subsets.validation])
    with torch.no_grad():
        assert float((loaded(x).argmax(1) == y).double().mean()) == pytest.approx(result.best().score)
    with pytest.raises(ValueError, match=r"differs in evaluator \(Supernet with weights"):
        autoprune.search(model, "flops <= 60%", data, evaluator=Supernet(steps=5), resume=True, **settings)


@pytest.mark.slow
def test_a_search_killed_while_its_supernet_trains_is_resumed_as_if_nothing_had_happened(tmp_path):
    def search(run_dir, most):
        supernet = Supernet(
            6, Augmented(most, interrupt), batch_size=45, checkpoint=tmp_path / run_dir / "weights", checkpoint_steps=2
        )
        settings = {"trials": 4, "progress": False, "run_dir": tmp_path / run_dir, "resume": True}
        data = autoprune.Data(validation=rows(), batch_size=16)
        result = autoprune.search(made(Dropping), "flops <= 60%", data, evaluator=supernet, **settings)
        return [(trial.candidate, trial.signal) for trial in result.trials]

    with pytest.raises(KeyboardInterrupt):
        search("killed", 150)
    assert search("killed", 225) == search("whole", 1000)


@pytest.mark.slow
def test_agreement_compares_with_the_model_given():
    context = context_of(data=rows()[0])
    dense = np.zeros((1, len(context.space.sizes)), dtype=np.int64)
    (outcome,) = prepared(context, steps=5, lr=0.1).evaluate(dense)
    assert outcome.signal.mean() > 0.01
    (same,) = prepared(context, steps=1, lr=1e-12).evaluate(dense)
    assert same.signal.mean() < outcome.signal.mean()


@pytest.mark.slow
def test_candidates_drawn_cost_anything_from_most_to_least():
    space = context_of(partial(nn.Sequential, *[nn.Linear(6, 6) for _ in range(9)])).space
    levels = random_candidates(space, 400, np.random.default_rng(0)) / (space.sizes - 1)
    assert ((levels >= 0) & (levels <= 1)).all()
    means = levels.mean(1)
    assert (np.histogram(means, 4, (0, 1))[0] > 60).all()
    assert levels.std(1).mean() > 0.1


SOURCES = {
    "arrays": lambda: rows(),
    "numpy": lambda: tuple(array.numpy() for array in rows()),
    "dataset": Augmented,
    "loader": lambda: torch.utils.data.DataLoader(Augmented(), 16, shuffle=True, generator=torch.Generator()),
    "batches": lambda: [rows(16, seed) for seed in range(3)],
}


@pytest.mark.parametrize("name", SOURCES)
def test_rounds_go_on_from_any_position_with_the_same_batches(name):
    def rounds(position=(0, 0)):
        return Rounds(training_loader(SOURCES[name](), 16, "supernet"), 0, position)

    whole, seen = rounds(), []
    for _ in range(9):
        batch = next(whole)
        seen.append((whole.position, batch))
    for i in (0, 2, 4, 7):
        again = rounds(seen[i][0])
        for position, batch in seen[i + 1 :]:
            assert all(torch.equal(a, b) for a, b in zip(next(again), batch, strict=True))
            assert again.position == position
    if name != "batches":
        firsts = [batch[0] for (_, read), batch in seen if read == 1]
        assert len(firsts) > 1
        assert not torch.equal(*firsts[:2])


@pytest.mark.slow
def test_a_batch_of_one_sample_is_passed_over_where_batch_norm_cannot_take_it(context):
    batches = [rows(1), rows(8), rows(1)]
    prepared(context, steps=3, data=batches)
    with pytest.raises(DataError, match="at least 2 samples"):
        prepared(context, steps=3, data=[rows(1)])
    prepared(context_of(Plain), steps=3, data=[rows(1)])


@pytest.mark.parametrize(
    ("data", "message"), [((b for b in [rows()]), "no generator"), ("train", "got str"), ([], "0 ")]
)
def test_training_data_of_unknown_form_or_without_a_second_round_is_refused(context, data, message):
    with pytest.raises(DataError, match=message):
        prepared(context, steps=2, data=data)


def test_mixed_precision_runs_in_bfloat16_and_keeps_the_weights_in_single(context):
    dtypes = []

    def loss(outputs, batch):
        dtypes.append(outputs.dtype)
        return outputs.float().square().mean()

    mixed = prepared(context, steps=2, loss=loss, mixed_precision=True)
    assert set(dtypes) == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(mixed).values()} == {torch.float32, torch.int64}


@pytest.mark.gpu
def test_on_a_gpu_it_trains_in_mixed_precision_and_scores():
    model, data = made(Dropping).cuda(), autoprune.Data(validation=rows(), batch_size=16)
    context = study_of(model, data, evaluator="adaptive_bn").context
    (outcome,) = prepared(context, steps=5).evaluate(halved(context)[None])
    assert np.isfinite(outcome.signal).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "steps must be"), ({"subnets": -1}, "subnets must be"), ({"lr": 0}, "lr must be")],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Supernet(**settings)


@pytest.mark.slow
def test_a_model_without_anything_to_train_is_refused():
    context = context_of()
    context.model.requires_grad_(False)
    with pytest.raises(ValueError, match="none requires gradients"):
        prepared(context)
