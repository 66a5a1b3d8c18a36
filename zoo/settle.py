"""Deterministic weights for the zoo's networks, chosen so that mistakes in slicing show in the outputs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)
CONTRACTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)

Shapes = tuple[tuple[int, ...], ...]


def draw(shapes: Shapes, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Return one standard normal tensor (batch, *shape) for each shape of one sample."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)


def settled(make: Callable[[], nn.Module], shapes: Shapes, seed: int = 0) -> nn.Module:
    """Build a network in eval mode, every parameter and statistic of which matters; the global RNG stays as it was.

    Weights keep the variance of activations from layer to layer, so that an absolute tolerance on outputs means
    something. Running statistics are those of random data, then jittered: identical channels or fresh statistics (0 and
    1) would hide a channel that took its neighbour's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            _spread(module)
        norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None  # one exact average, where the default would keep 90 % of the fresh statistics
        with torch.no_grad():
            model.train()(*draw(shapes, batch=16, seed=seed + 1))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            mean += 0.3 * variance.sqrt() * torch.randn_like(mean)
            variance *= 0.8 + 0.5 * torch.rand_like(variance)
    return model.eval()


@torch.no_grad()
def _spread(module: nn.Module) -> None:
    if isinstance(module, CONTRACTIONS):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, NORMS):
        nn.init.uniform_(module.weight, 0.5, 1.5)
    else:
        return
    if module.bias is not None:
        nn.init.normal_(module.bias, std=0.2)
