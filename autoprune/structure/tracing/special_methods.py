"""Special methods of single objects, overridden for a while.

Python looks ``__call__`` or ``__setattr__`` up in the class of an object, not in the object. So the object gets a
subclass of its class, and its own class back afterwards. No other object is affected, in no thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def subclass_of(kind: type, members: Mapping[str, Any]) -> type:
    """Make a subclass under the name of a class.

    Args:
        kind: The class.
        members: Methods that override its own, by name.

    Raises:
        TypeError: If the class refuses subclasses, or such ones; a metaclass may raise anything else.
    """
    return type(kind)(kind.__name__, (kind,), {"__module__": kind.__module__, **members})


@contextmanager
def overridden(objects: Iterable[object], subclass: Callable[[type], type]) -> Iterator[None]:
    """Give objects a subclass of their class inside.

    Args:
        objects: Used by this thread alone while inside.
        subclass: Returns the subclass of a class, see `subclass_of`.

    Raises:
        TypeError: If an object cannot change its class; the others have their own again.
    """
    held: list[tuple[object, type]] = []
    try:
        for each in objects:
            own = type(each)
            object.__setattr__(each, "__class__", subclass(own))
            held.append((each, own))
        yield
    finally:
        for each, own in held:
            object.__setattr__(each, "__class__", own)
