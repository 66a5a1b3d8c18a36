"""Checks that several spaces can be applied to one model together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autoprune.protocols import IntArray, SearchSpace
from autoprune.search_spaces.protocol import FollowsWidths


def single_changes(space: SearchSpace) -> IntArray:
    """The dense candidate, then every other option of every dimension alone, shape (k, d)."""
    sizes = space.sizes
    dims = np.repeat(np.arange(len(sizes)), sizes - 1)
    changes = np.zeros((1 + len(dims), len(sizes)), dtype=np.int64)
    changes[np.arange(1, len(changes)), dims] = np.concatenate([np.arange(1, size) for size in sizes])
    return changes


def require_following(members: Sequence[SearchSpace], changes: Sequence[IntArray], decides: NDArray[np.bool_]) -> None:
    """Refuse members that set elements to zero without regard to what others do.

    Args:
        members: The spaces.
        changes: `single_changes` of each.
        decides: Whether each changes each width, shape (members, columns).

    Raises:
        ValueError: If one sets elements to zero but does not follow the widths of another; if two do so in one weight.
    """
    taken: dict[str, int] = {}
    for i, (member, alone) in enumerate(zip(members, changes, strict=True)):
        names = _zeroed_names(member, alone)
        for name in sorted(names):
            if name in taken:
                raise ValueError(
                    f"spaces of a product must not set elements of one weight to zero twice, but members {taken[name]} "
                    f"and {i} both do in {name!r}; leave it out of one of them"
                )
            taken[name] = i
        if names and not isinstance(member, FollowsWidths) and np.delete(decides, i, axis=0).any():
            raise ValueError(
                "spaces of a product that set elements to zero must follow the widths of those that remove units, but "
                f"{type(member).__name__} has no zeroed_weights and zeros_among (see "
                "autoprune.search_spaces.FollowsWidths)"
            )


def require_nested(
    members: Sequence[SearchSpace],
    changes: Sequence[IntArray],
    decides: NDArray[np.bool_],
    groups: Sequence[str],
) -> None:
    """Refuse members that keep other units of one group, or drop the same part.

    Args:
        members: The spaces.
        changes: `single_changes` of each.
        decides: Whether each changes each width, shape (members, columns).
        groups: Names of the first columns.

    Raises:
        ValueError: Names the group.
    """
    shared = decides.sum(axis=0) > 1
    if shared[len(groups) :].any():
        raise ValueError("spaces of a product must not drop the same part of the model; leave one of them out")
    names = {name for name, both in zip(groups, shared, strict=False) if both}
    kept: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for member, alone in zip(members, changes, strict=True) if names else ():
        for candidate in alone.tolist():
            for name in names & member.pruning(candidate).kept.keys():
                kept[name].add(member.pruning(candidate).kept[name])
    for name, found in kept.items():
        if any(not set(few) <= set(more) for few, more in pairwise(sorted(found, key=len))):
            raise ValueError(
                f"spaces of a product that decide on one group must keep its units by the same order, but two keep "
                f"other units of {name!r}; leave the group out of one of them"
            )


def _zeroed_names(member: SearchSpace, changes: IntArray) -> set[str]:
    if not member.zeroed(changes).any():
        return set()
    if isinstance(member, FollowsWidths):
        return set(member.zeroed_weights)
    return {name for candidate in changes.tolist() for name in member.pruning(candidate).zeroed}
