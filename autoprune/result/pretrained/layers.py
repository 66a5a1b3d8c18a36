"""Widths of each layer of a transformer, in the words of transformers, of NVIDIA's ModelOpt and of llama.cpp.

transformers 5 writes ``per_layer_config``: of layers that differ from the config, what differs. ModelOpt writes
``block_configs``, an attention and a feed-forward part for each layer. The GGUF files of llama.cpp have arrays of
numbers, one entry a layer, in which 0 stands for a part that was left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ATTENTION, MLP = "attention", "mlp"
SKIP = "skip"
FEED_FORWARD = "intermediate_size"
HEADS, KEY_HEADS = "num_attention_heads", "num_key_value_heads"
_GGUF = {"attention.head_count": HEADS, "attention.head_count_kv": KEY_HEADS, "feed_forward_length": FEED_FORWARD}
_PARTS = {"attention.head_count": ATTENTION, "attention.head_count_kv": ATTENTION, "feed_forward_length": MLP}


@dataclass(frozen=True)
class LayerWidths:
    """Widths of each layer.

    Attributes:
        layers: For each layer, sizes by their names in transformers, such as ``{"intermediate_size": 1152}``.
        skipped: For each layer, the parts that were left out: ``"attention"``, ``"mlp"`` or names of other modules.
    """

    layers: tuple[Mapping[str, int], ...]
    skipped: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.skipped):
            raise ValueError(
                f"skipped must have an entry for each of {len(self.layers)} layers, got {len(self.skipped)}"
            )

    def plain(self) -> dict[str, int]:
        """Sizes that all layers have in common."""
        found: dict[str, int] = {}
        for name in sorted({name for layer in self.layers for name in layer}):
            sizes = {layer.get(name) for layer in self.layers}
            size = sizes.pop()
            if not sizes and size is not None:
                found[name] = size
        return found

    def per_layer_config(self, dense: Mapping[str, int]) -> dict[int, dict[str, Any]]:
        """``per_layer_config`` of transformers: of each layer, the sizes that not all have in common, if not as dense.

        Args:
            dense: Sizes in the config, for layers that name none.
        """
        plain = self.plain()
        found: dict[int, dict[str, Any]] = {}
        for i, (layer, skipped) in enumerate(zip(self.layers, self.skipped, strict=True)):
            own: dict[str, Any] = {
                name: size for name, size in layer.items() if name not in plain and size != dense.get(name)
            }
            if skipped:
                own[SKIP] = sorted(skipped)
            if own:
                found[i] = own
        return found

    @classmethod
    def from_per_layer_config(
        cls, given: Mapping[int | str, Mapping[str, Any]], plain: Mapping[str, int], count: int
    ) -> LayerWidths:
        """Restore the widths of `count` layers from what differs, and from the sizes of layers that name none."""
        own = {int(i): dict(values) for i, values in given.items()}
        skipped = tuple(tuple(sorted(own.get(i, {}).pop(SKIP, ()))) for i in range(count))
        return cls(tuple({**plain, **own.get(i, {})} for i in range(count)), skipped)

    def block_configs(self) -> list[dict[str, dict[str, Any]]]:
        """``block_configs`` of NVIDIA's ModelOpt: of each layer, attention and feed-forward part."""
        blocks = []
        for layer, skipped in zip(self.layers, self.skipped, strict=True):
            attention: dict[str, Any] = {"no_op": ATTENTION in skipped}
            feed_forward: dict[str, Any] = {"no_op": MLP in skipped}
            for part, names in ((attention, (HEADS, KEY_HEADS)), (feed_forward, (FEED_FORWARD,))):
                part |= {name: None if part["no_op"] else layer[name] for name in names if name in layer}
            blocks.append({"attention": attention, "ffn": feed_forward})
        return blocks

    @classmethod
    def from_block_configs(cls, blocks: Sequence[Mapping[str, Mapping[str, Any]]]) -> LayerWidths:
        """Restore the widths; those of parts that are left out are gone."""
        layers, skipped = [], []
        for block in blocks:
            parts = {ATTENTION: block["attention"], MLP: block["ffn"]}
            gone = tuple(sorted(name for name, part in parts.items() if part["no_op"]))
            sizes = {name: size for part in parts.values() for name, size in part.items() if name != "no_op"}
            layers.append({name: int(size) for name, size in sizes.items() if size is not None})
            skipped.append(gone)
        return cls(tuple(layers), tuple(skipped))

    def gguf_arrays(self, architecture: str) -> dict[str, list[int]]:
        """Arrays of llama.cpp, such as ``"llama.feed_forward_length"``, with 0 for parts that are left out.

        Args:
            architecture: Its name there, such as ``"llama"`` or ``"qwen3"``.
        """
        found = {}
        for key, name in _GGUF.items():
            sizes = [
                0 if _PARTS[key] in skipped else layer.get(name)
                for layer, skipped in zip(self.layers, self.skipped, strict=True)
            ]
            if None not in sizes:
                found[f"{architecture}.{key}"] = [size for size in sizes if size is not None]
        return found

    @classmethod
    def from_gguf_arrays(cls, arrays: Mapping[str, Sequence[int]]) -> LayerWidths:
        """Restore the widths; those of parts that are left out are gone."""
        named = {key.partition(".")[2]: values for key, values in arrays.items()}
        known = {key: values for key, values in named.items() if key in _GGUF}
        count = len(next(iter(known.values()), ()))
        layers = tuple({_GGUF[key]: int(v[i]) for key, v in known.items() if v[i]} for i in range(count))
        gone = [{_PARTS[key] for key, values in known.items() if not values[i]} for i in range(count)]
        return cls(layers, tuple(tuple(sorted(parts)) for parts in gone))
