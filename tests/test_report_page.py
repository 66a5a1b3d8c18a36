"""The page of a report in a real browser: nothing is asked for, and what it shows and does is what Python says."""

import csv
import filecmp
import re
import shutil
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest

from autoprune.result.recipe import read_slices
from tests.browser import WEB, Browser, node_modules, why_no_browser
from tests.reporting import HOSTILE, made, searched_in

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "there is one")]
LIST, TABLE = "#list", "#all"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("downloads")) as found:
        yield found


@pytest.fixture(scope="module")
def result():
    """A result of 60 trials with names of every kind."""
    return made(trials=60, dimensions=8, names=HOSTILE, limits=("flops", "latency_ms"), measured=True)


@pytest.fixture
def page(browser, result, tmp_path):
    browser.open(result.report(tmp_path / "front.html"))
    return browser


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("searched")
    return searched_in(run_dir), run_dir


def choose(page, trial):
    """Choose a trial of the front in the list."""
    page.click(f"#point-{trial.id}")
    page.wait(f"document.getElementById('candidate-title').textContent.startsWith('Trial {trial.id}')")
    page.wait("document.getElementById('pin') !== null")


def cells(page, selector):
    """Texts of a table, row by row."""
    script = (
        "[...document.querySelectorAll(arguments[0] + ' tbody tr')].map((r) => [...r.children].map((c) => c.innerText))"
    )
    return page.run(script, selector)


def most_alone(result):
    """The trial furthest from any other in the chart, so that the pointer can hit no other."""
    done = [t for t in result.trials if t.status == "ok"]
    points = np.array([(t.costs["flops"], t.score) for t in done])
    points = (points - points.min(axis=0)) / np.ptp(points, axis=0)
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2) + 9 * np.eye(len(done))
    return done[int(gaps.min(axis=1).argmax())]


def set_slider(page, number, value):
    script = "(() => {const s = document.getElementById(`budget-${arguments[0]}`); s.value = arguments[1]; "
    page.run(script + "s.dispatchEvent(new Event('input'));})(...arguments)", number, value)


class TestTheFile:
    def test_it_says_nothing_on_the_console_and_asks_for_nothing(self, page):
        page.click("#csv")
        assert page.messages() == []
        assert page.requests() == []

    def test_names_are_shown_as_they_are_and_do_nothing(self, page, result):
        assert page.run("document.title") == f"Chain: {result.budget}"
        assert page.run("document.querySelectorAll('script').length") == 5
        choose(page, result.front[0])
        assert page.run("[...document.querySelectorAll('#layers code')].map((e) => e.title)") == [
            dimension.name for dimension in result.space.dimensions
        ]

    @pytest.mark.parametrize("width", [390, 1280, 1920])
    def test_it_is_no_wider_than_the_window(self, page, width):
        page.show(width=width)  # charts follow the window in a frame of their own
        page.wait(f"window.innerWidth == {width} && document.documentElement.scrollWidth <= {width}", seconds=10)

    def test_a_result_without_a_front_is_shown(self, browser, tmp_path):
        browser.open(replace(made(), trials=(), front=(), outline=None).report(tmp_path / "bare.html"))
        assert browser.messages() == []
        assert "Choose a point" in browser.find("#candidate-body").text


class TestChoosing:
    def test_a_click_on_a_point_shows_its_candidate(self, page, result):
        from selenium.webdriver.common.action_chains import ActionChains

        trial = most_alone(result)
        canvas = page.find("#front-chart")
        page.run("arguments[0].scrollIntoView({block: 'center'})", canvas)
        where = page.run(
            "charts.getInstanceByDom(arguments[0]).convertToPixel('grid', arguments[1])",
            canvas,
            [trial.costs["flops"], trial.score],
        )
        width, height = canvas.size["width"], canvas.size["height"]
        offset = round(where[0] - width / 2), round(where[1] - height / 2)
        ActionChains(page.driver).move_to_element_with_offset(canvas, *offset).pause(0.3).perform()
        assert f"trial {trial.id}" in page.find("#tooltip").text
        ActionChains(page.driver).click().perform()
        page.wait(f"document.getElementById('candidate-title').textContent === 'Trial {trial.id}'")

    def test_its_layers_are_those_of_the_recipe(self, browser, searched, tmp_path):
        result, run_dir = searched
        browser.open(result.report(tmp_path / "searched.html"))
        for trial in result.front:
            choose(browser, trial)
            slices = read_slices(run_dir / f"trial-{trial.id:04d}.safetensors", 2**30)
            shown = {row[0]: row[2:5] for row in cells(browser, "#layers") if row[2]}
            assert len(shown) > 15
            for name, (dense, kept, zeros) in shown.items():
                level = trial.decoded.get(f"{name}.weight")
                assert zeros.strip() == ("" if level is None else f"{100 * level:.1f} %")
                if kept.strip() == "dropped":
                    continue
                cut = slices.get(f"{name}.weight", {}).get("0")
                assert int(kept) == (int(dense) if cut is None else len(cut))

    def test_the_shares_of_layers_add_up_before_and_after(self, page, result):
        choose(page, result.front[0])
        rows = cells(page, "#layers")
        assert rows[-1][0] == "everything else"
        for column in range(4, 10):
            shares = [float(row[column].split()[0]) for row in rows if row[column]]
            assert sum(shares) == pytest.approx(100, abs=0.5)
        assert [row[9].split()[0] for row in rows] == ["10.0"] * 8 + ["20.0"]

    def test_heads_and_the_groups_that_share_keys_and_values_are_named(self, page, result):
        choose(page, result.front[0])
        first = cells(page, "#layers")[0]
        kept = next(iter(result.front[0].decoded.values()))
        assert first[2] == "16, 32 heads in 16 groups"
        assert first[3].strip() == f"{kept}, {2 * kept} heads in {kept} groups"

    def test_its_measurements_are_those_of_the_trial(self, page, result):
        trial = result.front[len(result.front) // 2]
        choose(page, trial)
        shown = {row[0]: row[1:] for row in cells(page, "#candidate .wide:nth-of-type(2)")} or {}
        rows = {row[0]: row[2] for row in cells(page, "#candidate-body > .wide")}
        assert shown is not None
        assert rows["accuracy on validation"].startswith(f"{trial.score:.4f} (")
        assert rows["accuracy, held out"] == f"{trial.test_score:.4f} (0.1000 to 0.9000)"
        assert rows["latency_ms (ms), measured"].startswith(f"{trial.costs['latency_ms']:.4g}")
        assert rows["latency_ms, predicted"].startswith(f"{trial.predicted['latency_ms']:.4g}")

    def test_a_trial_off_the_front_shows_its_options(self, page, result):
        trial = next(t for t in result.trials if t not in result.front and t.status == "ok" and any(t.candidate))
        page.run("document.getElementById(arguments[0]).click()", f"row-{trial.id}")
        page.wait(f"document.getElementById('candidate-title').textContent === 'Trial {trial.id}'")
        page.wait("document.querySelector('#layers') !== null")
        widths = [row[3].partition(",")[0] for row in cells(page, "#layers")]
        assert [int(w) for w in widths] == list(trial.decoded.values())

    def test_two_points_show_where_they_differ(self, page, result):
        a, b = result.front[0], result.front[-1]
        choose(page, a)
        page.click("#pin")
        choose(page, b)
        assert page.find("#candidate-title").text == f"Trial {b.id} and Trial {a.id}"
        differing = sum(x != y for x, y in zip(a.candidate, b.candidate, strict=True))
        page.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        assert len(page.texts("#options .differs")) == 2 * differing
        page.click("#candidate-body h3 ~ .controls input[type=checkbox]")
        assert 0 < len(cells(page, "#layers")) <= len(result.space.dimensions)
        rows = {row[0]: row[1:] for row in cells(page, "#candidate-body > .wide")}
        change = a.costs["flops"] - b.costs["flops"]
        assert rows["flops (MACs)"][3] == f"\N{MINUS SIGN}{-change:.0f}"


class TestBudget:
    @pytest.mark.parametrize("steps", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.4), (0.6, 0.6), (0.0, 1.0), (0.0, 0.0)])
    def test_the_sliders_mark_the_best_trial(self, page, result, steps):
        for number, at in enumerate(steps):
            low, high = (int(page.find(f"#budget-{number}").get_attribute(end)) for end in ("min", "max"))
            set_slider(page, number, round(low + at * (high - low)))
        self.same_as_python(page, result)

    @pytest.mark.parametrize("at", [0, 300, 700, 1000])
    def test_a_limit_on_the_score_asks_for_the_cheapest(self, browser, tmp_path, at):
        result = replace(made(trials=60), budget="flops <= 70% and accuracy drop <= 20pp")
        browser.open(result.report(tmp_path / "front.html"))
        set_slider(browser, 1, at)
        self.same_as_python(browser, result)

    def same_as_python(self, page, result):
        text = page.find("#best").text
        call = re.match(r"result\.best\(.*?\)(?=:| finds)", text).group()
        if "finds no trial" in text:
            with pytest.raises(ValueError, match="met by none"):
                eval(call, {"result": result})
        else:
            assert int(re.search(r": trial (\d+)", text).group(1)) == eval(call, {"result": result}).id


class TestTable:
    @pytest.mark.parametrize(("key", "column"), [("flops", 4), ("score", 2), ("trial", 0)])
    def test_a_click_on_a_column_sorts_and_a_second_one_turns_it_round(self, page, result, key, column):
        page.click("#sort-status")
        values = {str(t.id): {"flops": t.costs["flops"], "score": t.score, "trial": t.id}[key] for t in result.trials}
        known = sorted(value for value in values.values() if not np.isnan(value))
        for order in (known, known[::-1]):
            page.click(f"#sort-{key}")
            shown = [values[row[0]] for row in cells(page, TABLE)]
            assert shown == order[: len(shown)]
            assert len(shown) == 25
        assert column < len(cells(page, TABLE)[0])

    @pytest.mark.parametrize(
        ("text", "holds"),
        [
            ("front", lambda t, r: t in r.front),
            ("failed", lambda t, r: t.status == "failed"),
            ('"out of memory"', lambda t, r: "out of memory" in t.reason),
            (
                "score > 0.9 flops <= 60%",
                lambda t, r: t.score > 0.9 and t.costs["flops"] <= 0.6 * r.dense.costs["flops"],
            ),
            ("flops<1.2K", lambda t, r: t.costs["flops"] < 1200),
            ("nothing like this", lambda t, r: False),
        ],
    )
    def test_the_filter_keeps_what_fits(self, page, result, text, holds):
        page.find("#filter").send_keys(text)
        expected = [t for t in result.trials if holds(t, result)]
        assert page.find("#count").text.startswith(f"{len(expected)} of {len(result.trials)} trials")
        assert [int(row[0]) for row in cells(page, TABLE)] == [t.id for t in expected][:25]

    def test_its_csv_holds_what_is_filtered_in_its_order_with_every_option(self, page, result):
        file = page.downloads / "trials.csv"
        file.unlink(missing_ok=True)
        page.find("#filter").send_keys("score > 0.5")
        page.click("#sort-flops")
        page.click("#csv")
        end = time.monotonic() + 20
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.05)
        with file.open(newline="", encoding="utf-8") as stream:
            header, *rows = csv.reader(stream)
        file.unlink()
        expected = sorted((t for t in result.trials if t.score > 0.5), key=lambda t: (t.costs["flops"], t.id))
        assert [int(row[0]) for row in rows] == [t.id for t in expected]
        names = [d.name for d in result.space.dimensions]
        assert header[-len(names) :] == [f"'{name}" if name.startswith("=") else name for name in names]
        assert [[int(x) for x in row[-len(names) :]] for row in rows] == [list(t.decoded.values()) for t in expected]
        assert [float(row[header.index("latency_ms")]) for row in rows] == [t.costs["latency_ms"] for t in expected]


class TestKeyboard:
    def test_it_leads_from_the_front_to_the_build_command(self, page, result):
        from selenium.webdriver.common.keys import Keys

        for _ in range(40):
            page.press(Keys.TAB)
            if page.run("document.activeElement.id") == "list":
                break
        assert page.run("document.activeElement.id") == "list"
        page.press(Keys.HOME)
        page.press(Keys.ARROW_DOWN)
        page.wait(f"document.getElementById('candidate-title').textContent === 'Trial {result.front[1].id}'")
        assert page.run("document.activeElement.getAttribute('aria-activedescendant')") == f"point-{result.front[1].id}"
        page.press(Keys.ENTER)
        assert page.run("document.activeElement.id") == "candidate-title"
        page.wait("document.getElementById('copy-python') !== null")
        for _ in range(10):
            page.press(Keys.TAB)
            if page.run("document.activeElement.id") == "copy-python":
                break
        page.press(Keys.ENTER)
        page.wait("/copied|selected/.test(document.querySelector('.told').textContent)")
        position = result.trials.index(result.front[1])
        assert page.find("#python").text == f"small = result.build(result.trials[{position}])"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_violation(page, width, dark):
    packages, reason = node_modules()
    if packages is None:
        pytest.skip(reason)
    page.show(width=width, dark=dark)
    page.click("#list div")
    page.click("#pin")
    page.press("\ue015")  # to the next point, so that two are compared
    page.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    page.driver.execute_script((packages / "axe-core" / "axe.min.js").read_text())
    script = "axe.run(document, {resultTypes: ['violations']}).then((found) => arguments[0](found.violations))"
    page.driver.set_script_timeout(60)
    found = page.driver.execute_async_script(script)
    assert [(one["id"], [node["html"][:120] for node in one["nodes"][:3]]) for one in found] == []


def test_the_bundle_in_the_repository_is_what_its_sources_give(tmp_path):
    packages, reason = node_modules()
    if packages is None:
        pytest.skip(reason)
    shutil.copytree(WEB, tmp_path / "web", ignore=shutil.ignore_patterns("node_modules"))
    (tmp_path / "web" / "node_modules").symlink_to(packages)
    subprocess.run(["node", "build.js", "../built"], cwd=tmp_path / "web", check=True, capture_output=True)
    names = ["charts.js", "page.css", "page.js"]
    equal, different, missing = filecmp.cmpfiles(tmp_path / "built", WEB.parent / "built", names, shallow=False)
    assert (different, missing) == ([], []), "npm ci && npm run build in autoprune/result/report/web, and commit"
    assert equal == names
