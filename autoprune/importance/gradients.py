"""Gradients of the dense model: of the loss where there are labels, else of its distance to itself."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from autoprune.data.batch import Batch, Forward, batch_size, pieces, targets, to_device
from autoprune.importance.calibration import Calibration, private_copy
from autoprune.metrics.scorers import (
    are_chances,
    class_dimension,
    drawn_cross_entropy,
    logits_of,
    main_output,
    noise_scale,
)

if TYPE_CHECKING:
    from autoprune.importance.unit_products import UnitProducts

DRAWN = 8
"""Most samples whose gradients are averaged before they are squared, where there are no labels."""

_WORK_AT_ONCE = 2**30  # multiply-accumulates of a forward pass, up to which averaging saves more time than memory


def loss_gradients(calibration: Calibration, seed: int = 0) -> dict[str, Tensor]:
    """Compute the gradient of the mean loss, in evaluation mode: cross-entropy for classes, else squared error.

    If labels are missing, or are neither classes of the outputs nor floats shaped like them, it is that of the
    distortion.
    """
    copied = _Forward(private_copy(calibration.model), calibration.forward)
    state = _state_of(copied)
    device = next(calibration.model.parameters()).device
    placed = [to_device(batch, device) for batch in calibration.batches]
    if not all(isinstance(targets(batch), Tensor) for batch in placed):
        return distortion_gradients(calibration.on(placed), seed)
    for batch in placed:
        with torch.enable_grad():
            loss = _loss(main_output(functional_call(copied, state, (batch,))), targets(batch))
            if loss is None:
                return distortion_gradients(calibration.on(placed), seed)
            (loss / len(placed)).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
    return {name.removeprefix("model."): torch.zeros_like(p) if p.grad is None else p.grad for name, p in state.items()}


def distortion_gradients(
    calibration: Calibration, seed: int = 0, products: UnitProducts | None = None
) -> dict[str, Tensor]:
    """Compute the root mean square of gradients towards outputs drawn from the model's distribution, without labels.

    At the dense model the gradient of any distance to its outputs is zero. The expected square over labels drawn from
    its softmax is the diagonal of its Fisher information, the curvature of the divergence; where outputs are no
    logits, normal noise gives that of the squared difference. Squares are averaged over groups of a few samples.

    Args:
        calibration: The dense model and the samples.
        seed: For the labels drawn.
        products: Observes the model of this calibration, and its copies.

    Reference:
        Martens, "New insights and perspectives on the natural gradient method", JMLR 2020, arXiv:1412.1193, section 9.
    """
    copied = _Forward(private_copy(calibration.model), calibration.forward)
    state = _state_of(copied)
    generator = torch.Generator().manual_seed(seed)
    squares = {name: torch.zeros_like(p) for name, p in state.items()}
    parts = parts_of(calibration)

    def take(name: str, parameter: Tensor) -> None:
        """Add a gradient as soon as it is computed, so that no two are in memory at once."""
        assert parameter.grad is not None
        squares[name] += parameter.grad.square() / len(parts)
        parameter.grad = None

    for name, parameter in state.items():
        hook = partial(take, name)
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # as above
    for part in parts:
        with torch.enable_grad():
            drawn = drawn_loss(functional_call(copied, state, (part,)), part, generator)
            drawn.loss.backward()  # type: ignore[no-untyped-call]  # as above
        if products is not None and not products.enough:
            products.take(batch_size(part), drawn.draws, drawn.factor)
    return {name.removeprefix("model."): square.sqrt() for name, square in squares.items()}


def _state_of(copied: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_() for name, p in copied.named_parameters()}


def parts_of(calibration: Calibration) -> list[Batch]:
    """Divide the batches into the parts whose gradients are taken together: single samples where these are long.

    An average over fewer draws has as large a square in expectation, up to a factor of all, and there are more squares.
    """
    most = min(DRAWN, max(1, int(_WORK_AT_ONCE // max(calibration.structure.macs, 1.0))))
    return [part for batch in calibration.batches for part in pieces(batch, most)]


def _loss(outputs: Tensor, target: Any) -> Tensor | None:
    """Compute the loss for the kind of labels; None where they do not fit."""
    if not isinstance(target, Tensor):
        return None
    if target.is_floating_point():
        return F.mse_loss(outputs, target) if target.shape == outputs.shape else None
    fits = outputs.ndim > 1 and target.shape == (len(outputs), *outputs.shape[2:]) and target.max() < outputs.shape[1]
    return F.cross_entropy(logits_of(outputs, are_chances(outputs, 1)), target.long()) if fits else None


class Drawn(NamedTuple):
    """Loss towards labels drawn from the model's distribution.

    Attributes:
        loss: Mean over the draws, with gradients.
        draws: Number of independent draws.
        factor: Of its gradients, to those of the loss of `autoprune.metrics.scorers.sampled_loss`.
    """

    loss: Tensor
    draws: int
    factor: float


def drawn_loss(outputs: Any, batch: Batch, generator: torch.Generator) -> Drawn:
    """Compute the mean loss towards labels drawn from logits, else towards normal noise around the outputs."""
    output = main_output(outputs)
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    classes = class_dimension(outputs, batch)
    if classes is None:
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        size = len(output)
        return Drawn((output * noise).sum() / size, size, size * noise_scale(output))
    loss, draws = drawn_cross_entropy(output, classes, generator)
    return Drawn(loss / draws, draws, draws)


class _Forward(nn.Module):
    def __init__(self, model: nn.Module, run: Forward) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, batch: Batch) -> Any:
        return self.run(self.model, batch)
