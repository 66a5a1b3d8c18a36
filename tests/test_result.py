"""Results: choosing, building, saving, loading and looking at what a search found."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import autoprune
from autoprune import Data, Metric, SearchResult
from autoprune.protocols import FAILED
from autoprune.result.builders import weights_file
from tests.searching import grouped
from zoo import ZOO


@pytest.fixture(scope="module")
def vectors():
    x = torch.randn(240, 64, generator=torch.Generator().manual_seed(0))
    return x, ZOO["mlp"].build()(x).argmax(1)


def search(model, data, budget="flops <= 60%", trials=30, **options):
    return autoprune.search(model, budget, data, trials=trials, **grouped(**options))


@pytest.fixture(scope="module")
def found(vectors):
    return search(ZOO["mlp"].build(), vectors)


def feasible(result):
    """The trials that can be best: all but the probes."""
    return [trial for trial in result.trials if trial.feasible]


@pytest.fixture(scope="module")
def with_a_failure(found):
    """The same result, in which the first feasible trial off the front failed."""
    on_front = {trial.id for trial in found.front}
    victim = next(trial for trial in feasible(found) if trial.id not in on_front)
    failed = replace(
        victim, status=FAILED, reason="out of memory", score=math.nan, signal=math.nan, interval=(math.nan, math.nan)
    )
    return replace(found, trials=tuple(failed if trial is victim else trial for trial in found.trials))


class TestBest:
    @pytest.mark.slow
    def test_it_is_the_best_score_within_a_tighter_budget(self, found):
        within = [trial for trial in found.trials if trial.costs["flops"] <= 0.3 * found.dense.costs["flops"]]
        best = found.best("flops <= 30%")
        assert 0 < len(within) < len(found.trials)
        assert best in within
        assert best.score == max(trial.score for trial in within)

    def test_ties_go_to_the_better_signal_then_to_the_lower_cost(self, found):
        first, second, third = (replace(trial, score=2.0, signal=1.0) for trial in feasible(found)[:3])
        costs = sorted([first, second, third], key=lambda trial: trial.costs["flops"])
        tied = replace(found, trials=(*costs[::-1], *feasible(found)[3:]))
        assert tied.best() is costs[0]
        assert replace(found, trials=(*costs, replace(costs[2], signal=0.5))).best().signal == 0.5

    def test_other_costs_than_those_searched_for_can_be_limited(self, found):
        limit = sorted(trial.costs["params"] for trial in feasible(found))[5]
        assert found.best(f"params <= {limit}").costs["params"] <= limit

    def test_limits_on_score_and_cost_hold_together(self, found):
        chosen = found.front[len(found.front) // 2]  # one that both limits leave
        best = found.best(f"accuracy >= {chosen.score} and flops <= {chosen.costs['flops']:.0f}")
        assert best.score >= chosen.score
        assert best.costs["flops"] <= chosen.costs["flops"]

    def test_limits_on_the_score_alone_give_the_cheapest_model(self, found):
        middle = sorted(trial.score for trial in feasible(found))[len(feasible(found)) // 2]
        drop = found.dense.score - middle
        good = [trial for trial in feasible(found) if trial.score >= middle]
        for budget in (f"accuracy >= {middle}", f"accuracy drop <= {drop + 1e-12}"):
            assert found.best(budget).costs["flops"] == min(trial.costs["flops"] for trial in good)

    def test_a_drop_of_a_loss_is_an_increase(self, found):
        middle = sorted(trial.score for trial in feasible(found))[len(feasible(found)) // 2]
        dense = replace(found.dense, score=middle - 0.5)
        loss = replace(found, metric="loss", higher_is_better=False, dense=dense)
        good = [trial for trial in feasible(loss) if trial.score <= middle]
        assert loss.best("loss drop <= 0.5").costs["flops"] == min(trial.costs["flops"] for trial in good)

    def test_when_nothing_is_within_the_budget_the_nearest_is_named(self, found):
        trials = feasible(found)
        nearest = rf"the nearest is trial {min(trials, key=lambda trial: trial.costs['flops']).id} with flops"
        pattern = rf"'flops <= 1%' is met by none of {len(trials)} trials; {nearest}.*again"
        with pytest.raises(autoprune.InfeasibleBudgetError, match=pattern):
            found.best("flops <= 1%")

    def test_a_failed_trial_is_never_the_best(self, found):
        best = found.best()
        failed = tuple(replace(t, status=FAILED) if t is best else t for t in found.trials)
        assert replace(found, trials=failed).best().id != best.id


class TestBuild:
    @pytest.mark.slow
    def test_it_takes_a_trial_a_budget_or_nothing(self, found, vectors):
        best = found.best()
        expected = found.build()(vectors[0])
        assert torch.equal(found.build(best)(vectors[0]), expected)
        tight = found.best("flops <= 30%")
        assert torch.equal(found.build("flops <= 30%")(vectors[0]), found.build(tight)(vectors[0]))

    @pytest.mark.slow
    def test_the_outputs_are_those_that_were_scored(self, vectors):
        x, y = vectors
        data = Data(calibration=(x[:80], y[:80]), validation=(x[80:160], y[80:160]), test=(x[160:], y[160:]))
        result = search(ZOO["mlp"].build(), data, trials=10)
        for trial in result.trials:
            outputs = result.build(trial)(x[80:160])
            assert trial.signal == pytest.approx(F.cross_entropy(outputs, y[80:160]).item(), abs=1e-5)

    @pytest.mark.slow
    def test_nothing_is_shared_with_the_model_or_between_builds(self, vectors):
        model = ZOO["mlp"].build()
        result = search(model, vectors, trials=4)
        first, second, dense = result.build(), result.build(), result.build(result.dense)
        pointers = [
            {tensor.untyped_storage().data_ptr() for tensor in built.state_dict().values()}
            for built in (model, first, second, dense)
        ]
        assert len(set.union(*pointers)) == sum(map(len, pointers))

    def test_the_dense_trial_builds_a_copy(self, found, vectors):
        assert torch.equal(found.build(found.dense)(vectors[0]), ZOO["mlp"].build()(vectors[0]))


class TestSaveAndLoad:
    @pytest.mark.slow
    def test_what_was_saved_is_what_is_loaded(self, with_a_failure, tmp_path):
        with_a_failure.save(tmp_path / "result")
        loaded = SearchResult.load(tmp_path / "result")
        assert loaded.to_json() == with_a_failure.to_json()
        assert loaded.space == with_a_failure.space
        assert loaded.notes == with_a_failure.notes
        (failed,) = (trial for trial in loaded.trials if trial.status == FAILED)
        assert (failed.reason, math.isnan(failed.score)) == ("out of memory", True)
        assert loaded.best("flops <= 30%") == with_a_failure.best("flops <= 30%")
        assert loaded.front == with_a_failure.front
        assert str(loaded) == str(with_a_failure)

    @pytest.mark.slow
    def test_an_interval_that_is_unknown_stays_unknown(self, vectors, tmp_path):
        def mean(forward, batches):
            return sum(forward(batch).mean() for batch in batches)

        result = search(ZOO["mlp"].build(), vectors, trials=3, metric=Metric(mean, True, per_sample=False))
        loaded = SearchResult.load(result.save(tmp_path / "result"))
        assert all(math.isnan(end) for trial in loaded.trials for end in trial.interval)
        assert "nan" not in (tmp_path / "result" / "result.json").read_text().lower()

    @pytest.mark.slow
    def test_with_a_model_of_the_class_the_front_is_built(self, found, vectors, tmp_path):
        found.save(tmp_path / "result")
        fresh = ZOO["mlp"].build()
        for parameter in fresh.parameters():
            torch.nn.init.normal_(parameter)
        loaded = SearchResult.load(tmp_path / "result", model=fresh)
        for trial in loaded.front:
            assert torch.equal(loaded.build(trial)(vectors[0]), found.build(trial)(vectors[0]))

    @pytest.mark.slow
    def test_a_loaded_result_is_saved_again(self, found, tmp_path):
        found.save(tmp_path / "first")
        SearchResult.load(tmp_path / "first", model=ZOO["mlp"].build()).save(tmp_path / "second")
        first, second = (SearchResult.load(tmp_path / name, ZOO["mlp"].build()) for name in ("first", "second"))
        assert first.to_json() == second.to_json()
        for trial in found.front:
            tensors = zip(
                first.build(trial).state_dict().values(), second.build(trial).state_dict().values(), strict=True
            )
            assert all(torch.equal(a, b) for a, b in tensors)

    def test_without_a_model_building_says_how_to_get_one(self, found, tmp_path):
        found.save(tmp_path / "result")
        with pytest.raises(autoprune.FileFormatError, match=r"SearchResult.load\(path, model=model\)"):
            SearchResult.load(tmp_path / "result").build()

    @pytest.mark.parametrize("weights", ["front", "best", "none"])
    def test_weights_are_kept_for_those_asked_for(self, found, tmp_path, weights):
        found.save(tmp_path / "result", weights=weights)
        kept = {"front": found.front, "best": [found.best()], "none": []}[weights]
        files = {weights_file(tmp_path / "result", trial).name for trial in kept}
        dense = {file.name for file in (tmp_path / "result").glob("dense-*.safetensors")}
        assert len(dense) == (weights == "front")
        assert {file.name for file in (tmp_path / "result").iterdir()} == {"result.json", *files, *dense}
        dropped = next(trial for trial in found.trials if trial not in kept)
        with pytest.raises(autoprune.FileFormatError, match=f"trial {dropped.id} was saved without weights"):
            SearchResult.load(tmp_path / "result", ZOO["mlp"].build()).build(dropped)

    def test_unknown_weights_are_refused(self, found, tmp_path):
        with pytest.raises(ValueError, match=r"weights must be one of \['best', 'front', 'none'\], got 'all'"):
            found.save(tmp_path / "result", weights="all")
        assert not (tmp_path / "result").exists()

    def test_another_result_or_a_file_is_not_overwritten(self, found, tmp_path):
        found.save(tmp_path / "result", weights="none")
        (tmp_path / "file").write_text("mine")
        for path in (tmp_path / "result", tmp_path / "file"):
            with pytest.raises(FileExistsError, match=r"path must be a folder without a result.*pass another path"):
                found.save(path)
        assert (tmp_path / "file").read_text() == "mine"

    def test_weights_swapped_between_trials_are_named(self, found, tmp_path):
        found.save(tmp_path / "result")
        first, second = (weights_file(tmp_path / "result", trial) for trial in found.front[:2])
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
        loaded = SearchResult.load(tmp_path / "result", ZOO["mlp"].build())
        for trial in loaded.front[:2]:
            with pytest.raises(
                autoprune.FileFormatError, match=f"does not hold the weights that trial {trial.id} was saved with"
            ):
                loaded.build(trial)

    @pytest.mark.slow
    def test_weights_left_over_from_an_earlier_search_are_not_built(self, found, tmp_path):
        left = next(trial for trial in feasible(found) if trial not in found.front)
        autoprune.save(found.build(), weights_file(tmp_path, left))
        found.save(tmp_path)
        assert not weights_file(tmp_path, left).exists()
        autoprune.save(found.build(), weights_file(tmp_path, left))
        with pytest.raises(autoprune.FileFormatError, match=f"trial {left.id} was saved without weights"):
            SearchResult.load(tmp_path, ZOO["mlp"].build()).build(left)

    @pytest.mark.slow
    def test_a_result_takes_the_place_of_another_without_leaving_any_of_it(self, found, vectors, tmp_path):
        found.save(tmp_path)
        fewer = replace(found, front=found.front[:1])
        fewer.save(tmp_path, replace=True)
        loaded = SearchResult.load(tmp_path, ZOO["mlp"].build())
        assert loaded.to_json() == fewer.to_json()
        assert torch.equal(loaded.build(fewer.front[0])(vectors[0]), found.build(found.front[0])(vectors[0]))
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.slow
    def test_a_save_that_is_cut_short_leaves_the_earlier_one_whole(self, found, vectors, tmp_path, monkeypatch):
        found.save(tmp_path)
        others = reversed(found.front)  # other weights of the same trials, whose files would have the same names
        front = tuple(replace(trial, candidate=o.candidate) for trial, o in zip(found.front, others, strict=True))
        assert front != found.front
        other = replace(found, front=front)

        def cut_short(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("autoprune.result.saving.write_json", cut_short)
        with pytest.raises(KeyboardInterrupt):
            other.save(tmp_path, replace=True)
        loaded = SearchResult.load(tmp_path, ZOO["mlp"].build())
        assert loaded.to_json() == found.to_json()
        for trial in loaded.front:
            assert torch.equal(loaded.build(trial)(vectors[0]), found.build(trial)(vectors[0]))
        monkeypatch.undo()
        other.save(tmp_path, replace=True)
        assert len(list(tmp_path.iterdir())) == 2 + len(found.front)  # what all of them share is in one more
        assert SearchResult.load(tmp_path, ZOO["mlp"].build()).build(found.front[0]) is not None

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("trials", 0, "costs", "flops"), "many"),
            (("trials", 0, "candidate"), [-1, 0, 0]),
            (("trials", 0, "candidate", 0), 10**6),
            (("trials", 0, "candidate"), [0]),
            (("trials", 0, "costs"), {}),
            (("trials", 1, "id"), 0),
            (("dense", "interval"), [0.5]),
            (("seconds",), "long"),
            (("limits",), {}),
            (("limits", "flops"), None),
            (("budget",), "half"),
            (("budget",), "accuracies >= 0.5"),
            (("front", 0), 999),
            (("space", "dimensions", 0, "options"), [48, 60]),
            (("space", "dimensions", 0, "order", 0), 1),
            (("space", "type"), []),
            (("weights",), {"0": {"file": "../trial.safetensors", "sha256": ""}}),
            (("audit",), {"rows": 3}),
        ],
    )
    def test_a_value_of_another_kind_is_named(self, found, tmp_path, place, value):
        file = found.save(tmp_path / "result", weights="none") / "result.json"
        data = json.loads(file.read_text())
        inner = data
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        file.write_text(json.dumps(data))
        with pytest.raises(
            autoprune.FileFormatError, match=r"result\.json is not a result of autoprune, or is damaged"
        ):
            SearchResult.load(tmp_path / "result", ZOO["mlp"].build())

    def test_there_is_no_pickle_on_disk(self, found, tmp_path):
        for file in found.save(tmp_path / "result").iterdir():
            content = file.read_bytes()
            if file.suffix == ".json":
                json.loads(content)
                continue
            length = int.from_bytes(content[:8], "little")  # safetensors: its header's length, JSON, then raw numbers
            header = json.loads(content[8 : 8 + length])
            del header["__metadata__"]
            assert len(content) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())

    def test_a_folder_without_a_result_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"path must be a folder written by result.save"):
            SearchResult.load(tmp_path)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[: len(text) // 2],
            lambda text: "",
            lambda text: "[1, 2]",
            lambda text: '{"name": "some other tool"}',
            lambda text: text.replace("autoprune-result", "autotune-result"),
            lambda text: text.replace('"version": 1', '"version": 2'),
            lambda text: text.replace('"front"', '"fronts"'),
            lambda text: text.replace('"type": "channels"', '"type": "blocks"'),
        ],
    )
    def test_a_damaged_or_foreign_file_is_named(self, found, tmp_path, damage):
        file = found.save(tmp_path / "result", weights="none") / "result.json"
        file.write_text(damage(file.read_text()))
        with pytest.raises(
            autoprune.FileFormatError, match=r"result\.json is not a result of autoprune, or is damaged"
        ):
            SearchResult.load(tmp_path / "result")


class TestLookingAtIt:
    @pytest.mark.slow
    def test_the_frame_has_a_row_for_each_trial(self, with_a_failure):
        frame = with_a_failure.to_frame()
        assert len(frame) == 30
        fixed = [
            "trial",
            "flops",
            "params",
            "memory_bytes",
            "nonzero_params",
            "score",
            "low",
            "high",
            "signal",
            "distortion",
            "test_score",
        ]
        assert list(frame.columns) == [*fixed, "status", "feasible", "reason", "front", "0", "3", "6"]
        front = frame[frame["front"]]
        assert set(front["trial"]) == {trial.id for trial in with_a_failure.front}
        assert front["test_score"].notna().all()
        assert frame[frame["status"] == FAILED]["score"].isna().all()

    @pytest.mark.slow
    def test_the_plot_of_all_but_failures_and_probes_is_written_and_returned(self, with_a_failure, tmp_path):
        axes = with_a_failure.plot(tmp_path / "front.png")
        assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "front.png").stat().st_size < 200_000
        assert "flops" in axes.get_xlabel()
        assert "accuracy" in axes.get_ylabel()
        assert len(axes.collections[0].get_offsets()) == len(feasible(with_a_failure)) - 1 < 29

    def test_a_picture_of_an_unknown_format_is_refused_in_words_and_not_begun(self, found, tmp_path):
        with pytest.raises(
            ValueError, match=r"path must end in a format of pictures, one of \[.*'png'.*got .*front.docx"
        ):
            found.plot(tmp_path / "front.docx")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_two_limits_are_plotted_without_a_line(self, vectors):
        result = search(ZOO["mlp"].build(), vectors, budget=["flops <= 60%", "params <= 60%"], trials=6)
        assert result.plot().containers[0].lines[0].get_linestyle() == "None"

    def test_an_empty_result_is_plotted_and_printed(self, found):
        empty = replace(found, trials=(), front=())
        empty.plot()
        assert "0 trials" in str(empty)

    @pytest.mark.slow
    @pytest.mark.parametrize("budget", ["flops <= 60%", ["flops <= 60%", "params <= 60%", "memory_bytes <= 99%"]])
    def test_the_text_fits_a_terminal(self, budget):
        result = search(ZOO["mlp"].build(), None, budget=budget, trials=8, example=torch.randn(2, 64))
        lines = str(result).splitlines()
        assert max(map(len, lines)) <= 100
        assert sum(line.split()[:1] == ["dense"] for line in lines) == 1

    def test_the_table_shows_a_long_front_by_both_ends_and_what_lies_between(self, found):
        trials = tuple(replace(found.front[0], id=i) for i in range(57))
        text = str(replace(found, trials=trials, front=trials))
        rows = [line.split()[0] for line in text.split("\n\n")[0].splitlines()]
        shown = [int(name) for name in rows if name.isdigit()]
        assert (shown[0], shown[-1], len(shown)) == (0, 56, 20)
        assert "37 between them not shown" in text

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.5, "0.5"), (999.9, "999.9"), (1404.0, "1.4K"), (999_600.0, "1000K"), (1e6, "1M"), (2.3e9, "2.3G")],
    )
    def test_costs_have_three_digits_and_a_prefix(self, value, text):
        from autoprune.result.tables import engineering

        assert engineering(value) == text
