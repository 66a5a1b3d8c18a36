"""The shortlist: what it trains and for how long, that the best after training wins, and that nothing else changes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import autoprune
from autoprune import Shortlist
from autoprune.errors import FileFormatError, InfeasibleBudgetError
from tests.searching import grouped
from zoo import ZOO

X = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
Y = ZOO["mlp"].build()(X).argmax(1)
DATA = autoprune.Data(calibration=(X[:100], Y[:100]), validation=(X[100:200], Y[100:200]), test=(X[200:], Y[200:]))
RECIPE = autoprune.Recovery((X[:100], Y[:100]), batch_size=50)


def search(budget="flops <= 60%", trials=30, **options):
    return autoprune.search(
        ZOO["mlp"].build(), budget, DATA, trials=trials, **grouped(evaluator="adaptive_bn", **options)
    )


@pytest.fixture(scope="module")
def found():
    return search()


class Watched:
    """Training that notes what it is given, and makes networks of a given number of parameters good and others bad."""

    def __init__(self, good=(), fail=()):
        self.good, self.fail, self.seen = good, fail, []

    def __call__(self, model, steps):
        size = sum(parameter.numel() for parameter in model.parameters())
        self.seen.append((size, steps, model[0].weight.detach().clone()))
        if size in self.fail:
            raise RuntimeError("does not converge")
        with torch.no_grad():
            model[-1].weight.mul_(1.0 if size in self.good else -1.0)


class Interrupted:
    """Training that Ctrl-C ends in a call of the given number."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, model, steps):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt


def size_of(result, trial):
    return sum(parameter.numel() for parameter in result.build(trial).parameters())


class TestTraining:
    def test_all_are_trained_for_a_quarter_and_the_best_quarter_from_the_start_again(self, found):
        watched = Watched()
        chosen = autoprune.shortlist(found, watched, k=8, steps=20)
        built = {row.trial.id: found.build(row.trial)[0].weight for row in chosen.rows}
        assert chosen.steps == (5, 20)
        assert [steps for _, steps, _ in watched.seen] == [5] * 8 + [20] * 2
        assert [len(row.scores) for row in chosen.rows] == [2] * 2 + [1] * 6
        for _, _, weight in watched.seen:
            assert any(weight.shape == other.shape and torch.equal(weight, other) for other in built.values())

    def test_one_step_has_one_round(self, found):
        assert autoprune.shortlist(found, Watched(), k=4, steps=1).steps == (1,)

    def test_the_best_after_training_wins_whatever_its_score_was(self, found):
        rows = autoprune.shortlist(found, Watched(), k=6, steps=4).rows
        sizes = [size_of(found, row.trial) for row in rows]
        worst = max(rows, key=lambda row: row.trial.signal)
        assert sizes.count(size_of(found, worst.trial)) == 1
        chosen = autoprune.shortlist(found, Watched(good=(size_of(found, worst.trial),)), k=6, steps=4)
        assert chosen.best.id == worst.trial.id
        assert chosen.rows[0].signals[-1] == min(row.signals[-1] for row in chosen.rows)

    def test_a_recipe_trains_them_and_brings_scores_up(self, found):
        chosen = autoprune.shortlist(found, RECIPE, k=4, steps=40)
        assert chosen.rows[0].scores[-1] > chosen.best.score
        small = found.build(chosen.best)
        autoprune.recover(small, recipe=RECIPE, steps=40)
        loss = F.cross_entropy(small(X[100:200]), Y[100:200]).item()
        assert loss == pytest.approx(chosen.rows[0].signals[-1], rel=1e-4)  # the same training, in the same order

    def test_zeros_stay_zero(self):
        result = search("stored_bytes <= 60%", trials=12, space=autoprune.Sparsity())

        def train(model, steps):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1)
            zeros.append(model)

        zeros = []
        chosen = autoprune.shortlist(result, train, k=2, steps=1)
        kept = result.build(chosen.rows[0].trial)
        assert any((parameter == 0).any() for parameter in kept.parameters())
        pairs = zip(kept.parameters(), zeros[0].parameters(), strict=True)
        assert all((after[before == 0] == 0).all() for before, after in pairs if before.ndim > 1)


class TestCandidates:
    def test_they_are_within_the_budget_with_the_best_and_uniform_widths(self, found):
        chosen = autoprune.shortlist(found, Watched(), k=8, steps=1)
        trials = [row.trial for row in chosen.rows]
        assert len({trial.candidate for trial in trials}) == len(trials) == 8
        assert found.best() in trials
        assert sum(row.uniform for row in chosen.rows) == 1
        limit = found.limits["flops"]
        assert all(trial.costs["flops"] <= limit for trial in trials)
        assert sum(trial.costs["flops"] >= 0.9 * limit for trial in trials) >= 4

    def test_a_tighter_budget_may_be_given(self, found):
        chosen = autoprune.shortlist(found, Watched(), k=50, steps=1, budget="flops <= 45%")
        assert 2 <= len(chosen.rows) < 50
        assert all(row.trial.costs["flops"] <= 0.45 * found.dense.costs["flops"] for row in chosen.rows)
        with pytest.raises(InfeasibleBudgetError, match="the nearest is trial"):
            autoprune.shortlist(found, Watched(), budget="flops <= 0.1%")

    def test_a_training_that_raises_costs_one_candidate(self, found):
        first = autoprune.shortlist(found, Watched(), k=4, steps=1).rows
        chosen = autoprune.shortlist(found, Watched(fail=(size_of(found, first[0].trial),)), k=4, steps=1)
        (failed,) = [row for row in chosen.rows if row.reason]
        assert failed is chosen.rows[-1]
        assert "does not converge" in failed.reason
        assert math.isnan(failed.scores[0])
        assert "failed" in str(chosen)
        sizes = {size_of(found, row.trial) for row in first}
        with pytest.raises(
            InfeasibleBudgetError, match=r"no candidate could be trained for 1 steps; .*does not converge"
        ):
            autoprune.shortlist(found, Watched(fail=sizes), k=4, steps=1)

    def test_a_longer_training_that_raises_lets_the_next_one_move_up(self, found):
        plain = autoprune.shortlist(found, Watched(), k=6, steps=8)
        trials = {size_of(found, row.trial): row.trial.id for row in plain.rows}
        seen = []

        def train(model, steps):
            size = sum(parameter.numel() for parameter in model.parameters())
            if steps == 8:
                seen.append(trials[size])
                if len(seen) <= 2:
                    raise RuntimeError("diverges")
            Watched()(model, steps)

        chosen = autoprune.shortlist(found, train, k=6, steps=8)
        assert {row.trial.id for row in chosen.rows[:2]} == set(seen[2:])
        assert len(seen) == 4
        assert [bool(row.reason) for row in chosen.rows] == [False] * 4 + [True] * 2

        def never(model, steps):
            if steps == 8:
                raise RuntimeError("diverges")

        with pytest.raises(InfeasibleBudgetError, match=r"no candidate could be trained for 8 steps; .*diverges"):
            autoprune.shortlist(found, never, k=6, steps=8)

    def test_limits_on_the_score_do_not_count_before_training(self):
        result = search(["flops <= 30%", "accuracy >= 0.999"], trials=8)
        with pytest.raises(InfeasibleBudgetError):
            result.best()
        chosen = autoprune.shortlist(result, Watched(), k=4, steps=1)
        assert len(chosen.rows) == 4
        again = autoprune.shortlist(result, Watched(), k=4, steps=1, budget=["flops <= 30%", "accuracy >= 0.999"])
        assert again == chosen

    def test_a_search_that_limits_no_cost_or_finds_the_dense_model_alone_is_refused(self):
        result = search("accuracy >= 0.3", trials=4)
        assert set(result.limits) == {"flops"}
        with pytest.raises(ValueError, match=r"budget must limit a cost, .* got 'accuracy >= 0\.3'"):
            autoprune.shortlist(result, RECIPE)
        assert autoprune.shortlist(result, Watched(), k=2, steps=1, budget="flops <= 80%").rows
        with pytest.raises(InfeasibleBudgetError, match="met by the dense model alone; search again"):
            autoprune.shortlist(search("flops <= 100%", trials=1), RECIPE)


class TestRest:
    @pytest.mark.parametrize(("at", "known"), [(3, [1, 1, 0, 0]), (5, [1, 1, 1, 1]), (6, [2, 1, 1, 1])])
    def test_ctrl_c_returns_what_is_known(self, found, at, known):
        chosen = autoprune.shortlist(found, Interrupted(at), k=4, steps=8)
        assert [len(row.scores) for row in chosen.rows] == known
        assert len(str(chosen).splitlines()) == 2 + 4

    def test_ctrl_c_before_anything_is_known_is_raised(self, found):
        with pytest.raises(KeyboardInterrupt):
            autoprune.shortlist(found, Interrupted(1), k=4, steps=8)

    def test_the_same_call_gives_the_same_and_changes_nothing(self, found):
        state = torch.get_rng_state()
        before = {name: value.clone() for name, value in found._builder.context.model.state_dict().items()}
        one, two = (autoprune.shortlist(found, RECIPE, k=3, steps=2) for _ in range(2))
        assert one == two
        assert isinstance(one, Shortlist)
        assert torch.equal(state, torch.get_rng_state())
        after = found._builder.context.model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    def test_it_prints_a_table(self, found):
        chosen = autoprune.shortlist(found, Watched(), k=4, steps=8)
        lines = str(chosen).splitlines()
        assert lines[0].split()[:2] == ["trial", "flops"]
        assert "2 steps" in lines[0]
        assert "8 steps" in lines[0]
        assert len(lines) == 2 + 4
        assert sum("uniform" in line for line in lines) == 1

    def test_what_it_cannot_work_with_is_refused(self, found, tmp_path):
        found.save(tmp_path / "saved")
        loaded = autoprune.SearchResult.load(tmp_path / "saved", model=ZOO["mlp"].build())
        with pytest.raises(FileFormatError, match="shortlist needs a result with its model and samples"):
            autoprune.shortlist(loaded, RECIPE)
        with pytest.raises(TypeError, match=r"result must be what autoprune\.search returned, got 5"):
            autoprune.shortlist(5, RECIPE)
        with pytest.raises(TypeError, match=r"train_fn must be a function train_fn\(model, steps\)"):
            autoprune.shortlist(found, lambda model: None)
        with pytest.raises(ValueError, match="k must be an integer of at least 2"):
            autoprune.shortlist(found, RECIPE, k=1)
        with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
            autoprune.shortlist(found, RECIPE, steps=0)
        with pytest.raises(ValueError, match="Recovery without checkpoint="):
            autoprune.shortlist(found, replace(RECIPE, checkpoint=tmp_path / "state.safetensors"))
        with pytest.raises(ValueError, match=r"steps must be at least 80, .* steps_to=20 networks, got 40"):
            autoprune.shortlist(found, replace(RECIPE, steps_to=20))
        with pytest.raises(ValueError, match="budget must limit a cost"):
            autoprune.shortlist(found, RECIPE, budget="accuracy >= 10%")
