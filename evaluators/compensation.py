"""Compensation: change what reads the removed units so that it gives nearly what it gave before, without training."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.arguments import flag, positive, whole_number
from autoprune.batches import Batch
from autoprune.criteria import private_copy
from autoprune.evaluators.adaptive_bn import recalibrate, statistics
from autoprune.evaluators.layers import Layer, Reads, columns_kept, find_layers, matrix_of
from autoprune.evaluators.least_squares import Normal
from autoprune.evaluators.measuring import Adapted, bound_forward
from autoprune.evaluators.normalisation import Correction
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.room import bytes_of, room_beside
from autoprune.evaluators.sharing import checked_bytes
from autoprune.protocols import Failure, IntArray, Measurement, Pruning, SearchSpace
from autoprune.sources import seeded
from autoprune.structure.adapters import refresh_flat_weights
from autoprune.structure.slicing import Edit

SOLVED_BYTES = 2**28
"""Most memory for solutions that later candidates may need again."""


class Compensated:
    """Scores a candidate after re-fitting its layers to the dense model: weights, biases and batch-norm statistics.

    Every weight that reads units is re-fitted, whatever calls it: linear layers, ungrouped convolutions, recurrent
    cells, projections of attention, parameters that a forward passes to a function itself; transposed convolutions,
    weights that two places share, and what is computed from a parameter before it is used are left out. What they read
    is looked at once, in the dense model on the calibration samples without their padding, so the weights of a
    candidate cost one linear system each, of a size in proportion to a pass over these samples, and none where another
    candidate had it. Everything is a difference from the dense model: where nothing was removed, nothing changes. The
    dense candidate stays as it is. `build` delivers what was scored; parameters keep their names and shapes.

    Args:
        bn: Correct batch-norm statistics by what pruning changed, in one pass over the calibration samples.
        bias: Make up in biases for the mean of what is removed. A layer without a bias is left alone: adding one would
            change the keys of its state dict, and behind batch norm, where most such layers are, it would have no
            effect.
        least_squares: Fit the weights on the inputs that stay to the outputs of the dense layer; about the mean where a
            bias or batch norm takes care of that. Weights with elements set to zero keep them.
        ridge: How strongly the fit is held to the inherited weights, as a share of the mean square of the inputs; None
            chooses it for each layer by its error on a quarter of the calibration samples, which then count, too.
        renew: Re-estimate the batch-norm statistics of the dense model first, and fit to what it is then: for a model
            whose running statistics do not suit the data.
        memory_bytes: Most memory for the products of inputs, columns squared times 8 (from 513 columns on 4) for each
            layer; of larger layers fewer rows are kept, or none, so that they keep their weights, which the log says.
            None: 1 GiB; less for large models, but at least what the model takes.
        share_bytes: Most memory for what candidates share, see `AdaptiveBN`.

    Reference:
        Bias: An et al., "Fluctuation-based Adaptive Structured Pruning", AAAI 2024, arXiv:2312.11983. Least squares: He
        et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, arXiv:1707.06168, here from the
        dense activations alone, for every layer at once.
    """

    def __init__(
        self,
        bn: bool = True,
        bias: bool = True,
        least_squares: bool = True,
        ridge: float | None = None,
        renew: bool = False,
        memory_bytes: int | None = None,
        share_bytes: int | None = None,
    ) -> None:
        if ridge is not None:
            ridge = positive("ridge", ridge, ", a share of the mean square of inputs, or None")
        if memory_bytes is not None:
            memory_bytes = whole_number("memory_bytes", memory_bytes, 0)
        for name, part in (("bn", bn), ("bias", bias), ("least_squares", least_squares), ("renew", renew)):
            flag(name, part)
        self._bn, self._bias, self._least_squares, self._renew = bn, bias, least_squares, renew
        self._ridge, self._memory_bytes, self._share_bytes = ridge, memory_bytes, checked_bytes(share_bytes)
        self._collected = False
        self._whole = {"bn": bn, "bias": bias, "least_squares": least_squares}  # what is collected serves these parts
        self._typical: Pruning | None = None

    def prepare(self, context: Context) -> None:
        """Look at what layers read, and make the skeleton that every candidate is cut from."""
        if not self._collected:
            self.collect(context)
        self._context, self._collected = context, False  # another `prepare` may be for another model
        self._adapted = Adapted(context, self.adapt, share_bytes=self._share_bytes)

    def collect(self, context: Context) -> None:
        """Look at what layers and norms read; the first part of `prepare`, which is not repeated then."""
        self._context = context
        calibration, whole = context.subsets.calibration, self.with_parts(**self._whole)
        self._reference = private_copy(context.model)
        with seeded(0):
            if self._renew:
                recalibrate(self._reference, calibration, bound_forward(context, self._reference))
            normalises = whole._bn and statistics(self._reference)
            self._correction = Correction(self._reference, calibration, context.forward) if normalises else None
        self._solved: OrderedDict[tuple[str, int, bytes], Tensor] = OrderedDict()
        self._solved_bytes = 0
        self._most_solved = min(SOLVED_BYTES, room_beside(context.model))
        self._layers: dict[str, list[Layer]] = defaultdict(list)
        if whole._bias or whole._least_squares:
            typical = context.structure.edit(self._typical or middle_of(context.space))
            reads = Reads(self._reference, context.structure, calibration, context.forward)
            most = max(room_beside(context.model), bytes_of(context.model))  # a transformer's take as much as the model
            allowed = most if self._memory_bytes is None else self._memory_bytes
            memory = allowed if whole._least_squares else 0
            with seeded(0):
                for layer in find_layers(reads, memory, self._ridge, typical, whole._centred):
                    self._layers[layer.reader.name].append(layer)
        self._collected = True

    def with_parts(self, **parts: bool) -> Compensated:
        """The same with other parts of the re-fit (`bn`, `bias`, `least_squares`), from what was or will be collected.

        What is collected, ridges included, stays that of the evaluator as it was made.
        """
        other = copy.copy(self)
        other._bn, other._bias = parts.get("bn", self._bn), parts.get("bias", self._bias)
        other._least_squares = parts.get("least_squares", self._least_squares)
        other._solved, other._solved_bytes = OrderedDict(), 0
        return other

    def judged_on(self, typical: Pruning) -> Compensated:
        """The same, not prepared yet, with ridges chosen for this pruning and not for the middle of the space."""
        other = self.with_parts()
        other._typical, other._collected = typical, False
        return other

    @property
    def settings(self) -> dict[str, bool]:
        """The parts that are on, as arguments of the class."""
        return {"bn": self._bn, "bias": self._bias, "least_squares": self._least_squares, "renew": self._renew}

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that are on and have something to do in this model, once collected."""
        layers = [layer for each in self._layers.values() for layer in each]
        busy = {
            "least_squares": any(layer.moments.sketch_rows is not None for layer in layers),
            "bias": any(map(self._shifted, layers)),
            "bn": self._correction is not None,
        }
        return tuple(name for name, has_work in busy.items() if has_work and self.settings[name])

    def order(self, candidates: IntArray) -> IntArray:
        """The order of evaluation in which candidates share most."""
        return self._adapted.order(candidates)

    def release(self) -> None:
        """Forget what candidates share."""
        self._adapted.release()
        self.forget()

    def forget(self) -> None:
        """Forget solutions, which only candidates with the same units would need again."""
        self._solved.clear()
        self._solved_bytes = 0

    def held(self) -> list[Tensor]:
        """The products of inputs, which `build` needs."""
        return [tensor for layers in self._layers.values() for layer in layers for tensor in layer.moments.large()]

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Score candidates on validation batches."""
        return self._adapted.evaluate(candidates, chunk)

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a candidate on the held-out samples."""
        return self._adapted.test(candidate)

    def build(self, candidate: IntArray) -> nn.Module:
        """A plain module with the weights, biases and statistics that were scored."""
        return self._adapted.build(candidate)

    def _centred(self, layer: Layer) -> bool:
        """Whether the mean of what a layer gives is taken care of."""
        return (self._bn and layer.normalised) or self._shifted(layer)

    def _shifted(self, layer: Layer) -> bool:
        """Whether the bias of a layer is corrected."""
        return self._bias and layer.bias is not None and not (self._bn and layer.normalised)

    @torch.no_grad()
    def adapt(self, module: nn.Module, edit: Edit, run: Callable[[Batch], object]) -> None:
        """Re-fit what was cut from the model, in place; ``run(batch)`` runs it on calibration data."""
        for name, layers in self._layers.items():
            if name in edit.zeroed or layers[0].reader.dim in edit.slices.get(name, {}):
                for layer in layers:
                    self._refit(module, edit, layer)
        if self._bn and self._correction is not None:
            self._correction.apply(module, edit, run)

    def _refit(self, module: nn.Module, edit: Edit, layer: Layer) -> None:
        """Give a weight that reads removed units, and its bias, new values."""
        reader, name = layer.reader, layer.reader.name
        dense = self._context.model.get_parameter(name).detach()
        whole = matrix_of(dense, reader).double()
        left = edit.slices.get(name, {}).get(1 - reader.dim, np.arange(dense.shape[1 - reader.dim]))
        places = np.flatnonzero((left >= reader.start) & (left < reader.start + reader.outputs))
        rows = torch.from_numpy(left[places] - reader.start).to(dense.device)
        into = torch.from_numpy(places).to(dense.device)
        value = module.get_parameter(name).detach().clone()
        matrix = value.flatten(1) if reader.dim else value.T
        kept = columns_kept(reader, self._context.model, edit)
        if kept is not None and self._least_squares:
            fitted = whole[rows][:, kept] + self._change(layer, whole, kept)[rows].double()
            matrix[into] = fitted.to(matrix.dtype)
            _replace(module, name, value)
        if self._shifted(layer):
            assert layer.bias is not None
            mean = layer.moments.mean
            lost = whole[rows] @ mean - matrix[into].double() @ (mean if kept is None else mean[kept])
            bias = module.get_parameter(layer.bias).detach().clone()
            bias[into] = (bias[into].double() + lost).to(bias.dtype)
            _replace(module, layer.bias, bias)

    def _change(self, layer: Layer, whole: Tensor, kept: Tensor) -> Tensor:
        """What least squares add to the columns that stay, for all rows of the dense weight, because others need some.

        The latest are kept: most layers of a candidate read what they read in another.
        """
        key = layer.reader.name, layer.reader.start, kept.cpu().numpy().tobytes()
        if key not in self._solved:
            fits = layer.moments.sketch_rows is not None and np.isfinite(layer.ridge)
            normal = Normal(layer.moments, self._centred(layer))
            zero = torch.zeros(len(whole), len(kept), device=whole.device)
            self._solved[key] = normal.change(whole, kept, layer.ridge).float() if fits else zero
            self._solved_bytes += self._solved[key].nbytes
            while self._solved_bytes > self._most_solved and len(self._solved) > 1:
                self._solved_bytes -= self._solved.popitem(last=False)[1].nbytes
        self._solved.move_to_end(key)
        return self._solved[key]


def middle_of(space: SearchSpace) -> Pruning:
    """What stays with the option in the middle of every dimension."""
    return space.pruning((np.array(space.sizes) // 2).tolist())


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module a new parameter, never new values: it may share the one that it has."""
    owner = module.get_submodule(name.rpartition(".")[0])
    key = name.rpartition(".")[2]
    setattr(owner, key, nn.Parameter(value, requires_grad=owner.get_parameter(key).requires_grad))
    refresh_flat_weights(owner)
