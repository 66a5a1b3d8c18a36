"""The picture in CONTRIBUTING.md against the code: imports go downwards only, and nothing imports in a circle."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("search_spaces", "evaluators")
MOST_FILES, MOST_FOLDERS, MOST_FLOORS = 10, 18, 10


def picture() -> list[list[str]]:
    """Rooms of each floor of the picture in CONTRIBUTING.md, top first: the block that begins with ``__main__``."""
    (block,) = re.findall(r"^```\n(__main__ .*?)```$", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    return [re.split(r"\s{4,}", line)[0].replace("/", "").split() for line in block.splitlines()]


FLOORS = picture()
FLOOR = {room: len(FLOORS) - number for number, rooms in enumerate(FLOORS) for room in rooms}


def source_files() -> dict[str, Path]:
    """Every module of the package by its dotted name; the two links are followed by name, not on disk."""
    found = {}
    for folder, prefix in ((ROOT / "autoprune", ""), *((ROOT / name, f"{name}.") for name in MAPPED)):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = prefix + ".".join(parts)
            found[f"autoprune.{name}".removesuffix(".__init__").rstrip(".")] = path
    return found


MODULES = source_files()


def room_of(module: str) -> str:
    """First part of a module's name below ``autoprune``; ``autoprune`` for the package itself."""
    return module.split(".")[1] if "." in module else "autoprune"


def only_for_types(tree: ast.AST) -> set[ast.AST]:
    """Every node below ``if TYPE_CHECKING:``."""
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    return {inner for block in blocks for line in block.body for inner in ast.walk(line)}


def known(name: str) -> str:
    """The module that holds a dotted name; the first part of a name from elsewhere."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def imported(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and module of every import from autoprune that runs, wherever it stands: in functions, too."""
    tree = ast.parse(source)
    skipped = only_for_types(tree)
    path = MODULES.get(module)
    package = module if path is not None and path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names if alias.name != "__version__"]
        for name in dict.fromkeys(map(known, names)):
            if name in MODULES and node not in skipped:
                yield node.lineno, name


def forbidden(module: str, source: str) -> list[str]:
    """Imports of a module that the picture does not allow."""
    room = room_of(module)
    if room == "testing":
        return []
    if room not in FLOOR:
        return [f"{module}: {room!r} has no place in the picture of CONTRIBUTING.md yet"]
    return [
        f"{module}:{line} imports {other}"
        for line, other in imported(module, source)
        if room_of(other) != room and FLOOR.get(room_of(other), len(FLOORS)) >= FLOOR[room]
    ]


@pytest.mark.slow
def test_imports_only_go_downwards():
    assert len(MODULES) > 200
    assert [line for module, path in MODULES.items() for line in forbidden(module, path.read_text())] == []


def test_the_picture_holds_every_room_once():
    drawn = [room for rooms in FLOORS for room in rooms]
    assert sorted(drawn) == sorted({room_of(module) for module in MODULES} - {"testing"})


def test_a_stranger_meets_few_files_folders_and_floors():
    top = ROOT / "autoprune"
    folders = {path.name for path in top.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert len(list(top.glob("*.py"))) <= MOST_FILES
    assert len(folders) <= MOST_FOLDERS
    assert len(FLOORS) <= MOST_FLOORS


@pytest.mark.slow
def test_no_module_imports_itself_through_others():
    graph = {name: {other for _, other in imported(name, path.read_text())} - {name} for name, path in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("autoprune.structure.trace", "def f():\n    from ..costs import structural"),
        ("autoprune.structure.rules.layers", "from ...importance.criteria import CRITERIA"),
        ("autoprune.optimizers.nsga2", "import autoprune.evaluators.adaptive_bn"),
        ("autoprune.evaluators.adaptive_bn", "from autoprune.search_spaces.channels import Channels"),
        ("autoprune.errors", "from .protocols import OK"),
        ("autoprune.result.trials", "from autoprune import SearchResult"),
        ("autoprune.cli.app", "from autoprune.testing import problems"),
        ("autoprune.helpers", ""),
    ],
)
def test_an_upward_or_sideways_import_is_found(module, source):
    assert len(forbidden(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("autoprune.structure.trace", "from .rules import layers\nfrom ..protocols import OK\nimport torch"),
        ("autoprune.structure.trace", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import search"),
        ("autoprune.cli.app", "from autoprune.search import search"),
        ("autoprune.result.trials", "from .. import __version__"),
        ("autoprune", "from .search import search"),
        ("autoprune.testing.contexts", "from .. import search"),
    ],
)
def test_a_downward_import_is_allowed(module, source):
    assert forbidden(module, source) == []
