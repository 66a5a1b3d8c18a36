"""Rules that divide zeros among weights, by closed form: baselines of a search, and candidates to begin from.

Every rule returns the number of elements that each weight keeps. The numbers add up to `nonzero`, whatever the rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from autoprune.importance.masks.scores import lamp as lamp_scores
from autoprune.protocols import FloatArray, IntArray

Weights = Mapping[str, Tensor]
Kept = dict[str, int]
"""Number of elements of each weight that stay."""


def share_out(wanted: Mapping[str, float], weights: Weights, nonzero: int) -> Kept:
    """Numbers proportional to `wanted` that add up to `nonzero`, none above the elements of its weight.

    Raises:
        ValueError: If there are fewer elements.
    """
    most = np.array([weight.numel() for weight in weights.values()], dtype=np.float64)
    if not 0 <= nonzero <= most.sum():
        raise ValueError(f"nonzero must be at most {int(most.sum())}, the elements of all weights, got {nonzero}")
    share = np.array([wanted[name] for name in weights], dtype=np.float64)
    full = np.zeros(len(most), dtype=bool)
    while not full.all():
        scale = (nonzero - most[full].sum()) / max(share[~full].sum(), 1e-300)
        over = ~full & (scale * share > most)
        if not over.any():
            break
        full |= over
    exact = np.where(full, most, 0.0 if full.all() else scale * share)
    kept = np.floor(exact + 1e-9)
    missing = nonzero - int(kept.sum())
    kept[np.argsort(kept - exact, kind="stable")[:missing]] += 1  # to the largest remainders
    return {name: int(count) for name, count in zip(weights, kept, strict=True)}


def uniform(weights: Weights, nonzero: int) -> Kept:
    """The same sparsity everywhere."""
    return share_out({name: weight.numel() for name, weight in weights.items()}, weights, nonzero)


def erdos_renyi_kernel(weights: Weights, nonzero: int) -> Kept:
    """Density proportional to the sum of the dimensions over their product.

    Reference:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv:1911.11134.
    """
    return share_out({name: sum(weight.shape) for name, weight in weights.items()}, weights, nonzero)


def lamp(weights: Weights, nonzero: int) -> Kept:
    """One threshold on `autoprune.importance.masks.scores.lamp`."""
    return kept_above({name: lamp_scores(weight) for name, weight in weights.items()}, nonzero)


def global_magnitude(weights: Weights, nonzero: int, floor: float = 0.0) -> Kept:
    """One threshold on magnitudes; every weight keeps at least the share `floor` of the mean density.

    With a floor, as in "Global MP with a minimum threshold" (arXiv:2209.14624), no layer is emptied.
    """
    total = sum(weight.numel() for weight in weights.values())
    least = {name: int(floor * nonzero / total * weight.numel()) for name, weight in weights.items()}
    return kept_above({name: weight.detach().abs() for name, weight in weights.items()}, nonzero, least)


def standardised(scores: Weights, nonzero: int) -> Kept:
    """One threshold on scores with mean 0 and standard deviation 1 in each weight.

    Reference:
        An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024,
        arXiv:2312.11983, there for units.
    """
    exact = {name: own.detach().double() for name, own in scores.items()}
    return kept_above({name: (own - own.mean()) / (own.std() + 1e-30) for name, own in exact.items()}, nonzero)


def owl(
    scores: Weights, nonzero: int, spread: float = 0.08, above: float = 5.0, parts: Mapping[str, str] | None = None
) -> Kept:
    """Density by the share of outliers, within `spread` of the mean density on either side.

    Args:
        scores: Of elements, such as roots of `autoprune.importance.masks.scores.wanda`.
        nonzero: Elements that stay.
        spread: Half the distance of the least and the largest density.
        above: An outlier is above this multiple of the mean of its weight.
        parts: Part of the network, such as a block, that each weight belongs to: all weights of a part get one density.

    Reference:
        Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv:2310.05175. Where weights have
        different sizes, densities are shifted so that they meet the number in all.
    """
    parts = parts or {name: name for name in scores}
    outliers: dict[str, list[tuple[int, int]]] = {}
    for name, own in scores.items():
        count = int((own > above * own.double().mean()).sum())
        outliers.setdefault(parts[name], []).append((count, own.numel()))
    share = {part: sum(n for n, _ in each) / sum(size for _, size in each) for part, each in outliers.items()}
    low, high = min(share.values()), max(share.values())
    raised = {part: 2 * spread * (value - low) / max(high - low, 1e-300) for part, value in share.items()}
    return _shifted({name: raised[parts[name]] for name in scores}, scores, nonzero)


def heavy_tails(weights: Weights, nonzero: int, spread: float = 0.3) -> Kept:
    """Sparsity by the exponents of the tails of spectra: those with a heavy tail, which learned more, keep more.

    Args:
        weights: The weights.
        nonzero: Elements that stay.
        spread: Sparsities lie between 1 - spread and 1 + spread times a number that meets `nonzero`.

    Reference:
        Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large
        Language Models", NeurIPS 2024, arXiv:2410.10912, with the Hill estimate over the upper half.
    """
    exponents = {name: hill_exponent(weight) for name, weight in weights.items()}
    low, high = min(exponents.values()), max(exponents.values())
    gone = {
        name: 1 - spread + 2 * spread * (value - low) / max(high - low, 1e-300) for name, value in exponents.items()
    }
    total = sum(weight.numel() for weight in weights.values())
    zeros = share_out({name: gone[name] * weight.numel() for name, weight in weights.items()}, weights, total - nonzero)
    return {name: weights[name].numel() - count for name, count in zeros.items()}


def hill_exponent(weight: Tensor) -> float:
    """Exponent of the power law of the upper half of the squared singular values, by Hill's estimate."""
    values = torch.linalg.svdvals(weight.detach().double().flatten(1)).square().sort(descending=True).values
    count = max(len(values) // 2, 1)
    tail = values[:count] / values[min(count, len(values) - 1)].clamp(min=1e-300)
    return 1 + count / max(float(tail.clamp(min=1e-300).log().sum()), 1e-12)


def rate_distortion(losses: Sequence[FloatArray], zeros: Sequence[IntArray], wanted: int) -> IntArray:
    """Options of least total loss with at least `wanted` zeros, on the lower convex hull of each table.

    Args:
        losses: Of each option of each weight, dense first.
        zeros: Elements that each option sets to zero.
        wanted: Zeros in all.

    Returns:
        Option of each weight, int64, shape (weights,); all at their last where even these have fewer zeros.

    Reference:
        Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988; for sparsity Xu et al.,
        "Efficient Layer-wise Pruning by Rate-Distortion", 2023, arXiv:2308.10438.
    """

    def chosen(price: float) -> IntArray:
        best = [np.flatnonzero(value == value.min())[-1] for value in (x - price * z for x, z in pairs)]
        return np.array(best, dtype=np.int64)

    def enough(options: IntArray) -> bool:
        return bool(sum(int(z[i]) for z, i in zip(zeros, options, strict=True)) >= wanted)

    pairs = [(np.asarray(x, dtype=np.float64), np.asarray(z)) for x, z in zip(losses, zeros, strict=True)]
    low, high = 0.0, 1e-12
    while not enough(chosen(high)):
        if high > 1e12:
            return np.array([len(z) - 1 for z in zeros], dtype=np.int64)
        low, high = high, 4 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(chosen(middle)) else (middle, high)
    return chosen(high)


def kept_above(scores: Weights, nonzero: int, least: Mapping[str, int] | None = None) -> Kept:
    """Number of elements of each weight above one threshold; none keeps fewer than `least`."""
    kept = _largest(scores, nonzero)
    held: Kept = {}
    for _ in scores:  # weights at their least drop out, and the others share what is left
        low = [name for name, count in kept.items() if name not in held and count < (least or {}).get(name, 0)]
        if not low:
            break
        held |= {name: (least or {})[name] for name in low}
        rest = {name: own for name, own in scores.items() if name not in held}
        kept = {**held, **_largest(rest, nonzero - sum(held.values()))}
    return {name: kept[name] for name in scores}


def _largest(scores: Weights, nonzero: int) -> Kept:
    owner = torch.cat([torch.full((own.numel(),), i, dtype=torch.int32) for i, own in enumerate(scores.values())])
    values = torch.cat([own.flatten() for own in scores.values()])
    first = values.argsort(descending=True, stable=True)[:nonzero]
    counts = owner[first].long().bincount(minlength=len(scores)).tolist()
    return dict(zip(scores, counts, strict=True))


def _shifted(densities: Mapping[str, float], weights: Weights, nonzero: int) -> Kept:
    """Densities plus one constant, between 0 and 1, that meet the number."""
    sizes = np.array([weight.numel() for weight in weights.values()], dtype=np.float64)
    own = np.array([densities[name] for name in weights])
    low, high = -own.max() - 1.0, 1.0 - own.min()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.clip(own + middle, 0, 1) * sizes).sum() < nonzero else (low, middle)
    wanted = np.clip(own + high, 0, 1) * sizes
    return share_out(dict(zip(weights, wanted.tolist(), strict=True)), weights, nonzero)
