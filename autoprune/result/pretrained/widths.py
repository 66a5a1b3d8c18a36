"""Widths of a pruned transformer in the words of its config, found by changing the config and watching the class.

The class is built on the meta device, which takes milliseconds, once as the config says and once for each field with
another value. Sizes of tensors and numbers in modules that follow a field tell its value in each layer of the pruned
model; no table of architectures is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoprune.data.sampling import seeded
from autoprune.result.pretrained.layers import ATTENTION, FEED_FORWARD, HEADS, KEY_HEADS, MLP, LayerWidths

HIDDEN, HEAD_SIZE = "hidden_size", "head_dim"
NAMES = {
    HIDDEN: ("hidden_size", "n_embd", "d_model", "dim"),
    HEAD_SIZE: ("head_dim", "d_kv"),
    FEED_FORWARD: ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "ffn_hidden_size"),
    HEADS: ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    KEY_HEADS: ("num_key_value_heads", "num_kv_heads"),
}
"""Fields by their names in most configs, with the names that others give them."""

_LAYERS = "num_hidden_layers"
_NORM = re.compile(r"norm|\bln_?\d?\b|dropout", re.IGNORECASE)
_WORDS = {ATTENTION: ("attn", "attention"), MLP: ("mlp", "ffn", "feed_forward", "feedforward")}

Make = Callable[[Mapping[str, Any]], nn.Module]
Sizes = dict[tuple[str, str], int]
"""Sizes of tensors by name and dimension, and whole numbers of modules by name and attribute."""


@dataclass(frozen=True)
class Widths:
    """Widths of a pruned transformer.

    Attributes:
        plain: Fields of the config that have another value in the whole model, by the config's own names.
        per_layer: What differs between layers, as ``per_layer_config`` has it, by the config's own names.
        layers: The same for every layer, by common names; None if the model has no single stack of layers.
    """

    plain: dict[str, int]
    per_layer: dict[int, dict[str, Any]]
    layers: LayerWidths | None


def widths_of(module: nn.Module, make: Make, dense: Mapping[str, Any], dropped: Mapping[str, Any]) -> Widths:
    """Find the widths of a pruned model.

    Args:
        module: The pruned model.
        make: Builds its class from a config as a dictionary.
        dense: The config of the dense model.
        dropped: Names of modules that were left out.
    """
    dense, names = _fields(dense)
    base = {field: int(dense[name]) for field, name in names.items()}
    with seeded(0), torch.device("meta"):
        outline = make(dense)
        follows = _followers(make, outline, base, names, dense)
    reading = _Reading(_sizes(outline), _sizes(module), follows, base)
    stack = _stack(outline)
    outside = reading.values("", stack)
    known = {**base, **{field: outside[field] for field in (HIDDEN, HEAD_SIZE) if field in outside}}
    layers = _layers(reading, outline, stack, known, dropped) if stack else None
    whole = {**reading.values("", "", known), **outside} if layers is None else {**outside, **layers.plain()}
    plain = {names[field]: value for field, value in whole.items() if value != base[field]}
    varied = {} if layers is None else layers.per_layer_config(base)
    per_layer = {i: {names.get(key, key): value for key, value in own.items()} for i, own in varied.items()}
    return Widths(plain, per_layer, layers)


def _fields(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A config with the sizes that it implies, and the names of its fields by common names."""
    names = {field: name for field in NAMES if (name := next((each for each in NAMES[field] if each in config), ""))}
    full = dict(config)
    if FEED_FORWARD in names and full[names[FEED_FORWARD]] is None and HIDDEN in names:
        full[names[FEED_FORWARD]] = 4 * full[names[HIDDEN]]  # as GPT-2 and its kin mean it
    return full, {field: name for field, name in names.items() if type(full[name]) is int}


def _layers(
    reading: _Reading, outline: nn.Module, stack: str, known: Mapping[str, int], dropped: Mapping[str, Any]
) -> LayerWidths:
    """Widths of each layer of a stack."""
    count = sum(1 for _ in outline.get_submodule(stack).children())
    read = [reading.values(f"{stack}.{i}.", "", known) for i in range(count)]
    inner = tuple({f: v for f, v in own.items() if f not in (HIDDEN, HEAD_SIZE)} for own in read)
    return LayerWidths(inner, tuple(_skipped(f"{stack}.{i}", dropped) for i in range(count)))


@dataclass(frozen=True)
class _Reading:
    """Sizes of the dense and the pruned model, and the fields that each follows.

    Attributes:
        dense: Sizes of the dense model.
        pruned: Sizes of the pruned one.
        follows: Fields that a size is a multiple of, all of them.
        base: Values of the fields in the dense config.
    """

    dense: Sizes
    pruned: Sizes
    follows: Mapping[tuple[str, str], tuple[str, ...]]
    base: Mapping[str, int]

    def values(self, within: str, without: str, known: Mapping[str, int] | None = None) -> dict[str, int]:
        """Values of the fields, by the sizes below `within`, and not below `without`.

        Tensors count before numbers in modules, which may be left from the dense model. The width of the model is that
        of most tensors; of other fields, all must agree.

        Args:
            within: Beginning of the names.
            without: Name of a module whose sizes do not count.
            known: Values of fields that a size may follow at once; without, such sizes do not count.
        """
        found: dict[str, tuple[list[int | None], list[int | None]]] = {}
        for key, fields in self.follows.items():
            inside = key[0].startswith(within) and not (without and key[0].startswith(f"{without}."))
            if key not in self.pruned or not inside or (known is None and len(fields) > 1):
                continue
            for field in fields:
                value = self._value(key, field, [other for other in fields if other != field], known or self.base)
                tensors, numbers = found.setdefault(field, ([], []))
                (tensors if key[1].isdecimal() else numbers).append(value)
        chosen = {field: _agreed(field, tensors or numbers) for field, (tensors, numbers) in found.items()}
        return {field: value for field, value in chosen.items() if value is not None}

    def _value(self, key: tuple[str, str], field: str, others: list[str], known: Mapping[str, int]) -> int | None:
        """Value of a field that gives a size its number; None if none does."""
        then = self.base[field]
        now = self.pruned[key] * then
        for other in others:
            now, then = now * self.base[other], then * known[other]
        whole = self.dense[key] * then // self.base[field]
        return now // whole if whole and now % whole == 0 else None


def _agreed(field: str, values: list[int | None]) -> int | None:
    ((commonest, count),) = Counter(values).most_common(1)
    return commonest if field == HIDDEN or count == len(values) else None


def _followers(
    make: Make, outline: nn.Module, values: Mapping[str, int], names: Mapping[str, str], dense: Mapping[str, Any]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Fields that each size is proportional to."""
    before = _sizes(outline)
    found: dict[tuple[str, str], list[str]] = {}
    spoiled = set()
    for field, value in values.items():
        other = _changed(make, {**dense}, names[field], value)
        if other is None:
            continue
        changed, now = other
        for key, size in _sizes(changed).items():
            if key not in before or size == before[key]:
                continue
            if size * value == before[key] * now:
                found.setdefault(key, []).append(field)
            else:
                spoiled.add(key)  # a sum, such as the rows of fused projections
    return {key: tuple(fields) for key, fields in found.items() if key not in spoiled}


def _changed(make: Make, config: dict[str, Any], name: str, value: int) -> tuple[nn.Module, int] | None:
    """The class with another value of a field, and that value; None if it takes no other."""
    for now in (2 * value, 3 * value, value // 2):
        try:
            return make({**config, name: now}), now
        except Exception:  # a class may refuse sizes in any way
            continue
    return None


def _sizes(module: nn.Module) -> Sizes:
    tensors = {
        (name, str(dim)): size
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        for dim, size in enumerate(tensor.shape)
    }
    numbers = {
        (f"{name}.", key): value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if type(value) is int and value > 0
    }
    return {**tensors, **numbers}


def _stack(outline: nn.Module) -> str:
    """Name of the only list of layers; empty if there is none, or several."""
    count = getattr(getattr(outline, "config", None), _LAYERS, 0)
    found = [
        name
        for name, part in outline.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == count and name
    ]
    return found[0] if len(found) == 1 else ""


def _skipped(layer: str, dropped: Mapping[str, Any]) -> tuple[str, ...]:
    """Parts of a layer that were left out, by common names."""
    if layer in dropped:
        return (ATTENTION, MLP)
    within = [name.removeprefix(f"{layer}.") for name in dropped if name.startswith(f"{layer}.")]
    parts = [_word(name) for name in within if not _NORM.search(name)]  # which only prepare what a part reads
    return tuple(sorted(set(parts or within)))


def _word(name: str) -> str:
    return next((part for part, words in _WORDS.items() if any(word in name.lower() for word in words)), name)
