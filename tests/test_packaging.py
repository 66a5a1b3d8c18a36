"""Contents of the wheel, imports between the parts, and what an import brings."""

import ast
import importlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("search_spaces", "evaluators")


def source_files() -> set[str]:
    """Every source file by its path inside the installed package; the links are followed by name, not on disk."""
    files = {f"autoprune/{path.relative_to(ROOT / 'autoprune')}" for path in (ROOT / "autoprune").rglob("*.py")}
    return files | {f"autoprune/{path.relative_to(ROOT)}" for name in MAPPED for path in (ROOT / name).rglob("*.py")}


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
        "from zoo.test_zoo import leaves",
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


IMPORT = """
import sys, torch
before = set(sys.modules)
import autoprune
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
# How long it takes depends on the machine, and on compiled files: benchmarks/execution/import_time.py.
LIGHT = sys.stdlib_module_names | {"autoprune", "numpy", "cython_runtime", "_cython_*"}


def test_import_autoprune_brings_nothing_but_the_standard_library_and_numpy():
    finished = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    brought = finished.stdout.split()
    assert "autoprune" in brought
    assert [name for name in brought if not any(fnmatch(name, light) for light in LIGHT)] == []


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
    assert {name for name in names if name.endswith(".py")} == source_files()
    report = {f"autoprune/result/report/{name}" for name in ("NOTICE", "page.html.jinja", "built/page.js")}
    assert report | {"autoprune/py.typed", f"{dist_info}/licenses/LICENSE", f"{dist_info}/entry_points.txt"} <= names
    assert not any(stat.S_ISLNK(entry.external_attr >> 16) for entry in entries)
