"""Report of an audit: cheap scores compared with trained ones, and the origin of the best network's quality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.pareto import Direction
from autoprune.protocols import FloatArray
from autoprune.result.notebook import audit_html
from autoprune.result.plots.audit import plot_audit
from autoprune.result.ranking import BAND, CHOICES, FEWEST, Estimate, Ranking, rank, tau_difference
from autoprune.result.tables import WIDTH, aligned, engineering
from autoprune.result.trials import none_if_nan, or_nan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOUND, NEW_WEIGHTS, RANDOM_UNITS, UNIFORM = "as found", "new weights", "random units", "uniform widths"
ORIGINS = {"widths": UNIFORM, "units": RANDOM_UNITS, "weights": NEW_WEIGHTS}
"""Control network that each origin of quality is measured against."""


@dataclass(frozen=True)
class Trained:
    """Candidate that was trained.

    Attributes:
        trial: Its number in the result.
        cost: The first limited cost.
        trained: The metric on the held-out samples after training; NaN if that failed.
        scores: By evaluator the metric on the validation samples before training; NaN if that failed.
        signals: By evaluator the signal that steers a search, lower is better.
        reason: Reason why training failed.
    """

    trial: int
    cost: float
    trained: float
    scores: Mapping[str, float]
    signals: Mapping[str, float]
    reason: str = ""


@dataclass(frozen=True)
class Variant:
    """Trainings of one control network.

    Attributes:
        cost: The first limited cost.
        trained: The metric on the held-out samples after each training; those that failed are left out.
    """

    cost: float
    trained: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the trainings; NaN without any."""
        return float(np.mean(self.trained)) if self.trained else math.nan


@dataclass(frozen=True)
class Audit:
    """Reliability of cheap scores; see `autoprune.audit`.

    Attributes:
        rows: The candidates that were trained, by cost.
        evaluators: Whose scores were compared, that of the search first.
        metric: Name of the metric.
        higher_is_better: Its direction.
        samples: Held-out samples that trained candidates were scored on.
        cost: Name of the first limited cost.
        steps: The budget of each training, if one was given.
        winner: Number of the trial that the variants are made of.
        variants: By name, of ``"as found"``, ``"new weights"``, ``"random units"`` and ``"uniform widths"`` those that
            were trained.
        seconds: Wall time, that of trainings read from `run_dir` included.
        notes: Omitted parts with the reasons, in plain words.
    """

    rows: tuple[Trained, ...]
    evaluators: tuple[str, ...]
    metric: str
    higher_is_better: bool
    samples: int
    cost: str
    steps: int | None
    winner: int
    variants: Mapping[str, Variant]
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def direction(self) -> Direction:
        """Direction of the metric."""
        return Direction(self.higher_is_better)

    @cached_property
    def rankings(self) -> Mapping[str, Ranking]:
        """Rank agreement of each evaluator's score with the trained score."""
        return {name: rank(self._cheap(name), self._trained, self._costs) for name in self.evaluators}

    @cached_property
    def signal_rankings(self) -> Mapping[str, Ranking]:
        """Rank agreement of each evaluator's signal with the trained score; it ties less than most metrics."""
        return {name: rank(-self._column("signals", name), self._trained, self._costs) for name in self.evaluators}

    @cached_property
    def cost_ranking(self) -> Ranking:
        """Rank agreement of the cost with the trained score, as a baseline without any evaluation."""
        return rank(self._costs, self._trained, self._costs)

    @property
    def best_evaluator(self) -> str:
        """Name of the evaluator with the best tau; that of the search if none has a value."""
        return max(self.evaluators, key=lambda name: np.nan_to_num(self.rankings[name].tau.value, nan=-2.0))

    @cached_property
    def effects(self) -> Mapping[str, Estimate]:
        """Advantage of the best network over control networks without its ``"widths"``, ``"units"`` and ``"weights"``.

        It is in units of the metric, positive where the found network is better. One property is replaced at a time, so
        effects need not add up. Intervals are those of Student's t, with the variance of repeated trainings pooled over
        the variants; they do not cover other samples. NaN where trainings were not repeated.
        """
        known = {name: variant for name, variant in self.variants.items() if variant.trained}
        freedom = sum(len(v.trained) - 1 for v in known.values())
        found = known.get(FOUND)
        effects = {}
        for origin, name in ORIGINS.items():
            if found is None or name not in known:
                continue
            other = known[name]
            margin = math.nan
            value = self.direction.worse_by(other.mean, found.mean)
            if freedom:
                from scipy.stats import t

                several = 1 / len(found.trained) + 1 / len(other.trained)
                margin = float(t.ppf(0.975, freedom)) * self.noise * several**0.5
            effects[origin] = Estimate(value, value - margin, value + margin)
        return effects

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the trained score between trainings of one network; NaN where none was repeated."""
        groups = [np.array(variant.trained) for variant in self.variants.values() if len(variant.trained) > 1]
        freedom = sum(len(group) - 1 for group in groups)
        return float(sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom) ** 0.5 if freedom else math.nan

    def verdict(self) -> str:
        """Conclusion of the comparison, in one sentence."""
        name = self.evaluators[0]
        ranking = self.rankings[name]
        if math.isnan(ranking.tau.value):
            why = f"{ranking.candidates} candidates have both" if ranking.candidates < FEWEST else "one of them ties"
            return f"nothing can be said of how the score of {name} compares with trained scores: {why}"
        inside = ranking.tau_in_band
        equal = (
            f"too few pairs ({ranking.pairs_in_band}) cost nearly the same to tell"
            if math.isnan(inside.value)
            else f"of {ranking.pairs_in_band} pairs that cost nearly the same, {_share(inside)}"
        )
        return (
            f"of two networks, the one with the better score by {name} is the better one after training in "
            f"{_share(ranking.tau)}; {equal}; so {self._advice(ranking)}"
        )

    def _advice(self, ranking: Ranking) -> str:
        most = CHOICES[-1]
        if not ranking.tau.low > 0:
            return "do not choose by it: train several networks of the front and compare them"
        if not ranking.tau_in_band.low > 0:
            return (
                f"it tells networks of different {self.cost} apart, but among equals train several before choosing; "
                f"the {most} of best score come within {ranking.regret[most].value:.4f} of the best of {len(self.rows)}"
            )
        loss = ranking.regret[1].value
        return f"it can be chosen by, and its first choice comes within {loss:.4f} of the best of {len(self.rows)}"

    def comparison(self) -> str:
        """Best evaluator and the significance of its lead, in one sentence; empty if there is only one."""
        best = self.best_evaluator
        others = [name for name in self.evaluators if name != best and np.isfinite(self.rankings[name].tau.value)]
        if not others:
            return ""
        ahead = []
        for name in others:
            gap = tau_difference(self._cheap(best), self._cheap(name), self._trained)
            ahead.append(f"{gap.value:+.2f} to {name} ({gap.low:+.2f} to {gap.high:+.2f})")
        return f"{best} did best; difference in tau, with its 95 % interval: {', '.join(ahead)}"

    def origin(self) -> str:
        """Contributions of widths, units and weights to the best network's quality, in one sentence."""
        if not self.effects:
            return ""
        parts = ", ".join(
            f"{effect.value:+.4f}"
            + ("" if math.isnan(effect.low) else f" ({effect.low:+.4f} to {effect.high:+.4f})")
            + f" from its {name}"
            for name, effect in self.effects.items()
        )
        sure = [name for name, effect in self.effects.items() if effect.low > 0]
        lost = [name for name, effect in self.effects.items() if effect.high < 0]
        end = f"beyond the spread of trainings are {_and(sure)}" if sure else "none is beyond the spread of trainings"
        if lost:
            end += f", and with other {_and(lost)} it is better"
        if math.isnan(self.noise):
            end = "trainings were not repeated, so luck is not told apart"
        return f"of {self.metric} after equal training, the network found owes {parts}; {end}"

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw trained scores against each evaluator's, coloured by cost, and the variants next to them.

        Args:
            path: File of the picture; its ending gives the format.

        Raises:
            ImportError: If matplotlib is missing.
        """
        return plot_audit(self, path)

    def _repr_html_(self) -> str:
        """Make the tables for notebooks."""
        return audit_html(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the text in IPython, in place of every field."""
        printer.text(str(self))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary; NaN becomes null."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["trained"] = none_if_nan(row["trained"])
            for table in ("scores", "signals"):
                row[table] = {name: none_if_nan(value) for name, value in row[table].items()}
        return {
            **plain,
            "evaluators": list(self.evaluators),
            "notes": list(self.notes),
            "rows": rows,
            "variants": {name: [v.cost, list(v.trained)] for name, v in self.variants.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Audit:
        """Restore what `to_json` wrote."""
        rows = tuple(
            Trained(
                trial=row["trial"],
                cost=row["cost"],
                trained=or_nan(row["trained"]),
                scores={name: or_nan(value) for name, value in row["scores"].items()},
                signals={name: or_nan(value) for name, value in row["signals"].items()},
                reason=row["reason"],
            )
            for row in data["rows"]
        )
        return cls(
            rows=rows,
            evaluators=tuple(data["evaluators"]),
            notes=tuple(data["notes"]),
            variants={name: Variant(cost, tuple(scores)) for name, (cost, scores) in data["variants"].items()},
            **{name: data[name] for name in _PLAIN},
        )

    def __str__(self) -> str:
        tables = [part for rows in self.tables() for part in (aligned(rows), "")]
        texts = [line for text in self.texts() for line in wrap(text, WIDTH, subsequent_indent="  ")]
        return "\n".join([self.headline(), "", *tables, *texts])

    def headline(self) -> str:
        """Summarise the trainings in one line."""
        recipe = "" if self.steps is None else f", {self.steps} steps each"
        return (
            f"{len(self.rows)} candidates trained{recipe}; {self.metric} on {self.samples} held-out samples afterwards"
        )

    def tables(self) -> list[list[list[str]]]:
        """Make the tables in words, each with its header: the rank agreements, and the control networks if any."""
        if not self.variants:
            return [self._table()]
        rows = [[f"like trial {self.winner}", self.cost, self.metric, "trainings"]]
        for name, variant in self.variants.items():
            rows.append([name, engineering(variant.cost), f"{variant.mean:.4f}", str(len(variant.trained))])
        return [self._table(), rows]

    def texts(self) -> list[str]:
        """Collect the conclusions and the notes."""
        return [text for text in (self.verdict(), self.comparison(), self.origin(), *self.notes) if text]

    def _table(self) -> list[list[str]]:
        behind = [f"behind, of {most}" for most in CHOICES]
        equal = f"{BAND:.0%} of {self.cost}"
        rows = [["against trained scores", "tau", "95 % interval", equal, "95 % interval", *behind]]
        named = [(name, ranking) for name, ranking in self.rankings.items()]
        for name, ranking in self.signal_rankings.items():
            if ranking != self.rankings[name]:
                named.append((f"{name}, its signal", ranking))
        for name, ranking in (*named, (f"{self.cost} alone", self.cost_ranking)):
            taus = [cell for tau in (ranking.tau, ranking.tau_in_band) for cell in _cells(tau)]
            rows.append([name, *taus, *(f"{ranking.regret[most].value:.4f}" for most in CHOICES)])
        return rows

    @property
    def _trained(self) -> FloatArray:
        return -self.direction.key(np.array([row.trained for row in self.rows]))

    @property
    def _costs(self) -> FloatArray:
        return np.array([row.cost for row in self.rows])

    def _cheap(self, name: str) -> FloatArray:
        return -self.direction.key(self._column("scores", name))

    def _column(self, table: str, name: str) -> FloatArray:
        return np.array([getattr(row, table)[name] for row in self.rows])


_PLAIN = ("metric", "higher_is_better", "samples", "cost", "steps", "winner", "seconds")


def _share(tau: Estimate) -> str:
    """Format a tau as a share of pairs."""
    return f"{50 * (1 + tau.value):.0f} % of cases (tau {tau.value:.2f}, 95 % interval {tau.low:.2f} to {tau.high:.2f})"


def _cells(tau: Estimate) -> tuple[str, str]:
    if math.isnan(tau.value):
        return "", ""
    return f"{tau.value:.2f}", f"{tau.low:.2f} to {tau.high:.2f}"


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
