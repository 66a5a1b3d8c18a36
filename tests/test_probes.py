"""Probes: trials over the limit that say what one dimension costs, and the tables made of them."""

import json
import logging
import math
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from typer.testing import CliRunner

import autoprune
from autoprune import Channels, Data, Metric, SearchResult
from autoprune.cli.app import app
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.optimizers import RandomSearch
from autoprune.protocols import FAILED, OK
from autoprune.study.progress import Progress
from zoo import ZOO

TRIALS = 40
EIGHTHS = Channels(step=0.125, min_fraction=0.125)  # three dimensions of 8 options: 21 single changes


def settled_mlp():
    """The network with batch-norm statistics of its own data, so that few units removed change little."""
    model = ZOO["mlp"].build().eval()
    recalibrate(model, [torch.randn(240, 64, generator=torch.Generator().manual_seed(0))], model)
    return model


class Scan:
    """Asks for every option of every dimension alone, whatever it costs, and then searches at random."""

    def __init__(self, problem, seed):
        rest, self.told = RandomSearch(problem, seed), []
        self.ask_more, self.tell_rest = rest.ask, rest.tell
        rows = np.repeat(np.eye(len(problem.sizes), dtype=np.int64), problem.sizes - 1, axis=0)
        self.queue = list(rows * np.concatenate([np.arange(1, size) for size in problem.sizes])[:, None])

    def ask(self, n):
        now, self.queue = self.queue[:n], self.queue[n:]
        return np.array(now) if now else self.ask_more(n)

    def tell(self, evaluations):
        self.told.append(evaluations)
        self.tell_rest(evaluations)


@pytest.fixture(scope="module")
def data():
    x = torch.randn(240, 64, generator=torch.Generator().manual_seed(0))
    y = settled_mlp()(x).argmax(1)
    return Data((x[:80], y[:80]), (x[80:160], y[80:160]), (x[160:], y[160:]))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("probes") / "run"


@pytest.fixture(scope="module")
def scan():
    return []


@pytest.fixture(scope="module")
def found(data, run_dir, scan):
    def make(problem, seed):
        scan.append(Scan(problem, seed))
        return scan[0]

    options = {"trials": TRIALS, "space": EIGHTHS, "execution": autoprune.Execution(run_dir=run_dir)}
    result = autoprune.search(settled_mlp(), "flops <= 50%", data, optimizer=make, **options)
    result.save(run_dir)
    return result


@pytest.fixture(scope="module")
def probes(found):
    return [trial for trial in found.trials if trial.costs["flops"] > found.limits["flops"]]


class TestInTheLoop:
    @pytest.mark.slow
    def test_trials_over_the_limit_are_evaluated_and_marked(self, found, probes):
        assert len(found.trials) == TRIALS
        assert 10 < len(probes) < TRIALS - 10
        assert [trial.feasible for trial in found.trials] == [trial not in probes for trial in found.trials]
        assert {trial.status for trial in probes} == {OK}
        assert all(sum(i > 0 for i in trial.candidate) == 1 for trial in probes)

    def test_they_are_never_on_the_front_though_some_are_better_than_all_of_it(self, found, probes):
        assert max(trial.score for trial in probes) > max(trial.score for trial in found.front)
        assert all(trial.feasible for trial in found.front)
        feasible = [trial for trial in found.trials if trial.feasible]
        beaten = {
            t.id
            for t in feasible
            for o in feasible
            if o.costs["flops"] <= t.costs["flops"] and (-o.score, o.signal) < (-t.score, t.signal)
        }
        assert {trial.id for trial in found.front} == {trial.id for trial in feasible} - beaten

    @pytest.mark.parametrize("budget", [None, "flops <= 90%", "accuracy >= 0"])
    def test_they_are_never_the_best(self, found, budget):
        assert found.best(budget).feasible

    def test_when_there_is_nothing_else_best_says_so(self, found, probes):
        only = replace(found, trials=tuple(probes), front=())
        with pytest.raises(
            autoprune.InfeasibleBudgetError, match=rf"no trial succeeded.*{len(probes)} of .* are probes"
        ):
            only.best()

    def test_the_result_says_how_many_there_were(self, found, probes):
        assert any(note.startswith(f"{len(probes)} of {TRIALS} trials are probes") for note in found.notes)
        assert f"{len(probes)} of {TRIALS} trials are probes" in str(found)

    @pytest.mark.slow
    def test_a_search_without_probes_says_nothing_of_them(self, data):
        options = {"trials": 4, "optimizer": "nsga2"}
        result = autoprune.search(settled_mlp(), "flops <= 50%", data, **options)
        assert "probes" not in str(result)
        assert all(trial.feasible for trial in result.trials)

    @pytest.mark.slow
    def test_the_log_says_so_and_the_progress_counts_the_front_without_them(self, data, caplog, monkeypatch):
        shown = []
        monkeypatch.setattr(Progress, "due", lambda self, done: True)
        monkeypatch.setattr(Progress, "update", lambda self, done, failed, best, front, _: shown.append((done, front)))
        options = {"trials": 24, "space": EIGHTHS, "optimizer": Scan}
        with caplog.at_level(logging.INFO, logger="autoprune"):
            result = autoprune.search(settled_mlp(), "flops <= 20%", data, **options)
        assert any("trials are probes" in record.getMessage() for record in caplog.records)
        assert [done for done, _ in shown] == list(range(1, 25))
        first = next(i for i, trial in enumerate(result.trials) if trial.feasible)
        assert {front for _, front in shown[:first]} == {0}
        assert shown[-1][1] == len(result.front) > 0

    def test_the_optimizer_is_told_the_distortion(self, found, scan):
        told = {tuple(e.candidates[0].tolist()): e.distortion[0] for e in scan[0].told}
        assert told == {trial.candidate: trial.distortion for trial in found.trials}
        assert all(distortion > 0 for distortion in told.values())


class TestOnDisk:
    @pytest.mark.slow
    def test_the_journal_gives_the_same_trials_and_front(self, found, run_dir):
        read = SearchResult.from_journal(run_dir)
        assert [trial.id for trial in read.front] == [trial.id for trial in found.front]
        for one, other in zip(read.trials, found.trials, strict=True):
            assert (one.feasible, one.evaluations[0].distortion) == (other.feasible, other.distortion)
            assert replace(one.evaluations[0], seconds=0) == replace(other.evaluations[0], seconds=0)
        assert any("are probes" in note for note in read.notes)

    @pytest.mark.parametrize("read", [SearchResult.load, SearchResult.from_journal])
    def test_tables_of_what_was_read_are_those_of_the_search(self, found, run_dir, read):
        for table in ("distortion", "signal", "metric"):
            one, other = read(run_dir).sensitivity(table), found.sensitivity(table)
            np.testing.assert_allclose(one.losses, other.losses, rtol=1e-12)
            np.testing.assert_allclose(one.stderr, other.stderr, rtol=1e-12)

    def test_results_saved_before_there_were_probes_load(self, found, tmp_path):
        old = json.loads(json.dumps(found.to_json()))
        for trial in (old["dense"], *old["trials"]):
            del trial["feasible"]
            for evaluation in trial["evaluations"]:
                for name in ("distortion", "distortion_stderr", "signal_change_stderr", "metric_change_stderr"):
                    del evaluation[name]
        (tmp_path / "result.json").write_text(json.dumps(old))
        loaded = SearchResult.load(tmp_path)
        assert all(trial.feasible for trial in loaded.trials)
        assert math.isnan(loaded.trials[0].distortion)

    @pytest.mark.parametrize("finished", [True, False])
    def test_the_shell_shows_the_front_without_them(self, found, probes, run_dir, tmp_path, finished):
        if not finished:
            with sqlite3.connect(run_dir / "journal.sqlite") as journal:
                journal.execute("VACUUM INTO ?", (str(tmp_path / "journal.sqlite"),))
            journal.close()
        shown = CliRunner().invoke(app, ["front", "--json", str(run_dir if finished else tmp_path)])
        front = json.loads(shown.stdout)
        assert [trial["id"] for trial in front["front"]] == [trial.id for trial in found.front]
        assert front["probes"] == len(probes)

    def test_the_frame_shows_them_as_infeasible_and_the_picture_leaves_them_out(self, found, probes):
        frame = found.to_frame()
        assert set(frame[~frame["feasible"]]["trial"]) == {trial.id for trial in probes}
        assert not (frame["front"] & ~frame["feasible"]).any()
        (axes,) = found.plot().figure.axes
        assert len(axes.collections[0].get_offsets()) == TRIALS - len(probes)


class TestSensitivity:
    def outputs(self, data, result, trial):
        with torch.no_grad():
            return result.build(trial).eval()(data.validation[0])

    def test_distortion_is_the_divergence_of_the_built_models(self, found, data):
        table = found.sensitivity()
        dense = Categorical(logits=self.outputs(data, found, found.dense))
        for trial in found.trials[:21:4]:
            each = kl_divergence(dense, Categorical(logits=self.outputs(data, found, trial))).double().numpy()
            j = int(np.flatnonzero(trial.candidate)[0])
            where = j, trial.candidate[j]
            assert table.losses[where] == pytest.approx(each.mean(), rel=1e-3)
            assert table.stderr[where] == pytest.approx(each.std(ddof=1) / 80**0.5, rel=1e-3)

    def test_signal_and_metric_are_paired_changes_to_the_dense_model_higher_worse(self, found, data):
        labels = data.validation[1]
        outputs = self.outputs(data, found, found.dense)
        for table, measure in (
            ("signal", lambda out: torch.nn.functional.cross_entropy(out, labels, reduction="none")),
            ("metric", lambda out: -(out.argmax(1) == labels).double()),
        ):
            made = found.sensitivity(table)
            for trial in found.trials[:21:4]:
                change = (measure(self.outputs(data, found, trial)) - measure(outputs)).double()
                j = int(np.flatnonzero(trial.candidate)[0])
                assert made.losses[j, trial.candidate[j]] == pytest.approx(change.mean().item(), abs=1e-5)
                assert made.stderr[j, trial.candidate[j]] == pytest.approx(change.std().item() / 80**0.5, abs=1e-5)

    def test_dense_costs_nothing_and_what_was_not_measured_is_unknown(self, found):
        failed = next(t for t in found.trials if t.candidate == (0, 3, 0))
        broken = replace(failed, status=FAILED, evaluations=())
        trials = tuple(broken if t is failed else t for t in found.trials if t.candidate != (5, 0, 0))
        table = replace(found, trials=trials).sensitivity()
        assert (table.losses[:, 0] == 0).all()
        assert set(zip(*np.nonzero(np.isnan(table.losses)), strict=True)) == {(0, 5), (1, 3)}
        assert np.isnan(table.of((5, 1, 1)))
        assert table.of((1, 0, 2)) == table.losses[0, 1] + table.losses[2, 2]

    def test_dimensions_of_fewer_options_are_padded(self, found):
        short = replace(found.space, dimensions=(replace(found.space.dimensions[0], options=(48, 24)),))
        trials = tuple(replace(found.trials[0], candidate=(1,), id=i) for i in range(2))
        longer = replace(found.space, dimensions=(*short.dimensions, *found.space.dimensions[1:]))
        padded = replace(found, space=longer, trials=()).sensitivity()
        assert padded.losses.shape == (3, 8)
        assert replace(found, space=short, trials=trials).sensitivity().losses.shape == (1, 2)
        assert len(padded.to_frame()) == 2 + 8 + 8

    def test_text_and_frame_hold_the_table(self, found):
        table = found.sensitivity()
        lines = str(table).splitlines()
        assert lines[0] == "distortion of one dimension at a time, where measured"
        assert len({len(line) for line in lines[3:]}) == 1
        assert lines[4].split()[:5] == ["0", "48", "0", "42", f"{table.losses[0, 1]:.3g}"]
        frame = table.to_frame()
        np.testing.assert_array_equal(frame["loss"].to_numpy().reshape(3, 8), table.losses)
        assert frame["option"].tolist()[:3] == [48, 42, 36]

    def test_an_unknown_table_is_refused(self, found):
        with pytest.raises(ValueError, match=r"table must be one of \['distortion', 'signal', 'metric'\], got 'loss'"):
            found.sensitivity("loss")

    @pytest.mark.slow
    def test_a_metric_of_the_whole_set_has_changes_without_error_and_distortion_if_watched(self, data):
        def mean(forward, batches):
            return sum(forward(batch).mean() for batch in batches)

        metric = Metric(mean, higher_is_better=True, per_sample=False)
        result = autoprune.search(settled_mlp(), "flops <= 50%", data, metric=metric, optimizer=Scan, trials=4)
        table = result.sensitivity("metric")
        assert np.isfinite(table.losses[0, 1:5]).all()
        assert np.isnan(table.stderr[0, 1:5]).all()
        assert (result.sensitivity().losses[0, 1:5] > 0).all()


def with_distortion(found, value):
    """The same trials with the distortion that `value` gives for their candidates."""
    trials = tuple(
        replace(t, evaluations=(replace(t.evaluations[0], distortion=value(np.array(t.candidate))),))
        for t in found.trials
    )
    return replace(found, trials=trials)


class TestAdditivity:
    @pytest.mark.slow
    def test_additive_losses_have_slope_and_correlations_of_one(self, found):
        fit = with_distortion(found, lambda c: float(c @ [1.0, 2.0, 3.0])).additivity()["distortion"]
        assert (fit.r2, fit.slope, fit.spearman) == pytest.approx((1, 1, 1))
        assert len(fit.joint) == sum(t.feasible and np.count_nonzero(t.candidate) > 1 for t in found.trials)

    def test_losses_that_grow_faster_together_have_a_steeper_slope_and_the_same_order(self, found):
        def loss(c):
            total = float(c @ [1.0, 2.0, 3.0])
            return total if np.count_nonzero(c) == 1 else total**2

        fit = with_distortion(found, loss).additivity()["distortion"]
        assert fit.spearman == pytest.approx(1)
        assert fit.slope > 2
        assert fit.r2 < 1

    def test_it_is_reported_for_every_table(self, found):
        report = found.additivity()
        lines = str(report).splitlines()
        assert [line.split()[0] for line in lines[2:]] == ["distortion", "signal", "metric"]
        frame = report.to_frame()
        assert frame["spearman"].tolist() == [fit.spearman for fit in report.fits.values()]
        x, y = report["signal"].summed, report["signal"].joint
        assert report["signal"].r2 == pytest.approx(
            1 - np.polyfit(x, y, 1, full=True)[1][0] / ((y - y.mean()) ** 2).sum()
        )

    def test_a_table_without_measurements_is_nan_beside_the_others(self, found):
        report = with_distortion(found, lambda c: None).additivity()
        assert math.isnan(report["distortion"].r2)
        assert math.isnan(report["distortion"].spearman)
        assert 0 < report["signal"].r2 <= 1

    def test_equal_losses_have_no_correlation(self, found):
        assert math.isnan(with_distortion(found, lambda c: 1.0).additivity()["distortion"].spearman)

    def test_too_few_trials_name_what_was_not_measured_alone(self, found):
        joint = tuple(t for t in found.trials if np.count_nonzero(t.candidate) > 1)
        with pytest.raises(ValueError, match=rf"at least 5 feasible.*got 0 of {len(joint)}; not measured alone: 0=.*"):
            replace(found, trials=joint).additivity()
        with pytest.raises(ValueError, match=r"got 0 of 0; search with"):
            replace(found, trials=found.trials[:21]).additivity()
