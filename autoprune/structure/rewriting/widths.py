"""Numbers in a recorded call that are sizes of its result, at other widths than the recorded ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._pytree import tree_leaves

from autoprune.structure.rewriting.capture import Held, Step

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""

Shapes = Callable[[Held], tuple[int, ...]]
"""Shape of a tensor at the other widths."""

WHOLE = frozenset(
    (
        *("reshape", "view", "expand", "broadcast_to", "new_zeros", "new_ones", "new_full", "new_empty"),
        *("zeros", "ones", "empty", "full", "rand", "randn"),
    )
)
"""Calls whose arguments include the shape of their result."""


def resized(step: Step, dense: Shapes, shapes: Shapes) -> Arguments:
    """Replace the numbers among the arguments of a call that follow the shape of its result.

    Args:
        step: The call.
        dense: Shapes as recorded.
        shapes: Shapes at the other widths.
    """
    touched = [leaf for leaf in tree_leaves((step.args, step.kwargs, step.output)) if isinstance(leaf, Held)]
    if step.kind == "module" or all(dense(leaf) == shapes(leaf) for leaf in touched):
        return step.args, step.kwargs  # a submodule may be called like a function
    name = step.target.rpartition(".")[2]
    args, kwargs = list(step.args), dict(step.kwargs)
    if name in WHOLE:
        return _whole(name, args, kwargs, shapes(step.output))
    if name in _PARTS:
        return _PARTS[name](step, args, kwargs, shapes)
    if name == "getitem":
        return _getitem(step, dense, shapes)
    return step.args, step.kwargs


def _whole(name: str, args: list[Any], kwargs: dict[str, Any], shape: tuple[int, ...]) -> Arguments:
    begin = 0 if not args or not isinstance(args[0], Held) else 1
    for key in ("size", "shape"):
        if key in kwargs:
            return tuple(args), {**kwargs, key: _filled(kwargs[key], shape)}
    if len(args) > begin and isinstance(args[begin], list | tuple):
        args[begin] = _filled(args[begin], shape)
    elif all(type(arg) is int for arg in args[begin:]):
        args[begin:] = _filled(args[begin:], shape)
    return tuple(args), kwargs


def _filled(sizes: Sequence[Any], shape: Sequence[int]) -> Any:
    """Fill in sizes from the shape, except for -1."""
    if len(sizes) != len(shape):
        return sizes
    filled = [given if given == -1 else size for given, size in zip(sizes, shape, strict=True)]
    return filled if isinstance(sizes, list) else tuple(filled)


def _given(args: list[Any], kwargs: dict[str, Any], place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _put(args: list[Any], kwargs: dict[str, Any], place: int, name: str, value: Any) -> None:
    if len(args) > place:
        args[place] = value
    else:
        kwargs[name] = value


def _unflatten(step: Step, args: list[Any], kwargs: dict[str, Any], shapes: Shapes) -> Arguments:
    dim, sizes = _given(args, kwargs, 1, "dim"), _given(args, kwargs, 2, "sizes")
    shape = shapes(step.output)
    dim %= len(shape) - len(sizes) + 1
    _put(args, kwargs, 2, "sizes", _filled(sizes, shape[dim : dim + len(sizes)]))
    return tuple(args), kwargs


def _split(step: Step, args: list[Any], kwargs: dict[str, Any], shapes: Shapes) -> Arguments:
    key = next((key for key in ("split_size_or_sections", "split_size", "split_sizes") if key in kwargs), "split_size")
    sizes = _given(args, kwargs, 1, key)
    dim = _given(args, kwargs, 2, "dim", 0)
    parts = [shapes(leaf)[dim] for leaf in tree_leaves(step.output)]
    several = parts if isinstance(sizes, list) else tuple(parts)
    _put(args, kwargs, 1, key, parts[0] if isinstance(sizes, int) else several)
    return tuple(args), kwargs


def _narrow(step: Step, args: list[Any], kwargs: dict[str, Any], shapes: Shapes) -> Arguments:
    dim = _given(args, kwargs, 1, "dim")
    whole = shapes(args[0])[dim]
    part = shapes(step.output)[dim]
    if _given(args, kwargs, 2, "start"):
        _put(args, kwargs, 2, "start", whole - part)  # where it is not the end, a check says so
    _put(args, kwargs, 3, "length", part)
    return tuple(args), kwargs


def _norm(step: Step, args: list[Any], kwargs: dict[str, Any], shapes: Shapes) -> Arguments:
    sizes = _given(args, kwargs, 1, "normalized_shape")
    _put(args, kwargs, 1, "normalized_shape", _filled(sizes, shapes(step.output)[-len(sizes) :]))
    return tuple(args), kwargs


def _convolution(step: Step, args: list[Any], kwargs: dict[str, Any], shapes: Shapes) -> Arguments:
    x = args[0]
    weight = _given(args, kwargs, 1, "weight")
    if _given(args, kwargs, 6, "groups", 1) > 1 and isinstance(weight, Held):
        _put(args, kwargs, 6, "groups", shapes(x)[1] // shapes(weight)[1])
    return tuple(args), kwargs


def _getitem(step: Step, dense: Shapes, shapes: Shapes) -> Arguments:
    args, kwargs = step.args, step.kwargs
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    plain = all(part is None or part is ... or isinstance(part, int | slice) for part in index)
    if not plain or not isinstance(args[0], Held) or not isinstance(step.output, Held):
        return args, kwargs
    whole = shapes(args[0])
    part = shapes(step.output)
    taken = sum(1 for item in index if item is not None and item is not ...)
    given = 0
    made = 0
    new = []
    for item in index:
        if item is ...:
            skipped = len(whole) - taken
            given, made = given + skipped, made + skipped
        elif item is None:
            made += 1
        elif isinstance(item, int):
            given += 1
        else:
            if whole[given] != dense(args[0])[given]:
                item = _cut(item, whole[given], part[made])
            given, made = given + 1, made + 1
        new.append(item)
    return (args[0], tuple(new) if isinstance(args[1], tuple) else new[0]), kwargs


def _cut(item: slice, whole: int, part: int) -> slice:
    """Adapt a slice from the beginning, or to the end, of a dimension to other sizes."""
    if item.step not in (None, 1) or any(type(end) is int and end < 0 for end in (item.start, item.stop)):
        return item
    if not item.start and type(item.stop) is int:
        return slice(item.start, part, item.step)
    if item.stop is None and type(item.start) is int:
        return slice(whole - part, None, item.step)
    return item


_PARTS: dict[str, Callable[[Step, list[Any], dict[str, Any], Shapes], Arguments]] = {
    "unflatten": _unflatten,
    "narrow": _narrow,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _split),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
}
