"""The state of a training in one safetensors file: tensors as they are, everything else as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from autoprune.files.access import MIB, make_folder, parse_json, shortened, sound
from autoprune.files.formats import Format
from autoprune.files.schema import Form, require_form
from autoprune.files.tensor_file import HASH, content_hash, read_tensors, require_whole, write_tensors

FORMAT = Format("autoprune-training", 1, "a checkpoint of a training")
WAY_OUT = "remove it to train again, or name another file"
MOST_BYTES = 2**20 * MIB
"""Largest size of a checkpoint where the model is not known, in bytes."""


def write_checkpoint(path: Path, state: Any) -> None:
    """Write a state: nested dictionaries, lists and tuples of tensors, numbers, strings and None.

    The file is replaced as a whole, so that a process killed while it writes leaves the one before.

    Raises:
        ValueError: If the state holds anything else.
        OSError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encoded(state, tensors, ()))
    make_folder(path.parent, "checkpoint")
    header = {**FORMAT.header(), HASH: content_hash(tensors, text), "state": text}
    write_tensors(path, tensors, header, "checkpoint")


def read_checkpoint(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Read what `write_checkpoint` wrote; tuples come back as lists, tensors on the CPU.

    Args:
        path: The file.
        most_bytes: Largest size of a sound file.

    Raises:
        FileFormatError: If the file is corrupted, foreign or of another version.
    """
    told = f"checkpoint {shortened(path)}"
    with sound(f"{told} cannot be read", WAY_OUT):
        metadata, tensors = read_tensors(path, "checkpoint must be a file that a training wrote", most_bytes)
    with FORMAT.reading(told, WAY_OUT):
        FORMAT.require(metadata)
        require_whole(metadata, metadata["state"], tensors)
        return _decoded(parse_json(metadata["state"]), tensors)


def read_same(path: Path, identity: Mapping[str, Any], form: Form, holds: str, most_bytes: int = MOST_BYTES) -> Any:
    """Read the checkpoint of a training to continue.

    Args:
        path: The file.
        identity: Settings of this training; the file was made with the same.
        form: Of its state, with the identity under ``"identity"``.
        holds: The training in words, such as ``"a supernet"``.
        most_bytes: Largest size of a sound file.

    Raises:
        FileFormatError: If it is damaged, or of something else.
        ValueError: If it was made with other settings; names them.
    """
    state = read_checkpoint(path, most_bytes)
    told = f"checkpoint {shortened(path)} is damaged, or of something else than {holds}"
    with sound(told, WAY_OUT):
        require_form(state, form)
        found = state["identity"]
    differing = [name for name, value in identity.items() if found.get(name) != value]
    if differing:
        raise ValueError(
            f"checkpoint {path} must be of the same training, but it was made with another "
            f"{', another '.join(differing)}; pass what it was made with, or another file"
        )
    return state


def _encoded(tree: Any, tensors: dict[str, Tensor], path: tuple[Any, ...]) -> Any:
    """Encode a state: plain values as they are, tensors and containers as an object whose only key names the kind."""
    if isinstance(tree, Tensor):
        name = "/".join(map(str, path)) or "/"
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, dict):  # as pairs, because keys may be numbers
        return {"dict": [[key, _encoded(value, tensors, (*path, key))] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list": [_encoded(value, tensors, (*path, i)) for i, value in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise ValueError(
        f"the state of a training must hold tensors, numbers and strings, got {type(tree).__name__} at "
        f"{'/'.join(map(str, path))}; use an optimizer and a schedule whose state_dict() does, or no checkpoint="
    )


def _decoded(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _decoded(each, tensors) for key, each in value}
    if kind != "list":
        raise ValueError(f"{kind!r:.60} is nothing that a state holds")
    return [_decoded(each, tensors) for each in value]
