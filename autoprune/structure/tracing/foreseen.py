"""Operations whose results have the same form on the meta device, and so need not be computed."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

log = logging.getLogger(__name__)


def stand_in(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], empty: tuple[bool, ...]) -> Any:
    """Make results of an operation without computing it; `empty` is the answer of `foresee` for it."""
    device = next(t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    leaves, tree = tree_flatten(_on_meta(func, args, kwargs))
    return tree_unflatten([_unwritten(leaf, none, device) for leaf, none in zip(leaves, empty, strict=True)], tree)


def foresee(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[bool, ...] | None:
    """Return which results of an operation are empty; None unless the meta device gives all others, and each is new."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    made = tree_leaves(out)
    if func._schema.is_mutable or not given or not all(isinstance(leaf, Tensor) and not leaf.is_meta for leaf in made):
        return None
    if any(leaf.layout != torch.strided for leaf in (*given, *made)):
        return None
    if {leaf.untyped_storage()._cdata for leaf in given} & {leaf.untyped_storage()._cdata for leaf in made}:
        return None
    try:
        said = tree_leaves(_on_meta(func, args, kwargs))
    except Exception as error:  # there is no such kernel, or it needs values
        log.debug("%s runs on real values only: %s", func, error)
        return None
    empty = tuple(tuple(leaf.shape) == (0,) for leaf in made)
    differ = any(
        (own.shape, own.stride(), own.dtype) != (leaf.shape, leaf.stride(), leaf.dtype)
        for own, leaf, none in zip(said, made, empty, strict=True)
        if not none
    )
    return None if differ else empty


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the meta device, on tensors of these sizes and strides."""
    return func(*tree_map(_bare, args), **tree_map(_bare, kwargs))


def _bare(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def _unwritten(leaf: Any, empty: bool, device: torch.device) -> Any:
    """Make a result on a device; whole numbers are zero, because they may be indices."""
    if not isinstance(leaf, Tensor):
        return leaf
    if empty:
        return torch.empty(0, dtype=leaf.dtype, device=device)
    made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)
    return made if leaf.is_floating_point() else made.zero_()
