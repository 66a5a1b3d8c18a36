"""Stage the pages of the site in ``build/docs``: documents, changelog, guides to contribute, and figures.

Documents link to each other and to files of the repository by relative paths, so that they can be read where the
repository is shown. The site has them in other places; links are rewritten, and one to a file that the site lacks is an
error. ``make docs`` runs this first.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "build" / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)

PAGES = ("docs/**/*.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "benchmarks/results/*.md")
AS_THEY_ARE = ("docs/pictures/*.png", "docs/schemas/*.json", "benchmarks/results/*.png")
SOURCES = ("examples/**/*.py",)


def place(path: PurePosixPath) -> PurePosixPath:
    """Place on the site of a file of the repository, both relative."""
    if path.suffix == ".py":
        return path.with_suffix(".md")
    return path.relative_to("docs") if path.parts[0] == "docs" else path


def found(patterns: tuple[str, ...]) -> list[PurePosixPath]:
    """Files of the repository that match, relative to it."""
    return sorted(
        PurePosixPath(path.relative_to(ROOT).as_posix()) for pattern in patterns for path in ROOT.glob(pattern)
    )


def relinked(text: str, page: PurePosixPath, known: frozenset[PurePosixPath]) -> str:
    """Text of a page with its links to files of the repository as links to pages of the site.

    Raises:
        ValueError: If a link leads to a file that is not on the site.
    """

    def moved(match: re.Match[str]) -> str:
        target = PurePosixPath(os.path.normpath(page.parent / match[1]))
        if target not in known:
            raise ValueError(f"{page} links to {match[1]}, which is not on the site; see docs/stage.py")
        return PurePosixPath(os.path.relpath(place(target), place(page).parent)).as_posix()

    parts = FENCED.split(text)
    blocks = [*FENCED.findall(text), ""]
    return "".join(LINK.sub(moved, part) + block for part, block in zip(parts, blocks, strict=True))


def main() -> None:
    """Stage everything again."""
    shutil.rmtree(STAGE, ignore_errors=True)
    pages = found(PAGES)
    kept = found(AS_THEY_ARE)
    sources = found(SOURCES)
    known = frozenset([*pages, *kept, *sources])
    for path in known:
        (STAGE / place(path)).parent.mkdir(parents=True, exist_ok=True)
    for path in pages:
        (STAGE / place(path)).write_text(relinked((ROOT / path).read_text(), path, known))
    for path in kept:
        shutil.copy(ROOT / path, STAGE / place(path))
    for path in sources:
        (STAGE / place(path)).write_text(f"# {path}\n\n```python\n{(ROOT / path).read_text()}```\n")


if __name__ == "__main__":
    main()
