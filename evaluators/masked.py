"""Evaluation of networks with zeros: masks by what layers read, and weights that make up for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from autoprune.arguments import flag, one_of, positive, whole_number
from autoprune.data.batch import Batch
from autoprune.data.subsets import fingerprint
from autoprune.evaluators.activation_cache.cache import checked_bytes
from autoprune.evaluators.compensated import Compensated, replace_parameter
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.refit.layers import shift_bias
from autoprune.evaluators.refit.sequential import Sequential
from autoprune.evaluators.scoring.scorer import Adapted
from autoprune.importance.calibration import affordable, private_copy
from autoprune.importance.masks.layer import DAMPING
from autoprune.importance.masks.methods import METHODS, Method
from autoprune.importance.masks.observe import observe_weights
from autoprune.importance.masks.prices import losses_of_options
from autoprune.importance.masks.solver import Solver
from autoprune.importance.masks.tables import STORE_BYTES, STORES, Choice, Store, ZeroDatabase, build_tables
from autoprune.protocols import Failure, FloatArray, IntArray, Measurement, SetsZeros
from autoprune.structure.slicing.slicing import Edit
from autoprune.structure.slicing.zeros import UNSTRUCTURED, Pattern

FEWEST_SAMPLES, MOST_SAMPLES = 8, 64
"""Samples for backward passes, which weigh errors of different layers: fewer of a large model."""
SLICED_BYTES = 2**28
"""Most memory for weights of layers that lost units, which other candidates may need again."""
MEMORY_BYTES = 2**30


class Masked:
    """Scores candidates whose weights have zeros where a method sets them, and values that make up for them.

    The dense model runs once on the calibration samples. Every option of every weight is then made, with its error, and
    a candidate is put together from these. Where a candidate also loses units, weights are re-fitted to the inputs that
    stay, and then set to zero (STUN's order, arXiv:2409.06211). Biases and batch-norm statistics follow, as in
    `Compensated`. Weights of grouped convolutions, and those that a model computes before use, go by magnitude.

    With `sequential` the options only tell what each weight bears: a candidate's own weights are made one layer after
    the other, each for the inputs that the layers before it now give, see
    `autoprune.evaluators.refit.sequential.Sequential`. That takes two passes over the calibration samples for each set
    of weights that read the same values, and candidates share nothing.

    Args:
        method: ``"magnitude"``, ``"wanda"``, ``"ria"``, ``"sparsegpt"`` or ``"admm"``, see docs/sparsity.md.
        bn: Correct batch-norm statistics.
        bias: Correct biases.
        damping: Share of the mean square of inputs that is added to their moments before they are inverted.
        sequential: Make weights with the errors of earlier layers in their inputs.
        folder: Folder for the errors of all options, some kilobytes, which are then measured only once for the same
            model, data and settings, by whatever process; None keeps them in memory.
        store: What the folder holds: ``"tables"`` of errors, where candidates make the weights that they need, or all
            ``"weights"``, too, which are then mapped into memory.
        store_bytes: Most bytes of weights in a folder, which is refused beyond; or of those that are kept in memory,
            where others are made again when they are needed.
        memory_bytes: Most memory for moments of inputs.
        share_bytes: Most memory for what candidates share, see `AdaptiveBN`.
    """

    def __init__(
        self,
        method: Method = "admm",
        *,
        bn: bool = True,
        bias: bool = True,
        damping: float = DAMPING,
        sequential: bool = False,
        folder: str | Path | None = None,
        store: Store = "tables",
        store_bytes: int = STORE_BYTES,
        memory_bytes: int = MEMORY_BYTES,
        share_bytes: int | None = None,
    ) -> None:
        one_of("method", method, METHODS)
        for name, part in (("bn", bn), ("bias", bias), ("sequential", sequential)):
            flag(name, part)
        self._method: Method = method
        self._bn, self._bias = bn, bias
        self._damping = positive("damping", damping, ", a share of the mean square of inputs")
        self._sequential = sequential
        one_of("store", store, STORES)
        if store == "weights" and folder is None:
            raise ValueError("store='weights' needs a folder=; without one, weights are kept in memory")
        if store == "weights" and sequential:
            raise ValueError("store='weights' has none for sequential=True, which makes those of every candidate")
        self._folder = folder
        self._store: Store = store
        self._store_bytes = whole_number("store_bytes", store_bytes, 0)
        self._memory_bytes = whole_number("memory_bytes", memory_bytes, 0)
        self._share_bytes = checked_bytes(share_bytes)

    @property
    def identity(self) -> str:
        """Settings that scores depend on."""
        settings = f"{self._method}, bn={self._bn}, bias={self._bias}, damping={self._damping:g}"
        return f"Masked({settings}{', sequential' if self._sequential else ''})"

    def prepare(self, context: Context) -> None:
        """Observe the dense model, make the options of every weight, and the skeleton that candidates are cut from."""
        structure, space = context.structure, context.space
        self._context = context
        last = space.widths(space.canonical(space.sizes[None] - 1))[0]
        loses_units = bool((last != structure.dense[: len(last)]).any())
        self._refit = Compensated(self._bn, self._bias, least_squares=loses_units)
        self._refit.collect(context)
        self._solver: Solver | None = None
        self._database = self._built(context)
        self._sliced: OrderedDict[bytes, Tensor] = OrderedDict()
        self._sliced_bytes = 0
        # A pass of a network that is half done must not serve other candidates.
        share_bytes = 0 if self._sequential else self._share_bytes
        self._adapted = Adapted(context, self.adapt, share_bytes=share_bytes, zeroed=self._database.tables)

    def solver(self) -> Solver:
        """Equations of what weights read; the dense model runs on the calibration samples if it has not yet."""
        if self._solver is None:
            context = self._context
            space = context.space
            names = space.zeroed_weights if isinstance(space, SetsZeros) else tuple(context.structure.weights)
            samples = affordable(context.structure, FEWEST_SAMPLES, MOST_SAMPLES)
            observed = observe_weights(context.calibration, names, samples, self._memory_bytes)
            self._solver = Solver(context.model, observed, self._method, self._damping, self._bn, self._bias)
        return self._solver

    def _built(self, context: Context) -> ZeroDatabase:
        choices = choices_of(context)
        sizes = {name: context.model.get_parameter(name).nbytes for name in choices}
        identity = ""
        if self._folder is not None:
            state = context.model.state_dict()
            settings = [self._method, self._damping, self._bn, self._bias]
            identity = fingerprint([state, list(context.subsets.calibration), *settings])
        store_bytes = 0 if self._sequential else self._store_bytes
        return build_tables(self.solver, choices, sizes, self._folder, identity, self._store, store_bytes)

    @property
    def database(self) -> ZeroDatabase:
        """Prices and weights of all options; after `prepare`."""
        return self._database

    def expected_losses(self) -> tuple[FloatArray, ...] | None:
        """Expected loss of every option of every dimension alone, as a prior; None where some have none."""
        return losses_of_options(self._context.space, self._database.tables)

    def order(self, candidates: IntArray) -> IntArray:
        """Return the order of evaluation in which candidates share most."""
        return self._adapted.order(candidates)

    def rest(self) -> None:
        """Free the memory of the latest candidate."""
        self._adapted.rest()

    def release(self) -> None:
        """Forget what candidates share."""
        self._adapted.release()
        self._sliced.clear()
        self._sliced_bytes = 0

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Score candidates on validation batches."""
        return self._adapted.evaluate(candidates, chunk)

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a candidate on the held-out samples."""
        return self._adapted.test(candidate)

    def build(self, candidate: IntArray) -> nn.Module:
        """A plain module with the weights, biases and statistics that were scored."""
        return self._adapted.build(candidate)

    def adapt(self, module: nn.Module, edit: Edit, run: Callable[[Batch], object]) -> None:
        """Give weights their zeros and values in place, then correct what follows from them."""
        if self._sequential:
            self._adapt_in_order(module, edit, run)
            return
        for name, zeros in edit.zeroed.items():
            if name in self._database.tables:
                choice = edit.patterns.get(name, UNSTRUCTURED), zeros
                slices = edit.slices.get(name)
                made = self._made(name, choice, slices) if slices else self._database.weight(name, choice)
                dense = self._context.model.get_parameter(name)
                replace_parameter(module, name, made.to(dense).clone())
                if self._bias and name not in self._refit.shifted:
                    self._shift(module, name, edit)
        self._refit.adapt(module, edit, run)

    def _adapt_in_order(self, module: nn.Module, edit: Edit, run: Callable[[Batch], object]) -> None:
        context = self._context
        if edit.slices or edit.dropped:
            self._refit.with_parts(bn=False).adapt(module, replace(edit, zeroed={}), run)
        dense = context.calibration.of(private_copy(context.model))
        solver = self.solver()
        own = replace(edit, zeroed={name: zeros for name, zeros in edit.zeroed.items() if name in solver})
        in_order = Sequential(dense, solver, replace_parameter)
        in_order.apply(module, own, run, lambda seen: self._refit.through(module, edit, seen))
        self._refit.with_parts(bias=False, least_squares=False).adapt(module, edit, run)

    def _shift(self, module: nn.Module, name: str, edit: Edit) -> None:
        """Correct the bias of a weight that reads no units, which `Compensated` does not know."""
        for each in self.solver().observed[name]:
            if each.bias is not None and not (self._bn and each.normalised):
                value = shift_bias(module, self._context.model, edit, each.reader, each.bias, each.moments.mean)
                replace_parameter(module, each.bias, value)

    def _made(self, name: str, choice: Choice, slices: Mapping[int, IntArray]) -> Tensor:
        """The weight of a layer that lost units; the latest ones are kept."""
        key = repr((name, choice, [(dim, index.tobytes()) for dim, index in sorted(slices.items())])).encode()
        if key not in self._sliced:
            made = self.solver().solve(name, Pattern.parse(choice[0]), choice[1], slices)
            self._sliced[key] = made
            self._sliced_bytes += made.nbytes
            while self._sliced_bytes > SLICED_BYTES and len(self._sliced) > 1:
                self._sliced_bytes -= self._sliced.popitem(last=False)[1].nbytes
        self._sliced.move_to_end(key)
        return self._sliced[key]


def choices_of(context: Context) -> dict[str, list[Choice]]:
    """Pattern and number of zeros of each option that sets elements of a weight to zero, in the dense widths."""
    space = context.space
    found: dict[str, list[Choice]] = {}
    for j, size in enumerate(space.sizes.tolist()):
        for option in range(1, size):
            candidate = np.zeros(len(space.sizes), dtype=np.int64)
            candidate[j] = option
            pruning = space.pruning(candidate.tolist())
            for name, zeros in pruning.zeroed.items():
                own = found.setdefault(name, [])
                choice = pruning.patterns.get(name, UNSTRUCTURED), zeros
                if choice not in own:
                    own.append(choice)
    return found
