"""A pruned model is an ordinary module: compiled, data-parallel, in mixed precision, checkpointed and quantised."""

import copy
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint_sequential

import autoprune
from autoprune.errors import UnsupportedModelError
from tests.recovering import halved, network, samples, weights


@pytest.fixture
def small():
    return halved(network())


def gradients(module, x, y):
    module.zero_grad()
    nn.functional.cross_entropy(module(x), y).backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


def in_a_group(rank, count, file):
    """Train one step on a share of the samples as one of `count` processes; all end with the same weights."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count)
    try:
        module = halved(network(norm=False))
        x, y = samples(network(norm=False), 16)
        alone = gradients(copy.deepcopy(module), x, y)
        parallel = DistributedDataParallel(module)
        found = gradients(parallel, x[rank::count], y[rank::count])
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other)
        receipt = autoprune.recover(parallel, samples(network(norm=False)), steps=2)
        assert receipt.steps == 2
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_it_compiles_and_computes_the_same(small, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is no g++ here")
    x, _ = samples(network())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own compiler
        compiled = torch.compile(small, backend=backend)
        torch.testing.assert_close(compiled(x), small(x))
    before = weights(small)
    autoprune.recover(compiled, samples(network()), steps=2)
    assert not torch.equal(before["0.weight"], small[0].weight)
    torch._dynamo.reset()


def test_it_trains_data_parallel_in_one_process(tmp_path):
    in_a_group(0, 1, tmp_path / "group")


@pytest.mark.slow
def test_it_trains_data_parallel_in_two_processes(tmp_path):
    spawn(in_a_group, (2, tmp_path / "group"), nprocs=2)


def test_it_runs_in_mixed_precision_and_recovers_in_it(small):
    x, y = samples(network())
    with torch.autocast("cpu", torch.bfloat16):
        outputs = small(x)
        loss = nn.functional.cross_entropy(outputs, y)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), small(x), rtol=0.1, atol=0.1)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in small.parameters())
    receipt = autoprune.recover(small, (x, y), network(), steps=2, recipe=autoprune.Recovery(mixed_precision=True))
    assert receipt.stopped == ""


def test_gradients_through_checkpoints_are_the_same(small):
    x, y = samples(network())
    expected = gradients(small, x, y)
    found = gradients(recomputed(small), x, y)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def recomputed(small):
    """The network with its activations recomputed in the backward pass."""

    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = small

        def forward(self, x):
            return checkpoint_sequential(self.small, 2, x, use_reentrant=False)

    return Recomputed()


def test_its_linear_layers_are_quantised_to_int8(small):
    x, _ = samples(network())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to move to torchao, where the same works
        quantised = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, torch.qint8)
        outputs = quantised(x)
    assert "DynamicQuantizedLinear" in repr(quantised)
    torch.testing.assert_close(outputs, small(x), rtol=0.1, atol=0.1)
    assert not torch.equal(outputs, small(x))


def test_a_quantised_model_is_refused_by_name_where_it_would_be_trained(small):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, torch.qint8)
    with pytest.raises(UnsupportedModelError, match="must not be quantised"):
        autoprune.recover(quantised, samples(network()), steps=2)
