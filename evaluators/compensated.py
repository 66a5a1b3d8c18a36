"""Compensation: adjust the layers that read removed units so that their outputs stay close, without training."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.arguments import flag, positive, said, whole_number
from autoprune.data.batch import Batch
from autoprune.data.sampling import seeded
from autoprune.evaluators.activation_cache.cache import checked_bytes
from autoprune.evaluators.activation_cache.limits import bytes_of, room_beside
from autoprune.evaluators.adaptive_bn import recalibrate, statistics
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.refit.finding import find_layers
from autoprune.evaluators.refit.layers import Layer, columns_kept
from autoprune.evaluators.refit.least_squares import Normal
from autoprune.evaluators.refit.linear_maps import LinearMaps
from autoprune.evaluators.refit.normalisation import Correction
from autoprune.evaluators.refit.remaining import remaining_errors
from autoprune.evaluators.scoring.scorer import Adapted
from autoprune.importance.calibration import Calibration, private_copy
from autoprune.importance.reading import matrix_of
from autoprune.protocols import Failure, FloatArray, IntArray, Measurement, Pruning, SearchSpace, Silences
from autoprune.structure.slicing.adapters import refresh_flat_weights
from autoprune.structure.slicing.slicing import Edit, Slicer

log = logging.getLogger(__name__)

SOLVED_BYTES = 2**28
"""Most memory for solutions that later candidates may need again."""


class Compensated:
    """Scores a candidate after re-fitting its layers to the dense model: weights, biases and batch-norm statistics.

    Every weight that reads units is re-fitted, whatever calls it: linear layers, ungrouped convolutions, recurrent
    cells, projections of attention, parameters that a forward passes to a function itself. Transposed convolutions,
    weights that two places share, and values computed from a parameter before use are left out. The inputs of these
    weights are collected once, in the dense model on the calibration samples without their padding. Each weight of a
    candidate then costs one linear system, of a size in proportion to a pass over these samples, and none if another
    candidate has solved it. Every part is a difference from the dense model: where nothing was removed, nothing
    changes, and the dense candidate stays as it is. `build` delivers the module that was scored; parameters keep their
    names and shapes.

    Args:
        bn: Correct batch-norm statistics for the change by pruning, in one pass over the calibration samples, or over
            the first of them if those of a typical candidate have converged by then.
        bias: Add the mean contribution of the removed inputs to biases. A layer without a bias is left alone: adding
            one would change the keys of its state dict, and before batch norm, where most such layers are, it would
            have no effect.
        least_squares: Fit the weights on the inputs that stay to the outputs of the dense layer; about the mean where a
            bias or batch norm takes care of that. Weights with elements set to zero keep them.
        ridge: How strongly the fit is held to the inherited weights, as a share of the mean square of the inputs; None
            chooses it for each layer by its error on a quarter of the calibration samples, which then count, too.
        renew: Re-estimate the batch-norm statistics of the dense model first, and fit to that model: for one whose
            running statistics do not suit the data.
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
        self._ridge = ridge
        self._memory_bytes = memory_bytes
        self._share_bytes = checked_bytes(share_bytes)
        self._collected = False
        self._whole = {"bn": bn, "bias": bias, "least_squares": least_squares}  # the parts that `collect` serves
        self._typical: Pruning | None = None
        self._maps: LinearMaps | None = None

    def prepare(self, context: Context) -> None:
        """Collect the inputs of layers, and make the skeleton that every candidate is cut from."""
        if not self._collected:
            self.collect(context)
        self._context, self._dense = context, context.model
        self._collected = False  # another `prepare` may be for another model
        few = () if self._correction is None else tuple(self._correction.batches)  # all that candidates run on
        context = replace(context, subsets=replace(context.subsets, calibration=few))
        self._adapted = Adapted(context, self.adapt, share_bytes=self._share_bytes)

    def collect(self, context: Context) -> None:
        """Collect the inputs of layers and norms: the first part of `prepare`, which then does not repeat it."""
        self._context = context
        typical = self._typical or middle_of(context.space)
        self.collect_for(context.calibration, typical, drops(context.space))
        self._collected = True

    def collect_for(self, calibration: Calibration, typical: Pruning, depth: bool = False) -> None:
        """Collect the inputs of layers and norms of a model without a space: all that `adapt` needs.

        Args:
            calibration: The model, its structure and the samples.
            typical: Pruning that ridges are chosen for.
            depth: Whether whole branches may be dropped.
        """
        whole = self.with_parts(**self._whole)
        self._dense, structure = calibration.model, calibration.structure
        self._reference = private_copy(self._dense)
        calibration = calibration.of(self._reference)
        with seeded(0):
            if self._renew:
                recalibrate(self._reference, calibration.batches, partial(calibration.forward, self._reference))
            normalises = whole._bn and statistics(self._reference)
            self._correction = Correction(calibration) if normalises else None
        self._every_batch = self._correction
        self._solved: OrderedDict[tuple[str, int, bytes], Tensor] = OrderedDict()
        self._solved_bytes = 0
        room = room_beside(self._dense)
        self._most_solved = min(SOLVED_BYTES, room)
        self._layers: dict[str, list[Layer]] = defaultdict(list)
        edit = structure.edit(typical)
        if whole._bias or whole._least_squares:
            most = max(room, bytes_of(self._dense))  # a transformer's take as much as the model
            allowed = most if self._memory_bytes is None else self._memory_bytes
            memory = allowed if whole._least_squares else 0
            with seeded(0):
                for layer in find_layers(calibration, memory, self._ridge, edit, whole._centred):
                    self._layers[layer.reader.name].append(layer)
        maps = whole._least_squares and depth
        self._maps = LinearMaps(calibration, structure.branches) if maps else None
        if self._correction is not None:
            self._correction = self._correction.first(self._settled(calibration, edit, self._correction))

    def _settled(self, calibration: Calibration, edit: Edit, correction: Correction) -> int:
        """Number of calibration batches after which statistics of a typical candidate have converged, else all."""
        every = len(correction.batches)
        if every == 1 or not (edit.slices or edit.zeroed or edit.dropped):
            return every
        module = Slicer(self._dense).cut(edit).eval()
        run = partial(calibration.forward, module)
        try:
            with seeded(0):
                self.with_parts(bn=False).adapt(module, edit, run)
                return correction.converged(module, edit, run)
        except Exception as error:  # a candidate that cannot run fails when it is scored, alone
            log.info("statistics are taken of all calibration samples: %s", said(error))
            return every

    def with_parts(self, **parts: bool) -> Compensated:
        """Copy with other parts of the re-fit on or off (`bn`, `bias`, `least_squares`); it shares collected inputs.

        The moments and ridges stay those of the parts that the original evaluator was made with.
        """
        other = copy.copy(self)
        other._bn, other._bias = parts.get("bn", self._bn), parts.get("bias", self._bias)
        other._least_squares = parts.get("least_squares", self._least_squares)
        other._solved = OrderedDict()
        other._solved_bytes = 0
        return other

    def to_send(self, processes: int) -> Compensated:
        """Copy for some processes, with the collected inputs, so that its `prepare` need not collect them again.

        The limits on what each keeps are those of one process, divided.
        """
        self.held()  # completes the products, which each process would do in memory of its own
        other = self.with_parts()
        other._collected = True
        other._most_solved = self._most_solved // processes
        room = room_beside(self._dense) if self._share_bytes is None else self._share_bytes
        other._share_bytes = room // processes
        for name in ("_adapted", "_context", "_dense"):
            other.__dict__.pop(name, None)
        return other

    def judged_on(self, typical: Pruning) -> Compensated:
        """Copy, not prepared yet, that chooses ridges for this pruning instead of for the middle of the space."""
        other = self.with_parts()
        other._typical = typical
        other._collected = False
        return other

    @property
    def settings(self) -> dict[str, bool]:
        """Parts that are on, as arguments of the class."""
        return {"bn": self._bn, "bias": self._bias, "least_squares": self._least_squares, "renew": self._renew}

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that are on and change something in this model; known after `collect`."""
        layers = [layer for each in self._layers.values() for layer in each]
        busy = {
            "least_squares": any(layer.moments.sketch_rows is not None for layer in layers)
            or (self._maps is not None and self._maps.useful),
            "bias": any(map(self._shifted, layers)),
            "bn": self._correction is not None,
        }
        return tuple(name for name, has_work in busy.items() if has_work and self.settings[name])

    @property
    def shifted(self) -> frozenset[str]:
        """Weights whose biases are corrected; known after `collect`."""
        return frozenset(name for name, layers in self._layers.items() if all(map(self._shifted, layers)))

    def remaining_errors(self) -> tuple[FloatArray | None, ...] | None:
        """Errors that the re-fit leaves, for each option alone, see there; None where it fits no weights, or few."""
        context = self._context
        if not self._least_squares:
            return None
        return remaining_errors(self._layers, context.model, context.structure, context.space, self._centred)

    def order(self, candidates: IntArray) -> IntArray:
        """Return the order of evaluation in which candidates share most."""
        return self._adapted.order(candidates)

    def rest(self) -> None:
        """Free the memory of the latest candidate."""
        self._adapted.rest()

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
        moments = {id(layer.moments): layer.moments for layers in self._layers.values() for layer in layers}
        return [tensor for each in moments.values() for tensor in each.large()]

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
        """Return whether a bias or batch norm corrects the mean of a layer's output."""
        return (self._bn and layer.normalised) or self._shifted(layer)

    def _shifted(self, layer: Layer) -> bool:
        """Return whether the bias of a layer is corrected."""
        return self._bias and layer.bias is not None and not (self._bn and layer.normalised)

    def through(self, module: nn.Module, edit: Edit, run: Callable[[Batch], object]) -> None:
        """Run a pruned module on all calibration batches, and correct the statistics of its batch norms."""
        if self._bn and self._every_batch is not None:
            self._every_batch.apply(module, edit, run)
            return
        for batch in self._context.subsets.calibration:
            run(batch)

    @torch.no_grad()
    def adapt(self, module: nn.Module, edit: Edit, run: Callable[[Batch], object]) -> None:
        """Re-fit a pruned module in place; ``run(batch)`` runs it on calibration data."""
        for name, layers in self._layers.items():
            if name in edit.zeroed or layers[0].reader.dim in edit.slices.get(name, {}):
                for layer in layers:
                    self._refit(module, edit, layer)
        if self._least_squares and self._maps is not None:
            self._maps.apply(module, edit, replace_parameter)
        if self._bn and self._correction is not None:
            self._correction.apply(module, edit, run)

    def _refit(self, module: nn.Module, edit: Edit, layer: Layer) -> None:
        """Give a weight that reads removed units, and its bias, new values."""
        reader = layer.reader
        name = layer.reader.name
        dense = self._dense.get_parameter(name).detach()
        whole = matrix_of(dense, reader)
        whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
        left = edit.slices.get(name, {}).get(1 - reader.dim, np.arange(dense.shape[1 - reader.dim]))
        places = np.flatnonzero((left >= reader.start) & (left < reader.start + reader.outputs))
        rows = torch.from_numpy(left[places] - reader.start).to(dense.device)
        into = torch.from_numpy(places).to(dense.device)
        value = module.get_parameter(name).detach().clone(memory_format=torch.contiguous_format)
        matrix = value.flatten(1) if reader.dim else value.T  # a view, since it is contiguous
        kept = columns_kept(reader, self._dense, edit)
        if kept is not None and self._least_squares and name not in edit.zeroed:
            change = self._change(layer, whole, kept).index_select(0, rows)
            fitted = whole.index_select(0, rows).index_select(1, kept) + change
            matrix[into] = fitted.to(matrix.dtype)
            replace_parameter(module, name, value)
        if self._shifted(layer):
            assert layer.bias is not None
            mean = layer.moments.mean
            lost = whole[rows].double() @ mean - matrix[into].double() @ (mean if kept is None else mean[kept])
            bias = module.get_parameter(layer.bias).detach().clone()
            bias[into] = (bias[into].double() + lost).to(bias.dtype)
            replace_parameter(module, layer.bias, bias)

    def _change(self, layer: Layer, whole: Tensor, kept: Tensor) -> Tensor:
        """Change of the columns that stay by least squares, for all rows of the dense weight.

        All rows, because another candidate may keep other rows. The latest solutions are cached: most layers read the
        same units in several candidates.
        """
        key = layer.reader.name, layer.reader.start, kept.cpu().numpy().tobytes()
        if key not in self._solved:
            fits = layer.moments.sketch_rows is not None and np.isfinite(layer.ridge)
            normal = Normal(layer.moments, self._centred(layer))
            if fits:
                change = normal.change(whole, kept, layer.ridge).float()
            else:
                change = torch.zeros(len(whole), len(kept), device=whole.device)
            self._solved[key] = change
            self._solved_bytes += change.nbytes
            while self._solved_bytes > self._most_solved and len(self._solved) > 1:
                self._solved_bytes -= self._solved.popitem(last=False)[1].nbytes
        self._solved.move_to_end(key)
        return self._solved[key]


def middle_of(space: SearchSpace) -> Pruning:
    """Pruning with the middle option of every dimension that drops no part as a whole."""
    middle = np.array(space.sizes) // 2
    if isinstance(space, Silences):
        for j in np.flatnonzero(middle):
            alone = np.where(np.arange(len(middle)) == j, middle, 0)
            middle[j] = 0 if space.pruning(alone.tolist()).dropped else middle[j]
    return space.pruning(middle.tolist())


def drops(space: SearchSpace) -> bool:
    """Return whether candidates of a space may drop parts as a whole."""
    return isinstance(space, Silences) and bool(space.pruning((np.array(space.sizes) - 1).tolist()).dropped)


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter of a module, never its values: another module may share them; its memory format stays."""
    owner = module.get_submodule(name.rpartition(".")[0])
    key = name.rpartition(".")[2]
    before = owner.get_parameter(key)
    if value.stride() != before.stride():
        value = torch.empty_like(before, dtype=value.dtype).copy_(value)
    setattr(owner, key, nn.Parameter(value, requires_grad=before.requires_grad))
    refresh_flat_weights(owner)
