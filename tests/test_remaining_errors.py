"""Errors that a re-fit leaves, against least squares by NumPy, and the prior that they make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.evaluators import Compensated, Context
from autoprune.evaluators.refit import remaining
from autoprune.search_spaces import Channels, Depth, Product
from autoprune.testing.contexts import study_for
from tests.residual import Residual


def network(transposed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.ConvTranspose2d(6, 5, 1) if transposed else nn.Conv2d(6, 5, 1, bias=False)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), middle, nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).eval()  # fmt: skip


def images(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, 6, 6, generator=generator), torch.arange(samples) % 2


def context(model: nn.Module, space: object = "channels", budget: str = "flops <= 50%") -> Context:
    data = autoprune.Data(images(40), images(40), images(8))
    return study_for(model, budget, data, space=space, evaluator="compensated").context


def prepared(given: Context, ridge: float | None = None) -> Compensated:
    evaluator = Compensated(ridge=ridge)
    evaluator.prepare(given)
    return evaluator


def outputs_left(given: Context, name: str, columns: list[int], ridge: float) -> float:
    """Error of a layer fitted to the columns that stay, about the mean, and the penalty, relative to its energy."""
    seen: list[Tensor] = []
    layer = given.model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].movedim(1, -1).flatten(0, -2)))
    with torch.no_grad():
        for batch in given.subsets.calibration:
            given.model(batch[0])
    hook.remove()
    rows = torch.cat(seen).double().numpy()
    rows = (rows - rows.mean(0)) / np.sqrt(len(rows))
    weight = layer.get_parameter("weight").detach().double().flatten(1).numpy()
    held = np.sqrt(ridge * np.square(rows).sum() / rows.shape[1])
    left = np.vstack([rows[:, columns], held * np.eye(len(columns))])
    wanted = np.vstack([rows @ weight.T, held * weight[:, columns].T])
    fit = np.linalg.lstsq(left, wanted, rcond=None)[0]
    return float(np.square(left @ fit - wanted).sum() / np.square(rows @ weight.T).sum())


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_errors_are_those_of_least_squares_for_every_option(ridge: float) -> None:
    given = context(network())
    errors = prepared(given, ridge).remaining_errors()
    assert errors is not None
    for j, name in enumerate(("3", "6")):
        for option in range(1, given.space.sizes[j]):
            edit = given.structure.edit(given.space.pruning([option if i == j else 0 for i in range(len(errors))]))
            columns = edit.slices[f"{name}.weight"][1].tolist()
            assert errors[j][option] == pytest.approx(outputs_left(given, name, columns, ridge), rel=1e-4)
        assert errors[j][0] == 0
        assert (np.diff(errors[j]) >= 0).all()


def test_without_a_fit_they_are_what_the_removed_columns_add() -> None:
    rng = np.random.default_rng(0)
    rows, weight = rng.normal(size=(50, 4)), torch.from_numpy(rng.normal(size=(3, 4)))
    products = torch.from_numpy(rows.T @ rows / 50)
    kept = {1: torch.tensor([0, 2, 3]), 2: torch.tensor([0, 3])}
    found = remaining._errors(weight, products, float("inf"), kept)
    outputs = rows @ weight.numpy().T
    expected = [
        np.square(rows[:, gone] @ weight.numpy()[:, gone].T).sum() / np.square(outputs).sum() for gone in ([1], [1, 2])
    ]
    np.testing.assert_allclose(found, expected)


def test_there_are_none_where_options_are_not_nested_or_a_layer_is_not_fitted() -> None:
    kept = {1: torch.tensor([0, 2]), 2: torch.tensor([1])}
    assert remaining._errors(torch.ones(2, 3), torch.eye(3), 0.1, kept) is None
    assert prepared(context(network(transposed=True))).remaining_errors() is None
    assert prepared(context(network(), autoprune.Sparsity(), "nonzero_params <= 50%")).remaining_errors() is None


@pytest.mark.parametrize(("prior", "same"), [("auto", True), ("reconstruction", False)])
def test_they_are_the_prior_of_a_refitted_network_with_batch_norm(prior: str, same: bool) -> None:
    data = autoprune.Data(images(40), images(40), images(8))
    study = study_for(network(), "flops <= 50%", data, start=autoprune.Start(prior=prior), evaluator="compensated")
    errors = prepared(study.context).remaining_errors()
    assert errors is not None
    assert study.problem.prior is not None
    assert all(map(np.allclose, errors, study.problem.prior)) == same


def test_of_a_product_the_widths_have_them_and_dropped_branches_have_none() -> None:
    model = Residual(2, nn.BatchNorm1d).eval()
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    data = autoprune.Data((x, torch.arange(40) % 5), (x, torch.arange(40) % 5), (x[:8], torch.arange(8) % 5))
    space = Product(Channels(), Depth(min_kept=1))
    study = study_for(model, "flops <= 70%", data, space=space, evaluator="compensated")
    errors = prepared(study.context).remaining_errors()
    assert errors is not None
    drops = [dimension.options[-1] == "dropped" for dimension in study.context.space.dimensions]
    assert drops.count(True) == 2
    assert [row is None for row in errors] == drops
    assert study.problem.prior is not None
    for row, prior in zip(errors, study.problem.prior, strict=True):
        if row is not None:
            np.testing.assert_allclose(prior, row)
