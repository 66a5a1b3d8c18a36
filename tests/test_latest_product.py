"""Matrix products are computed only when another operation follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.evaluators.refit.finding import find_layers
from autoprune.importance import latest_product
from autoprune.importance.calibration import Calibration
from autoprune.importance.latest_product import LatestProduct
from autoprune.importance.reading import Reading
from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example


@pytest.fixture(autouse=True)
def _any_product_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest_product, "LEAST", 0)


X = torch.linspace(-1, 1, 12).reshape(3, 4)
W = torch.linspace(2, -3, 20).reshape(4, 5)


class Waiting(TorchDispatchMode):
    """Runs every operation through a `LatestProduct`."""

    latest = LatestProduct()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.latest.run(func, args, kwargs or {})


class Products(TorchDispatchMode):
    """Notes the sizes of the weights of all products that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.append(tuple(args[-1].shape))
        return func(*args, **(kwargs or {}))


def changed_inputs(x: Tensor) -> Tensor:
    product = x @ W
    x.add_(1)
    return product + x.sum()


def views(x: Tensor) -> Tensor:
    product = (x @ W).T[1:]
    return product.reshape(-1).cumsum(0)


def in_place(x: Tensor) -> Tensor:
    product = x @ W
    part = product[:, 1:3]
    part.mul_(3)
    return product + 0


def with_bias(x: Tensor) -> Tensor:
    return torch.addmm(torch.ones(5), x, W, beta=2.0, alpha=0.5).exp()


def one_after_another(x: Tensor) -> Tensor:
    return F.linear(x.view(1, 3, 4), W.T.contiguous()) @ torch.ones(5, 2) - 1


def as_a_number(x: Tensor) -> Tensor:
    return torch.tensor((x @ W)[0, 0].item())


CASES = [changed_inputs, views, in_place, with_bias, one_after_another, as_a_number]


@pytest.mark.parametrize("compute", CASES)
def test_whatever_reads_a_product_gets_its_values(compute: Any):
    expected = compute(X.clone())
    with torch.no_grad(), Waiting():
        found = compute(X.clone())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Tagger(nn.Module):
    def __init__(self, capped: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 50, bias=False)
        self.capped = capped

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x + self.outer(self.inner(x).relu()))
        return logits.tanh() if self.capped else logits


@pytest.mark.parametrize("capped", [False, True])
def test_a_pass_for_what_layers_read_does_not_compute_logits(capped: bool):
    torch.manual_seed(0)
    model, x = Tagger(capped).eval(), torch.randn(4, 3, 6)
    structure = analyse(Example(model, (x,)))
    calibration = Calibration(model, structure, [x], lambda module, batch: module(batch))
    with Products() as products:
        layers = find_layers(calibration, 2**20, 1e-2, structure.edit(Pruning()), lambda layer: False)
    assert (8, 6) in products.seen
    assert ((6, 50) in products.seen) == capped
    moments = {layer.reader.name: layer.moments for layer in layers}
    hidden = model.inner(x).relu().detach().double().flatten(0, 1)
    torch.testing.assert_close(moments["outer.weight"].products(False), hidden.T @ hidden / 12)


def test_outputs_of_a_pass_with_gradients_have_their_values():
    torch.manual_seed(0)
    model, x = Tagger(False).eval(), torch.randn(4, 3, 6)
    structure = analyse(Example(model, (x,)))
    reading = Reading(model, structure, lambda reader, rows: None)
    with reading.batch(None, gradients=True):
        outputs = model(x)
    torch.testing.assert_close(outputs, model(x), rtol=0, atol=0)


@pytest.mark.parametrize("read", [Tensor.tolist, Tensor.numpy], ids=["list", "array"])
def test_a_small_product_can_be_read_past_all_operations(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with Waiting():
        found = read((X @ W).detach())
    torch.testing.assert_close(torch.as_tensor(found), X @ W)
