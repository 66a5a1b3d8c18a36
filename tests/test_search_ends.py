"""Ends of searches, the cost of failures, and their records in the journal."""

import itertools
import math
import re

import pytest
import torch

import autoprune
from autoprune import Channels
from autoprune.execution import LocalExecutor
from autoprune.journal.journal import Journal
from autoprune.protocols import FAILED, OK
from tests.oracle import count_macs, count_params
from tests.searching import WITH_AND_WITHOUT_PROBES, Watched, assert_within_the_limits_or_probes, quick, undominated
from tests.user_functions import raise_out_of_memory


class TestNoBetterThanAConstant:
    @pytest.mark.slow
    def test_a_network_that_knows_nothing_any_more_is_named(self, digits_model, data):
        result = quick(digits_model, "flops <= 4%", data, trials=2, optimizer="random", evaluator="adaptive_bn")
        (note,) = [note for note in result.notes if "constant output" in note]
        labels = data.validation[1]
        share = max((labels == label).float().mean().item() for label in labels.unique())
        constant = float(re.search(r"every sample ([0-9.]+);", note).group(1))
        assert constant <= share + 1e-4
        assert max(trial.score for trial in result.trials if trial.feasible) <= constant

    @pytest.mark.slow
    def test_one_that_knows_something_is_not(self, digits_model, data):
        result = quick(digits_model, "flops <= 60%", data, trials=2)
        assert not any("constant output" in note for note in result.notes)

    @pytest.mark.slow
    @pytest.mark.parametrize(("budget", "near"), [("flops <= 4%", True), ("flops <= 60%", False)])
    def test_of_one_that_knows_little_scores_before_training_tell_little(self, digits_model, data, budget, near):
        result = quick(digits_model, budget, data, trials=2, optimizer="random")
        notes = [note for note in result.notes if "is closer to a constant output" in note]
        best = max(trial.score for trial in result.trials if trial.feasible)
        assert len(notes) == near, (best, result.notes)
        if near:
            pattern = r"accuracy ([0-9.]+), .* constant output, ([0-9.]+), than to the dense model, ([0-9.]+):"
            told, constant, dense = map(float, re.search(pattern, notes[0]).groups())
            assert (told, dense) == pytest.approx((best, result.dense.score), abs=1e-4)
            assert constant < told < (constant + dense) / 2

    @pytest.mark.slow
    def test_a_constant_that_has_no_score_is_not_spoken_of(self, mlp, vectors):
        def correlation(forward, batches):
            outputs = torch.cat([forward(batch)[:, 0] for batch in batches])
            pair = torch.stack([outputs, torch.cat([batch[0][:, 0] for batch in batches])])
            return float(torch.corrcoef(pair)[0, 1])

        metric = autoprune.Metric(correlation, higher_is_better=True, per_sample=False)
        result = quick(mlp, "flops <= 60%", vectors, trials=2, metric=metric)
        assert result.front
        assert not any("constant output" in note for note in result.notes)

    @pytest.mark.slow
    def test_without_time_left_no_further_pass_is_made(self, mlp, vectors, monkeypatch):
        monkeypatch.setattr("autoprune.study.constant_output.score_of_constant", None)
        result = quick(mlp, "flops <= 60%", vectors, trials=100_000, max_seconds=2.0)
        assert result.stopped == "time"


class TestStopping:
    @pytest.mark.slow
    def test_max_seconds_ends_the_search_early(self, digits_model, data):
        result = quick(digits_model, "flops <= 50%", data, trials=100_000, max_seconds=1.0)
        assert result.stopped == "time"
        assert len(result.trials) < 5_000

    @pytest.mark.slow
    @WITH_AND_WITHOUT_PROBES
    def test_a_small_space_is_exhausted(self, mlp, vectors, optimizer, probes):
        halves = Channels(options=(1.0, 0.5))
        result = quick(mlp, "flops <= 60%", vectors, trials=100, space=halves, optimizer=optimizer)
        assert result.stopped == "exhausted"
        dims = [(a, b, c) for a in (48, 24) for b in (32, 16) for c in (24, 12)]
        macs = {w: 64 * w[0] + w[0] * w[1] + w[1] * w[2] + w[2] * 10 for w in dims}
        within = {widths for widths, cost in macs.items() if cost <= 0.6 * macs[dims[0]]}
        assert {tuple(trial.decoded.values()) for trial in result.trials if trial.feasible} == within
        assert_within_the_limits_or_probes(result, probes)

    @pytest.mark.slow
    def test_an_interrupt_returns_the_front_so_far(self, mlp, vectors, tmp_path):
        def interrupt_the_fifth(calls):
            if calls == 4:
                raise KeyboardInterrupt

        evaluator = Watched(before=interrupt_the_fifth)
        result = quick(mlp, "flops <= 50%", vectors, trials=20, evaluator=evaluator, run_dir=tmp_path)
        assert result.stopped == "interrupted"
        assert len(result.trials) == 3  # the first evaluation was the dense model
        assert {trial.id for trial in result.front} == undominated(result)
        assert count_macs(result.build(), (vectors[0][:1],)) == result.best().costs["flops"]
        journal = Journal.open(tmp_path)
        assert sorted(row.status for row in journal.trials()) == [OK] * 3 + ["pending"] * 5
        journal.close()

    @pytest.mark.slow
    def test_an_interrupt_while_the_front_is_tested_keeps_the_result(self, mlp, vectors, monkeypatch):
        evaluator = Watched()
        test = evaluator.test

        def interrupted(candidate):
            if evaluator.tests == 2:
                raise KeyboardInterrupt
            return test(candidate)

        monkeypatch.setattr(evaluator, "test", interrupted)
        result = quick(mlp, "flops <= 50%", vectors, trials=30, evaluator=evaluator)
        assert result.stopped == "interrupted"
        assert len(result.trials) == 30
        assert [trial.id for trial in result.front if trial.test_score is not None] == [result.best().id]  # comes first

    @pytest.mark.slow
    def test_an_error_outside_of_candidates_is_raised_and_the_journal_keeps_the_trials(self, mlp, vectors, tmp_path):
        class Broken(LocalExecutor):
            def gather(self):
                if len(self._queue) == 5:
                    raise OSError("the node is gone")
                return super().gather()

        with pytest.raises(OSError, match="the node is gone"):
            quick(mlp, "flops <= 50%", vectors, trials=20, execution=Broken(), run_dir=tmp_path)
        journal = Journal.open(tmp_path)
        assert sorted(row.status for row in journal.trials()) == [OK] * 3 + ["pending"] * 5
        journal.close()


def raise_error(outputs):
    raise RuntimeError("sizes do not match")


class TestFailures:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            (raise_error, "RuntimeError: sizes do not match"),
            (raise_out_of_memory, "OutOfMemoryError: no memory left"),
            (lambda outputs: outputs * math.nan, "the score of 96 of 96 samples is NaN or infinite"),
            (lambda outputs: outputs[:3], "ValueError: Expected input batch_size (3) to match target batch_size (96)."),
        ],
        ids=["error", "memory", "nan", "shape"],
    )
    def test_a_failing_candidate_costs_one_trial_and_leaves_its_reason(self, mlp, vectors, tmp_path, fault, reason):
        def narrow(model, outputs):
            return fault(outputs) if model[0].out_features < 24 else outputs

        result = quick(mlp, "flops <= 50%", vectors, trials=24, evaluator=Watched(fault=narrow), run_dir=tmp_path)
        failed = {trial.id for trial in result.trials if trial.decoded["0"] < 24}
        assert len(result.trials) == 24
        assert 0 < len(failed) < 24
        assert {trial.id for trial in result.trials if trial.status == FAILED} == failed
        assert not failed & {trial.id for trial in result.front}
        journal = Journal.open(tmp_path)
        for trial, row in zip(result.trials, journal.trials(), strict=True):
            assert (trial.status, trial.reason) == (row.status, row.reason)
            assert trial.reason == (reason if trial.id in failed else "")
            assert math.isnan(trial.score) == (trial.id in failed)
        journal.close()
        assert f"{len(failed)} failed" in str(result)

    @pytest.mark.slow
    def test_when_every_candidate_fails_best_says_why(self, mlp, vectors):
        dense = count_params(mlp)

        def pruned_fails(model, outputs):
            return outputs if count_params(model) == dense else raise_error(outputs)

        result = quick(mlp, "flops <= 50%", vectors, evaluator=Watched(fault=pruned_fails))
        assert result.front == ()
        with pytest.raises(autoprune.InfeasibleBudgetError, match=r"no trial succeeded.*sizes do not match"):
            result.best()
        assert "0 on the front" in str(result)
        assert f"{len(result.trials)} of {len(result.trials)} trials failed with" in " ".join(str(result).split())

    @pytest.mark.slow
    def test_of_several_reasons_the_commonest_is_printed_with_an_empty_front(self, mlp, vectors):
        dense, calls = count_params(mlp), itertools.count()

        def pruned_fails(model, outputs):
            if count_params(model) == dense:
                return outputs
            raise RuntimeError("disk is on fire" if next(calls) % 4 else f"number {next(calls)}")

        result = quick(mlp, "flops <= 50%", vectors, trials=12, evaluator=Watched(fault=pruned_fails))
        printed = " ".join(str(result).split())
        assert re.search(r"the front is empty: 12 of 12 trials failed, \d+ of them with .*disk is on fire", printed)


class TestJournal:
    @pytest.mark.slow
    def test_it_holds_every_trial(self, mlp, vectors, tmp_path):
        result = quick(mlp, "flops <= 50%", vectors, trials=12, run_dir=tmp_path / "runs" / "a")
        journal = Journal.open(tmp_path / "runs" / "a")
        rows, meta = journal.trials(), journal.meta()
        journal.close()
        for trial, row in zip(result.trials, rows, strict=True):
            assert (row.id, row.candidate, row.costs) == (trial.id, trial.candidate, dict(trial.costs))
            (evaluation,) = row.evaluations
            assert evaluation.metric == pytest.approx(trial.score)
            assert evaluation.signal == pytest.approx(trial.signal)
            assert evaluation.samples == 96
        assert (meta["budget"], meta["seed"], meta["metric"]) == (result.budget, 0, "accuracy")
        assert meta["space"] == result.space.to_json()

    @pytest.mark.slow
    def test_it_can_be_read_while_the_search_runs(self, mlp, vectors, tmp_path):
        finished = []

        def look(calls):
            if calls:
                journal = Journal.open(tmp_path)
                finished.append(sum(row.status == OK for row in journal.trials()))
                journal.close()

        quick(mlp, "flops <= 50%", vectors, trials=6, evaluator=Watched(before=look), run_dir=tmp_path)
        assert finished == list(range(6))
