"""The examples of the documents run in order, and give the outputs written there."""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoprune.structure.slicing.adapters import ADAPTERS

DOCS = Path(__file__).parent.parent / "docs"
FENCED = re.compile(r"^```python\n(>>> .*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def adapters_restored() -> Iterator[None]:
    before = dict(ADAPTERS)
    yield
    ADAPTERS.clear()
    ADAPTERS.update(before)


@pytest.mark.slow
@pytest.mark.usefixtures("adapters_restored")
@pytest.mark.parametrize("name", ["not-prunable-enough.md", "adapters.md", "export.md", "spaces.md", "sparsity.md"])
def test_the_examples_of_a_document_give_what_it_says(name: str, tmp_path: Path):
    blocks = FENCED.findall((DOCS / name).read_text())
    assert blocks
    test = doctest.DocTestParser().get_doctest("".join(blocks), {"folder": tmp_path}, name, name, 0)
    report: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert results.failed == 0, "".join(report)
    assert results.attempted > 5
