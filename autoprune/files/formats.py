"""Formats of files that autoprune writes: a name and a version, checked before anything relies on the content."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoprune.files.access import read_json, require_file, shortened, sound
from autoprune.files.schema import Form, require_form


@dataclass(frozen=True)
class Format:
    """Format of one kind of file.

    Attributes:
        name: As written into the file, such as ``"autoprune-result"``.
        version: The version that is written and read.
        holds: Its content in words, such as ``"a result"``.
    """

    name: str
    version: int
    holds: str

    def stamp(self) -> dict[str, Any]:
        """Entries of a JSON object that say which format it has."""
        return {"format": self.name, "version": self.version}

    def header(self) -> dict[str, str]:
        """The same as texts, for the header of a file of tensors."""
        return {key: str(value) for key, value in self.stamp().items()}

    def require(self, found: Mapping[str, Any]) -> None:
        """Check the format that was read.

        Raises:
            ValueError: If it is another one, or of another version.
        """
        name, version = found.get("format"), found.get("version")
        if name != self.name:
            has = "names no format" if name is None else f"has the format {name!r:.60}"
            raise ValueError(f"it {has}, and not {self.name!r}, so another tool or an earlier version wrote it")
        if str(version) != str(self.version):
            raise ValueError(
                f"it has version {version!s:.60}, and this autoprune reads {self.version}: use the one that wrote it"
            )

    def reading(self, file: str | Path, way_out: str) -> AbstractContextManager[None]:
        """Make a context that turns all errors of a foreign or damaged file into a `FileFormatError` with its name."""
        return sound(f"{shortened(file)} is not {self.holds} of autoprune, or is damaged", way_out)

    def read_json(self, path: str | Path, expected: str, way_out: str, most_bytes: int, form: Form) -> dict[str, Any]:
        """Read a JSON object of this format.

        Args:
            path: The file.
            expected: The argument with its rule, as for `autoprune.files.access.require_file`.
            way_out: Advice to the user where it cannot be read.
            most_bytes: Largest size of a sound file.
            form: Of its content.

        Raises:
            FileNotFoundError: If there is no such file.
            FileFormatError: If it is damaged, foreign, or of another version.
        """
        file = require_file(path, expected, most_bytes)
        with self.reading(file, way_out):
            data: dict[str, Any] = read_json(file, most_bytes)
            require_form(data, {})
            self.require(data)
            require_form(data, form)
        return data
