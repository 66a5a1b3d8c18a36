"""Save a pruned model and load it into the user's own class: one safetensors file with a JSON recipe, no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune.errors import RecipeError
from autoprune.structure.examples import unwrap
from autoprune.structure.slicing import Edit, build

FORMAT = "autoprune-model"
VERSION = 1
ATTRIBUTE = "_autoprune_recipe"
"""Where a built module keeps its recipe, JSON-ready, so that it survives copying, pickling and fine-tuning."""


def attach(module: nn.Module, edit: Edit, dense: nn.Module) -> nn.Module:
    """Make `module`, built from `dense` by `edit`, remember how; a model pruned twice remembers both steps as one."""
    shapes = {name: list(t.shape) for name, t in (*dense.named_parameters(), *dense.named_buffers())}
    recipe = {
        "slices": {n: {str(d): index.tolist() for d, index in dims.items()} for n, dims in edit.slices.items()},
        "attributes": {name: dict(values) for name, values in edit.attributes.items()},
        "dense_shapes": {name: shapes[name] for name in edit.slices},
    }
    earlier = getattr(dense, ATTRIBUTE, None)
    setattr(module, ATTRIBUTE, recipe if earlier is None else _compose(earlier, recipe))
    return module


def _compose(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    slices = {name: dict(dims) for name, dims in first["slices"].items()}
    for name, dims in second["slices"].items():
        own = slices.setdefault(name, {})
        for dim, index in dims.items():
            own[dim] = np.asarray(own[dim])[index].tolist() if dim in own else index
    shapes = {**second["dense_shapes"], **first["dense_shapes"]}
    attributes = {name: dict(values) for name, values in first["attributes"].items()}
    for name, values in second["attributes"].items():
        attributes.setdefault(name, {}).update(values)
    return {"slices": slices, "attributes": attributes, "dense_shapes": shapes}


def save(module: nn.Module, path: str | Path) -> None:
    """Write a pruned model, fine-tuned or not, to one safetensors file.

    Args:
        module: What ``result.build()`` returned.
        path: The file to write; an existing one is replaced.

    Raises:
        RecipeError: If the module was not built by autoprune.
    """
    from safetensors.torch import save_file

    module = unwrap(module)
    recipe = getattr(module, ATTRIBUTE, None)
    if recipe is None:
        raise RecipeError(
            f"module must come from result.build(), but {type(module).__name__} carries no recipe; "
            "save an ordinary model with torch.save(model.state_dict(), ...)"
        )
    # Clones, because safetensors refuses tensors that share storage, as tied weights do.
    state = {name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}
    metadata = {"format": FORMAT, "version": str(VERSION), "recipe": json.dumps(recipe)}
    save_file(state, path, metadata=metadata)


def load(path: str | Path, fresh_model: nn.Module) -> nn.Module:
    """Load a saved pruned model into the user's own class.

    Args:
        path: A file that `save` wrote.
        fresh_model: A dense model of the class that was pruned, with any weights; stays as it is.

    Returns:
        A new module with the saved weights, on the device and in the training mode of `fresh_model`.

    Raises:
        FileNotFoundError: If there is no such file.
        RecipeError: If the file is corrupted or foreign, or was made for another model.
    """
    recipe, state = _read(Path(path))
    fresh_model = unwrap(fresh_model)
    edit = _edit(recipe, fresh_model, path)
    try:
        module = build(fresh_model, edit)
        module.load_state_dict(state)
    except (RuntimeError, LookupError) as error:  # tensors that do not fit; modules or indices that do not exist
        raise RecipeError(f"{path} was not made for this {type(fresh_model).__name__}: {error}") from error
    setattr(module, ATTRIBUTE, recipe)
    return module


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"path must be a file written by autoprune.save, got {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    except (SafetensorError, OSError) as error:
        raise RecipeError(f"{path} is not a safetensors file or is corrupted: {error}") from error
    if metadata.get("format") != FORMAT:
        raise RecipeError(f"{path} is a safetensors file without an autoprune recipe; was it saved by another tool?")
    if metadata.get("version") != str(VERSION):
        raise RecipeError(
            f"{path} has recipe version {metadata.get('version')}, and this autoprune reads {VERSION}: use the version "
            "that wrote it"
        )
    try:
        recipe = json.loads(metadata["recipe"])
        if not all(isinstance(recipe[key], dict) for key in ("slices", "attributes", "dense_shapes")):
            raise TypeError("its parts are not objects")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path} holds a damaged recipe: {error!r}") from error
    return recipe, state


def _edit(recipe: Mapping[str, Any], model: nn.Module, path: str | Path) -> Edit:
    shapes = {name: list(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}
    for name, shape in recipe["dense_shapes"].items():
        if shapes.get(name) != shape:
            raise RecipeError(
                f"{path} was made for a model whose {name!r} has shape {shape}, but this {type(model).__name__} has "
                f"{shapes.get(name, 'no such tensor')}; pass a dense model of the class that was pruned"
            )
    slices = {
        name: {int(dim): np.asarray(index, dtype=np.int64) for dim, index in dims.items()}
        for name, dims in recipe["slices"].items()
    }
    return Edit(slices, recipe["attributes"])
