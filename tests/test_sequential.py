"""Weights solved layer after layer: equal to a computation by hand, and no worse than weights for dense inputs."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.evaluators import Context, Evaluator, Masked
from autoprune.evaluators.refit.sequential import stages_of
from autoprune.search_spaces import Channels, Depth, Product, Sparsity
from autoprune.structure.slicing.zeros import Pattern
from autoprune.testing.contexts import context_of, image_context, sequence_context
from autoprune.testing.contracts import EvaluatorContract

DAMPING = 1e-2


class TestSequential(EvaluatorContract):
    def make_evaluator(self) -> Evaluator:
        return Masked(sequential=True)

    def make_context(self) -> Context:
        return image_context(Sparsity(levels=(0, 0.5, 0.8), patterns=("unstructured", "2:4")))


class TestSequentialInAProduct(EvaluatorContract):
    def make_evaluator(self) -> Evaluator:
        return Masked("sparsegpt", sequential=True)

    def make_context(self) -> Context:
        return sequence_context(Product(Channels(), Sparsity(levels=(0, 0.5, 0.8))), "agreement")


def built(context: Context, level: int | list[int] = -1, **settings: object) -> nn.Module:
    evaluator = Masked(**settings)  # type: ignore[arg-type]  # settings by name
    evaluator.prepare(context)
    candidate = np.broadcast_to(np.array(level), len(context.space.sizes)) % context.space.sizes
    return evaluator.build(context.space.canonical(candidate[None])[0]).eval()


def samples(context: Context) -> Tensor:
    return torch.cat([batch[0] for batch in context.subsets.calibration])


def by_hand(dense: nn.Linear, inputs: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares towards what the layer gives for clean inputs: rows for the damping are added to the system."""
    wanted = clean.double() @ dense.weight.double().T
    x = inputs.double() - inputs.double().mean(0)
    damping = (DAMPING * x.square().mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    system = torch.cat([x / len(x) ** 0.5, damping])
    right = torch.cat([(wanted - wanted.mean(0)) / len(x) ** 0.5, damping @ dense.weight.double().T])
    return torch.linalg.lstsq(system, right).solution.T, wanted.mean(0) + dense.bias.double()


@pytest.fixture(scope="module")
def mlp() -> Context:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    x = 1 + torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(x).argmax(1)
    return context_of(model, (x, labels), Sparsity(levels=(0, 0.5)), "agreement")


class TestAnMlp:
    def test_weights_are_those_of_a_computation_by_hand(self, mlp: Context):
        """With masks by magnitude: of the weight that fits the dense outputs best, on inputs of the layers before."""
        model = mlp.model
        found = built(mlp, method="magnitude", sequential=True)
        clean = inputs = samples(mlp)
        with torch.no_grad():
            for i in (0, 2, 4):
                dense = model.get_submodule(str(i))
                weight, mean = by_hand(dense, inputs, clean)
                expected = weight.masked_fill(
                    Pattern.parse("unstructured").mask(weight.square(), weight.numel() // 2), 0
                )
                own = found.get_submodule(str(i))
                torch.testing.assert_close(own.weight.double(), expected, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(own(inputs).double().mean(0), mean, rtol=1e-4, atol=1e-5)
                clean, inputs = dense(clean).relu(), own(inputs).relu()

    def test_a_layer_that_stays_dense_is_left_alone(self, mlp: Context):
        found = built(mlp, [1, 0, 1], sequential=True)
        for key, own in found.get_submodule("2").state_dict().items():
            assert torch.equal(own, mlp.model.state_dict()[f"2.{key}"])

    def test_outputs_are_nearer_to_the_dense_ones(self, mlp: Context):
        x = samples(mlp)
        with torch.no_grad():
            near, far = ((built(mlp, sequential=order)(x) - mlp.model(x)).square().mean() for order in (True, False))
        assert near < far


class Block(nn.Module):
    """Attention by hand between residual connections, then a feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.query(y), self.key(y), self.value(y)
        x = x + self.out((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)
        return x + self.down(self.up(x).relu())


@pytest.fixture(scope="module")
def transformer() -> Context:
    torch.manual_seed(0)
    model = nn.Sequential(Block(16), Block(16), nn.Linear(16, 6)).eval()
    x = torch.randn(96, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(x).argmax(-1)
    return context_of(model, (x, labels), Sparsity(levels=(0, 0.5)), "agreement")


class TestATransformer:
    def test_weights_that_read_the_same_are_solved_together(self, transformer: Context):
        evaluator = Masked(sequential=True)
        evaluator.prepare(transformer)
        stages = [[name.removesuffix(".weight") for name in stage] for stage in stages_of(evaluator.solver().observed)]
        assert stages == [
            ["0.query", "0.key", "0.value"],
            ["0.out"],
            ["0.up"],
            ["0.down"],
            ["1.query", "1.key", "1.value"],
            ["1.out"],
            ["1.up"],
            ["1.down"],
            ["2"],
        ]

    def test_weights_are_those_of_a_computation_by_hand(self, transformer: Context):
        """A network is built up: each layer in turn, on what reads of it a hook sees in both networks."""
        found = built(transformer, method="magnitude", sequential=True)
        now = copy.deepcopy(transformer.model)
        x = samples(transformer)
        parts = ("query", "key", "value", "out", "up", "down")
        with torch.no_grad():
            for name in [*(f"{i}.{part}" for i in (0, 1) for part in parts), "2"]:
                taken = [_read(network, name, x) for network in (now, transformer.model)]
                dense = transformer.model.get_submodule(name)
                weight, mean = by_hand(dense, *taken)
                expected = weight.masked_fill(
                    Pattern.parse("unstructured").mask(weight.square(), weight.numel() // 2), 0
                )
                own = found.get_submodule(name)
                torch.testing.assert_close(own.weight.double(), expected, rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(own(taken[0]).double().mean(0), mean, rtol=1e-3, atol=1e-5)
                now.get_submodule(name).load_state_dict(own.state_dict())

    def test_outputs_are_nearer_to_the_dense_ones(self, transformer: Context):
        x = samples(transformer)
        with torch.no_grad():
            near, far = (
                (built(transformer, sequential=order)(x) - transformer.model(x)).square().mean()
                for order in (True, False)
            )
        assert near < far


def test_parts_that_are_dropped_are_passed_over(transformer: Context):
    x, labels = (torch.cat([batch[i] for batch in transformer.subsets.calibration]) for i in (0, 1))
    space = Product(Depth(), Sparsity(levels=(0, 0.5)))
    context = context_of(transformer.model, (x, labels), space, "agreement")
    first = [
        int(bool(context.space.pruning(row).dropped)) for row in np.eye(len(context.space.sizes), dtype=int).tolist()
    ]
    candidate = np.ones(len(first), dtype=int) - np.array(first)
    candidate[first.index(1)] = 1
    candidate = context.space.canonical(candidate[None])[0]
    module = built(context, candidate.tolist(), sequential=True)
    pruning = context.space.pruning(candidate.tolist())
    assert pruning.dropped
    assert len(pruning.zeroed) > 3
    for name, zeros in pruning.zeroed.items():
        assert int((module.get_parameter(name) == 0).sum()) == zeros
    assert module(x).isfinite().all()


def _read(network: nn.Module, name: str, x: Tensor) -> Tensor:
    """Rows that a layer reads."""
    taken: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    network(x)
    handle.remove()
    return taken[0].flatten(0, -2)


class TestConvolutions:
    def test_batch_norms_follow(self):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 5))
        x = torch.randn(128, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model(x)  # statistics
            labels = model.eval()(x).argmax(1)
        context = context_of(model, (x, labels), Sparsity(levels=(0, 0.7)), "agreement")
        inputs = samples(context)
        with torch.no_grad():
            near, far = (
                (built(context, sequential=order)(inputs) - model(inputs)).square().mean() for order in (True, False)
            )
            found = built(context, sequential=True)
            first = found[1](found[0](inputs))
            torch.testing.assert_close(
                first.mean((0, 2, 3)), model[1](model[0](inputs)).mean((0, 2, 3)), atol=1e-4, rtol=0
            )
        assert near < far

    def test_units_that_are_gone_are_made_up_for(self):
        context = image_context(Product(Channels(step=0.5), Sparsity(levels=(0, 0.5))))
        inputs = samples(context)
        with torch.no_grad():
            near, far = (
                (built(context, 1, sequential=order)(inputs) - context.model(inputs)).square().mean()
                for order in (True, False)
            )
        assert near < far


def test_the_setting_is_checked_and_is_part_of_the_identity():
    with pytest.raises(ValueError, match="sequential must be"):
        Masked(sequential=1)  # type: ignore[arg-type]  # refused
    assert Masked(sequential=True).identity != Masked().identity
    assert pickle.loads(pickle.dumps(Masked(sequential=True))).identity == Masked(sequential=True).identity
