"""Zeros in the weights of SmolLM2: published rules on one set of moments, and searches on a database of levels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import autoprune
from autoprune.evaluators import Growing, Masked
from autoprune.importance.masks import allocation
from autoprune.importance.masks.methods import Method
from autoprune.importance.masks.scores import wanda
from autoprune.importance.masks.solver import Solver
from autoprune.optimizers import evopress, uniform_seeds
from autoprune.search_spaces import Sparsity
from autoprune.structure.slicing.zeros import Pattern
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for
from benchmarks.peers.language.case import Case

LEVELS = (0.0, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9)
FITTED, COMPARED, LEFT = 54, 8, 2  # of the 64 sequences: moments, candidates, and a look at the finished front
BATCH = 2
NEAR = 0.01
"""Share of the weights by which a network may have fewer nonzero ones than the budget, for its front to be wanted."""
Target = float | str
"""A share of zeros, or a pattern."""


@dataclass
class Zeros:
    """A model with moments of what its weights read, and a database of levels in a folder.

    Attributes:
        model: The dense model.
        data: Calibration samples, and those that searches compare candidates on.
        inside: Beginning of the names of the weights that may have zeros: those of linear layers in blocks.
        outside: Others that are multiplied, which have none.
        folder: For the weights of all levels.
        metric: Of a search.
        seed: Of a search.
        evaluations: Candidates of a search.
        method: Of the database.
        kept: Notes of the last cell.
    """

    model: nn.Module
    data: autoprune.Data
    inside: str
    outside: Sequence[str]
    folder: Path
    metric: str = "agreement"
    seed: int = 0
    evaluations: int = 40
    method: Method = "admm"
    kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_case(cls, case: Case, folder: Path) -> Zeros:
        """SmolLM2, with the sequences of a case."""
        data = autoprune.Data(
            [{"input_ids": part} for part in case.ids.split(BATCH)],
            calibration_samples=FITTED,
            validation_samples=COMPARED,
            test_samples=LEFT,
        )
        return cls(
            case.fast,
            data,
            "model.layers.",
            ["model.embed_tokens*"],
            folder,
            seed=case.seed,
            evaluations=case.evaluations,
        )

    @cached_property
    def study(self) -> Study:
        """A search at half of the weights, set up and not begun; the database is made here."""
        return study_for(self.model, self.limit(0.5), self.data, **self.options())

    @property
    def solver(self) -> Solver:
        """Equations of all weights."""
        evaluator = self.study.evaluator
        assert isinstance(evaluator, Masked)
        return evaluator.solver()

    def options(self) -> dict[str, Any]:
        """Settings of a search; its evaluator finds the levels in the folder."""
        bias = any(name.startswith(self.inside) and name.endswith(".bias") for name in self.model.state_dict())
        evaluator = Masked(self.method, bn=False, bias=bias, folder=self.folder, store="weights", store_bytes=2**34)
        space = Sparsity(levels=LEVELS, ignore=self.outside)
        return {"space": space, "evaluator": evaluator, "metric": self.metric, "seed": self.seed}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The linear layers of the blocks."""
        named = self.model.named_parameters()
        return {name: each.detach() for name, each in named if name.startswith(self.inside) and each.ndim == 2}

    def limit(self, share: float) -> str:
        """Budget for this share of zeros among the linear layers of the blocks, give or take `NEAR`.

        Without a lower end, a search that looks for a front would spend most of its candidates on networks with more
        zeros, which nobody judges.
        """
        inside = sum(each.numel() for each in self.weights.values())
        most = sum(each.numel() for each in self.model.parameters()) - int(share * inside)
        return f"{most - int(NEAR * inside)} <= nonzero_params <= {most}"

    def network(self, method: Method, kept: Mapping[str, int] | None, pattern: str = "unstructured") -> nn.Module:
        """The model with these numbers of elements left in each weight, or with a pattern everywhere."""
        model = copy.deepcopy(self.model)
        form = Pattern.parse(pattern)
        solver = Solver(self.model, self.solver.observed, method)  # as published: no bias corrects means
        for name, weight in self.weights.items():
            zeros = form.zeros(tuple(weight.shape)) if kept is None else weight.numel() - kept[name]
            made = solver.solve(name, form, zeros)
            if not form.holds(made) or int((made == 0).sum()) < zeros:
                raise RuntimeError(f"{name} has other zeros than {pattern} with {zeros}")
            with torch.no_grad():
                model.get_parameter(name).copy_(made)
        return model

    def nonzero(self, share: float) -> int:
        """Elements of the linear layers that stay."""
        total = sum(each.numel() for each in self.weights.values())
        return total - int(share * total)


def uniform(zeros: Zeros, target: Target, method: Method) -> nn.Module:
    """The same share, or pattern, in every weight."""
    if isinstance(target, str):
        return zeros.network(method, None, target)
    return zeros.network(method, allocation.uniform(zeros.weights, zeros.nonzero(target)))


def owl(zeros: Zeros, target: float, spread: float, above: float) -> nn.Module:
    """OWL's shares, one for each block, and SparseGPT in them."""
    solver = zeros.solver
    scores = {}
    for name in zeros.weights:
        (layer,) = solver.layers(name)
        scores[name] = wanda(layer.weight, layer.energies).sqrt()
    parts = {name: block_of(name) for name in scores}
    return zeros.network("sparsegpt", allocation.owl(scores, zeros.nonzero(target), spread, above, parts))


def on_database(zeros: Zeros, target: float) -> nn.Module:
    """Uniform shares of the database, without a search."""
    study = study_for(zeros.model, zeros.limit(target), zeros.data, **zeros.options())
    with torch.no_grad():
        return study.evaluator.build(uniform_seeds(study.problem)[-1])


def searched(zeros: Zeros, target: float, optimizer: Any, growing: bool) -> nn.Module:
    """The best network that a search of `case.evaluations` candidates finds."""
    options = zeros.options()
    if growing:
        options |= {"evaluator": Growing(options["evaluator"]), "early_stopping": autoprune.Rungs(2, reduction=4)}
    result = autoprune.search(
        zeros.model,
        zeros.limit(target),
        zeros.data,
        optimizer=optimizer,
        trials=zeros.evaluations,
        execution=autoprune.Execution(progress=False),
        **options,
    )
    zeros.kept["evaluations"] = float(len(result.trials))
    zeros.kept["near"] = NEAR
    zeros.kept["notes"] = list(result.notes)
    zeros.kept["spread"] = spread_of(result.best().decoded)
    with torch.no_grad():
        return result.build()


def spread_of(levels: Mapping[str, float]) -> dict[str, float]:
    """Mean share of zeros by kind of weight, and in the first, the middle and the last third of blocks."""
    kinds = {name.split(".")[-2] for name in levels}
    found = {kind: float(np.mean([x for name, x in levels.items() if f".{kind}." in name])) for kind in sorted(kinds)}
    blocks = np.array([int(block_of(name)) for name in levels])
    values = np.array(list(levels.values()))
    for i, place in enumerate(("first third", "middle", "last third")):
        found[place] = float(values[blocks * 3 // (blocks.max() + 1) == i].mean())
    return found


def block_of(name: str) -> str:
    """Number of the block of a weight."""
    return next(part for part in name.split(".") if part.isdigit())


Run = Callable[[Zeros, Any], nn.Module]
METHODS: dict[str, Run] = {
    "uniform magnitude": partial(uniform, method="magnitude"),
    "uniform Wanda": partial(uniform, method="wanda"),
    "uniform SparseGPT": partial(uniform, method="sparsegpt"),
    "OWL + SparseGPT": partial(owl, spread=0.08, above=5.0),
    "uniform, fitted": partial(uniform, method="admm"),
    "auto on the database": partial(searched, optimizer="auto", growing=False),
    "uniform on the database": on_database,
    "EvoPress on the database": partial(searched, optimizer=evopress, growing=True),
}
SEARCHES = ("auto on the database", "uniform on the database", "EvoPress on the database", "OWL + SparseGPT")
"""Methods that divide a share of zeros, which patterns have none of."""
DATABASE = ("auto on the database", "uniform on the database", "EvoPress on the database")
"""Methods that need no moments once there is a database."""
