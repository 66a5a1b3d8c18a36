"""Files that are whole at any time."""

from __future__ import annotations

from pathlib import Path


def replace_file(file: Path, text: str) -> Path:
    """Write a file; a kill leaves the old one or the new one."""
    fresh = file.with_name(f"{file.name}.new")
    try:
        fresh.write_text(text)
        return fresh.replace(file)
    except OSError:  # the disk is full, or a folder is in the way
        fresh.unlink(missing_ok=True)
        raise
