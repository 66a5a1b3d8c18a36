"""Pruned models in one safetensors file with a JSON recipe, no pickle: save, and load into the user's own class."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune.errors import FileFormatError
from autoprune.files.access import MIB, as_path, parse_json, shortened, sound
from autoprune.files.formats import Format
from autoprune.files.schema import require_form
from autoprune.files.tensor_file import HASH, content_hash, read_metadata, read_tensors, require_whole, write_tensors
from autoprune.result.fresh import class_path
from autoprune.result.fresh import fresh_model as fresh_of
from autoprune.result.pretrained.section import keep_in_config
from autoprune.result.shared_tensors import SharedTensors, restored
from autoprune.structure.given import unwrap
from autoprune.structure.sizes.held import size_held
from autoprune.structure.slicing.dropped import require_returns
from autoprune.structure.slicing.kept import ATTRIBUTE
from autoprune.structure.slicing.slicing import Edit, build

FORMAT = Format("autoprune-model", 1, "a pruned model")
MOST_TIMES_DENSE = 8
"""Largest size of a file in multiples of the dense model: it may hold other types of numbers."""
MOST_RECIPE = 256 * MIB
_GRAPH = {"name": str, "inputs": [[object]], "nodes": [[object]], "output": object}
RECIPE_FORM = {
    "slices": {str: {str: [int]}},
    "attributes": {str: {str: int}},
    "dense_shapes": {str: [int]},
    "graphs?": {str: _GRAPH},
    "dropped?": {str: object},
    "class?": str,
}


def attach(module: nn.Module, edit: Edit, dense: nn.Module) -> nn.Module:
    """Attach the recipe to `module`, built from `dense` by `edit`; of a model pruned twice it joins both steps."""
    shapes = {name: list(t.shape) for name, t in (*dense.named_parameters(), *dense.named_buffers())}
    recipe = {
        "slices": slices_of(edit),
        "attributes": {name: dict(values) for name, values in edit.attributes.items()},
        "dense_shapes": {name: shapes[name] for name in edit.slices},
        "graphs": dict(edit.graphs),
        "dropped": dict(edit.dropped),
        "class": class_path(type(dense)),
    }
    earlier = getattr(dense, ATTRIBUTE, None)
    recipe = recipe if earlier is None else _compose(earlier, recipe)
    setattr(module, ATTRIBUTE, recipe)
    keep_in_config(module, recipe, dense)
    return module


def slices_of(edit: Edit) -> dict[str, dict[str, list[int]]]:
    """Convert the slices of an edit to the form of a recipe."""
    return {name: {str(d): index.tolist() for d, index in dims.items()} for name, dims in edit.slices.items()}


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
    graphs = {**first.get("graphs", {}), **second["graphs"]}
    dropped = {**first.get("dropped", {}), **second["dropped"]}
    return {
        "slices": slices,
        "attributes": attributes,
        "dense_shapes": shapes,
        "graphs": graphs,
        "dropped": _outermost(dropped),
        "class": first.get("class", ""),
    }


def _outermost(dropped: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what lies inside a dropped module: it is no part of the model any more."""
    return {
        name: returns for name, returns in dropped.items() if not any(name.startswith(f"{other}.") for other in dropped)
    }


def save(module: nn.Module, path: str | Path) -> None:
    """Write a pruned model, fine-tuned or not, to one safetensors file.

    Args:
        module: Module from ``result.build()``.
        path: The file to write; an existing one is replaced as a whole. A link is followed.

    Raises:
        FileFormatError: If the module was not built by autoprune.
        OSError: If the file cannot be written, or `path` is a folder, a device or a FIFO.
    """
    write(module, path)


def write(module: nn.Module, path: str | Path, shared: SharedTensors | None = None) -> str:
    """Write a pruned model as `save` does, and return the hash of its content.

    With `shared`, the tensors that it has in common with others in the same folder are left out.
    """
    module = unwrap(module) if isinstance(module, nn.Module) else module
    recipe = getattr(module, ATTRIBUTE, None)
    if recipe is None:
        raise FileFormatError(
            f"module must come from result.build(), but {type(module).__name__} carries no recipe; "
            "save an ordinary model with torch.save(model.state_dict(), ...)"
        )
    state = module.state_dict()
    text = json.dumps(recipe)
    digest = content_hash(state, text)
    metadata = {**FORMAT.header(), HASH: digest, "recipe": text}
    left_out = {} if shared is None else shared.leave_out(state, recipe["slices"])
    if shared is not None and left_out:
        metadata |= {"left_out": json.dumps(left_out), "dense": shared.file_name}
    write_tensors(path, {name: tensor for name, tensor in state.items() if name not in left_out}, metadata)
    return digest


def load(path: str | Path, fresh_model: nn.Module | None = None) -> nn.Module:
    """Load a saved pruned model into the user's own class.

    Args:
        path: A file that `save` wrote.
        fresh_model: A dense model of the class that was pruned, with any weights; stays as it is. None makes one of the
            class that the file names, if its module is imported and it takes no arguments.

    Returns:
        A new module with the saved weights, on the device and in the training mode of `fresh_model`.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If the file is corrupted or foreign, or was made for another model.
        TypeError: If `fresh_model` is no module.
    """
    module, _ = read(path, fresh_model)
    return module


def read(path: str | Path, fresh_model: nn.Module | None) -> tuple[nn.Module, str]:
    """Load a model as `load` does, and return it with the hash of its content."""
    if fresh_model is None:
        fresh_model = made_for(path)
    if not isinstance(fresh_model, nn.Module):
        raise TypeError(
            f"fresh_model must be a dense nn.Module of the class that was pruned, got {type(fresh_model).__name__}"
        )
    fresh_model = unwrap(fresh_model)
    expected = "path must be a file written by autoprune.save"
    most_bytes = most_bytes_of(fresh_model)
    metadata, state = read_tensors(path, expected, most_bytes)
    recipe = _recipe_in(metadata, shortened(path))
    with sound(f"{shortened(path)} holds a damaged recipe, or damaged weights", "save the model again"):
        if "left_out" in metadata:
            left_out = parse_json(metadata["left_out"])
            require_form(left_out, {str: str})
            state |= restored(as_path(path).parent, metadata["dense"], left_out, recipe["slices"], most_bytes)
        digest = require_whole(metadata, metadata["recipe"], state)
    misfit = f"{shortened(path)} was not made for this {type(fresh_model).__name__}"
    with sound(misfit, "pass a dense model of the class that was pruned"):
        module = build(fresh_model, _edit(recipe, fresh_model))
        _require_fit(state, module.state_dict())
        module.load_state_dict(state)
    setattr(module, ATTRIBUTE, recipe)
    keep_in_config(module, recipe, fresh_model)
    return module, digest


def made_for(path: str | Path) -> nn.Module:
    """Make a fresh model for a file, of the class that its recipe names."""
    metadata = read_metadata(path, "path must be a file written by autoprune.save")
    return fresh_of(_recipe_in(metadata, shortened(path)).get("class", ""), shortened(path))


def most_bytes_of(dense: nn.Module) -> int:
    """Largest size of a file of a model cut from a dense one."""
    return MOST_TIMES_DENSE * sum(tensor.nbytes for tensor in (*dense.parameters(), *dense.buffers())) + MOST_RECIPE


def read_slices(path: Path, most_bytes: int) -> dict[str, dict[str, list[int]]]:
    """Read the slices in the recipe of a saved model; no sound file is larger than `most_bytes`."""
    metadata, _ = read_tensors(path, "path must be a file written by autoprune.save", most_bytes)
    slices: dict[str, dict[str, list[int]]] = _recipe_in(metadata, shortened(path))["slices"]
    return slices


def _recipe_in(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """Read the recipe in the header of a file."""
    with FORMAT.reading(name, "name a file that autoprune.save wrote"):
        FORMAT.require(metadata)
    with sound(f"{name} holds a damaged recipe", "save the model again"):
        recipe: dict[str, Any] = parse_json(metadata["recipe"])
        require_form(recipe, RECIPE_FORM)
        for name, dims in recipe["slices"].items():
            for dim, index in dims.items():
                _require_index(index, int(recipe["dense_shapes"][name][int(dim)]), f"slices[{name!r}][{dim!r}]")
    return recipe


def _require_index(index: Sequence[int], size: int, at: str) -> None:
    if len(set(index)) != len(index) or (index and not 0 <= min(index) <= max(index) < size):
        raise ValueError(f"{at} must be different numbers from 0 to {size - 1}")


def _edit(recipe: Mapping[str, Any], model: nn.Module) -> Edit:
    shapes = {name: list(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}
    for name, shape in recipe["dense_shapes"].items():
        if shapes.get(name) != shape:
            found = shapes.get(name, "no such tensor")
            raise ValueError(f"its {name!r} has shape {shape}, but this {type(model).__name__} has {found}")
    for name, values in recipe["attributes"].items():
        _require_numbers(model.get_submodule(name), name, values)
    slices = {
        name: {int(dim): np.asarray(index, dtype=np.int64) for dim, index in dims.items()}
        for name, dims in recipe["slices"].items()
    }
    for name, returns in recipe.get("dropped", {}).items():
        model.get_submodule(name)
        require_returns(returns)
    return Edit(slices, recipe["attributes"], graphs=recipe.get("graphs", {}), dropped=recipe.get("dropped", {}))


def _require_numbers(module: nn.Module, name: str, attributes: Iterable[str]) -> None:
    """Refuse attributes whose present value is no number, such as a method, a flag or a module."""
    for path in attributes:
        if "." not in path and not hasattr(module, path):
            continue  # which `build` leaves out, too
        if type(size_held(module, path)) is not int:
            raise ValueError(f"it sets {name}.{path}, which is no whole number in this {type(module).__name__}")


def _require_fit(state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors of other names and shapes than a module has, naming the first."""
    for name in (*wanted, *state):
        here = list(wanted[name].shape) if name in wanted else "no such tensor"
        there = list(state[name].shape) if name in state else "no such tensor"
        if here != there:
            raise ValueError(f"its {name!r} is {there}, and that of this model, once it is cut, is {here}")
