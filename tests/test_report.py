"""Reports: what the page says equals the result, whatever its names are, and nothing in it loads or breaks out."""

import base64
import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune.pareto import hypervolume
from autoprune.protocols import Dimension
from autoprune.result.report.convergence import convergence_of
from autoprune.result.report.data import data_of
from autoprune.result.report.packing import as_script, packed, unpacked
from autoprune.result.report.page import FOLDER, page_of
from autoprune.result.report.widths import width_effects
from autoprune.search_spaces import Channels, Depth, Product
from autoprune.search_spaces.channels import ChannelSpace
from tests.reporting import HOSTILE, Page, made, searched_in
from zoo import ZOO


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A result of a search over widths and depth, and its folder."""
    run_dir = tmp_path_factory.mktemp("searched")
    return searched_in(run_dir), run_dir


def widths_of(outline, effects, candidate):
    """Widths by the rules that the page follows."""
    found = [size for _, size in outline.columns]
    for j, option in enumerate(candidate):
        for column, width in effects[j][option - 1] if option else ():
            found[column] = min(found[column], width)
    for kind, to, of in outline.rules:
        found[to] = min(found[to], max(found[i] for i in of)) if kind == "any" else found[to] * found[of[0]]
    return found


def total(terms, sizes):
    return sum(factor * np.prod([sizes[row] for row in rows]) for factor, rows in terms)


def size(affine, widths):
    fixed, shares = affine
    return fixed + sum(each * widths[column] for column, each in shares)


class TestTheOutline:
    def test_its_layers_have_the_widths_and_parameters_of_the_module_that_is_built(self, searched):
        result, _ = searched
        outline = result.outline
        effects = width_effects(result.space, outline, np.array([t.candidate for t in result.trials]))
        assert any(0 in widths_of(outline, effects, trial.candidate) for trial in result.trials)  # dropped branches
        for trial in result.trials:
            widths = widths_of(outline, effects, trial.candidate)
            sizes = [size(each, widths) for each in outline.sizes]
            modules = dict(result.build(trial).named_modules())
            for layer in outline.layers:
                module = modules.get(layer.name)
                own = sum(p.numel() for p in module.parameters(recurse=False)) if module is not None else 0
                assert total(layer.params, sizes) == own
                if layer.width is not None and isinstance(module, nn.Conv2d | nn.Linear):
                    assert size(layer.width, widths) == module.weight.shape[0]
            assert sum(total(layer.flops, sizes) for layer in outline.layers) == trial.costs["flops"]
            assert sum(total(layer.params, sizes) for layer in outline.layers) == trial.costs["params"]

    def test_it_comes_back_from_a_saved_result_and_from_the_journal(self, searched):
        result, run_dir = searched
        assert autoprune.SearchResult.load(run_dir).outline == result.outline
        assert autoprune.SearchResult.from_journal(run_dir).outline == result.outline

    def test_layers_come_in_forward_order_with_their_classes(self, searched):
        outline = searched[0].outline
        model = ZOO["resnet20"].build()
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        assert [layer.kind for layer in outline.layers] == [kinds[layer.name] for layer in outline.layers]
        order = [name for name, _ in model.named_modules()]
        assert outline.layers[0].name == next(n for n in order if isinstance(model.get_submodule(n), nn.Conv2d))
        assert isinstance(model.get_submodule(outline.layers[-1].name), nn.Linear)

    def test_uniform_candidates_are_at_the_same_place_in_every_ordered_dimension(self, searched):
        result, _ = searched
        ordered = [j for j, d in enumerate(result.space.dimensions) if d.ordered and len(d.options) == 4]
        assert result.outline.uniform
        for candidate in result.outline.uniform:
            assert len({candidate[j] for j in ordered}) <= 2  # the last step of a repair may differ

    def test_held_out_scores_lie_in_their_intervals(self, searched):
        tested = [trial for trial in searched[0].trials if trial.test_score is not None]
        assert tested
        for trial in tested:
            low, high = trial.test_interval
            assert low <= trial.test_score <= high
        saved = autoprune.SearchResult.load(searched[1])
        assert [t.test_interval for t in saved.front] == [t.test_interval for t in searched[0].front]


class TestWidthEffects:
    @pytest.mark.parametrize("settings", [Channels(), Depth(), Product(Channels(step=0.25), Depth())])
    def test_the_least_width_of_any_option_is_that_of_the_candidate(self, settings, searched):
        result, _ = searched
        structure = autoprune.inspect(ZOO["resnet20"].build(), ZOO["resnet20"].inputs()).structure
        space = settings.bind(structure, {g.name: tuple(range(g.size)) for g in structure.groups})
        rng = np.random.default_rng(0)
        candidates = space.canonical(rng.integers(0, space.sizes, (50, len(space.sizes))))
        effects = width_effects(space, result.outline, candidates)
        presence = structure.presence
        expected = presence.effective(space.widths(candidates))
        for candidate, widths in zip(candidates.tolist(), expected.tolist(), strict=True):
            assert widths_of(result.outline, effects, candidate) == widths

    def test_a_width_that_two_dimensions_decide_together_has_no_table(self, searched):
        class Either:
            """A space whose first group shrinks only if two dimensions say so."""

            sizes = np.array([2, 2])

            def widths(self, candidates):
                dense = [n for _, n in searched[0].outline.columns]
                found = np.tile(np.array(dense, dtype=float), (len(candidates), 1))
                found[candidates.all(axis=1), 0] = 1
                return found

        assert width_effects(Either(), searched[0].outline, np.array([[1, 0], [0, 1]])) is not None
        assert width_effects(Either(), searched[0].outline, np.array([[1, 1]])) is None


class TestColumns:
    @pytest.mark.parametrize("measured", [False, True])
    def test_the_first_by_rank_within_limits_is_the_best(self, measured):
        result = made(trials=120, limits=("flops", "latency_ms"), measured=measured)
        columns = data_of(result).columns
        for share in (0.7, 0.5, 0.4, 0.35):
            limit = share * result.dense.costs["flops"]
            latency = columns.predicted["latency_ms"] if measured else range(len(columns.id))
            fits = [
                i for i in latency if columns.rank[i] is not None and result.trials[i].upper_costs["flops"] <= limit
            ]
            best = min(fits, key=lambda i: columns.rank[i])
            assert columns.id[best] == result.best(f"flops <= {100 * share:g}%").id

    def test_equal_columns_are_written_once(self):
        result = made()
        trials = tuple(replace(t, costs={**t.costs, "same": t.costs["params"]}) for t in (result.dense, *result.trials))
        fields = {"dense": trials[0], "trials": trials[1:]}
        found = data_of(replace(result, **fields)).columns.costs
        assert found["same"] == "params"
        assert found["params"] == [t.costs["params"] for t in result.trials]

    @pytest.mark.parametrize(("most", "bits"), [(8, 4), (200, 8), (300, 16)])
    def test_candidates_come_back_dimension_by_dimension_in_few_bits(self, most, bits):
        result = made(trials=401, dimensions=5)
        space = ChannelSpace(
            dimensions=tuple(Dimension(d.name, tuple(range(most, 0, -1))) for d in result.space.dimensions),
            groups=tuple((d.name, most) for d in result.space.dimensions),
            order={d.name: tuple(range(most)) for d in result.space.dimensions},
        )
        chosen = np.random.default_rng(0).integers(0, most, (401, 5))
        trials = tuple(replace(t, candidate=tuple(c)) for t, c in zip(result.trials, chosen.tolist(), strict=True))
        kept = data_of(replace(result, space=space, trials=trials, front=trials[:2], outline=None)).to_json()
        assert kept["candidates"]["bits"] == bits
        raw = np.frombuffer(unpacked(kept["candidates"]["data"]), np.uint16 if bits == 16 else np.uint8)
        options = np.column_stack([raw & 15, raw >> 4]).ravel()[:2005] if bits == 4 else raw
        assert options.reshape(5, 401).T.tolist() == chosen.tolist()

    def test_a_page_may_leave_them_out_and_keeps_those_of_the_front(self):
        result = made(trials=30)
        data = data_of(result, full=False).to_json()
        assert data["candidates"] is None
        assert data["head"]["options"] == [list(trial.candidate) for trial in result.front]


class TestConvergence:
    def test_after_each_trial_it_is_the_hypervolume_of_the_trials_so_far(self):
        result = made(trials=60, seed=3)
        found = convergence_of(result)
        done = [t for t in result.trials if t.status == "ok" and t.feasible]
        points = np.array([(t.costs["flops"], -t.score) for t in done])
        numbers = np.array([result.trials.index(t) + 1 for t in done])
        front = np.array([(t.costs["flops"], -t.score) for t in result.front])
        low, high = front.min(axis=0), front.max(axis=0)
        extent = np.where(high > low, high - low, 1.0)
        for trial, value in zip(found["trial"], found["value"], strict=True):
            expected = hypervolume((points[numbers <= trial] - low) / extent, np.array([1.05, 1.05]))
            assert value == pytest.approx(expected, rel=1e-4)
        assert found["value"] == sorted(found["value"])

    def test_a_search_without_a_front_has_none(self):
        result = replace(made(), front=())
        assert convergence_of(result) is None


class TestPage:
    def test_names_of_any_kind_are_data(self):
        result = made(names=HOSTILE)
        page = Page(page_of(result))
        assert page.bulk["space"]["names"][: len(HOSTILE)] == list(HOSTILE)
        assert page.data["data-head"]["run"]["notes"] == ["a note", *HOSTILE]
        assert len(page.scripts) == 2
        assert [tag for tag, _ in page.tags].count("script") == 5

    def test_the_title_is_escaped(self):
        outline = replace(made().outline, model="<img src=x onerror=alert(1)>")
        page = Page(page_of(replace(made(), outline=outline)))
        assert "img" not in [tag for tag, _ in page.tags]
        assert any("<img src=x" in text for text in page.texts)

    def test_half_of_a_character_does_not_stop_it(self, tmp_path):
        outline = replace(made().outline, model="half \ud83d")
        file = replace(made(), outline=outline).report(tmp_path / "a.html")
        assert "half" in file.read_text("utf-8")

    def test_its_policy_forbids_everything_but_its_own_scripts_and_style(self):
        page = Page(page_of(made()))
        (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        hashes = [
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in page.scripts
        ]
        style = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
        assert rules == {
            "default-src": "'none'",
            "script-src": " ".join(hashes),
            "style-src": f"'sha256-{style}'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
        }

    def test_nothing_in_it_names_another_file(self):
        page = Page(page_of(made()))
        named = [a[key] for _, a in page.tags for key in ("src", "href") if key in a]
        assert sorted(named) == ["#front", "data:,"]
        assert not [a for _, a in page.tags if any(key.startswith("on") or key == "style" for key in a)]

    def test_the_same_result_gives_the_same_bytes(self):
        assert page_of(made()) == page_of(made())

    def test_numbers_that_are_not_finite_become_null(self):
        assert json.loads(as_script({"a": [np.nan, np.inf, 1.5], "b": (1, None)})) == {
            "a": [None, None, 1.5],
            "b": [1, None],
        }
        assert unpacked(packed(b"abc")) == b"abc"

    def test_readers_without_scripts_get_the_front_as_a_table(self):
        result = made()
        page = Page(page_of(result))
        text = " ".join(page.texts)
        for trial in result.front:
            assert re.search(rf"\b{trial.id}\b.*{trial.score:.4f}", text, re.DOTALL)

    def test_a_result_without_outline_or_front_has_a_page(self):
        bare = replace(made(), outline=None, front=())
        page = Page(page_of(bare))
        assert page.bulk["outline"] is None
        assert page.data["data-head"]["run"]["why_empty"]


class TestCommands:
    def test_a_saved_result_names_its_folder_and_the_trials_with_weights(self, searched):
        result, run_dir = searched
        commands = data_of(autoprune.SearchResult.load(run_dir), "runs/my run", "model.py:build").commands
        assert commands.shell == (
            "autoprune build 'runs/my run' --model model.py:build --trial {trial} --output trial-{trial}.safetensors"
        )
        assert commands.saved == sorted(trial.id for trial in result.front)

    def test_the_python_command_builds_the_trial(self, searched):
        result, _ = searched
        position = result.trials.index(result.front[0])
        lines = data_of(result).commands.python.replace("{trial}", str(position))
        names = {"result": result}
        exec(lines, names)
        built = names["small"].state_dict()
        expected = result.build(result.front[0]).state_dict()
        assert built.keys() == expected.keys()
        assert all(torch.equal(built[key], expected[key]) for key in built)

    def test_a_journal_says_that_it_has_no_weights(self, searched):
        commands = data_of(autoprune.SearchResult.from_journal(searched[1])).commands
        assert not commands.shell
        assert not commands.python
        assert "holds no weights" in commands.hint

    def test_the_path_of_a_journal_stands_for_its_folder(self, searched):
        result, run_dir = searched
        found = autoprune.SearchResult.load(run_dir / "journal.sqlite", ZOO["resnet20"].build())
        assert found.front == result.front
        assert data_of(found).commands.saved


def test_the_lock_file_names_no_registry():
    """So that ``npm ci`` asks the one that this machine is set up for."""
    text = (FOLDER / "web" / "package-lock.json").read_text()
    assert "resolved" not in text
    assert "://" not in text
    assert text.count("integrity") > 5
