"""Documents of the repository: their pages, links and blocks of code."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:)([^)\s]*)\)")


class Block(NamedTuple):
    """Block of Python in a page.

    Attributes:
        page: Path of the page, relative to the repository.
        line: Line of the page that it begins in.
        code: The text.
    """

    page: str
    line: int
    code: str

    @property
    def is_session(self) -> bool:
        return self.code.startswith(">>> ")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks() -> list[Block]:
    """Every block of Python in every page."""
    return [block for page in PAGES for block in blocks_of(page)]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(name_of(page), text.count("\n", 0, match.start()) + 2, match[2])
        for match in FENCED.finditer(text)
        if match[1] == "python"
    ]


def links(text: str) -> list[str]:
    """Relative links of a page, without those in blocks and in spans of code."""
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))
    return LINK.findall(prose)


def anchors(text: str) -> set[str]:
    """Anchors of the headings of a page, as sites make them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def commands(program: str) -> list[tuple[str, str]]:
    """Page and text of each command of a program in the blocks of the shell, without comments."""
    return [
        (name_of(page), line.partition(" #")[0].strip())
        for page in PAGES
        for match in FENCED.finditer(page.read_text())
        if match[1] == "console"
        for line in match[2].splitlines()
        if line.startswith(f"{program} ")
    ]
