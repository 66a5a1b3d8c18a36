"""Trainings of shared weights that stop and go on, are shared by searches, and are sent to workers."""

import copy
import multiprocessing
import os
import pickle
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import autoprune
from autoprune.errors import FileFormatError
from autoprune.evaluators import FineTune, Supernet
from tests.contexts import halved
from tests.supernet.networks import (
    Augmented,
    Dropping,
    Plain,
    assert_equal,
    context_of,
    interrupt,
    made,
    prepared,
    rows,
    weights,
)

SGD = {
    "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "schedule": lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps),
}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


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
    with pytest.raises(FileFormatError, match="cannot be read"):
        prepared(context, steps=2, checkpoint=file)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(FileFormatError, match=r"not a checkpoint of a training .*it names no format"):
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
        return autoprune.search(made(Dropping), "flops <= 60%", data, evaluator=evaluator, execution=executor, trials=8)

    local, remote = search("local"), search(autoprune.execution.RayExecutor(workers=1, synchronous=True))
    assert {t.status for t in remote.trials} == {"ok"}
    assert [(t.candidate, t.signal) for t in remote.trials] == [(t.candidate, t.signal) for t in local.trials]


@pytest.mark.slow
def test_what_was_pickled_for_one_search_refuses_another(context):
    sent = pickle.loads(pickle.dumps(prepared(context, steps=2, data=rows())))
    with pytest.raises(ValueError, match="without its training data"):
        sent.prepare(context_of(Plain))


@pytest.mark.slow
def test_a_search_killed_while_its_supernet_trains_is_resumed_as_if_nothing_had_happened(tmp_path):
    def search(run_dir, most):
        supernet = Supernet(
            6, Augmented(most, interrupt), batch_size=45, checkpoint=tmp_path / run_dir / "weights", checkpoint_steps=2
        )
        settings = {"trials": 4, "execution": autoprune.Execution(run_dir=tmp_path / run_dir, resume=True)}
        data = autoprune.Data(validation=rows(), batch_size=16)
        result = autoprune.search(made(Dropping), "flops <= 60%", data, evaluator=supernet, **settings)
        return [(trial.candidate, trial.signal) for trial in result.trials]

    with pytest.raises(KeyboardInterrupt):
        search("killed", 150)
    assert search("killed", 225) == search("whole", 1000)
