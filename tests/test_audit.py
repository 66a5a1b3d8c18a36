"""The audit: what it trains, what it says of the ranking and of the best network, and that nothing done is repeated."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import nn

import autoprune
from autoprune import Audit, SearchResult
from autoprune.audit.audit import spread
from autoprune.evaluators import AdaptiveBN, FineTune
from autoprune.result.audit_report import FOUND, NEW_WEIGHTS, RANDOM_UNITS, UNIFORM, Trained, Variant
from autoprune.result.ranking import rank, tau_difference
from tests.searching import grouped
from zoo import ZOO

X = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
Y = ZOO["mlp"].build()(X).argmax(1)
DATA = autoprune.Data(calibration=(X[:100], Y[:100]), validation=(X[100:200], Y[100:200]), test=(X[200:], Y[200:]))


def search(budget="flops <= 60%", trials=30, **options):
    options = {"optimizer": "nsga2", "evaluator": "adaptive_bn", **options}
    return autoprune.search(ZOO["mlp"].build(), budget, DATA, trials=trials, **grouped(**options))


class Recipe:
    """A few steps of SGD, which remembers what it was given."""

    def __init__(self, fail=lambda model: None):
        self.seen, self.fail = [], fail

    def __call__(self, model, steps=2):
        self.seen.append({"steps": steps, "widths": [m.out_features for m in model if isinstance(m, nn.Linear)][:3]})
        self.seen[-1]["weight"] = model[0].weight.detach().clone()
        self.fail(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(steps):
            rows = torch.randint(100, (50,))
            optimizer.zero_grad()
            F.cross_entropy(model(X[rows]), Y[rows]).backward()
            optimizer.step()


@pytest.fixture(scope="module")
def found():
    return search()


@pytest.fixture(scope="module")
def audited(found):
    return autoprune.audit(found, Recipe(), 8, evaluators=["compensated"])


class TestRanking:
    @pytest.mark.slow
    def test_tau_is_that_of_scipy_ties_included(self):
        generator = np.random.default_rng(0)
        for _ in range(8):
            cheap, trained = generator.integers(0, 6, (2, 12)).astype(float)
            assert rank(cheap, trained, np.ones(12)).tau.value == pytest.approx(kendalltau(cheap, trained).statistic)

    def test_within_the_band_only_pairs_of_nearly_equal_cost_count(self):
        costs = np.array([1, 1.01, 1.02, 1.03, 1.04, 2, 2.01, 2.02, 2.03, 2.04])
        trained = costs.copy()
        cheap = np.where(costs < 1.5, 1 - costs, 10 - costs)  # right between the two, wrong within them
        ranking = rank(cheap, trained, costs)
        assert ranking.tau.value == pytest.approx((25 - 20) / 45)
        assert (ranking.pairs_in_band, ranking.tau_in_band.value) == (20, -1)

    def test_too_few_pairs_in_the_band_say_nothing(self):
        values = np.arange(8.0)
        ranking = rank(values, values, 2**values)
        assert ranking.tau.value == 1
        assert (ranking.pairs_in_band, math.isnan(ranking.tau_in_band.value)) == (0, True)

    def test_the_regret_is_what_training_only_the_first_choices_costs(self):
        cheap, trained = np.array([5.0, 4, 3, 2, 1]), np.array([1.0, 2, 7, 9, 3])
        regret = rank(cheap, trained, np.arange(5.0)).regret
        assert (regret[1].value, regret[3].value) == (8, 2)
        assert regret[3].low == 0

    def test_equal_cheap_scores_go_to_the_cheaper_candidate(self):
        regret = rank(np.zeros(4), np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 0, 2])).regret
        assert regret[1].value == 1

    @pytest.mark.slow
    def test_intervals_hold_what_the_truth_is_about_as_often_as_they_say(self):
        """Kendall's tau of normal pairs with correlation r is 2 / pi * asin(r)."""
        generator, r, hits = np.random.default_rng(0), 0.6, 0
        for i in range(30):
            a, b = generator.normal(size=(2, 24))
            tau = rank(a, r * a + (1 - r * r) ** 0.5 * b, np.arange(24.0) ** 2 + 1, seed=i).tau
            hits += tau.low <= 2 / math.pi * math.asin(r) <= tau.high
        assert 25 <= hits <= 30

    def test_candidates_without_a_score_are_left_out(self):
        values = np.array([1.0, 2, 3, 4, 5, np.nan])
        assert rank(values, values[::-1], np.arange(6.0)).candidates == 4
        assert math.isnan(rank(values[:4], values[2:], np.arange(4.0)).tau.value)

    @pytest.mark.slow
    def test_a_difference_compares_on_the_same_candidates(self):
        generator = np.random.default_rng(0)
        trained = generator.normal(size=20)
        good, bad = trained + 0.1 * generator.normal(size=20), generator.normal(size=20)
        difference = tau_difference(good, bad, trained)
        expected = kendalltau(good, trained).statistic - kendalltau(bad, trained).statistic
        assert difference.value == pytest.approx(expected)
        assert 0 < difference.low < difference.value < difference.high
        assert tau_difference(good, good, trained) == (0, 0, 0)


class TestSpread:
    @pytest.mark.slow
    def test_it_holds_the_best_some_of_the_front_and_some_of_equal_cost(self, found):
        chosen, best = spread(found, 12), found.best()
        ids = [trial.id for trial in chosen]
        near = [trial for trial in chosen if abs(trial.costs["flops"] / best.costs["flops"] - 1) <= 0.05]
        assert len(set(ids)) == 12
        assert best.id in ids
        assert sum(trial in found.front for trial in chosen) >= 5
        assert len(near) >= 3
        assert [t.costs["flops"] for t in chosen] == sorted(t.costs["flops"] for t in chosen)
        assert all(trial.feasible and trial.status == "ok" and any(trial.candidate) for trial in chosen)

    def test_a_small_search_gives_all_it_has_and_a_tiny_one_is_refused(self, found):
        few = replace(found, trials=found.trials[:6])
        assert {t.id for t in spread(few, 16)} == {t.id for t in few.trials if t.feasible and any(t.candidate)}
        with pytest.raises(ValueError, match="at least 4 pruned candidates that were scored, got 0"):
            spread(replace(found, trials=()), 16)

    @pytest.mark.slow
    def test_where_no_trial_meets_the_limit_on_the_score_it_goes_on(self):
        result = search("accuracy >= 0.999", trials=12)
        assert len(spread(result, 6)) == 6


class TestWhatIsTrained:
    @pytest.mark.slow
    def test_every_candidate_gets_the_recipe_once_from_what_is_built(self, found):
        recipe = Recipe()
        result = autoprune.audit(found, recipe, 6, steps=3, repeats=0)
        chosen = spread(found, 6)
        assert [call["steps"] for call in recipe.seen] == [3] * 6
        assert [call["widths"] for call in recipe.seen] == [list(trial.decoded.values()) for trial in chosen]
        for call, trial in zip(recipe.seen, chosen, strict=True):
            assert torch.equal(call["weight"], found.build(trial)[0].weight)
        assert [row.trial for row in result.audit.rows] == [trial.id for trial in chosen]
        assert [row.scores["adaptive_bn"] for row in result.audit.rows] == [trial.score for trial in chosen]
        assert not result.audit.variants

    def test_trained_scores_are_those_of_the_held_out_samples(self, found):
        result = autoprune.audit(found, lambda model: None, 4, repeats=0)
        for row, trial in zip(result.audit.rows, spread(found, 4), strict=True):
            expected = (found.build(trial)(X[200:]).argmax(1) == Y[200:]).double().mean().item()
            assert row.trained == pytest.approx(expected)

    @pytest.mark.slow
    def test_networks_like_the_best_get_new_weights_other_units_and_uniform_widths(self, found):
        recipe = Recipe()
        report = autoprune.audit(found, recipe, 4, repeats=2).audit
        best = found.best()
        built, calls = found.build(best)[0].weight, recipe.seen[4:]
        assert [len(variant.trained) for variant in report.variants.values()] == [2] * 4
        order = [UNIFORM, RANDOM_UNITS, NEW_WEIGHTS, FOUND, UNIFORM, RANDOM_UNITS, NEW_WEIGHTS]
        by_kind = {kind: [c for name, c in zip(order, calls, strict=True) if name == kind] for kind in order}
        for kind in (RANDOM_UNITS, NEW_WEIGHTS, FOUND):
            assert all(call["widths"] == list(best.decoded.values()) for call in by_kind[kind])
        assert torch.equal(by_kind[FOUND][0]["weight"], built)
        dense = ZOO["mlp"].build()[0].weight
        for first, second in (by_kind[RANDOM_UNITS], by_kind[NEW_WEIGHTS]):
            assert not torch.equal(first["weight"], second["weight"])
        for call in by_kind[RANDOM_UNITS]:
            rows = (call["weight"][:, None] == dense[None]).all(2).any(1)
            assert rows.all()
            assert not torch.equal(call["weight"], built)
        assert not (by_kind[NEW_WEIGHTS][0]["weight"][:, None] == dense[None]).all(2).any()

    @pytest.mark.slow
    def test_uniform_widths_cost_no_more_and_little_less(self, found, audited):
        cost, found_cost = (audited.audit.variants[name].cost for name in (UNIFORM, FOUND))
        assert 0.9 * found_cost <= cost <= found_cost == found.best().costs["flops"]

    def test_the_model_and_the_random_states_come_back_unchanged(self, found, global_rng_untouched):
        context = found._builder.context
        before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
        with global_rng_untouched():
            autoprune.audit(found, Recipe(), 4, repeats=1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())

    @pytest.mark.slow
    def test_the_same_seed_gives_the_same_report(self, found, audited):
        again = autoprune.audit(found, Recipe(), 8, evaluators=["compensated"]).audit.to_json()
        assert {**again, "seconds": 0} == {**audited.audit.to_json(), "seconds": 0}

    @pytest.mark.slow
    def test_elements_set_to_zero_stay_zero_in_every_network(self):
        def zeros(model):
            return [int((part.weight == 0).sum()) for part in model if isinstance(part, nn.Linear)]

        def forward(model, batch):
            scored.append(zeros(model))
            return model(batch[0])

        def train(model):
            given.append(zeros(model))
            scored.clear()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01)

        scored, given = [], []
        result = search("nonzero_params <= 40%", space="sparsity", trials=8, forward=forward)
        report = autoprune.audit(result, train, 4, repeats=1).audit
        best = next(count for count, row in zip(given, report.rows, strict=False) if row.trial == report.winner)
        like = dict(zip([kind for kind in report.variants if kind != FOUND], given[4:], strict=True))
        assert sum(best)
        assert like[NEW_WEIGHTS] == like[RANDOM_UNITS] == best
        assert {tuple(count) for count in scored} == {tuple(given[-1])}


class TestFaults:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            (lambda model: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")), "OutOfMemoryError: no memory"),
            (lambda model: model[0].weight.data.fill_(torch.nan), "NaN"),
        ],
    )
    def test_a_training_that_fails_costs_that_candidate_only(self, found, fault, reason):
        calls = []

        def once(model):
            calls.append(1)
            if len(calls) == 2:
                fault(model)

        report = autoprune.audit(found, Recipe(once), 6, repeats=0).audit
        assert [math.isnan(row.trained) for row in report.rows] == [False, True, False, False, False, False]
        assert reason in report.rows[1].reason
        assert report.rankings["adaptive_bn"].candidates == 5
        assert any("1 of 6 trainings and scores failed" in note and reason in note for note in report.notes)

    @pytest.mark.slow
    def test_all_that_fail_leave_a_report_that_says_so(self, found):
        def fail(model):
            raise RuntimeError("no such file")

        report = autoprune.audit(found, fail, 4, repeats=1).audit
        assert "nothing can be said" in report.verdict()
        assert "no such file" in str(report)
        assert report.origin() == ""

    def test_an_evaluator_that_cannot_be_prepared_is_left_out_with_its_reason(self, found):
        class Broken(AdaptiveBN):
            def prepare(self, context):
                raise RuntimeError("no weights to download")

        report = autoprune.audit(found, Recipe(), 4, evaluators=[Broken()], repeats=0).audit
        assert any("Broken was left out: RuntimeError: no weights to download" in note for note in report.notes)
        assert math.isnan(report.rankings["Broken"].tau.value)
        assert report.best_evaluator == "adaptive_bn"

    @pytest.mark.slow
    def test_what_cannot_get_new_weights_is_said_and_a_function_for_it_is_used(self, found, monkeypatch):
        monkeypatch.delattr(nn.Linear, "reset_parameters")
        report = autoprune.audit(found, Recipe(), 4, repeats=1).audit
        assert NEW_WEIGHTS not in report.variants
        assert any("0 (Linear) has parameters and no reset_parameters; pass initialise=" in n for n in report.notes)

        def zeros(model):
            for parameter in model.parameters():
                nn.init.zeros_(parameter)

        recipe = Recipe()
        autoprune.audit(found, recipe, 4, repeats=1, initialise=zeros)
        assert not recipe.seen[-1]["weight"].any()

    def test_an_interrupt_reports_on_what_was_trained(self, found):
        def interrupt(model):
            if len(recipe.seen) == 5:
                raise KeyboardInterrupt

        recipe = Recipe(interrupt)
        report = autoprune.audit(found, recipe, 6, repeats=1).audit
        assert [row.reason for row in report.rows] == [""] * 4 + ["not done"] * 2
        assert "interrupted before everything was trained" in report.notes

    def test_a_loaded_result_is_refused_with_the_way_out(self, found, tmp_path):
        loaded = SearchResult.load(found.save(tmp_path / "result"))
        with pytest.raises(autoprune.FileFormatError, match=r"resume=True"):
            autoprune.audit(loaded, Recipe())

    @pytest.mark.parametrize("wrong", [{"k": 3}, {"repeats": -1}, {"seed": -1}, {"k": 2.5}, {"evaluators": ["best"]}])
    def test_arguments_out_of_range_are_named(self, found, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong)).rstrip("s")):
            autoprune.audit(found, Recipe(), **wrong)


class TestGoingOn:
    @pytest.mark.slow
    def test_no_finished_training_is_repeated(self, found, tmp_path):
        def interrupt(model):
            if len(first.seen) == 7:
                raise KeyboardInterrupt

        first, second, third = Recipe(interrupt), Recipe(), Recipe()
        options = {"repeats": 1, "evaluators": [FineTune(steps=1)], "run_dir": tmp_path}
        whole = autoprune.audit(found, Recipe(), 5, repeats=1, evaluators=[FineTune(steps=1)]).audit.to_json()
        autoprune.audit(found, first, 5, **options)
        with (tmp_path / "audit.jsonl").open("a") as file:
            file.write('\n{"key": ["as fou')  # a crash in the middle of a line
        resumed = autoprune.audit(found, second, 5, **options).audit.to_json()
        again = autoprune.audit(found, third, 5, **options).audit.to_json()
        assert (len(first.seen), len(second.seen), len(third.seen)) == (7, 8 - 6, 0)
        assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
        assert again == resumed

    def test_failures_are_tried_again(self, found, tmp_path):
        def fail(model):
            if len(recipe.seen) == 2:
                raise RuntimeError("disk full")

        recipe, better = Recipe(fail), Recipe()
        autoprune.audit(found, recipe, 4, repeats=0, run_dir=tmp_path)
        report = autoprune.audit(found, better, 4, repeats=0, run_dir=tmp_path).audit
        assert len(better.seen) == 1
        assert not any(math.isnan(row.trained) for row in report.rows)

    def test_another_audit_in_the_folder_is_refused(self, found, tmp_path):
        autoprune.audit(found, Recipe(), 4, repeats=0, run_dir=tmp_path)
        with pytest.raises(ValueError, match=r"run_dir must hold the same audit.*differs in steps, seed"):
            autoprune.audit(found, Recipe(), 4, steps=5, seed=1, repeats=0, run_dir=tmp_path)

    @pytest.mark.slow
    def test_a_search_that_is_resumed_is_audited_in_its_folder(self, tmp_path):
        options = {"run_dir": str(tmp_path), "trials": 10}
        recipe = Recipe()
        autoprune.audit(search(**options), Recipe(), 4, repeats=0, run_dir=str(tmp_path))
        autoprune.audit(search(**options, resume=True), recipe, 4, repeats=0, run_dir=str(tmp_path))
        assert not recipe.seen


def report_of(cheap, trained, costs=None, **changes):
    costs = np.full(len(cheap), 5.0) if costs is None else costs
    rows = tuple(
        Trained(i, float(cost), float(after), {"a": float(before)}, {"a": -float(before)})
        for i, (before, after, cost) in enumerate(zip(cheap, trained, costs, strict=True))
    )
    fields = {"evaluators": ("a",), "metric": "accuracy", "higher_is_better": True, "samples": 100, "cost": "flops"}
    fields |= {"steps": None, "winner": 0, "variants": {}, "seconds": 1.0}
    return Audit(rows, **{**fields, **changes})


class TestReport:
    @pytest.mark.slow
    def test_json_restores_it_with_what_failed(self, audited):
        report = audited.audit
        broken = replace(report, rows=(replace(report.rows[0], trained=math.nan, reason="no memory"), *report.rows[1:]))
        for each in (report, broken):
            restored = Audit.from_json(json.loads(json.dumps(each.to_json(), allow_nan=False)))
            assert restored.to_json() == each.to_json()
            assert str(restored) == str(each)

    @pytest.mark.slow
    def test_it_is_saved_and_loaded_with_the_result(self, found, audited, tmp_path):
        loaded = SearchResult.load(audited.save(tmp_path / "result"))
        assert loaded.audit == audited.audit
        assert found.audit is None
        assert SearchResult.load(found.save(tmp_path / "before")).audit is None
        assert audited.audit.verdict() in " ".join(str(audited).split())

    def test_results_saved_before_there_were_audits_load(self, found, tmp_path):
        path = found.save(tmp_path / "result") / "result.json"
        data = json.loads(path.read_text())
        del data["audit"]
        path.write_text(json.dumps(data))
        assert SearchResult.load(path).audit is None

    @pytest.mark.slow
    def test_it_says_whom_to_trust_and_how_far(self):
        values = np.arange(16.0) / 100
        good = report_of(values, values)
        assert "in 100 % of cases" in good.verdict()
        assert "can be chosen by" in good.verdict()
        noise = np.random.default_rng(0).permutation(values)
        assert "do not choose by it" in report_of(values, noise).verdict()
        spread_out = report_of(values, values, 2.0 ** np.arange(16))
        assert "among equals train several" in spread_out.verdict()

    @pytest.mark.slow
    def test_a_metric_that_falls_is_read_the_other_way_round(self):
        values = np.arange(10.0)
        rising, falling = report_of(values, values), report_of(values, values, higher_is_better=False)
        assert rising.rankings["a"].tau.value == falling.rankings["a"].tau.value == 1
        assert falling.rankings["a"].regret[1].value == 0
        variants = {FOUND: Variant(1.0, (2.0, 2.2)), UNIFORM: Variant(1.0, (3.0, 3.2))}
        assert report_of(values, values, variants=variants).effects["widths"].value == pytest.approx(-1)
        falling = report_of(values, values, variants=variants, higher_is_better=False)
        assert falling.effects["widths"].value == pytest.approx(1)

    @pytest.mark.slow
    def test_the_evaluator_that_did_best_is_named_with_its_lead(self):
        generator = np.random.default_rng(0)
        trained, noise = generator.normal(size=(2, 16))
        report = report_of(noise, trained, evaluators=("a", "b"))
        rows = tuple(
            replace(row, scores={**row.scores, "b": row.trained}, signals={**row.signals, "b": 0.0})
            for row in report.rows
        )
        report = replace(report, rows=rows)
        assert report.best_evaluator == "b"
        assert report.comparison().startswith("b did best")
        assert "to a (" in report.comparison()

    def test_effects_are_differences_of_means_with_pooled_intervals(self):
        variants = {
            FOUND: Variant(5, (0.9, 0.92, 0.94)),
            NEW_WEIGHTS: Variant(5, (0.8, 0.82, 0.84)),
            RANDOM_UNITS: Variant(5, (0.91, 0.93, 0.95)),
        }
        report = report_of(np.arange(5.0), np.arange(5.0), variants=variants)
        assert report.noise == pytest.approx(0.02)
        margin = 2.4469 * 0.02 * (2 / 3) ** 0.5  # Student's t for 6 degrees of freedom
        assert report.effects["weights"] == pytest.approx((0.1, 0.1 - margin, 0.1 + margin), abs=1e-4)
        assert "widths" not in report.effects
        assert "beyond the spread of trainings are weights" in report.origin()

    def test_trainings_that_were_not_repeated_have_no_interval(self):
        variants = {FOUND: Variant(5, (0.9,)), NEW_WEIGHTS: Variant(5, (0.8,))}
        report = report_of(np.arange(5.0), np.arange(5.0), variants=variants)
        assert math.isnan(report.effects["weights"].low)
        assert "trainings were not repeated" in report.origin()

    @pytest.mark.slow
    def test_a_recipe_that_ignores_the_seed_is_noted(self, found):
        report = autoprune.audit(found, lambda model: None, 4, repeats=2).audit
        assert report.variants[FOUND].trained[0] == report.variants[FOUND].trained[1]
        still = replace(report, variants={FOUND: report.variants[FOUND]})
        assert still.noise == 0

    @pytest.mark.slow
    def test_it_is_drawn(self, audited, tmp_path):
        figure = audited.audit.plot(tmp_path / "audit.png")
        assert (tmp_path / "audit.png").stat().st_size > 1000
        titles = [axis.get_title() for axis in figure.axes]
        assert titles[0].startswith("adaptive_bn: tau")
        assert titles[1].startswith("compensated: tau")
        assert titles[2].startswith("networks like trial")


class TestARecoveryAsTheRecipe:
    def test_repeats_differ_by_their_seeds_and_steps_are_the_budget(self, found):
        recipe = autoprune.Recovery(DATA.calibration, ZOO["mlp"].build(), batch_size=50, lr=0.01)
        report = autoprune.audit(found, recipe, 4, steps=3, repeats=2).audit
        assert all(row.trained is not None for row in report.rows)
        first, second = report.variants[FOUND].trained
        assert first != second

    def test_a_checkpoint_is_for_one_model(self, found):
        with pytest.raises(ValueError, match="without checkpoint="):
            autoprune.audit(found, autoprune.Recovery(DATA, checkpoint="state.safetensors"), 4)
