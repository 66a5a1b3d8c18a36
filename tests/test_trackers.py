"""Searches in the stores of other tools, read back with the tools' own readers."""

import json
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import pytest
import torch
from torch import nn

import autoprune
from autoprune.execution import trackers
from tests.resuming import Counting, search

TRIALS = 6


def short(run_dir=None, resume=False, **options):
    return search(run_dir, resume, **{"trials": TRIALS, **options})


@pytest.fixture(scope="module")
def result():
    return short(optimizer="auto", trials=12)


def test_a_study_holds_what_the_result_does(result):
    study = result.to_optuna()
    directions = [direction.name for direction in study.directions]
    assert directions == ["MAXIMIZE" if result.higher_is_better else "MINIMIZE", "MINIMIZE"]
    assert study.metric_names == [result.metric, "flops"]
    assert [(t.user_attrs["trial"], t.params, t.values) for t in study.trials] == [
        (t.id, dict(t.decoded), [t.score, t.costs["flops"]]) for t in result.trials
    ]
    assert all(
        t.user_attrs["params"] == mine.costs["params"] for t, mine in zip(study.trials, result.trials, strict=True)
    )


def test_the_pareto_front_of_a_study_is_that_of_the_result_by_score_and_cost(result):
    over = 1.2 * result.limits["flops"]
    score = 1.0 if result.higher_is_better else 0.0
    probe = replace(result.front[0], id=99, score=score, costs={**result.front[0].costs, "flops": over}, feasible=False)
    study = replace(result, trials=(*result.trials, probe)).to_optuna()
    best = {(trial.values[0], trial.values[1]) for trial in study.best_trials}
    mine = {(trial.score, trial.costs["flops"]) for trial in result.front}
    assert best <= mine  # where scores tie, the signal decides here, so that ours may have more
    assert max(best) == max(mine)


def test_failed_and_raced_trials_keep_their_fate():
    class Failing(Counting):
        def evaluate(self, candidates, chunk=None):
            if self.count == 2:
                self.count += 1
                raise ValueError("no such candidate")
            return super().evaluate(candidates, chunk)

    study = short(evaluator=Failing()).to_optuna()
    (failed,) = [trial for trial in study.trials if trial.state.name == "FAIL"]
    assert failed.values is None
    assert "no such candidate" in failed.user_attrs["reason"]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.first(x).relu()
        return x + self.second(x).relu()


def test_options_that_are_no_numbers_are_written_as_words():
    result = autoprune.search(
        Residual(), "flops <= 80%", example=torch.ones(2, 8), space="depth", evaluator="adaptive_bn", trials=3
    )
    for trial, mine in zip(result.to_optuna().trials, result.trials, strict=True):
        assert trial.params == {name: str(option) for name, option in mine.decoded.items()}


def test_a_search_adds_its_trials_to_a_storage_as_they_end(tmp_path):
    storage = f"sqlite:///{tmp_path}/optuna.db"
    seen = []

    class Reading:
        def on_trial(self, trial):
            (study,) = optuna.get_all_study_summaries(storage)
            seen.append(study.n_trials)

        def on_end(self, result):
            pass

    result = short(tmp_path / "a", storage=storage, callbacks=[Reading()])
    assert seen == list(range(TRIALS))  # the storage comes after the callbacks
    study = optuna.load_study(study_name="a", storage=storage)
    assert [trial.user_attrs["trial"] for trial in study.trials] == [trial.number for trial in study.trials]
    assert study.user_attrs["front"] == [trial.id for trial in result.front]
    assert study.user_attrs["stopped"] == "trials"


def test_a_resumed_search_continues_its_study_and_doubles_no_trial(tmp_path):
    storage = f"sqlite:///{tmp_path}/optuna.db"
    short(tmp_path / "a", storage=storage, evaluator=Counting(3))
    short(tmp_path / "a", True, storage=storage, evaluator=Counting())
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    assert sorted(trial.user_attrs["trial"] for trial in trials) == list(range(TRIALS))


def test_a_second_search_gets_a_study_of_its_own(tmp_path):
    storage = optuna.storages.InMemoryStorage()
    short(tmp_path / "one" / "a", storage=storage)
    short(tmp_path / "two" / "a", storage=storage)
    assert optuna.get_all_study_names(storage) == ["a", "a (2)"]


@pytest.mark.parametrize("storage", ["runs/optuna.db", "sqlite:////no/such/folder/optuna.db"])
def test_a_storage_that_cannot_be_opened_is_refused_before_anything_is_evaluated(storage):
    evaluator = Counting()
    with pytest.raises(ValueError, match="storage must be a storage of Optuna or its URL"):
        short(storage=storage, evaluator=evaluator)
    assert evaluator.count == -1


@pytest.mark.parametrize("storage", [3, optuna.storages.InMemoryStorage, "", ["sqlite://"]])
def test_what_is_no_storage_is_refused_by_the_execution(storage):
    with pytest.raises((TypeError, ValueError), match="storage must be an Optuna storage, its URL such as"):
        autoprune.Execution(storage=storage)


def test_optuna_dashboard_lists_the_trials_of_a_run(tmp_path):
    dashboard = pytest.importorskip("optuna_dashboard", exc_type=ImportError)
    storage = f"sqlite:///{tmp_path}/optuna.db"
    result = short(tmp_path / "a", storage=storage)

    class Silent(WSGIRequestHandler):
        def log_message(self, *args):
            pass

    server = make_server("127.0.0.1", 0, dashboard.wsgi(storage), handler_class=Silent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:

        def get(path):
            with urlopen(f"http://127.0.0.1:{server.server_port}{path}") as answer:
                return json.load(answer)

        (summary,) = get("/api/studies")["study_summaries"]
        assert summary["study_name"] == "a"
        found = get(f"/api/studies/{summary['study_id']}?after=0")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert [trial["values"] for trial in found["trials"]] == [[t.score, t.costs["flops"]] for t in result.trials]
    assert {name["name"] for name in found["trials"][0]["params"]} == {d.name for d in result.space.dimensions}


@pytest.mark.parametrize("store", ["folder", "database"])
def test_mlflow_gets_a_step_for_each_trial_and_the_result(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a database has its artifacts
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow and its dependencies
        mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
        uri = (tmp_path / "runs").as_uri() if store == "folder" else f"sqlite:///{tmp_path}/mlflow.db"
        hook = trackers.MLflow("digits", tracking_uri=uri, run_name="small")
        result = short(callbacks=[hook])
        assert not [note for note in result.notes if "raised" in note]
        client = mlflow.MlflowClient(uri)
        run = client.get_run(hook.run_id)
        assert run.info.status == "FINISHED"
        assert run.info.run_name == "small"
        assert run.data.params["budget"] == "flops <= 50%"
        for name, values in {
            "score": [trial.score for trial in result.trials],
            "cost/flops": [trial.costs["flops"] for trial in result.trials],
        }.items():
            history = sorted(client.get_metric_history(hook.run_id, name), key=lambda one: one.step)
            assert [one.step for one in history] == list(range(TRIALS))
            assert [one.value for one in history] == values
        stored = json.loads(Path(client.download_artifacts(hook.run_id, "result.json", str(tmp_path))).read_text())
        assert stored["front"] == [trial.id for trial in result.front]


def test_tensorboard_reads_the_events_of_a_search(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard and its dependencies
        reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError)
        result = short(callbacks=[trackers.TensorBoard(tmp_path / "events")])
        assert not [note for note in result.notes if "raised" in note]
        events = reader.EventAccumulator(str(tmp_path / "events"))
        events.Reload()
    scores = events.Scalars("score")
    assert [event.step for event in scores] == list(range(TRIALS))
    assert [event.value for event in scores] == pytest.approx([trial.score for trial in result.trials])
    assert events.Tags()["images"] == ["front"]
    assert {"settings/text_summary", "front/text_summary"} <= set(events.Tags()["tensors"])


def test_wandb_writes_a_run_without_a_network(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of wandb and its dependencies
        wandb = pytest.importorskip("wandb", exc_type=ImportError)
        result = short(callbacks=[trackers.WeightsAndBiases(mode="offline", dir=tmp_path)])
        wandb.teardown()  # ends its process
    assert not [note for note in result.notes if "raised" in note]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (trackers.MLflow, "mlflow"),
        (lambda: trackers.TensorBoard("events"), "tensorboard"),
        (trackers.WeightsAndBiases, "wandb"),
    ],
    ids=["mlflow", "tensorboard", "wandb"],
)
def test_a_missing_package_is_named_in_a_note_and_costs_no_trial(make, package, monkeypatch):
    missing = "torch.utils.tensorboard" if package == "tensorboard" else package
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    result = short(callbacks=[make()])
    assert len(result.trials) == TRIALS
    (note,) = [note for note in result.notes if "raised" in note]
    assert f"pip install {package}" in note
