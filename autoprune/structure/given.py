"""Example inputs of a model: those given, or the example that the model carries; and the model inside its wrappers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.arguments import shown
from autoprune.data.batch import fresh, tensors
from autoprune.data.sampling import seeded
from autoprune.errors import UnsupportedModelError

ExampleInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""One input, positional inputs, or keyword inputs."""

FORMS = "a tensor, a tuple of positional inputs, or a dict of keyword inputs"


def unwrap(model: nn.Module) -> nn.Module:
    """Unwrap a module from ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``, however nested.

    Raises:
        UnsupportedModelError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        way_out = "load or build it first"
        if isinstance(model, type):
            got = f"the class {model.__name__}"
            way_out = "make one of it"
        raise UnsupportedModelError(f"model must be an nn.Module, got {got}; {way_out}")
    while True:
        # The wrapper of torch.compile is recognised by its attribute: importing its class takes longer than autoprune.
        parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = getattr(model, "module" if parallel else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def example_inputs_of(model: nn.Module, given: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Find positional and keyword inputs that the model can be called with.

    Without `given`, the model's own example: ``example_input_array`` (Lightning), ``dummy_inputs`` (transformers), or
    two samples of normal noise of the size in ``pretrained_cfg`` or ``default_cfg`` (timm). The noise is the same each
    time, and no global random state moves.

    Args:
        model: May be wrapped (see `unwrap`).
        given: One tensor, a tuple of positional inputs, or a mapping of keyword inputs.

    Returns:
        The arguments of ``model(*args, **kwargs)``, on the device that they are on: copies, which a model may write to.

    Raises:
        ValueError: If `given` has another form, or is None and the model carries no example.
    """
    model = unwrap(model)
    with seeded(0):  # an example may be a property that draws random numbers
        example = fresh(_carried(model) if given is None else given)
    if example is None:
        raise ValueError(
            f"example must be given, because {type(model).__name__} carries no example of its own "
            f"(example_input_array, dummy_inputs or pretrained_cfg['input_size']); pass {FORMS}"
        )
    held = [tensor for tensor in tensors(example) if tensor.ndim]
    if held and not any(tensor.numel() for tensor in held):
        raise ValueError(f"example must hold at least one sample, got {shown(example)}; give one or two")
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping) and all(isinstance(name, str) for name in example):
        return (), dict(example)
    if isinstance(example, tuple):
        return example, {}
    raise ValueError(
        f"example must be {FORMS}, or an autoprune.Call of these, got {type(example).__name__}; put a single input of "
        "another type into a tuple: (x,)"
    )


def examples_of(
    model: nn.Module, given: ExampleInputs | Sequence[ExampleInputs] | None = None
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Find the arguments of one call for each example in a list, or of a single call; see `example_inputs_of`.

    Raises:
        ValueError: If there is none, or one has another form.
    """
    if not isinstance(given, list):
        return [example_inputs_of(model, given)]
    if not given:
        raise ValueError(f"example must hold at least one example, got an empty list; pass {FORMS}")
    return [example_inputs_of(model, example) for example in given]


def _carried(model: nn.Module) -> Any:
    if (example := getattr(model, "example_input_array", None)) is not None:
        return example
    example = getattr(model, "dummy_inputs", None)
    # transformers gives token ids to every model, also to one that reads images.
    main = getattr(model, "main_input_name", None)
    if example is not None and not (isinstance(example, Mapping) and isinstance(main, str) and main not in example):
        return example
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        if isinstance(config, Mapping) and config.get("input_size"):
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            return torch.randn(2, *config["input_size"]).to(dtype)
    return None
