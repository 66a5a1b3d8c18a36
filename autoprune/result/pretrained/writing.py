"""Folders of pretrained models, written only after a model loaded from them gives the same outputs to the last bit."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.errors import UnsupportedModelError
from autoprune.files.access import as_path, brief, explaining, make_folder, write_json
from autoprune.files.tensor_file import write_tensors
from autoprune.result.exporting.program import quiet
from autoprune.result.pretrained.folder import CONFIG, GENERATION, WEIGHTS, from_pretrained, transformers_library
from autoprune.result.pretrained.section import FORM, FORMAT, KEY
from autoprune.result.pretrained.widths import Widths, widths_of
from autoprune.result.shared_tensors import first_names
from autoprune.structure.given import unwrap

PER_LAYER = "per_layer_config"
ALLOW = "allow_global_per_layer_attribute_access"
_FILES = (WEIGHTS, GENERATION, CONFIG)

Compare = Callable[[nn.Module], Any]
"""Compares a loaded module with the one that was written; raises UnsupportedModelError if outputs differ."""


def write_pretrained(small: nn.Module, path: str | Path, compare: Compare) -> tuple[Any, tuple[str, ...]]:
    """Write a folder that `autoprune.from_pretrained` loads, and ``from_pretrained`` of transformers where it can.

    Args:
        small: A model of transformers, pruned or not.
        path: The folder; made if missing. Other files in it, such as those of a tokenizer, stay.
        compare: Called with the model loaded again before anything is put into the folder.

    Returns:
        What `compare` returned, and notes on which loader reads the folder.

    Raises:
        UnsupportedModelError: If it is no model of transformers, or cannot be loaded again to the last bit.
        OSError: If the folder cannot be written.
    """
    small = unwrap(small)
    require_pretrained(small)
    folder = make_folder(path)
    with explaining(folder, "path"):
        fresh = Path(tempfile.mkdtemp(prefix=".autoprune-", dir=folder))
    try:
        widths, config = _described(small)
        _write(small, config, fresh)
        try:
            loaded = from_pretrained(fresh, type(small))
        except Exception as error:  # of whatever the class does when it is made
            raise UnsupportedModelError(
                f"{type(small).__name__} cannot be loaded from its config and weights: {brief(error)}; use "
                "autoprune.save(small, path) and autoprune.load(path, fresh_model)"
            ) from error
        found = compare(loaded)
        note = _stock(small, fresh, compare, widths)
        with explaining(folder, "path"):
            for name in _FILES:  # the config last
                if (fresh / name).exists():
                    os.replace(fresh / name, folder / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return found, (note,)


def require_pretrained(small: nn.Module) -> None:
    """Refuse models of other libraries.

    Raises:
        UnsupportedModelError: If it is no model of transformers.
    """
    if not isinstance(small, transformers_library().PreTrainedModel):
        raise UnsupportedModelError(
            f"format='hf' is for models of transformers, got a {type(small).__name__}; use autoprune.save, or "
            "format='onnx' or 'torch'"
        )


def pretrained_widths(small: nn.Module) -> Widths:
    """Widths of each layer of a pruned model of transformers, as other tools write them.

    Raises:
        UnsupportedModelError: If it is no model of transformers.

    Example:
        >>> widths = pretrained_widths(small)  # doctest: +SKIP
        >>> widths.layers.block_configs()[5]["ffn"]  # doctest: +SKIP
        {'no_op': False, 'intermediate_size': 1152}
    """
    small = unwrap(small)
    require_pretrained(small)
    return _described(small)[0]


def _described(small: nn.Module) -> tuple[Widths, dict[str, Any]]:
    """Widths of a model, and its config as a file has it."""
    kind: Any = type(small)
    held: Any = small.config
    config = {**held.to_dict(), "architectures": [kind.__name__]}
    section = {**_empty(), **config.pop(KEY, {})}
    dense = {**config, **section["dense"]}

    def make(changed: Mapping[str, Any]) -> nn.Module:
        made: nn.Module = kind(kind.config_class.from_dict(copy.deepcopy(dict(changed))))
        return made

    widths = widths_of(small, make, dense, section["dropped"])
    written: dict[str, Any] = {**config, **widths.plain}
    if widths.per_layer:
        written |= _readable({**written, PER_LAYER: {str(i): own for i, own in widths.per_layer.items()}}, kind)
    replaced = {name: dense[name] for name in widths.plain}
    section |= {"dense": {**section["dense"], **replaced}, "types": _types(small)}
    section["attention"] = getattr(held, "_attn_implementation", None)
    return widths, {**written, KEY: {**FORMAT.stamp(), **section}}


def _readable(config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Make a config with widths of layers readable by the class: some check a width as if all layers had it.

    Such a class is allowed to read the width of the dense model, so that tools that read configs alone, such as those
    of tokenizers, go on working. The widths of layers are left out where that does not help either.
    """
    for allowed in ({}, {ALLOW: True}):
        try:
            with quiet("transformers"):  # which warns of what is allowed here
                kind.config_class.from_dict({**copy.deepcopy(dict(config)), **allowed})
        except Exception:  # classes check their configs in any way
            continue
        return {PER_LAYER: config[PER_LAYER], **allowed}
    return {}


def _empty() -> dict[str, Any]:
    """Section of a model that was not pruned."""
    return {name.removesuffix("?"): {} for name in FORM}


def _types(small: nn.Module) -> dict[str, str]:
    """Types of floating-point buffers that no file holds."""
    held = small.state_dict().keys()
    return {
        name: str(tensor.dtype).removeprefix("torch.")
        for name, tensor in small.named_buffers()
        if name not in held and tensor.is_floating_point()
    }


def _write(small: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    state = small.state_dict()
    first = first_names(small)
    own = {name: tensor for name, tensor in state.items() if first[name] == name}
    write_tensors(folder / WEIGHTS, own, {"format": "pt"})  # as transformers requires
    generation: Any = getattr(small, "generation_config", None)
    if generation is not None:
        write_json(folder / GENERATION, generation.to_diff_dict(), indent=2)
    write_json(folder / CONFIG, config, indent=2)


def _stock(small: nn.Module, folder: Path, compare: Compare, widths: Widths) -> str:
    """Say whether transformers loads the folder by itself, after it was tried."""
    library = transformers_library()
    name = type(small).__name__
    reason = "its layers have different widths" if widths.per_layer else "its widths are in no field of the config"
    try:
        if not widths.per_layer and _same_shapes(small, folder):
            compare(_loaded_by_transformers(small, folder))
            return f"{name}.from_pretrained of transformers loads it, too"
    except Exception:  # whatever the class or its loader raises: it does not load it
        reason = "its numbers of heads or other sizes do not follow from the config"
    return (
        f"transformers {library.__version__} makes every layer of {name} from the whole config, and {reason}: load it "
        "with autoprune.from_pretrained(path)"
    )


def _same_shapes(small: nn.Module, folder: Path) -> bool:
    kind: Any = type(small)
    with torch.device("meta"):
        made = kind(kind.config_class.from_pretrained(folder))
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    return shapes == {name: tensor.shape for name, tensor in small.state_dict().items()}


def _loaded_by_transformers(small: nn.Module, folder: Path) -> nn.Module:
    kind: Any = type(small)
    attention = getattr(small.config, "_attn_implementation", None)
    loaded: nn.Module = kind.from_pretrained(as_path(folder), attn_implementation=attention).eval()
    return loaded
