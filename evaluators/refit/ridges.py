"""Ridges of a re-fit, chosen for each layer by its error on held-out rows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from autoprune.evaluators.activation_cache.limits import bytes_of
from autoprune.evaluators.refit.layers import Layer, columns_kept, firsts_of, take
from autoprune.evaluators.refit.least_squares import RIDGES, Normal
from autoprune.importance.calibration import Calibration
from autoprune.importance.moments import Moments, Sample
from autoprune.importance.reading import Reader, matrix_of, watch
from autoprune.structure.slicing.slicing import Edit

JUDGED_BYTES = 2**27
"""Most memory for rows that ridges are judged on; half of the model where that is more."""
_JUDGED, _FEWEST_JUDGED = 1024, 64  # held-out rows that a ridge is judged on
_JUDGED_OUTPUTS = 128  # outputs of each weight that a ridge is judged on, evenly spaced
_JUDGED_ALIKE = 8  # layers of one kind, in equal blocks, whose ridges are judged: the others take the nearest one's
_MOST_LEFT_OUT = 2.0  # held-out rows for each of these: more are fetched in another pass


def choose_ridges(
    calibration: Calibration,
    layers: Mapping[Reader, Layer],
    typical: Edit,
    centred: Callable[[Layer], bool],
    share: float,
) -> None:
    """Choose each ridge by the error on held-out rows, spread over all of the samples; then the moments take these."""
    firsts = firsts_of(layers)
    kept = {reader: columns_kept(reader, calibration.model, typical) for reader in layers}
    fitted = {}
    for first, sharing in firsts.items():
        moments = layers[first].moments
        read = [layer for layer in sharing if kept[layer.reader] is not None]
        if read and moments.sketch_rows is not None and moments.finite:
            fitted[first] = read
    judges = _judges(fitted, kept, centred)
    width = 4 * sum(reader.columns for reader in set(judges.values()))
    most = max(JUDGED_BYTES, bytes_of(calibration.model) // 2) // max(width, 1)
    judged = max(_FEWEST_JUDGED, min(_JUDGED, most))
    samples = {first: Sample(max(1.0, layers[first].rows * share / judged)) for first in judges.values()}

    def see(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        if reader in firsts:
            for rows in parts():
                samples[reader].add(rows) if reader in samples else layers[reader].moments.add(rows)

    watch(calibration, see)
    waiting = {}
    for first in list(samples):
        sample = samples.pop(first)
        if len(sample.rows):
            _set_ridges(calibration.model, fitted[first], kept, sample.rows, centred)
        if sample.every <= _MOST_LEFT_OUT:
            layers[first].moments.add(sample.rows)
        else:
            waiting[first] = layers[first]
    for first, judge in judges.items():
        for layer, judged_one in zip(fitted[first], fitted[judge], strict=True):
            layer.ridge = judged_one.ridge
    if waiting:
        take(calibration, waiting)


def _judges(
    fitted: Mapping[Reader, Sequence[Layer]],
    kept: Mapping[Reader, Tensor | None],
    centred: Callable[[Layer], bool],
) -> dict[Reader, Reader]:
    """Find for each of the layers the one whose ridge it takes: itself, where few are alike in sizes and name."""
    kinds: dict[Hashable, list[Reader]] = defaultdict(list)
    for first, sharing in fitted.items():
        kind = []
        for layer in sharing:
            stay = kept[layer.reader]
            assert stay is not None
            named = replace(layer.reader, name=re.sub(r"\d+", "*", layer.reader.name))
            kind.append((named, len(stay), centred(layer)))
        kinds[tuple(kind)].append(first)
    found = {}
    for alike in kinds.values():
        every = -(-len(alike) // _JUDGED_ALIKE)
        for i, first in enumerate(alike):
            found[first] = alike[min(i // every * every + every // 2, len(alike) - 1)]
    return found


def _set_ridges(
    model: nn.Module,
    layers: Sequence[Layer],
    kept: Mapping[Reader, Tensor | None],
    rows: Tensor,
    centred: Callable[[Layer], bool],
) -> None:
    """Set the ridges of layers that share moments; equations that several have in common are solved once."""
    alike: dict[tuple[bool, bytes], list[Layer]] = defaultdict(list)
    for layer in layers:
        stay = kept[layer.reader]
        assert stay is not None
        alike[centred(layer), stay.cpu().numpy().tobytes()].append(layer)
    for (about_mean, _), each in alike.items():
        stay = kept[each[0].reader]
        assert stay is not None
        weights = [_some_outputs(matrix_of(model.get_parameter(layer.reader.name), layer.reader)) for layer in each]
        for layer, ridge in zip(each, _best_ridges(each[0].moments, about_mean, weights, stay, rows), strict=True):
            layer.ridge = ridge


def _some_outputs(weight: Tensor) -> Tensor:
    """Evenly spaced rows of a weight, shape (at most `_JUDGED_OUTPUTS`, columns)."""
    every = -(-len(weight) // _JUDGED_OUTPUTS)
    return weight[::every]


def _best_ridges(moments: Moments, centred: bool, weights: Sequence[Tensor], kept: Tensor, rows: Tensor) -> list[float]:
    """Ridge of each weight with the least error on rows (n, columns); infinite where no fit is better."""
    if centred:
        rows = rows - moments.mean.to(rows.dtype)
    gone = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
    gone[kept] = False
    read = torch.cat([weight.detach()[:, gone] for weight in weights]).to(rows.dtype)
    alone = int(gone.sum()) < len(read)  # then the inputs that go are fitted themselves, and multiplied afterwards
    each = read if not alone else torch.eye(read.shape[1], dtype=rows.dtype, device=rows.device)
    whole = rows.new_zeros(len(each), rows.shape[1])
    whole[:, gone] = each
    lost = rows[:, gone] @ each.T
    stay = rows[:, kept]

    outputs = [len(weight) for weight in weights]
    squares = [part.T @ part for part in torch.split(read, outputs)] if alone else []

    def errors(left: Tensor) -> Tensor:
        if alone:  # the squared norm of their product with the weights, without this product
            products = left.T @ left
            return torch.stack([(products * square).sum(dtype=torch.float64) for square in squares])
        return torch.stack([part.square().sum(dtype=torch.float64) for part in torch.split(left, outputs, dim=1)])

    ridges = sorted(RIDGES, reverse=True)
    found = [errors(lost)]
    for fit in Normal(moments, centred).changes(whole, kept, ridges):
        found.append(errors(lost - stay @ fit.to(rows.dtype).T))
        if (found[-1] > found[-2]).all():  # errors have one minimum, and lesser ridges would lie beyond it
            break
    each = torch.stack(found)
    finite = each.isfinite().all(0).tolist()
    return [
        ridges[place - 1] if usable and place else float("inf")
        for place, usable in zip(each.argmin(0).tolist(), finite, strict=True)
    ]
