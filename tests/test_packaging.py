"""Contents of the wheel, imports between the parts, and the cost of an import."""

import ast
import importlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("search_spaces", "evaluators")

# The picture of DESIGN.md, bottom first: a part may import parts of the rows above it here, itself, and nothing else of
# autoprune. `autoprune` is the package's own __init__, the public names.
LAYERS = (
    ("errors", "arguments"),
    ("files", "schema", "imports"),
    ("protocols", "batches", "formats"),
    ("direction",),
    ("sources", "scorers", "statistics"),
    ("budget", "data", "pareto", "language", "losses", "segmentation"),
    ("metrics", "tensor_file", "user_code"),
    ("structure",),
    ("importance",),
    ("costs", "criteria"),
    ("reconstruction",),
    ("sensitivity",),
    ("prior",),
    ("optimizers", "evaluators", "search_spaces"),
    ("border", "inspection"),
    ("rungs",),
    ("racing",),
    ("journal_file", "journal_rows", "execution"),
    ("journal_reader", "journal_watch"),
    ("journal",),
    ("result", "report"),
    ("progress", "stopping"),
    ("checking", "mapped", "starts"),
    ("request",),
    ("study",),
    ("inputs",),
    ("measured_costs",),
    ("layout",),
    ("promotion",),
    ("records", "rivals", "trainings", "variants"),
    ("identity", "setup"),
    ("resume", "verify", "constant"),
    ("loop",),
    ("search", "audit", "recover"),
    ("autoprune",),
    ("loading",),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, row in enumerate(LAYERS) for part in row}


def source_files() -> dict[str, Path]:
    """Every source file by its path inside the installed package; the links are followed by name, not on disk."""
    files = {f"autoprune/{path.relative_to(ROOT / 'autoprune')}": path for path in (ROOT / "autoprune").rglob("*.py")}
    for folder in MAPPED:
        files |= {f"autoprune/{path.relative_to(ROOT)}": path for path in (ROOT / folder).rglob("*.py")}
    return files


def imported_parts(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and part of every import from autoprune, wherever it stands: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            part = rest.partition(".")[0]
            if top == "autoprune" and part != "__version__":
                yield node.lineno, part if part in LEVEL or part == "testing" else "autoprune"


def forbidden_imports(name: str, source: str) -> list[str]:
    """Imports in the file `name`, such as ``autoprune/costs/flops.py``, that the picture does not allow."""
    package, part = name.rpartition("/")[0].replace("/", "."), name.split("/")[1].removesuffix(".py")
    part = "autoprune" if part == "__init__" else part
    if part == "testing":
        return []
    if part not in LEVEL:
        return [f"{name}: the part {part!r} has no row in LAYERS and in DESIGN.md yet"]
    return [
        f"{name}:{line} imports {other}"
        for line, other in imported_parts(source, package)
        if other != part and LEVEL.get(other, len(LAYERS)) >= LEVEL[part]
    ]


@pytest.mark.slow
def test_imports_only_go_downwards():
    files = source_files()
    assert len(files) > 5
    assert [line for name, path in files.items() for line in forbidden_imports(name, path.read_text())] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("autoprune/structure/trace.py", "def f():\n    from ..costs import flops"),
        (
            "autoprune/structure/trace.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import search",
        ),
        ("autoprune/structure/rules/conv.py", "from ...criteria import l1"),
        ("autoprune/optimizers/nsga2.py", "import autoprune.evaluators.adaptive_bn"),
        ("autoprune/evaluators/adaptive_bn.py", "from autoprune.search_spaces.channels import Channels"),
        ("autoprune/errors.py", "from .protocols import OK"),
        ("autoprune/result.py", "from autoprune import SearchResult"),
        ("autoprune/cli.py", "from .testing import problems"),
        ("autoprune/helpers.py", ""),
    ],
)
def test_an_upward_or_sideways_import_is_found(name, source):
    assert len(forbidden_imports(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("autoprune/structure/trace.py", "from .rules import conv\nfrom ..protocols import OK\nimport torch"),
        ("autoprune/cli.py", "import autoprune\nfrom autoprune.search import search"),
        ("autoprune/result.py", "from . import __version__"),
        ("autoprune/__init__.py", "from .search import search"),
        ("autoprune/testing/contracts.py", "from .. import search"),
    ],
)
def test_a_downward_import_is_allowed(name, source):
    assert forbidden_imports(name, source) == []


def imports_of_tests(name: str, source: str) -> list[str]:
    """Imports in the file `name`, such as ``tests/test_cli.py``, of a test module or of the fixtures in conftest."""
    package, found = name.rpartition("/")[0].replace("/", "."), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return [
        f"{name}:{line} imports {imported}"
        for line, imported in found
        if any(part.startswith("test_") or part == "conftest" for part in imported.split("."))
    ]


def test_nothing_is_imported_from_a_test_module():
    """What tests share stands in modules of their own, so that a test file can be split, renamed and run alone."""
    files = [path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [line for path in files for line in imports_of_tests(str(path.relative_to(ROOT)), path.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        "from tests.test_search import seen",
        "from tests.zoo.test_zoo import leaves",
        "from tests import test_search",
        "from .test_search import seen",
        "import tests.test_search as other",
        "def f():\n    from tests.conftest import running",
    ],
)
def test_an_import_from_a_test_module_is_found(source):
    assert len(imports_of_tests("tests/test_resume.py", source)) == 1


@pytest.mark.parametrize("folder", MAPPED)
def test_the_links_inside_the_package_show_the_mapped_folders(folder):
    assert os.readlink(ROOT / "autoprune" / folder) == f"../{folder}"


@pytest.mark.parametrize(
    "line", ["import search_spaces", "import evaluators.adaptive_bn", "from search_spaces import channels"]
)
def test_ruff_bans_bare_imports_of_the_mapped_folders(line):
    command = [sys.executable, "-m", "ruff", "check", "--select=TID251", "--stdin-filename=examples/snippet.py", "-"]
    finished = subprocess.run(command, input=line, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 1
    assert "TID251" in finished.stdout
    assert "import autoprune." in finished.stdout


@pytest.mark.parametrize(
    ("package", "registry"), [("optimizers", "OPTIMIZERS"), ("evaluators", "EVALUATORS"), ("execution", "EXECUTORS")]
)
def test_every_part_with_a_name_is_imported_from_the_package_of_its_kind(package, registry):
    module = importlib.import_module(f"autoprune.{package}")
    for part in getattr(module, registry).values():
        assert part.__name__ in module.__all__
        assert getattr(module, part.__name__) is part


# Torch's objects are frozen: whichever import comes next sets off a pass of the garbage collector over all of them, and
# that takes as long as half of ours.
IMPORT = """
import gc, sys, time
start = time.process_time()
import torch
theirs = time.process_time() - start
gc.freeze()
before, start = set(sys.modules), time.process_time()
import autoprune
print((time.process_time() - start) / theirs, *{name.partition(".")[0] for name in set(sys.modules) - before})
"""


@pytest.mark.slow
def test_import_autoprune_is_quick_and_leaves_the_heavy_libraries_alone():
    for _ in range(5):  # the best of five, over torch's own time, because processors differ and others disturb
        finished = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        share, *modules = finished.stdout.split()
        heavy = {"ray", "pymoo", "optuna", "sklearn", "matplotlib", "pandas", "rich", "typer", "onnx", "onnxruntime"}
        assert heavy.isdisjoint(modules)
        if float(share) <= 0.5:
            return
    pytest.fail(f"import autoprune takes {share} of the time of import torch; half is allowed")


@pytest.mark.slow
def test_the_wheel_built_from_the_sdist_holds_the_package_and_nothing_else(tmp_path):
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("autoprune", *MAPPED):
        shutil.copytree(ROOT / name, project / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)

    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, project]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
    names = {entry.filename for entry in entries}
    (dist_info,) = {name.split("/")[0] for name in names} - {"autoprune"}
    assert dist_info.endswith(".dist-info")
    assert {name for name in names if name.endswith(".py")} == set(source_files())
    assert {"autoprune/py.typed", f"{dist_info}/licenses/LICENSE", f"{dist_info}/entry_points.txt"} <= names
    assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in entries)
