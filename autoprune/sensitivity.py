"""How much the outputs of the dense model change when units go, from one backward pass and without labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.batches import Batch, batch_size, beginning, pieces
from autoprune.criteria import affordable, private_copy, readers
from autoprune.protocols import FloatArray, IntArray
from autoprune.reconstruction import Removal, reads
from autoprune.scorers import sampled_loss
from autoprune.structure.structure import Structure

FEWEST_SAMPLES = 8
MOST_SAMPLES = 32
DRAWS = 1024
"""Independent draws from the outputs that are enough: a language model gives one a token, others one a sample."""

_AT_ONCE = 4  # samples in one backward pass, which bounds its memory


def output_changes(
    model: nn.Module,
    structure: Structure,
    removals: Sequence[Removal],
    batches: Sequence[Batch],
    forward: Callable[[nn.Module, Batch], Any],
    seed: int = 0,
) -> list[FloatArray | None]:
    """Expected change of the outputs of the whole model when units are set to zero in what reads them.

    In nats where the outputs are logits (the divergence from the dense distribution), else the squared difference
    relative to the mean square of the outputs. Of second order: half of E[(g . d)^2], where d is what a layer no longer
    reads at one position, and g the gradient there of a loss with a label drawn from the dense outputs, so that
    E[g g^T] is their Fisher information. What several layers read of one group is added up before it is squared.
    Different positions of a sample are taken as independent. One forward and one backward pass over at most 32 samples,
    fewer of a large model, serve every option, however many there are.

    Args:
        model: The dense model; comes back unchanged.
        structure: Its structure.
        removals: What to remove.
        batches: Calibration data; labels are not used.
        forward: Runs the model on a batch.
        seed: For the labels drawn.

    Returns:
        For each removal the change for each option, shape (options,), finite and at least 0; None where no ungrouped
        convolution or linear layer is seen to read the group, or no gradient arrives there.

    Reference:
        Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, arXiv:1801.05787, and
        Liu et al., "Group Fisher Pruning for Practical Network Compression", ICML 2021, arXiv:2108.00708; here with
        drawn labels, and for every option of a group with all products between its units.
    """
    copied = private_copy(model)
    for module in copied.modules():  # gradients are wanted of what layers read alone
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = parameter.detach()  # type: ignore[assignment]  # a plain tensor serves too
    axes, read = readers(copied, structure), reads(copied, structure)
    products: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def watch(layer: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = next(iter((*args, *kwargs.values())))
            branch = x.view_as(x) if x.requires_grad else x.detach().requires_grad_().view_as(x)
            seen = x.detach().clone()  # what comes later may write to it

            def receive(gradient: Tensor) -> None:
                rows = (gradient * seen).movedim(axes[layer], -1)
                for group, inputs in read[layer].items():
                    each = rows[..., torch.from_numpy(inputs).to(rows.device)].sum(-1).flatten(0, -2)
                    key = group, tuple(each.shape)
                    products[key] = products[key] + each if key in products else each

            branch.register_hook(receive)
            return ((branch, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): branch})

        return hook

    handles = [copied.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in read]
    generator = torch.Generator().manual_seed(seed)
    sums: dict[int, FloatArray] = defaultdict(lambda: np.zeros(1))
    steps = [_steps(options) for _, options in removals]
    samples = draws = 0
    try:
        for part in _parts(batches, affordable(structure, FEWEST_SAMPLES, MOST_SAMPLES)):
            if samples >= FEWEST_SAMPLES and draws >= DRAWS:
                break
            with torch.enable_grad():
                loss, drawn = sampled_loss(forward(copied, part), part, generator)
                loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            samples, draws = samples + batch_size(part), draws + drawn
            seen: dict[str, list[Tensor]] = defaultdict(list)
            for (name, _), each in products.items():
                seen[name].append(each)
            for i, (group, _) in enumerate(removals):
                for each in seen[group]:
                    sums[i] = sums[i] + _energies(each, steps[i])
            products.clear()
    finally:
        for handle in handles:
            handle.remove()
    found = [0.5 * sums[i] / draws if i in sums else None for i in range(len(removals))]
    return [each if each is not None and np.isfinite(each).all() else None for each in found]


def _steps(options: Sequence[IntArray]) -> list[tuple[bool, Tensor]]:
    """For each option whether it has all units of the one before, and the units that it has besides."""
    steps, seen = [], np.zeros(0, dtype=np.int64)
    for units in options:
        more = bool(np.isin(seen, units).all())
        steps.append((more, torch.from_numpy(np.setdiff1d(units, seen) if more else np.unique(units))))
        seen = units
    return steps


def _energies(products: Tensor, steps: Sequence[tuple[bool, Tensor]]) -> FloatArray:
    """Sum over rows (n, units) of the squared sum over the units of each option, shape (options,)."""
    total, sums = products.new_zeros(len(products)), []
    for more, units in steps:
        new = products[:, units.to(products.device)].sum(1)
        total = total + new if more else new
        sums.append(total)
    energies: FloatArray = torch.stack(sums).double().square().sum(1).cpu().numpy()
    return energies


def _parts(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """The first so many samples, a few at a time."""
    return [part for batch in beginning(batches, samples) for part in pieces(batch, _AT_ONCE)]
