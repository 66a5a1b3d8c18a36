"""Random prunings of a structure, and the answers that do not come from autoprune."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.protocols import FloatArray, Pruning
from autoprune.structure.slicing.slicing import Edit
from autoprune.structure.structure import Structure
from tests.oracle import masked_forward


def random_pruning(structure: Structure, rng: np.random.Generator) -> Pruning:
    """Any units of every group, from a single one to all."""
    kept = {}
    for group in structure.groups:
        count = group.multiple * int(rng.integers(1, group.size // group.multiple + 1))
        kept[group.name] = tuple(sorted(rng.choice(group.size, count, replace=False).tolist()))
    return Pruning(kept)


def widths_of(structure: Structure, prunings: list[Pruning]) -> FloatArray:
    return np.array([[len(p.kept.get(g.name, range(g.size))) for g in structure.groups] for p in prunings], dtype=float)


def outputs_of(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*args)) if isinstance(leaf, Tensor)]


def oracle_outputs(model: nn.Module, edit: Edit, args: tuple[Any, ...]) -> list[Tensor]:
    """Outputs of the dense model with what the edit removes masked."""
    shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    removed = {
        name: {dim: torch.from_numpy(np.setdiff1d(np.arange(shapes[name][dim]), kept)) for dim, kept in dims.items()}
        for name, dims in edit.slices.items()
    }
    return [leaf for leaf in tree_leaves(masked_forward(model, removed, args)) if isinstance(leaf, Tensor)]


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute difference; shapes must agree."""
    assert [tuple(a.shape) for a in found] == [tuple(b.shape) for b in expected]
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(found, expected, strict=True))


def state_of(model: nn.Module) -> Mapping[str, Any]:
    """Everything that must come back unchanged, in a form that compares with ``==``."""
    named = (*model.named_parameters(), *model.named_buffers())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "values": {name: tensor.detach().flatten().view(torch.uint8).numpy().tobytes() for name, tensor in named},
        "identity": {
            name: (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad) for name, tensor in named
        },
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, hook)) for hook in hooks] for name, module in model.named_modules()},
        "attributes": {name: repr(module) for name, module in model.named_modules()},
    }


def storages(model: nn.Module) -> set[int]:
    tensors = (*model.parameters(), *model.buffers())
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def uniform_order(structure: Structure) -> dict[str, tuple[int, ...]]:
    """Units in their own order, for tests that need no ranking."""
    return {group.name: tuple(range(group.size)) for group in structure.groups}
