"""Tensors with a JSON text in one safetensors file, and a hash over both that detects damage and mistaken files."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from autoprune.data.subsets import fingerprint
from autoprune.errors import FileFormatError
from autoprune.files.access import brief, replacing, require_file, shortened

HASH = "sha256"
_SYSTEM = re.compile(r"os error (\d+)")


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str = "path"
) -> None:
    """Replace a file by one of tensors, including tied ones, and a header of texts.

    Raises:
        OSError: If it cannot be written; says why, and names the argument `what`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Clones, because safetensors refuses tensors that share storage, as tied weights do.
    private = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path, what) as fresh:
        try:
            save_file(private, fresh, metadata=dict(metadata))
        except SafetensorError as error:  # errors of the system come as text
            found = _SYSTEM.search(str(error))
            code = int(found[1]) if found else errno.EIO
            raise OSError(code, os.strerror(code)) from error


def read_tensors(path: str | Path, expected: str, most_bytes: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read header and tensors of any safetensors file, on the CPU.

    Args:
        path: The file.
        expected: As in `autoprune.files.access.require_file`.
        most_bytes: Largest size of a sound file.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is no safetensors file, or cannot be read.
    """
    return _read(path, expected, most_bytes, tensors=True)


def read_metadata(path: str | Path, expected: str, most_bytes: int = 2**63) -> dict[str, str]:
    """Read the header of a safetensors file, as `read_tensors` does, and none of its tensors."""
    return _read(path, expected, most_bytes, tensors=False)[0]


def require_whole(metadata: Mapping[str, str], text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of the content, after comparing it with the one in the header under `HASH`.

    Raises:
        ValueError: If it is another one, or the header has none.
    """
    digest = content_hash(tensors, text)
    if HASH not in metadata:
        raise ValueError("it has no content hash")
    if metadata[HASH] != digest:
        raise ValueError("its content is not that of its hash")
    return digest


def content_hash(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of a text and of the names, types, shapes and values of tensors, whatever their order."""
    return fingerprint([text, {name: tensors[name] for name in sorted(tensors)}])


def _read(
    path: str | Path, expected: str, most_bytes: int, *, tensors: bool
) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    file = require_file(path, expected, most_bytes)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = opened.keys() if tensors else ()
            return metadata, {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RuntimeError) as error:  # of a damaged header
        told = f"{shortened(file)} is not a safetensors file or is corrupted: {brief(error)}"
        raise FileFormatError(f"{told}; write it again, or name another") from error
