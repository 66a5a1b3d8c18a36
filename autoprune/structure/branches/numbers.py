"""Numbers by which layers find their places in a cache of earlier tokens, such as ``layer_idx``.

A cache is a list with a place for each layer, and code asks its first place for the number of tokens seen so far. So
where layers are dropped, those that stay move up to the first places.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

PATHS = ("layer_idx", "layer_index", "layer_id")
"""Attributes that hold such a number."""


@dataclass(frozen=True)
class Numbered:
    """Number that a module holds.

    Attributes:
        module: Qualified name.
        path: The attribute.
        number: Its dense value.
        kind: Modules whose numbers may be exchanged share it.
    """

    module: str
    path: str
    number: int
    kind: str


def find_numbers(model: nn.Module) -> tuple[Numbered, ...]:
    """Find the numbered layers of a model: modules whose names differ in numbers only are of one kind.

    Places may be of different types, ``config.layer_types`` of transformers says which; a layer keeps its type.
    """
    found = []
    shared = getattr(getattr(model, "config", None), "layer_types", None)
    for name, module in model.named_modules():
        types = getattr(getattr(module, "config", None), "layer_types", None) or shared
        for path in PATHS:
            number = vars(module).get(path)
            if type(number) is int:
                type_ = types[number] if isinstance(types, list | tuple) and 0 <= number < len(types) else ""
                kind = f"{re.sub(r'[0-9]+', '*', name)} {type_}"
                found.append(Numbered(name, path, number, kind))
    return tuple(found)


def closed_up(numbers: Sequence[Numbered], stays: Callable[[str], bool]) -> Iterator[tuple[str, str, int]]:
    """Give the layers that stay the first numbers of their kind: module, attribute and number of those that change.

    Args:
        numbers: Those of the dense model.
        stays: Returns whether a module, by its name, is kept.
    """
    kinds: dict[str, list[Numbered]] = defaultdict(list)
    for each in numbers:
        kinds[each.kind].append(each)
    for own in kinds.values():
        places = sorted({each.number for each in own})
        alive = sorted({each.number for each in own if stays(each.module)})
        moved = dict(zip(alive, places, strict=False))
        for each in own:
            if stays(each.module) and moved[each.number] != each.number:
                yield each.module, each.path, moved[each.number]
