"""Modules made from a class, a config and the shapes of weights: no size is believed before it is compared.

The class is first built on the meta device, which takes no memory. Only when its sizes suit the weights, it is built
again, with its buffers on the CPU and its parameters still on the meta device, and the weights take their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from autoprune.data.sampling import seeded
from autoprune.files.access import MIB
from autoprune.protocols import IntArray
from autoprune.structure.branches.branch import inside
from autoprune.structure.owners import Owner, owners
from autoprune.structure.sizes.held import size_held
from autoprune.structure.slicing.dropped import require_returns
from autoprune.structure.slicing.slicing import Edit, build

MOST_TIMES = 64
"""Largest size of the class and of its buffers in multiples of the weights: pruned ones may be far smaller."""

MOST_PARAMETERS = 100_000
"""Tensors of the largest class that is built: a config may ask for layers without end."""

_ALWAYS = 1024 * MIB

Make = Callable[[], nn.Module]
Weights = Callable[[nn.Module], Mapping[str, Tensor]]


def module_of_shapes(
    make: Make, weights: Weights, section: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, list[int]]]:
    """Make a module that holds weights whose shapes may be smaller than those of the class.

    Args:
        make: Builds the class from its config.
        weights: The tensors, by the names in the class, which it is given; those tied to an earlier one may be missing.
        section: What else differs from the class, see `autoprune.result.pretrained.section`.

    Returns:
        The module in evaluation mode, and the shapes of the tensors of the class that are larger.

    Raises:
        ValueError: If sizes do not suit each other; names the first.
    """
    with _counted(), seeded(0), torch.device("meta"):
        outline = make()
    state = weights(outline)
    _require_bounded(outline, sum(tensor.nbytes for tensor in state.values()))
    edit, larger = _edit(outline, state, section)
    _require_fit(build(outline, edit), state)
    with seeded(0), _EmptyOnMeta(), _parameters_on_meta():
        dense = make()
    module = build(dense, edit).eval()
    _fill(module, state)
    return module, larger


def _edit(
    outline: nn.Module, state: Mapping[str, Tensor], section: Mapping[str, Any]
) -> tuple[Edit, dict[str, list[int]]]:
    """Edit that brings tensors of the class to the shapes of the weights, and the shapes of those that it cuts."""
    slices: dict[str, dict[int, IntArray]] = {}
    larger = {}
    for owner in _first_owners(outline):
        if any(inside(owner.module, name) for name in section["dropped"]):
            continue
        if owner.name in section["buffers"]:
            slices[owner.name] = _kept(owner, section["buffers"][owner.name])
        elif owner.name in state and (cut := _beginnings(owner, state[owner.name])):
            slices[owner.name] = cut
            larger[owner.name] = list(owner.tensor.shape)
    _require_numbers(outline, section["attributes"])
    dropped = section["dropped"]
    for name, returns in dropped.items():
        outline.get_submodule(name)
        require_returns(returns)
    return Edit(slices, section["attributes"], graphs=section["graphs"], dropped=dropped), larger


def _kept(owner: Owner, dims: Mapping[str, list[int]]) -> dict[int, IntArray]:
    """Indices of a buffer that stay."""
    kept = {int(dim): np.asarray(index, dtype=np.int64) for dim, index in dims.items()}
    for dim, index in kept.items():
        size = owner.tensor.shape[dim] if 0 <= dim < owner.tensor.ndim else 0
        if not (len(index) and 0 <= index.min() <= index.max() < size):
            raise ValueError(f"it keeps other entries of {owner.name!r} than there are")
    return kept


def _beginnings(owner: Owner, weights: Tensor) -> dict[int, IntArray]:
    """Indices that bring a tensor of the class to the shape of its weights."""
    wanted, there = list(weights.shape), list(owner.tensor.shape)
    if len(wanted) != len(there) or any(w > t for w, t in zip(wanted, there, strict=True)):
        raise ValueError(f"its {owner.name!r} is {wanted}, and that of the class is {there}, which is not larger")
    return {d: np.arange(w) for d, (w, t) in enumerate(zip(wanted, there, strict=True)) if w != t}


def _require_numbers(outline: nn.Module, attributes: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse attributes whose present value is no number, such as a method, a flag or a module."""
    for name, values in attributes.items():
        held = outline.get_submodule(name)
        for path in values:
            if ("." in path or hasattr(held, path)) and type(size_held(held, path)) is not int:
                raise ValueError(f"it sets {name}.{path}, which is no whole number in this class")


def _require_fit(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse weights of other names or shapes than a module has, naming the first."""
    named = {owner.name: owner.tensor for owner in _first_owners(module)}
    saved = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    tied = {name: first.setdefault(id(tensor), name) for name, tensor in saved.items()}
    for name, tensor in named.items():
        if name in saved and name not in state:
            raise ValueError(f"it lacks {name!r}, of shape {list(tensor.shape)}")
    for name, tensor in state.items():
        there = saved.get(tied.get(name, name))
        if there is None:
            raise ValueError(f"it holds {name!r}, which this class does not have")
        if list(there.shape) != list(tensor.shape):
            raise ValueError(f"its {name!r} is {list(tensor.shape)}, and that of this class {list(there.shape)}")


def _fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put weights in their places, tied ones in all of theirs."""
    made: dict[str, Tensor] = {}
    for owner in list(owners(module)):
        if owner.name not in state:
            if owner.tensor.is_meta:
                raise ValueError(f"it lacks {owner.name!r}")
            continue
        if owner.name not in made:
            tensor = state[owner.name].clone()  # at an aligned address: kernels for others round in another order
            parameter = isinstance(owner.tensor, nn.Parameter)
            made[owner.name] = nn.Parameter(tensor, owner.tensor.requires_grad) if parameter else tensor
        owner.holder[owner.key] = made[owner.name]
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(f"{name}.{key} of this class is made of weights, and is not known without them")


def _require_bounded(outline: nn.Module, bytes_given: int) -> None:
    held = [value for part in outline.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    wanted = sum(tensor.nbytes for tensor in (*outline.parameters(), *outline.buffers(), *held))
    most = MOST_TIMES * bytes_given + _ALWAYS
    if wanted > most:
        sizes = f"{wanted / MIB:,.0f} MiB, and its weights take {bytes_given / MIB:,.0f} MiB"
        raise ValueError(f"its config describes a model of {sizes}")


def _first_owners(module: nn.Module) -> Sequence[Owner]:
    """Owners of each tensor under its first name."""
    found = list(owners(module))
    return [owner for owner in found if owner.name == (f"{owner.module}.{owner.key}" if owner.module else owner.key)]


@contextmanager
def _counted() -> Iterator[None]:
    """Stop a class that makes more parameters than any model has."""
    left = MOST_PARAMETERS

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"its config describes a model of more than {MOST_PARAMETERS:,} tensors")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


class _EmptyOnMeta(TorchFunctionMode):
    """Makes tensors without values on the meta device: they become parameters, whose values come later."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)
