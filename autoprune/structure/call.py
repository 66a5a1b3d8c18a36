"""Call: the way a model is called and traced, as a user gives it to search, inspect and profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, get_args

from torch import nn

from autoprune.arguments import one_of, whole_number
from autoprune.data.batch import Forward, on_call
from autoprune.structure.analysis import ChecksMode, RewriteMode
from autoprune.structure.example import Example, called
from autoprune.structure.given import ExampleInputs, examples_of
from autoprune.structure.outputs import require_selecting

Outputs: TypeAlias = str | int | Sequence[str | int] | Callable[[Any], Any]
"""Choice of outputs: a key, an index, several of these, or a function of the model's return value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """The way a model is called and traced: ``search(..., example=autoprune.Call(inputs=x, outputs="boxes"))``.

    Attributes:
        inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs; None for the example that the model
            carries (``example_input_array``, ``dummy_inputs``, timm's ``pretrained_cfg``), or for the data of a search.
            A list of these covers branches of the forward: a group must be prunable in all of them, and costs are the
            first's.
        forward: ``forward(model, batch)``, where calling the model with the inputs of a batch is not enough; returns
            the outputs that matter. Where there is no data, the batch is the example: a tensor or dict as given,
            several inputs as a tuple with None at its end, in place of the target.
        outputs: Outputs that matter: a key, an index, several of these, or a function of the model's return value.
            Units that reach only other outputs can be pruned.
        checks: ``"on"`` freezes groups that fail a check of the traced structure, ``"strict"`` raises, ``"isolated"``
            checks in a separate process.
        rewrite: ``"auto"`` delivers modules whose code ties sizes, such as ``reshape(B, N, C)`` with ``C`` from the
            input's shape, as an ``fx.GraphModule`` of their operations; a note names them. ``"off"`` keeps the class of
            every module, and freezes or ties the groups that such code stops.
        cost_batch: Samples that ``memory_bytes`` and ``latency_ms`` are stated at.

    Raises:
        TypeError: If `forward` or `outputs` is none.
        ValueError: If another field is out of range or an unknown name.
    """

    inputs: ExampleInputs | Sequence[ExampleInputs] | None = None
    forward: Forward | None = None
    outputs: Outputs | None = None
    checks: ChecksMode = "on"
    rewrite: RewriteMode = "auto"
    cost_batch: int = 1

    def __post_init__(self) -> None:
        require_selecting(self.forward, self.outputs)
        one_of("checks", self.checks, get_args(ChecksMode))
        one_of("rewrite", self.rewrite, get_args(RewriteMode))
        object.__setattr__(self, "cost_batch", whole_number("cost_batch", self.cost_batch, 1))


PLACES = {
    "example_inputs": "example=...",
    **{field.name: f"example=autoprune.Call({field.name}=...)" for field in fields(Call)},
}
"""Places of arguments that a call groups, for messages."""

CallOrInputs: TypeAlias = Call | ExampleInputs | Sequence[ExampleInputs]
"""The argument ``example=``: a `Call`, or its inputs alone."""


def call_of(example: CallOrInputs | None) -> Call:
    """Make the call that ``example=`` stands for."""
    return example if isinstance(example, Call) else Call(inputs=example)


def example_of(model: nn.Module, call: Call) -> Example:
    """Make the example of a call without data, as `autoprune.inspect` and `autoprune.profile` trace it.

    Args:
        model: Unwrapped.
        call: Its inputs after the first of a list are further calls. Its forward gets them as
            `autoprune.data.batch.of_call` makes a batch of them.

    Raises:
        ValueError: If there are no inputs, or they have another form.
    """
    (args, kwargs), *further = examples_of(model, call.inputs)
    run = called if call.forward is None else on_call(call.forward)
    return Example(model, args, kwargs, run, further).selecting(call.outputs)
