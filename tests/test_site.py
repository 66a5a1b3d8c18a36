"""The documents hold together: links lead somewhere, public names have a page, and blocks of code use what exists."""

import ast
import builtins
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

import autoprune
from tests.documents import PAGES, ROOT, Block, anchors, blocks, links, name_of

BLOCKS = blocks()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files_and_headings(page: Path):
    text = page.read_text()
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{name_of(page)} links to {link}"


def test_a_dead_link_would_be_found():
    assert links("[a](b.md) `[c](d.md)` [e](https://f) ![g](h.png)\n```python\n[i](j.md)\n```\n") == ["b.md", "h.png"]
    assert anchors("# A title, with `code`\n") == {"a-title-with-code"}


def directives() -> set[str]:
    """Dotted names that the pages of the reference are made from."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    return {
        line.removeprefix("::: ").strip()
        for page in pages
        for line in page.read_text().splitlines()
        if line.startswith("::: ")
    }


@pytest.mark.parametrize("name", autoprune.__all__)
def test_every_public_name_has_a_place_in_the_reference(name: str):
    made = getattr(autoprune, name)
    full = f"{made.__module__}.{made.__qualname__}"
    assert {full, made.__module__} & directives(), f"{full} is on no page of docs/reference"


@pytest.mark.parametrize("name", sorted(directives()))
def test_the_reference_names_what_exists_where_it_is_defined(name: str):
    module, _, last = name.rpartition(".")
    if importlib.util.find_spec(module) is not None and hasattr(importlib.import_module(module), last):
        made = getattr(importlib.import_module(module), last)
        assert inspect.ismodule(made) or made.__module__ == module
    else:
        importlib.import_module(name)


def staging() -> Any:
    spec = importlib.util.spec_from_file_location("stage", ROOT / "docs" / "stage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of(nav: Any) -> list[str]:
    """Pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def test_the_site_has_every_document_in_its_navigation_once(tmp_path, monkeypatch):
    stage = staging()
    monkeypatch.setattr(stage, "STAGE", tmp_path)
    stage.main()
    listed = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert len(listed) == len(set(listed))
    assert all((tmp_path / page).is_file() for page in listed)
    documents = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert documents <= set(listed)
    for page in tmp_path.rglob("*.md"):
        for link in links(page.read_text()):
            path = link.partition("#")[0]
            assert not path or (page.parent / path).exists(), f"{page.relative_to(tmp_path)} links to {link}"


def test_a_link_to_what_the_site_lacks_is_an_error():
    stage = staging()
    page = stage.PurePosixPath("docs/a.md")
    known = frozenset([page, stage.PurePosixPath("benchmarks/results/b.md")])
    assert stage.relinked("[b](../benchmarks/results/b.md#c)", page, known) == "[b](benchmarks/results/b.md#c)"
    with pytest.raises(ValueError, match=r"docs/a.md links to ../Makefile"):
        stage.relinked("[c](../Makefile)", page, known)


def test_every_session_is_run():
    """Other blocks are run by tests/test_pages_run.py, whatever pages there are, or by what it names."""
    source = (ROOT / "tests" / "test_docs.py").read_text()
    assert all(f'"{Path(block.page).name}"' in source for block in BLOCKS if block.is_session)


KNOWN: dict[str, Any] = {
    "autoprune": autoprune,
    "result": autoprune.SearchResult,
    "found": autoprune.Inspection,
    "nn": nn,
    **vars(builtins),
}
"""Names that blocks use without importing them; those of classes stand for an object of theirs."""


class Names(ast.NodeVisitor):
    """Finds names and arguments of autoprune in a block that do not exist."""

    def __init__(self) -> None:
        self.known = dict(KNOWN)
        self.wrong: list[str] = []

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.startswith("autoprune"):
                importlib.import_module(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not (node.module or "").startswith("autoprune"):
            return
        module = importlib.import_module(node.module)
        for alias in node.names:
            if hasattr(module, alias.name):
                self.known[alias.asname or alias.name] = getattr(module, alias.name)
            else:
                self.wrong.append(f"{node.module}.{alias.name}")

    def object_of(self, node: ast.expr) -> Any:
        """Object that an expression names; None if it is not known."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self.object_of(node.value)
        fields = getattr(owner, "__dataclass_fields__", {}) if inspect.isclass(owner) else {}
        if owner is None or node.attr in fields:
            return None
        if not hasattr(owner, node.attr):
            self.wrong.append(ast.unparse(node))
            return None
        return getattr(owner, node.attr)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.object_of(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = self.object_of(node.func)
        module = getattr(called, "__module__", "") or ""
        spread = any(isinstance(each, ast.Starred) for each in node.args) or any(k.arg is None for k in node.keywords)
        if called is not None and module.startswith("autoprune") and not spread:
            self.bind(called, node)
        self.generic_visit(node)

    def bind(self, called: Any, node: ast.Call) -> None:
        method = isinstance(node.func, ast.Attribute) and inspect.isclass(self.object_of(node.func.value))
        bound = inspect.ismethod(called) or not method or inspect.isclass(called)
        given = [None] * (len(node.args) + (not bound))
        try:
            inspect.signature(called).bind(*given, **{keyword.arg: None for keyword in node.keywords})
        except TypeError as error:
            self.wrong.append(f"{ast.unparse(node)}: {error}")


def wrong_names(code: str) -> list[str]:
    names = Names()
    names.visit(ast.parse(code))
    return names.wrong


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if not block.is_session], ids=lambda block: f"{block.page}:{block.line}"
)
def test_blocks_of_code_compile_and_use_names_and_arguments_that_exist(block: Block):
    assert wrong_names(block.code) == []


@pytest.mark.parametrize(
    "code",
    [
        "autoprune.serch(model)",
        "autoprune.search(model, budgets='flops <= 50%')",
        "result.plots()",
        "result.best(1, 2)",
        "from autoprune.evaluators import Nothing",
        "autoprune.Execution(run_dirs=1)",
    ],
)
def test_a_name_or_an_argument_that_does_not_exist_would_be_found(code: str):
    assert wrong_names(code)


def test_names_and_arguments_that_exist_are_not_refused():
    code = (
        "import autoprune\nresult.front[0].score\nresult.best('flops <= 40%')\nautoprune.SearchResult.load('a', model)"
    )
    assert wrong_names(code) == []


@pytest.mark.slow
def test_the_tutorial_runs_word_by_word_in_an_empty_folder(tmp_path):
    code = "\n".join(block.code for block in BLOCKS if block.page == "docs/tutorial.md")
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "accuracy on test data: 0.9" in finished.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"front.png", "layers.png", "small.safetensors", "small.pt2"}
