"""Section of a config of transformers that says how a pruned model differs from the class that the config describes.

``save_pretrained`` writes it with the config, so that `autoprune.from_pretrained` can build the module. Shapes are not
in it: those of the weights count.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from autoprune.files.formats import Format
from autoprune.structure.owners import owners

log = logging.getLogger(__name__)

KEY = "autoprune"
FORMAT = Format("autoprune-pretrained", 1, "a pruned model of transformers")
FORM = {
    "attributes": {str: {str: int}},
    "graphs": {str: {"name": str, "inputs": [[object]], "nodes": [[object]], "output": object}},
    "dropped": {str: object},
    "buffers": {str: {str: [int]}},
    "dense": {str: object},
    "attention?": (str, None),
    "types?": ({str: str}, None),
}


def keep_in_config(module: nn.Module, recipe: Mapping[str, Any], dense: nn.Module) -> None:
    """Put the section into the config of a pruned model; other modules, without such a config, stay as they are.

    Models of other libraries that save themselves with a config are warned of, once for each class.

    Args:
        module: Built by autoprune; its config is its own.
        recipe: What was cut, from the model that the weights came from.
        dense: The model that was cut last; its config is read.
    """
    config: Any = getattr(module, "config", None)
    before: Any = getattr(dense, "config", None)
    if not callable(getattr(module, "save_pretrained", None)):
        return
    if not (hasattr(config, "to_dict") and hasattr(before, "to_dict")):
        _warn(type(module).__name__)
        return
    now, then = config.to_dict(), before.to_dict()
    earlier = then.pop(KEY, None) or {}
    changed = {name: then[name] for name in then if name in now and now[name] != then[name] and name != KEY}
    config.autoprune = {
        **FORMAT.stamp(),
        "attributes": {name: dict(values) for name, values in recipe["attributes"].items()},
        "graphs": dict(recipe.get("graphs", {})),
        "dropped": dict(recipe.get("dropped", {})),
        "buffers": _buffers(module, recipe["slices"]),
        "dense": {**changed, **earlier.get("dense", {})},
        "attention": getattr(config, "_attn_implementation", None),
    }


@cache
def _warn(name: str) -> None:
    log.warning(
        "%s.save_pretrained would write the config of the dense model, which cannot load pruned weights; save it with "
        "autoprune.save(model, path), and load it with autoprune.load(path, fresh_model)",
        name,
    )


def _buffers(module: nn.Module, slices: Mapping[str, Any]) -> dict[str, Any]:
    """Slices of the buffers that no state dictionary holds, and that are made again when the module is."""
    held = module.state_dict(keep_vars=True)
    missing = {owner.name for owner in owners(module)} - held.keys()
    return {name: dims for name, dims in slices.items() if name in missing}
