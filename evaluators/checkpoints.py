"""The state of a training in one safetensors file: tensors as they are, everything else as JSON in its header."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from autoprune.errors import RecipeError

FORMAT = "autoprune-training"
VERSION = 1


def write_checkpoint(path: Path, state: Any) -> None:
    """Write a state: nested dictionaries, lists and tuples of tensors, numbers, strings and None.

    The file is replaced at once, so that a process killed while it writes leaves the one before.

    Raises:
        ValueError: If the state holds anything else.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encoded(state, tensors, ()))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    save_file(tensors, beside, metadata={"format": FORMAT, "version": str(VERSION), "state": text})
    os.replace(beside, path)


def read_checkpoint(path: Path) -> Any:
    """Read what `write_checkpoint` wrote; tuples come back as lists, tensors on the CPU.

    Raises:
        RecipeError: If the file is corrupted, foreign or of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"checkpoint {path} cannot be read: {error}; remove it to train anew") from error
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
        raise RecipeError(
            f"checkpoint {path} must have the format {FORMAT} {VERSION}, got {metadata.get('format')} "
            f"{metadata.get('version')}; name another file"
        )
    try:
        return _decoded(json.loads(metadata["state"]), tensors)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RecipeError(f"checkpoint {path} is damaged: {error!r}; remove it to train anew") from error


def _encoded(tree: Any, tensors: dict[str, Tensor], path: tuple[Any, ...]) -> Any:
    """Plain values as they are, tensors and containers as an object with one key that says which it is."""
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
    return [_decoded(each, tensors) for each in value]
