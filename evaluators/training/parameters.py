"""Parameters that a training changes: all of them, norms and biases alone, or these and low-rank changes of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Train = Literal["all", "norm+bias", "lora"]

Masks = Mapping[nn.Parameter, Tensor]
"""Elements of each parameter that may differ from zero."""


class Trained:
    """Tensors that an optimizer updates, and their way into the module.

    Args:
        module: Trained in place; its parameters without ``requires_grad`` stay as they are.
        train: ``"all"`` parameters; ``"norm+bias"``, those of at most one dimension; ``"lora"``, these and a low-rank
            change of every weight, embeddings excepted, which is merged into the weight after every step.
        rank: Rank of these changes; smaller where the weight is small.
        masks: Elements that stay zero.
        seed: Draws the first factors.

    Attributes:
        leaves: The tensors for the optimizer.

    Raises:
        ValueError: If there is nothing to train.

    Reference:
        Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023, arXiv:2312.15230; Hu et
        al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685. Departing from these,
        no forward pass computes a separate product: the factors get the gradients that follow from that of the weight,
        which is freed at once, so any module that reads its weight in any way can be trained.
    """

    def __init__(self, module: nn.Module, train: str, rank: int, masks: Masks, seed: int) -> None:
        self._module, self._masks = module, masks
        ready = [each for each in module.parameters() if each.requires_grad and each.is_floating_point()]
        small = [each for each in ready if each.ndim <= 1]
        looked_up = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        generator = torch.Generator().manual_seed(seed)
        self._changes = {
            weight: LowRank(weight, rank, masks.get(weight), generator)
            for weight in ready
            if train == "lora" and weight.ndim > 1 and id(weight) not in looked_up
        }
        self._direct = ready if train == "all" else small
        factors = [factor for change in self._changes.values() for factor in (change.left, change.right)]
        self.leaves: list[nn.Parameter] = [*self._direct, *factors]
        if not self.leaves:
            few = "none requires gradients; set requires_grad first" if not ready else f"none is left for {train!r}"
            raise ValueError(f"{type(module).__name__} needs parameters to train, but {few}; or pass train='all'")

    @property
    def count(self) -> int:
        """Number of trained values."""
        return sum(leaf.numel() for leaf in self.leaves)

    @property
    def share(self) -> float:
        """Trained values as a share of the parameters of the module."""
        return self.count / sum(parameter.numel() for parameter in self._module.parameters())

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Let backward passes reach the trained tensors, and no others; flags come back as they were."""
        wanted = {id(each) for each in (*self._direct, *self._changes)}
        before = [(parameter, parameter.requires_grad) for parameter in self._module.parameters()]
        hooks = [
            weight.register_post_accumulate_grad_hook(change.take)  # type: ignore[no-untyped-call]  # not annotated
            for weight, change in self._changes.items()
        ]
        try:
            for parameter, _ in before:
                parameter.requires_grad_(id(parameter) in wanted)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, required in before:
                parameter.grad = None
                parameter.requires_grad_(required)

    @torch.no_grad()
    def merge(self) -> None:
        """Write low-rank changes into their weights, and elements that stay zero back to zero."""
        for weight, change in self._changes.items():
            change.merge(weight)
        mask(self._masks)

    def state(self) -> list[Tensor]:
        """The factors of low-rank changes and what they are added to; all else is in the module."""
        return [tensor.detach() for change in self._changes.values() for tensor in change.tensors]

    @torch.no_grad()
    def load(self, state: list[Tensor]) -> None:
        """Restore what `state` gave."""
        tensors = [tensor for change in self._changes.values() for tensor in change.tensors]
        for tensor, value in zip(tensors, state, strict=True):
            tensor.copy_(value)


class LowRank:
    """Change of one weight as the product of two small factors.

    Args:
        weight: At least two dimensions; all but the first are one for the product.
        rank: Most columns of the left factor; fewer where these would be more than half as many values as the weight.
        mask: Elements that may change; None for all.
        generator: Draws the right factor; the left one starts at zero.
    """

    def __init__(self, weight: nn.Parameter, rank: int, mask: Tensor | None, generator: torch.Generator) -> None:
        rows, columns = len(weight), weight[0].numel()
        rank = max(1, min(rank, weight.numel() // (2 * (rows + columns))))
        drawn = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.left = nn.Parameter(weight.detach().new_zeros(rows, rank))
        self.right = nn.Parameter(drawn.to(weight.device, weight.dtype))
        self._start = weight.detach().clone()
        self._mask = mask

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Both factors, and the weight at the start."""
        return self.left, self.right, self._start

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Turn the gradient of the weight into those of the factors, and free it."""
        gradient = weight.grad
        assert gradient is not None
        if self._mask is not None:
            gradient = gradient * self._mask
        gradient = gradient.reshape(len(self.left), -1)
        for factor, found in ((self.left, gradient @ self.right.T), (self.right, self.left.T @ gradient)):
            factor.grad = found if factor.grad is None else factor.grad.add_(found)
        weight.grad = None

    @torch.no_grad()
    def merge(self, weight: nn.Parameter) -> None:
        """Set the weight to its start plus the product."""
        weight.copy_(self._start + (self.left @ self.right).view_as(weight))


@torch.no_grad()
def mask(masks: Masks) -> None:
    """Set elements back to zero."""
    for parameter, kept in masks.items():
        parameter.mul_(kept)


def masks_of(module: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Masks that keep the zeros of weights: those of two and more dimensions with some zeros, and other values."""
    found = {}
    for parameter in module.parameters():
        kept = parameter.detach() != 0
        if parameter.ndim > 1 and kept.any() and not kept.all():
            found[parameter] = kept
    return found
