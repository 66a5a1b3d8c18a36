"""Atomic file replacement, and reading of files that are regular, of bounded size and sound.

Everything that autoprune writes goes through `replacing`, except for the journal and the audit log, which grow.

- A file appears under its name when it is complete; a kill, a full disk or an error before that leaves the old one.
- Devices, FIFOs and other paths that are no regular files are refused. A symbolic link is followed: the file that it
  leads to is replaced, and the link stays.
- A new file gets the permissions of the umask; a replaced one keeps its own, and must be writable.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from autoprune.errors import FileFormatError

MIB = 2**20
UNFINISHED = ".autoprune-*.part"
"""Names of files while they are written; a kill may leave one."""

DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, RuntimeError)
"""Errors that reading a damaged file may raise."""

_SHOWN = 200
_LONGEST = 255  # bytes of a name, in nearly all file systems
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def replacing(path: str | Path, what: str = "path") -> Iterator[Path]:
    """Yield a name to write to, which replaces a file at the end of the block.

    Args:
        path: The file to write.
        what: The argument that named it, for messages.

    Raises:
        OSError: If it cannot be written; one sentence with the reason, of the type that the system raised.
    """
    given = as_path(path, what)
    with explaining(given, what):
        target = Path(os.path.realpath(given))
        before = _regular_or_missing(target)
        fresh = target.with_name(UNFINISHED.replace("*", secrets.token_hex(6)))
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            mode = os.fstat(descriptor).st_mode if before is None else before
            os.close(descriptor)
            yield fresh
            os.chmod(fresh, stat.S_IMODE(mode))  # here, because libraries replace it by a file of their own
            _flush(fresh)
            os.replace(fresh, target)
        except BaseException:  # raised again: no partial file is left, not even after Ctrl-C
            fresh.unlink(missing_ok=True)
            raise


def write_text(path: str | Path, text: str, what: str = "path") -> Path:
    """Replace a file by text in UTF-8.

    Raises:
        OSError: As `replacing` does.
    """
    with replacing(path, what) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, content: Any, what: str = "path", indent: int | None = None) -> Path:
    """Replace a file by JSON, with null for numbers that are not finite.

    Raises:
        OSError: As `replacing` does.
    """
    try:
        text = json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(content), indent=indent, allow_nan=False)
    return write_text(path, f"{text}\n", what)


def _finite(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def as_path(path: str | Path, what: str = "path") -> Path:
    """Check the path that a user gave.

    Raises:
        TypeError: If it is none.
        ValueError: If it is empty, or holds characters that no path may.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{what} must be a path, got {type(path).__name__}; pass text or a pathlib.Path")
    if not os.fspath(path) or "\0" in str(path):
        raise ValueError(f"{what} must be a path, got {str(path)!r:.{_SHOWN}}; name a file or folder")
    if max((len(os.fsencode(part)) for part in Path(path).parts), default=0) > _LONGEST:
        raise ValueError(f"{what} must be a path of names up to {_LONGEST} bytes, got {str(path)!r:.{_SHOWN}}...")
    return Path(path)


def make_folder(path: str | Path, what: str = "path") -> Path:
    """Make a folder and those around it, unless it is there.

    Raises:
        OSError: If it cannot be made, or is a file.
    """
    folder = as_path(path, what)
    with explaining(folder, what):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def explaining(path: Path, what: str) -> Iterator[None]:
    """Turn system errors while a file is written into one sentence with the argument and the way out."""
    try:
        yield
    except OSError as error:
        _refuse(error, path, what)


def _refuse(error: OSError, path: Path, what: str) -> NoReturn:
    if error.errno is None:  # a sentence already
        raise error
    shown = shortened(path)
    if isinstance(error, FileNotFoundError):
        told = f"{what} must lie in a folder that exists, got {shown}; make the folder first, or name another"
    elif isinstance(error, IsADirectoryError | FileExistsError):
        told = f"{what} must be free, but there is {kind_of(path)} at {shown}; name another place"
    elif error.errno in _FORBIDDEN:
        told = f"{what} must lie where files can be written, got {shown} ({error.strerror}); name another place"
    elif error.errno in _FULL:
        told = f"{what} could not be written to {shown}: no space is left; free some, or name another place"
    else:
        told = f"{what} could not be written to {shown} ({error.strerror}); name another place"
    raise type(error)(told) from error


def _regular_or_missing(target: Path) -> int | None:
    """Mode of a file that may be replaced; None if there is none."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return found.st_mode


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_file(path: str | Path, expected: str, most_bytes: int) -> Path:
    """Check for a regular file of bounded size before it is opened: a FIFO would hang, and a device never ends.

    Args:
        path: The file; a link is followed.
        expected: The argument with its rule, such as ``"path must be a file written by autoprune.save"``.
        most_bytes: Largest size of a sound file.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is no regular file, or too large.
    """
    file = as_path(path, expected.partition(" ")[0])
    try:
        found = file.stat()
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise type(error)(f"{expected}, got {shortened(file)}: {error.strerror}") from error
        raise FileNotFoundError(f"{expected}, got {shortened(file)}: no such file") from error
    if not stat.S_ISREG(found.st_mode):
        raise FileFormatError(f"{expected}, got {shortened(file)}: it is {kind_of(file)}; name the file")
    if found.st_size > most_bytes:
        size = found.st_size / MIB
        most = most_bytes / MIB
        raise FileFormatError(f"{expected}, got {shortened(file)}: its {size:,.0f} MiB are over {most:,.0f} MiB")
    return file


def read_json(path: str | Path, most_bytes: int) -> Any:
    """Parse a file of JSON, without NaN and Infinity, which JSON does not have.

    Raises:
        ValueError: If it is no JSON; other errors in `DAMAGE` are possible, too.
    """
    with Path(path).open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it grew over {most_bytes} bytes")
    return parse_json(content)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, without NaN and Infinity, which JSON does not have; raises errors in `DAMAGE`."""
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


@contextmanager
def sound(told: str, way_out: str) -> Iterator[None]:
    """Turn all errors of reading a damaged file into one.

    Args:
        told: The file with the format expected, such as ``"a.json is not a result, or is damaged"``.
        way_out: Advice to the user.

    Raises:
        FileFormatError: ``"<told>: <what was wrong>; <way out>"``.
    """
    try:
        yield
    except FileFormatError as error:
        raise FileFormatError(f"{told}: {error}; {way_out}") from error
    except DAMAGE as error:
        raise FileFormatError(f"{told}: {brief(error)}; {way_out}") from error


def brief(error: BaseException) -> str:
    """Summarise an error in one line of at most 200 characters."""
    text = " ".join(str(error).split())
    if isinstance(error, RecursionError):
        text = "it is nested too deeply"
    elif isinstance(error, KeyError):
        text = f"{text} is missing"
    elif type(error) not in (ValueError, TypeError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def shortened(path: str | Path) -> str:
    """Shorten a path for a message: to its end, if it is long."""
    text = str(path)
    return text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}"


def kind_of(path: Path) -> str:
    """Name the kind of file at a path."""
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode), "a file")
    except OSError:
        return "something"
