"""Registry of spaces: it makes settings from a name, and restores a space that another process saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from autoprune.arguments import shown
from autoprune.errors import FileFormatError
from autoprune.protocols import SearchSpace
from autoprune.search_spaces.protocol import Settings


@dataclass(frozen=True)
class Kind:
    """One kind of space.

    Attributes:
        settings: Class of the settings, which can be made without arguments; None for a space of many settings, which
            has no name for ``space=``.
        space: Class of the space that they bind to a model, with a class method ``from_json``.
    """

    settings: type[Settings] | None
    space: type[SearchSpace]


class UnknownSpaceError(FileFormatError):
    """A kind of space that no imported module has registered."""


SPACES: dict[str, Kind] = {}
"""Every registered kind of space by its name."""


def register_space(name: str, settings: type[Settings], space: type[SearchSpace]) -> None:
    """Register a kind of space, so that `autoprune.search` takes it by name and its results can be loaded.

    A process that loads a result must register the space first: import the module that does.

    Args:
        name: The name for ``space=``, and the ``"type"`` in what ``to_json`` of the space returns.
        settings: Class with ``criterion`` and ``bind``, as in ``autoprune.search_spaces.protocol.Settings``, whose
            arguments all have defaults.
        space: Class of what ``bind`` returns, an ``autoprune.protocols.SearchSpace`` with ``from_json``.

    Raises:
        TypeError: If one of the classes lacks these methods.
        ValueError: If the name is taken by another kind.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be the name of a space, such as 'channels', got {shown(name)}")
    for argument, given, method in (("settings", settings, "bind"), ("space", space, "from_json")):
        if not isinstance(given, type) or not callable(getattr(given, method, None)):
            raise TypeError(f"{argument} must be a class with a method {method}, got {shown(given)}")
    taken = SPACES.get(name)
    if taken is not None and (_place(taken.settings), _place(taken.space)) != (_place(settings), _place(space)):
        raise ValueError(f"name must be free, but {name!r} is the space of {_place(taken.settings)}; choose another")
    SPACES[name] = Kind(settings, space)  # again, where a module is loaded again


def _place(kind: type | None) -> str:
    return "no settings of its own" if kind is None else f"{kind.__module__}.{kind.__qualname__}"


def settings_by_name() -> dict[str, type[Settings]]:
    """Classes of settings that ``space=`` takes by name."""
    return {name: kind.settings for name, kind in SPACES.items() if kind.settings is not None}


def make_space(spec: str | Settings) -> Settings:
    """The settings meant by a name, or settings already made.

    Raises:
        ValueError: If the name is unknown, or these are no settings.
    """
    named = settings_by_name()
    if isinstance(spec, str) and spec in named:
        return named[spec]()
    if isinstance(spec, str | type) or not hasattr(spec, "bind"):
        raise ValueError(
            f"space must be one of {sorted(named)}, or settings such as Channels(...) or Sparsity(...), got "
            f"{shown(spec)}"
        )
    return spec


def require_registered(space: SearchSpace) -> None:
    """Check that a space can be restored from what its ``to_json`` returns.

    Raises:
        ValueError: If it is not registered under the type that it gives.
    """
    named = space.to_json().get("type")
    kind = SPACES.get(named) if isinstance(named, str) else None
    if kind is None or not isinstance(space, kind.space):
        raise ValueError(
            f"space must be registered, or its results could not be loaded, got {type(space).__name__} with the type "
            f"{shown(named)} in its to_json(); call autoprune.register_space(type, settings class, space class)"
        )


def space_from_json(data: Mapping[str, Any]) -> SearchSpace:
    """Restore a space of any registered kind.

    Raises:
        UnknownSpaceError: If the kind is unknown here.
        ValueError: If it is damaged; names the first place that is.
    """
    named = data.get("type")
    kind = SPACES.get(named) if isinstance(named, str) else None
    if kind is None:
        raise UnknownSpaceError(
            f"space type must be one of {sorted(SPACES)}, got {named!r:.60}; was it saved by a newer version? Of a "
            "space of your own, import the module that calls autoprune.register_space first"
        )
    make: Any = kind.space  # checked by `register_space`; protocols cannot ask for class methods of instances
    return cast(SearchSpace, make.from_json(data))
