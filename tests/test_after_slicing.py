"""A built model is an ordinary module: it trains, compiles, copies, saves and changes type as the dense one did."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import autoprune
from autoprune.protocols import Pruning
from autoprune.result.recipe import attach
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from tests.candidates import random_pruning, storages
from zoo import ZOO
from zoo.hf import HF_ZOO
from zoo.outputs import leaves
from zoo.tasks import TASK_ZOO

pytestmark = pytest.mark.slow

IMAGES = ("vgg_bn", "mobilenet_v2", "resnext", "unet")
TRANSFORMERS = ("BertForSequenceClassification", "LlamaForCausalLM", "GPT2LMHeadModel")
ENCODER = "transformer_classifier"
NAMES = (*IMAGES, *TRANSFORMERS, ENCODER, "lstm_forecaster")
EVERY = pytest.mark.parametrize("name", NAMES)


@dataclass(frozen=True)
class Known:
    """A dense network with its structure and a random pruning, shared: `built` makes a pruned one to play with."""

    make: Callable[[], nn.Module]
    model: nn.Module
    inputs: Any
    run: Callable[[nn.Module], Any]
    structure: Structure
    pruning: Pruning

    def built(self) -> nn.Module:
        module = self.structure.build(self.model, self.pruning)
        return attach(module, self.structure.edit(self.pruning), self.model)


@cache
def known(name: str) -> Known:
    entry = (ZOO | HF_ZOO | TASK_ZOO)[name]
    key, inputs = getattr(entry, "outputs", None), entry.inputs()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})

    def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = model(*args, **kwargs)
        return made if key is None else made[key]

    model = entry.build()
    structure = analyse(Example(model, args, kwargs, forward=forward))
    pruning = random_pruning(structure, np.random.default_rng(1))
    assert structure.edit(pruning).slices
    return Known(entry.build, model, inputs, lambda m: forward(m, *args, **kwargs), structure, pruning)


def evaluate(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[Tensor]:
    with torch.no_grad():
        return leaves(run(model.eval()))


def loss_of(outputs: Any) -> Tensor:
    """Mean squared distance to a fixed draw."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack(
        [(out.float() - torch.randn(out.shape, generator=generator)).square().mean() for out in leaves(outputs)]
    ).sum()


def gradients(model: nn.Module, forward: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Gradients of one pass in training mode, with the same dropout each time."""
    model.train().zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss_of(forward(model)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert_same(list(found.values()), list(expected.values()), 1e-5)


@EVERY
def test_training_reaches_every_parameter_and_reduces_the_loss(name: str):
    case = known(name)
    model = case.built()
    before = loss_of(evaluate(model, case.run)).item()
    found = gradients(model, case.run)
    assert found.keys() == dict(model.named_parameters()).keys() - set(case.structure.untouched)
    assert all(gradient.isfinite().all() for gradient in found.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        gradients(model, case.run)
        optimizer.step()
    assert loss_of(evaluate(model, case.run)).item() < before


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@EVERY
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_gives_the_same_gradients(name: str):
    case = known(name)
    expected = gradients(case.built(), case.run)
    wrapped = DistributedDataParallel(case.built())
    gradients(wrapped, case.run)
    found = gradients(wrapped, case.run)  # the second pass fails where the first missed a parameter
    assert_same_gradients({name.removeprefix("module."): gradient for name, gradient in found.items()}, expected)


@pytest.mark.slow
@EVERY
def test_compiled_models_agree(name: str):
    case = known(name)
    model = case.built()
    expected = evaluate(model, case.run)
    torch._dynamo.reset()
    assert_same(evaluate(torch.compile(model, backend="eager"), case.run), expected, 1e-5)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@EVERY
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_equal_trains_and_shares_nothing(name: str, again: Callable[[nn.Module], nn.Module]):
    case = known(name)
    model = case.built()
    copied = again(model)
    assert type(copied) is type(model)
    assert storages(copied).isdisjoint(storages(model))
    assert_same(evaluate(copied, case.run), evaluate(model, case.run))
    assert_same_gradients(gradients(copied, case.run), gradients(model, case.run))


def sizes_in_python(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Classes, and the integers of modules and of their configurations."""
    found: dict[tuple[str, str], Any] = {(name, ""): type(module) for name, module in model.named_modules()}
    for name, module in model.named_modules():
        for holder, prefix in ((module, ""), (getattr(module, "config", None), "config.")):
            values = vars(holder).items() if holder is not None else ()
            found |= {(name, prefix + key): value for key, value in values if type(value) in (int, tuple)}
    return found


@EVERY
def test_a_saved_model_loads_into_a_fresh_one_with_the_sizes_it_keeps_in_python(name: str, tmp_path: Any):
    case = known(name)
    model, fresh = case.built(), case.make()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(0.5)
    autoprune.save(model, tmp_path / "small.safetensors")
    loaded = autoprune.load(tmp_path / "small.safetensors", fresh)
    assert sizes_in_python(loaded) == sizes_in_python(model)
    assert_same(evaluate(loaded, case.run), evaluate(model, case.run))


@EVERY
def test_a_state_dict_goes_into_another_built_model(name: str):
    case = known(name)
    model, other = case.built(), case.built()
    expected = evaluate(model, case.run)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(model.state_dict())
    assert_same(evaluate(other, case.run), expected)


def checkpointed(case: Known) -> Callable[[nn.Module], Any]:
    return lambda model: checkpoint(case.run, model, use_reentrant=False)


@EVERY
def test_gradient_checkpointing_gives_the_same_gradients(name: str):
    case = known(name)
    assert_same_gradients(gradients(case.built(), checkpointed(case)), gradients(case.built(), case.run))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_gradient_checkpointing_of_transformers_gives_the_same_gradients(name: str):
    case = known(name)
    model = case.built()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert_same_gradients(gradients(model, case.run), gradients(case.built(), case.run))


@EVERY
def test_autocast_stays_close_and_trains(name: str):
    case = known(name)
    expected = evaluate(case.built(), case.run)

    def run(model: nn.Module) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return case.run(model)

    try:
        evaluate(case.model, run)
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        pytest.skip(f"this processor cannot run the dense network in bfloat16: {error}"[:160])
    assert_same(evaluate(case.built(), run), expected, 0.1)
    assert all(gradient.isfinite().all() for gradient in gradients(case.built(), run).values())


@EVERY
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.15)], ids=str
)
def test_other_types_stay_close(name: str, dtype: torch.dtype, tolerance: float):
    case = known(name)
    expected = evaluate(case.built(), case.run)
    converted = case.built().to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in leaves(case.inputs)]
    named = dict(zip(case.inputs, inputs, strict=True)) if isinstance(case.inputs, dict) else None
    made = evaluate(converted, lambda model: model(*inputs) if named is None else model(**named)["logits"])
    assert all(out.dtype == dtype for out in made)
    assert_same(made, expected, tolerance)


@EVERY
def test_switching_between_training_and_evaluation_changes_nothing_in_evaluation(name: str):
    case = known(name)
    model = case.built()
    assert not any(module.training for module in model.modules())
    expected = evaluate(model, case.run)
    model.train()
    assert all(module.training for module in model.modules())
    assert_same(evaluate(model, case.run), expected)


@pytest.mark.parametrize("name", IMAGES)
def test_channels_last_gives_the_same_outputs_and_gradients(name: str):
    case = known(name)
    moved = case.built().to(memory_format=torch.channels_last)
    image = case.inputs[0].to(memory_format=torch.channels_last)
    assert_same(evaluate(moved, lambda model: model(image)), evaluate(case.built(), case.run), 1e-5)
    assert_same_gradients(gradients(moved, lambda model: model(image)), gradients(case.built(), case.run))


ENCODED = {"feed": ("linear1",), "heads": ("self_attn",), "all": ("",)}
"""Groups that lose units, by a part of their names."""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("pruned", ENCODED)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_the_fast_path_of_transformer_encoders_gives_what_the_slow_path_gives(first: bool, pruned: str, padded: bool):
    model, structure = encoder(first)
    tokens = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if padded else None
    groups = [group for group in structure.groups if any(part in group.name for part in ENCODED[pruned])]
    kept = {group.name: tuple(range(1, group.size)) for group in groups}
    assert len(kept) >= 2
    built = structure.build(model, Pruning(kept))
    slow = built(tokens, src_key_padding_mask=mask)  # gradients are wanted, which the fast path cannot give
    with torch.no_grad(), patch("torch._transformer_encoder_layer_fwd", wraps=FUSED) as fused:
        fast = built(tokens, src_key_padding_mask=mask)
    assert fused.called == (pruned == "feed")  # the fused kernel wants heads that fill the width
    alive = slice(None) if mask is None else ~mask  # nested tensors give zeros for padding
    assert_same([fast[alive]], [slow[alive].detach()], 1e-5)


FUSED = torch._transformer_encoder_layer_fwd


@cache
def encoder(first: bool) -> tuple[nn.Module, Structure]:
    """Two layers with nested tensors where PyTorch has them, and their structure."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True, norm_first=first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not first).eval()
        with torch.no_grad():  # layers begin as copies of one
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, analyse(Example(model, (torch.randn(2, 6, 24),)))
