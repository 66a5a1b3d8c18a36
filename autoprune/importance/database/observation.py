"""Observation: moments of the inputs of layers, and of the gradients that come back through them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch, batch_size, pieces
from autoprune.data.sampling import seeded
from autoprune.importance.calibration import Calibration, private_copy
from autoprune.importance.database.influence import Influence
from autoprune.importance.database.sources import Source
from autoprune.importance.moments import PRECISE, Moments
from autoprune.importance.padding import positions_of
from autoprune.importance.reading import Reader, Reading, matrix_of
from autoprune.metrics.scorers import sampled_loss

log = logging.getLogger(__name__)

ENOUGH_ROWS = 2**14
"""Rows that are always taken of an input; of wide ones at least `_FEWEST` for each column."""
_FEWEST = 32
_AT_ONCE = 4  # samples in one backward pass, which bounds its memory; more of a small model
_WORK_AT_ONCE = 2**27  # multiply-accumulates of a forward pass, up to which it holds more
_LONG = 2**32  # multiply-accumulates of a sample from which on each has a pass of its own


@dataclass(frozen=True, eq=False)
class Observation:
    """Moments of one source.

    Attributes:
        source: The input, and the weights W that multiply it.
        inputs: Moments of its rows x.
        returned: Moments of the rows W^T g, for gradients g towards the outputs.
        influence: Products of both.
    """

    source: Source
    inputs: Moments
    returned: Moments
    influence: Influence


def bytes_of_moments(source: Source) -> int:
    """Memory that the observation of a source takes."""
    return 2 * source.columns**2 * (8 if source.columns <= PRECISE else 4)


def observe(
    calibration: Calibration, sources: Sequence[Source], samples: int, seed: int
) -> tuple[list[Observation], int]:
    """Run the dense model on the calibration samples, forwards, and on the first of them backwards, too.

    Gradients are those of `sampled_loss`, so that their moments are a part of the Fisher information: the curvature of
    the divergence from the dense outputs, and no labels are needed.

    Args:
        calibration: The dense model and the samples.
        sources: Inputs to observe.
        samples: Number of samples for backward passes.
        seed: For the labels drawn.

    Returns:
        The observations, and the number of labels drawn; 0 where the model has no gradients.
    """
    if samples:
        try:
            return _observed(calibration, sources, samples, seed)
        except Exception as error:  # a user's forward need not have gradients, and may raise anything under autograd
            log.info("gradients cannot be observed, and all outputs count alike: %s", error)
    return _observed(calibration, sources, 0, seed)


def _observed(
    calibration: Calibration, sources: Sequence[Source], samples: int, seed: int
) -> tuple[list[Observation], int]:
    watch = _Watch(sources)
    reading = Reading(calibration.model, calibration.structure, watch.see, tied=True)
    model = private_copy(calibration.model)
    starts = detached(model, {id(calibration.model.get_parameter(reader.name)) for reader in watch.owner})
    generator = torch.Generator().manual_seed(seed)
    draws = 0
    with seeded(0):
        for batch, backward in divided(calibration, samples):
            mask = positions_of(batch)
            with reading.batch(mask, gradients=backward):
                outputs = calibration.forward(model, batch)
                if backward:
                    loss, drawn = sampled_loss(outputs, batch, generator)
                    reading.backward(loss, watch.receive)
                    for each in watch.found:
                        each.influence.end(draws, batch_size(batch), mask, apart=drawn > batch_size(batch))
                    draws += drawn
            for start in starts:
                start.grad = None
    return watch.found, draws if any(each.returned.seen for each in watch.found) else 0


class _Watch:
    """Receiver of what the weights read, and of what comes back through them.

    Attributes:
        found: An observation of each source.
        owner: That of each reader.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.found = [_empty(source) for source in sources]
        self.owner = {reader: each for each in self.found for reader in each.source.readers}

    def see(self, reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        own = self.owner.get(reader)
        if own is None or reader != own.source.readers[0]:  # the others read the same
            return
        taken = []
        for rows in parts():
            own.inputs.add(rows.detach())
            if torch.is_grad_enabled():
                taken.append(rows.detach())
        if taken:
            own.influence.read(torch.cat(taken))  # a copy: later operations may write to the input

    def receive(self, reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        own = self.owner.get(reader)
        back = [] if own is None else [rows.detach() for rows in parts()]
        if own is not None and back:
            rows = torch.cat(back)
            own.returned.add(rows)
            own.influence.receive(reader, rows)


def slopes_of(observation: Observation, model: nn.Module, draws: int) -> Tensor:
    """Moments W^T G W in units of the loss, shape (columns, columns): G is half the curvature towards the outputs.

    Without gradients G is one over the energy of the outputs, so that errors are relative.
    """
    if draws:
        returned = observation.returned
        if not returned.seen:
            return torch.zeros(returned.columns, returned.columns, dtype=torch.float64)
        return returned.products(centred=False).double() * (0.5 * returned.seen / draws)
    inputs = observation.inputs.products(observation.source.centred).double()
    total = torch.zeros_like(inputs)
    for reader in observation.source.readers:
        weight = matrix_of(model.get_parameter(reader.name).detach(), reader).double()
        products = weight.T @ weight
        energy = float((products * inputs).sum())
        if energy > 0:
            total += products / energy
    return total


def _empty(source: Source) -> Observation:
    every = max(1.0, source.rows / max(ENOUGH_ROWS, _FEWEST * source.columns))
    return Observation(source, Moments(source.columns, 0, every), Moments(source.columns, 0), Influence(source.columns))


def divided(calibration: Calibration, samples: int) -> Iterator[tuple[Batch, bool]]:
    """Calibration batches in parts of a few samples, each with whether it is among the first `samples` samples."""
    macs = max(calibration.structure.macs, 1.0)
    most = max(_AT_ONCE, int(_WORK_AT_ONCE // macs)) if macs < _LONG else 1
    for batch in calibration.batches:
        if samples <= 0:
            yield batch, False
            continue
        for part in pieces(batch, min(most, samples)):
            yield part, samples > 0
            samples -= batch_size(part)


def detached(model: nn.Module, readers: set[int]) -> list[Tensor]:
    """Replace the parameters of a copy by plain tensors; only those that read no units start a gradient.

    Returns:
        Those that do.
    """
    fresh: dict[int, Tensor] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                starts = id(parameter) not in readers and parameter.is_floating_point()
                plain = fresh.setdefault(id(parameter), parameter.detach().requires_grad_(starts))
                module._parameters[key] = plain  # type: ignore[assignment]  # a plain tensor serves too
    return [tensor for tensor in fresh.values() if tensor.requires_grad]
