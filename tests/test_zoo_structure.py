"""Every network of the zoo: what must be prunable is, and what is built is right by independent answers."""

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoprune.costs import StructuralCosts
from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from tests.candidates import gap, oracle_outputs, outputs_of, random_pruning, state_of, storages, widths_of
from tests.oracle import count_macs, count_params
from zoo import ZOO

EVERY = pytest.mark.parametrize("name", ZOO)
CANDIDATES = 20

ENDS = {
    "two_inputs": {("image.0.0.weight", 1): 3, ("vector.0.weight", 1): 6, ("head.weight", 0): 5},
    "detector": {("fine.0.0.weight", 1): 3, ("classes.1.weight", 0): 4, ("boxes.1.weight", 0): 4},
    "tied_autoencoder": {("encoder.0.weight", 1): 3},  # one weight reads the input and makes the output
}
"""Networks in which more than the first layer reads the input, or more than the last one makes the output."""

# A zero-padded shortcut adds a constant number of zero channels, so as many of what it is added to stay.
PADDED = {(f"stages.1.{block}.conv2.weight", 0): 8 for block in range(3)}
PADDED |= {(f"stages.{reader}.conv1.weight", 1): 8 for reader in ("1.1", "1.2", "2.0")}
PADDED |= {(f"stages.2.{block}.conv2.weight", 0): 8 + 16 for block in range(3)}
PADDED |= {(f"stages.{reader}.conv1.weight", 1): 8 + 16 for reader in ("2.1", "2.2")}
PADDED |= {("fc.weight", 1): 8 + 16}
BESIDES = {"resnet20_padded": PADDED}
"""Other frozen parts and their sizes; there are none in any other network."""


@dataclass(frozen=True)
class Analysed:
    """A network with its structure, shared by all tests; in evaluation mode, after it was analysed in training mode.

    Attributes:
        before: All of its state, and that of its inputs and of the global random generators.
        after: The same once the structure is known and a pruned model has been built.
    """

    model: nn.Module
    args: tuple[Tensor, ...]
    structure: Structure
    before: Any
    after: Any


@cache
def analysed(name: str) -> Analysed:
    model, args = ZOO[name].build().train(), ZOO[name].inputs()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda module, inputs, output: None)

    def state() -> tuple[Any, ...]:
        generators = torch.get_rng_state().tolist(), str(np.random.get_state(legacy=False)), random.getstate()  # noqa: NPY002
        return state_of(model), [arg.tolist() for arg in args], generators

    before = state()
    structure = analyse(Example(model, args), checks="strict")
    built = structure.build(model, random_pruning(structure, np.random.default_rng(0)))
    assert built.training
    after = state()
    return Analysed(model.eval(), args, structure, before, after)


@cache
def candidates(name: str) -> list[Pruning]:
    structure = analysed(name).structure
    rng = np.random.default_rng(7)
    return [random_pruning(structure, rng) for _ in range(CANDIDATES)]


def contractions(model: nn.Module) -> list[tuple[str, _ConvNd | nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _ConvNd | nn.Linear)]


@pytest.mark.slow
@EVERY
def test_only_what_reads_the_input_or_makes_the_output_stays(name: str):
    model, structure = analysed(name).model, analysed(name).structure
    layers = contractions(model)
    (first, reader), (last, head) = layers[0], layers[-1]
    ends = ENDS.get(name, {(f"{first}.weight", 1): reader.weight.shape[1], (f"{last}.weight", 0): head.weight.shape[0]})
    stays = {}
    for layer, module in layers:
        tensor = f"{layer}.weight"
        if tensor not in dict(model.named_parameters()):
            continue  # tied: it has another name
        for dim in range(2):
            size = module.weight.shape[dim]
            units = structure.units_of.get(tensor, (None,) * module.weight.ndim)[dim]
            fixed = size if units is None else int((units < 0).sum())
            if fixed and size > 1:  # a dimension of one index is the single channel of a depthwise kernel
                stays[tensor, dim] = fixed
    assert stays == {key: size for key, size in (ends | BESIDES.get(name, {})).items() if size > 1}
    if "core" in ZOO[name].tags:
        assert name not in BESIDES
    reported: Counter[tuple[str, int]] = Counter()
    for frozen in structure.frozen:
        assert frozen.reason
        reported[frozen.tensor, frozen.dim] += frozen.size
    assert {key: reported[key] for key in stays} == stays
    assert structure.untouched == ()


@pytest.mark.slow
@EVERY
def test_random_candidates_train_cost_what_was_predicted_and_equal_the_masked_dense_model(name: str):
    known = analysed(name)
    model, args, structure = known.model, known.args, known.structure
    prunings, batch = candidates(name), len(args[0])
    costs = StructuralCosts(structure)
    flops, params = (cost(widths_of(structure, prunings)) for cost in (costs.flops, costs.params))
    for i, pruning in enumerate(prunings):
        built = structure.build(model, pruning)
        assert not built.training
        assert gap(outputs_of(built, args), oracle_outputs(model, structure.edit(pruning), args)) <= 1e-5
        assert flops[i] * batch == count_macs(built, args)
        assert params[i] == count_params(built)
        assert storages(built).isdisjoint(storages(model))
        assert_trains(built, args)


def assert_trains(model: nn.Module, args: tuple[Any, ...]) -> None:
    outputs = [leaf for leaf in tree_leaves(model.train()(*args)) if isinstance(leaf, Tensor)]
    sum(out.square().mean() for out in outputs).backward()
    assert all(out.isfinite().all() for out in outputs)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@EVERY
def test_removing_units_changes_the_outputs_so_that_agreement_with_the_oracle_means_something(name: str):
    known = analysed(name)
    model, args, structure = known.model, known.args, known.structure
    dense = outputs_of(model, args)
    pruned = [pruning for pruning in candidates(name) if structure.edit(pruning).slices][:3]
    assert all(gap(outputs_of(structure.build(model, pruning), args), dense) > 1e-3 for pruning in pruned)
    assert len(pruned) == 3


@EVERY
def test_the_dense_candidate_is_bit_identical_and_shares_nothing(name: str):
    known = analysed(name)
    model, args, structure = known.model, known.args, known.structure
    whole = Pruning({group.name: tuple(range(group.size)) for group in structure.groups})
    for pruning in (Pruning(), whole):
        built = structure.build(model, pruning)
        assert repr(built) == repr(model)
        assert all(torch.equal(a, b) for a, b in zip(outputs_of(built, args), outputs_of(model, args), strict=True))
        pairs = zip(built.state_dict().items(), model.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
        assert storages(built).isdisjoint(storages(model))


@EVERY
def test_the_model_its_inputs_and_the_random_states_come_back_unchanged(name: str):
    assert analysed(name).after == analysed(name).before


class LiveBytes(TorchDispatchMode):
    """Most bytes of storages alive while an operation runs, counted on a real forward pass."""

    def __init__(self, args: tuple[Tensor, ...], model: nn.Module):
        super().__init__()
        self.state = storages(model)
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        for tensor in args:
            self.see(tensor)

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self.state:
            self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@EVERY
def test_memory_equals_what_is_alive_at_the_peak_of_a_real_forward(name: str):
    known = analysed(name)
    model, args, structure = known.model, known.args, known.structure
    prunings = [Pruning(), *candidates(name)[:3]]
    predicted = StructuralCosts(structure, batch=len(args[0])).memory_bytes(widths_of(structure, prunings))
    for pruning, expected in zip(prunings, predicted, strict=True):
        built = structure.build(model, pruning)
        with torch.no_grad(), LiveBytes(args, built) as counter:
            built(*args)
        state = sum(tensor.numel() * tensor.element_size() for tensor in (*built.parameters(), *built.buffers()))
        assert counter.peak + state == expected
