"""Inputs of a search: its samples, and the calls that the model is traced with and costs are stated for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autoprune.arguments import shown
from autoprune.data import batch as batches
from autoprune.data.sampling import SMALLEST_PART
from autoprune.data.subsets import PARTS, TOKENS, Subsets, materialise, synthetic
from autoprune.errors import DataError
from autoprune.metrics.language import first_tokens, is_language_model
from autoprune.structure.analysis import require_supported
from autoprune.structure.example import Example
from autoprune.structure.given import examples_of, unwrap
from autoprune.structure.outputs import selecting
from autoprune.study.request import Request

SYNTHETIC_SAMPLES = 256
"""Samples of each part when no data is given."""


@dataclass(frozen=True)
class Inputs:
    """The model with everything that it is called with.

    Attributes:
        model: The user's, without wrappers.
        subsets: The samples, on its device.
        forward: Runs a model on a batch, and takes the outputs that matter.
        example: The call to trace, with further ones that may take other branches.
        stated: Batch that costs are stated for.
    """

    model: nn.Module
    subsets: Subsets
    forward: batches.Forward
    example: Example
    stated: batches.Batch


def inputs_of(request: Request) -> Inputs:
    """Draw the samples, and choose the calls.

    Raises:
        UnsupportedModelError: If the model cannot be traced by its kind.
        DataError: If there is no data that the metric can use.
    """
    model = unwrap(request.model)
    call = request.example
    device = require_supported(model)
    subsets = _subsets(model, request).to(device)
    forward = selecting(call.forward or batches.default_forward, call.outputs)
    first = batches.fresh(batches.pieces(subsets.calibration[0], 2)[0])
    further = _branches(model, call.inputs)
    stated = subsets.calibration[0]
    if request.data is not None and call.inputs is not None and not further:
        stated = batches.to_device(_like(model, call.inputs, stated), device)
        if not _same_sizes(stated, first):  # the data may take other branches of the forward
            further.append(first)
        first = batches.fresh(stated)
    return Inputs(model, subsets, forward, Example.of_batch(model, first, forward, further), stated)


def counted_in_tokens(request: Request, inputs: Inputs, model: nn.Module) -> Inputs:
    """Leave a language model as many samples as hold `TOKENS`, where the user gave no number of samples.

    Args:
        request: With the metric, and the data.
        inputs: With all samples that were drawn.
        model: The dense model, in evaluation mode.
    """
    data, subsets = request.data, inputs.subsets
    if subsets.synthetic or not (isinstance(request.metric, str) and request.metric in ("auto", "next_token")):
        return inputs
    parts = [part for part in PARTS if getattr(data, f"{part}_samples", None) is None]
    counts = {part: first_tokens(getattr(subsets, part), TOKENS[part]) for part in parts}
    fewer = {part: max(count, SMALLEST_PART) for part, count in counts.items()}
    fewer = {part: count for part, count in fewer.items() if count < subsets.samples[part]}

    def run(batch: batches.Batch) -> Any:
        with torch.no_grad():
            return inputs.forward(model, batches.fresh(batch))

    few = batches.pieces(subsets.validation[0], 2)[0]
    if not fewer or batches.token_ids(few) is None or not is_language_model(run(few), [few], run):
        return inputs
    named = ", ".join(f"{count} of {subsets.samples[part]} {part} samples" for part, count in fewer.items())
    left = subsets.first(fewer)
    note = f"a language model is judged by tokens: {named} hold enough; for others give Data(validation_samples=...)"
    return replace(inputs, subsets=replace(left, notes=(*left.notes, note)))


def _subsets(model: nn.Module, request: Request) -> Subsets:
    metric = request.metric
    if request.data is not None:
        return materialise(request.data, request.seed)
    if not (isinstance(metric, str) and metric in ("auto", "agreement")):
        raise DataError(
            f"metric {shown(metric)} needs data; pass data=, or metric='agreement' to compare with the model"
        )
    (args, kwargs), *_ = examples_of(model, request.example.inputs)
    if not args and not kwargs:
        raise DataError(f"example must hold at least one input, got {shown(request.example.inputs)}")
    if not any(tensor.ndim for tensor in batches.tensors((args, kwargs))):
        given = shown(request.example.inputs)
        raise DataError(f"example must hold a tensor with a dimension for samples, got {given}")
    return synthetic(kwargs or (args if len(args) > 1 else args[0]), SYNTHETIC_SAMPLES, request.seed)


def _branches(model: nn.Module, example_inputs: Any) -> list[batches.Batch]:
    """Batches of a list of examples, which take branches that the data may not."""
    if not isinstance(example_inputs, list):
        return []
    return [kwargs or (*args, None) for args, kwargs in examples_of(model, example_inputs)]


def _like(model: nn.Module, example_inputs: Any, batch: batches.Batch) -> batches.Batch:
    """Example inputs in the form of a batch of the data, without a target."""
    ((args, kwargs),) = examples_of(model, example_inputs)
    return (*args, None) if args and isinstance(batch, list | tuple) else batches.of_call(args, kwargs)


def _same_sizes(one: batches.Batch, other: batches.Batch) -> bool:
    """Return whether the inputs in two batches differ at most in the number of samples."""
    sizes = [
        [(tensor.shape[1:], tensor.dtype) for tensor in batches.tensors(batches.inputs(batch))]
        for batch in (one, other)
    ]
    return sizes[0] == sizes[1]
