"""Folders of pretrained models, read without pickle, without code from elsewhere, and with sizes checked first.

``config.json`` has what `autoprune.result.pretrained.section` says, next to the fields of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autoprune.errors import FileFormatError
from autoprune.files.access import MIB, as_path, read_json, require_file, shortened, sound
from autoprune.files.schema import require_form
from autoprune.files.tensor_file import read_tensors
from autoprune.imports import importing
from autoprune.result.pretrained.section import FORM, FORMAT, KEY
from autoprune.result.pretrained.shapes import module_of_shapes
from autoprune.structure.slicing.kept import ATTRIBUTE

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
MOST_CONFIG = 256 * MIB
MOST_WEIGHTS = 2**44
"""Largest file of weights, which is as long as its header says, and so bounded by the disk."""

ALWAYS_LAYERS = 256
"""Layers that a config may name however few tensors there are: some models use a layer several times."""

_LAYERS = ("layers", "n_layer", "depth", "blocks")
_REPLACED = ("per_layer_config", "allow_global_per_layer_attribute_access")


def from_pretrained(path: str | Path, model_class: type[nn.Module] | None = None) -> nn.Module:
    """Load a pruned model of transformers from a folder, in any process, without the dense model.

    The folder is from ``autoprune.export(small, path, format="hf")`` or from ``small.save_pretrained(path)`` of a
    pruned model. The class is built by its name in transformers, its layers get the shapes of the weights, and no file
    is unpickled or run.

    Args:
        path: The folder.
        model_class: The class, if it is none of transformers.

    Returns:
        The module, in evaluation mode on the CPU, with the outputs of the one that was written, to the last bit.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        FileFormatError: If a file is damaged or foreign, or was made for another class; names it.
        ImportError: If transformers is missing.
    """
    folder = as_path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be a folder with {CONFIG}, got {shortened(folder)}: no such folder")
    config, section = _read_config(folder)
    kind = _class_of(config, model_class, folder)
    state = _read_weights(folder)
    with _damaged(folder / CONFIG):
        most = max(ALWAYS_LAYERS, len(state)) + len(section["dropped"])
        made = _config_of(kind, config, section, most)
        module, larger = module_of_shapes(lambda: kind(made), lambda outline: _named(outline, state), section)
        for name, tensor in module.named_buffers():
            if name in (section["types"] or {}):
                _set_type(module, name, tensor, section["types"][name])
    _restore_generation(module, folder)
    setattr(module, ATTRIBUTE, _recipe(module, larger, section))
    module.config.autoprune = {**FORMAT.stamp(), **section}  # type: ignore[union-attr]  # a config of transformers
    return module


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a config without the section, and the section."""
    file = require_file(folder / CONFIG, f"path must be a folder with {CONFIG}", MOST_CONFIG)
    with _damaged(file):
        config: dict[str, Any] = read_json(file, MOST_CONFIG)
        require_form(config, {"architectures?": ([str], None)})
        section = config.pop(KEY, None)
        if section is None:
            raise ValueError(
                "it names nothing that was pruned; load an ordinary model with from_pretrained of transformers, and "
                "write a pruned one with autoprune.export(small, path, format='hf')"
            )
        require_form(section, {})
        FORMAT.require(section)
        require_form(section, FORM)
    for name in _REPLACED:
        config.pop(name, None)
    return {**config, **section["dense"]}, {name: section.get(name) for name in _names(FORM)}


def _names(form: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix("?") for name in form]


def _class_of(config: Mapping[str, Any], given: type[nn.Module] | None, folder: Path) -> Any:
    """The class to build: one of transformers by its name, or the user's own. No name leads to any other code."""
    transformers = transformers_library()
    if given is not None:
        if not (isinstance(given, type) and issubclass(given, transformers.PreTrainedModel)):
            raise TypeError(f"model_class must be a class of pretrained models of transformers, got {given!r:.200}")
        return given
    name = next(iter(config.get("architectures") or ()), None)
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise FileFormatError(
            f"{shortened(folder / CONFIG)} names the class {name!r:.60}, which is none of transformers "
            f"{transformers.__version__}; pass model_class="
        )
    return kind


def _config_of(kind: Any, config: Mapping[str, Any], section: Mapping[str, Any], most: int) -> Any:
    """Make the config of the class before it was pruned, of at most as many layers."""
    for name, value in _numbers(config):
        if any(word in name for word in _LAYERS) and value > most:
            raise ValueError(f"{name} is {value}, more layers than there are tensors")
    made = kind.config_class.from_dict(dict(config))
    if section.get("attention") is not None:
        made._attn_implementation = section["attention"]
    return made


def _numbers(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Whole numbers in a config and in those inside it, by their names."""
    found = [(name, value) for name, value in config.items() if type(value) is int]
    inner = [entry for value in config.values() if isinstance(value, Mapping) for entry in _numbers(value)]
    return [*found, *inner]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of one file, or of those that an index names."""
    expected = f"path must be a folder with {WEIGHTS}"
    if (folder / WEIGHTS).exists():
        return read_tensors(folder / WEIGHTS, expected, MOST_WEIGHTS)[1]
    if not (folder / INDEX).exists():
        raise FileNotFoundError(
            f"{expected}, got {shortened(folder)}: there is none; other files of weights are pickles, which are never "
            "read"
        )
    file = require_file(folder / INDEX, expected, MOST_CONFIG)
    with _damaged(file):
        index = read_json(file, MOST_CONFIG)
        require_form(index, {"weight_map": {str: str}})
        names = sorted(set(index["weight_map"].values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it names {name!r:.60}, which is no safetensors file of its folder")
    return {
        name: tensor
        for part in names
        for name, tensor in read_tensors(folder / part, expected, MOST_WEIGHTS)[1].items()
    }


def _named(outline: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names in the class, where ``save_pretrained`` wrote those of earlier versions of it."""
    known = outline.state_dict().keys()
    if state.keys() <= known:
        return state
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # of a version without earlier names
        return state
    mapping = get_model_conversion_mapping(outline)
    names = [each for each in mapping if isinstance(each, WeightRenaming)]
    joins = [each for each in mapping if isinstance(each, WeightConverter)]
    found = {}
    for name, tensor in state.items():
        renamed, joined = rename_source_key(name, names, joins)
        if joined is not None:
            raise ValueError(
                f"its {name!r} is a part of a tensor of this class; write it with autoprune.export(small, path, "
                "format='hf'), or save_pretrained(path, save_original_format=False)"
            )
        found[renamed] = tensor
    return found


def _restore_generation(module: nn.Module, folder: Path) -> None:
    """Read the settings of ``generate``, if there are any."""
    if not (folder / GENERATION).exists() or getattr(module, "generation_config", None) is None:
        return
    file = require_file(folder / GENERATION, f"{GENERATION} must be a file", MOST_CONFIG)
    with _damaged(file):
        settings = read_json(file, MOST_CONFIG)
        require_form(settings, {})
        held: Any = module
        held.generation_config = type(held.generation_config).from_dict(settings)


def _set_type(module: nn.Module, name: str, tensor: Tensor, kind: str) -> None:
    import torch

    wanted = getattr(torch, kind, None)
    if not isinstance(wanted, torch.dtype):
        raise ValueError(f"it gives {name!r} the type {kind!r:.60}")
    owner, _, key = name.rpartition(".")
    module.get_submodule(owner)._buffers[key] = tensor.to(wanted)


def _recipe(module: nn.Module, larger: Mapping[str, list[int]], section: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe for `autoprune.save`: the first rows of each tensor, because which ones were kept is known no more."""
    shapes = {name: tensor.shape for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    slices = {
        name: {str(d): list(range(size)) for d, size in enumerate(shapes[name]) if size != dense[d]}
        for name, dense in larger.items()
    }
    plain = {name: section[name] for name in ("attributes", "graphs", "dropped") if section[name]}
    return {"attributes": {}, "graphs": {}, **plain, "slices": slices, "dense_shapes": dict(larger)}


def _damaged(file: Path) -> Any:
    return sound(f"{shortened(file)} cannot be used", "export the model again, or pass its own folder")


def transformers_library() -> Any:
    """Import transformers.

    Raises:
        ImportError: If it is missing.
    """
    try:
        with importing():
            import transformers
    except ImportError as error:
        raise ImportError("a folder of a pretrained model needs transformers; install it") from error
    return transformers
