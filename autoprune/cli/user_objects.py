"""Objects named on a command line: ``FILE.py:NAME`` or ``package.module:NAME``."""

from __future__ import annotations

import importlib
import inspect
import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from autoprune.arguments import shown
from autoprune.files.access import as_path, shortened

IMPORT = "--import"


def load_object(target: str, option: str) -> Any:
    """Load the object that `target` names; a function or class is called without arguments.

    The folder of a file, or the current folder for a module, goes to the front of ``sys.path`` and stays there, as with
    ``python FILE.py``: user code may import its neighbours as late as in a forward pass.

    Args:
        target: ``"FILE.py:NAME"`` or ``"package.module:NAME"``.
        option: Option that named it, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If there is no such module, or the name of the file is taken by another module.
        ValueError: If `target` has another form, or names nothing there, or something that needs arguments.
    """
    source, _, name = target.rpartition(":")
    if not (source and name):
        raise ValueError(f"{option} must be FILE.py:NAME or package.module:NAME, got {shown(target)}")
    module = _module(source, option)
    if not hasattr(module, name):
        there = ", ".join(_defined_in(module)) or "nothing"
        raise ValueError(f"{option} must name what is in {source}, which has no {name!r}; it has {there:.200}")
    found = getattr(module, name)
    if not callable(found) or isinstance(found, nn.Module):
        return found
    signature = inspect.signature(found)
    try:
        signature.bind()
    except TypeError:
        raise ValueError(
            f"{option}: {target} is called without arguments, but it is {name}{signature}; name a function that fills "
            "them in"
        ) from None
    return found()


def import_first(sources: Sequence[str] | None) -> None:
    """Import the modules that register what a command needs, such as a space; their folders stay on ``sys.path``.

    Args:
        sources: Each ``"FILE.py"`` or ``"package.module"``.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If there is no such module, or the name of the file is taken by another module.
        ValueError: If one has another form.
    """
    for source in sources or ():
        if not source or ":" in source:
            raise ValueError(f"{IMPORT} must be FILE.py or package.module, got {shown(source)}")
        _module(source, IMPORT)


def load_model(target: str, weights: Path | None = None, option: str = "MODEL") -> nn.Module:
    """Load the model that `target` names, and a state dict into it.

    Args:
        target: See `load_object`.
        weights: A ``.safetensors`` file, or a state dict saved by ``torch.save`` (read without unpickling objects).
        option: Option that named the model, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If `target` gives no module, or the weights cannot be read or do not fit it.
    """
    model = load_object(target, option)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{option}: {target} must be or return a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        _load_weights(model, weights)
    return model


def example_inputs(model: nn.Module, shape: str | None, example: str | None, needed: bool = True) -> Any:
    """Example inputs: those named, noise of a shape, or None for those of the model, which must exist if `needed`."""
    import torch

    from autoprune.structure.example import require_fits
    from autoprune.structure.given import example_inputs_of

    if shape is not None and example is not None:
        raise ValueError("give --input-shape or --example, not both")
    if example is not None:
        return load_object(example, "--example")
    if shape is None and not needed:
        return None
    if shape is None:
        try:
            example_inputs_of(model)
        except ValueError as error:
            raise ValueError(
                f"{type(model).__name__} carries no example input of its own; give --input-shape, such as 2,3,224,224, "
                "or --example FILE.py:NAME"
            ) from error
        return None
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"input-shape must be positive numbers joined by commas, such as 2,3,224,224, got {shown(shape)}"
        )
    require_fits("input-shape must be of inputs", shape, 4 * math.prod(sizes))
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def _load_weights(model: nn.Module, path: Path) -> None:
    import torch
    from safetensors.torch import load_model as load_safetensors

    if not as_path(path, "weights").is_file():
        raise FileNotFoundError(f"weights must be a file, got {shortened(path)}: no such file")
    try:
        if path.suffix == ".safetensors":
            load_safetensors(model, path)  # knows the tied weights that its writer left out
        else:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:  # its message advises to unpickle any contents
        raise ValueError(
            f"weights must be a state dict, but {path} is no file of torch.save, or holds more than tensors"
        ) from error
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        what = " ".join(str(error).splitlines()[:2])  # the first of the tensors that do not fit
        raise ValueError(f"weights must be a state dict of {type(model).__name__}, got {path}: {what}") from error


def _module(source: str, option: str) -> ModuleType:
    return _from_file(Path(source), option) if source.endswith(".py") else _from_package(source, option)


def _from_file(path: Path, option: str) -> ModuleType:
    path = as_path(path, option).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{option} must be in a file, got {shortened(path)}: no such file")
    _put_first(path.parent)
    module = importlib.import_module(path.stem)
    if getattr(module, "__file__", None) != str(path):
        raise ImportError(
            f"{option}: {path} has the name of the module {module.__name__!r} in use already; rename the file"
        )
    return module


def _from_package(name: str, option: str) -> ModuleType:
    _put_first(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports is missing
        form = "FILE.py" if option == IMPORT else "FILE.py:NAME"
        raise ImportError(
            f"{option}: there is no module named {error.name!r} for {name!r}; for a file write {form}"
        ) from error


def _put_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _defined_in(module: ModuleType) -> list[str]:
    """Names that a user may have meant: those that the module defines, without imported ones."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and (not callable(value) or getattr(value, "__module__", module.__name__) == module.__name__)
        and type(value).__module__ != "__future__"
    ]
