"""Docstrings and comments open with a verb or a noun phrase, and use the plain terms of the field."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ["autoprune", "evaluators", "search_spaces", "benchmarks", "examples", "zoo"]
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

CLAUSE = re.compile(
    r"(What|How|Whether|Which|Where|When|Why|That|Who|Whose|Whatever|Whichever|Wherever|Whenever|However)\b"
)
PREPOSITION = re.compile(
    r"(For|Of|With|By|In|From|At(?! most| least)|On|To|As|Between|Under|Over|Unlike|If|Not|Because|Until|Unless)\b"
)
INVERSION = re.compile(r"(\w+(ed|en)|Sent|Kept|Held|Built|Left|Made|Put|Drawn|Lost|Found|Read) (is|are|was|were)\b")
RIDDLE = re.compile(r"\banew\b|\bbeside\b|\bso many\b|come what may|\blets? go of|held against|\bon the way\b", re.I)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and the text of every string that stands as a statement: docstrings, also those after assignments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def bad_openings(source: str) -> list[str]:
    found = []
    for line, text in docstrings(ast.parse(source)):
        if any(opening.match(text) for opening in (CLAUSE, PREPOSITION, INVERSION)):
            found.append(f"{line}: {text.splitlines()[0]}")
    return found


def riddles(source: str) -> list[str]:
    prose = [*docstrings(ast.parse(source)), *comments(source)]
    return [f"{line}: {text}" for line, text in prose if RIDDLE.search(text)]


@pytest.mark.parametrize(
    "text",
    [
        "What ranks units.",
        "Whether it is one.",
        "For each cut a digest.",
        "Seen are convolutions.",
        "Trained is the best one.",
        "Not prepared; once trained, with weights.",
    ],
)
def test_a_clause_or_an_inversion_is_no_opening(text: str):
    assert bad_openings(f'def f():\n    """{text}"""\n')
    assert bad_openings(f'X = 1\n"""{text}"""\n')


@pytest.mark.parametrize(
    "text", ["Whole networks.", "Return whether it is one.", "Format of a file.", "Trained weights."]
)
def test_a_verb_or_a_noun_is_an_opening(text: str):
    assert not bad_openings(f'"""{text}"""\n')


def test_riddles_are_found_in_docstrings_and_comments_and_not_in_code():
    assert riddles('def f():\n    """Keep it beside the journal."""\n')
    assert riddles("x = 1  # fitted anew\n")
    assert not riddles('raise RuntimeError("begin anew")\n')


def test_the_files_are_found():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_or_a_noun_and_state_things_plainly(path: Path):
    source = path.read_text()
    assert not bad_openings(source)
    assert not riddles(source)
