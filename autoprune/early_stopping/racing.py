"""Racing: a candidate is scored batch by batch, and dropped as soon as a rival is known to be better.

The rival is a finished trial that costs no more in any limited cost. The test compares the mean signal on the whole
validation subset, a fixed and finite set of samples, so after the last sample there is no error of estimation. It
assumes no normal distribution, holds at every sample at once, and spends its error probability once a race, not once a
look (`log_evidence`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from autoprune.arguments import is_number, shown
from autoprune.border import only
from autoprune.early_stopping.interim import Interim, Interrupted
from autoprune.early_stopping.successive_halving import Ladder, Rungs, climb
from autoprune.pareto import Direction
from autoprune.protocols import Failure, FloatArray, IntArray, Measurement

if TYPE_CHECKING:
    from autoprune.evaluators.protocol import Evaluator

FRACTIONS = np.array([0.1, 0.2, 0.4, 0.6, 0.8])
"""Bets, as fractions of the largest one that cannot lose more than the capital; the best depends on the candidate."""

QUANTILE = 0.9
"""Quantile at which the signals of the rival are capped: large bets need small losses. See `log_evidence`."""

_FIRST_BLOCK = 256
_SLACK = 1e-6  # rounding may take a loss below zero by this much


@dataclass(frozen=True)
class Racing:
    """Drop candidates early: ``search(..., early_stopping=Racing(delta=0.01))``; True takes the defaults.

    Attributes:
        delta: Largest probability that the search drops even one candidate whose mean signal on all validation samples
            is no worse than that of the trial it lost against.
    """

    delta: float = 0.05

    def __post_init__(self) -> None:
        if not (is_number(self.delta) and 0 < self.delta < 1):
            raise ValueError(f"delta must be a probability between 0 and 1, got {shown(self.delta)}")

    def share(self, trial: int) -> float:
        """Share of `delta` that a trial may spend, by its number from 0.

        Half of it for the first 256 trials, a quarter for the next 512, and so on, so that any number of trials may
        be added to a search.
        """
        block = int(np.log2(trial / _FIRST_BLOCK + 1))
        return float(self.delta / (2 * _FIRST_BLOCK * 4**block))


@dataclass(frozen=True)
class Race:
    """Race of a candidate against a rival. It is sent to workers: 8 bytes a sample.

    Attributes:
        rival: The trial to beat, which costs no more.
        signal: Its signal on each validation sample, float32 as in the journal, shape (N,).
        metric: Its metric on each, float32, shape (N,).
        direction: Direction of the metric.
        floor: Lower bound of the signal of any candidate on any sample.
        distances: Samples that the distortion is measured on.
        error: Largest probability of dropping the candidate although it is no worse.
        looks: Numbers of validation batches after which the race is looked at; empty for each.
    """

    rival: int
    signal: FloatArray
    metric: FloatArray
    direction: Direction
    floor: float
    distances: int
    error: float
    looks: tuple[int, ...] = ()

    def chunk(self, parts: int, seen: int) -> slice:
        """Batches to score next, after a number of parts that held `seen` batches."""
        return slice(seen, self.looks[parts] if parts < len(self.looks) else seen + 1)

    @property
    def total(self) -> int:
        """Validation samples."""
        return len(self.signal)

    @property
    def control(self) -> None:
        """The dense model serves estimates."""

    def expected_distances(self, samples: int) -> int:
        """Number of values of the distortion, which a candidate that is dropped does without."""
        return self.distances

    def why_stopped(self, signal: FloatArray, metric: FloatArray) -> str:
        """Reason to drop a candidate, as `lost` does; empty if it goes on."""
        if not self.lost(signal, metric):
            return ""
        return f"dominated by trial {self.rival} after {len(signal)} of {self.total} samples"

    def lost(self, signal: FloatArray, metric: FloatArray) -> bool:
        """Return whether a candidate is known to be worse, by its values on the first n samples, shape (n,) each.

        A candidate that is ahead in the metric so far is not dropped: users choose by the metric, though it is too
        coarse for a separate test. Nor is one with a signal below the floor.
        """
        gained = (metric - self.metric[: len(metric)]).mean()
        if self.direction.better(gained, 0.0) or signal.min() < self.floor - _SLACK:
            return False
        return bool(log_evidence(signal, self.signal, self.floor - _SLACK).max() >= -np.log(self.error))


def log_evidence(seen: FloatArray, rival: FloatArray, floor: float) -> FloatArray:
    """Logarithm of the capital of a bettor who starts with 1 and bets that a candidate is worse than its rival.

    If the candidate is no worse on all samples, the capital is a nonnegative supermartingale, so the probability that
    it ever reaches 1 / p is at most p (Ville's inequality), however often one looks. The assumptions are that samples
    come in a random order, all orders being equally likely and independent of the candidate, and that none of its
    signals is below `floor`. There is no assumption about the distribution of signals, and no upper bound.

    Each sample is a bet at fair odds on its expectation under the null hypothesis: the candidate's mean over the
    samples left, if its mean over all were the rival's. Bets are made on the difference to a known value for each
    sample, the rival's signal up to its 0.9 quantile, because hard samples are hard for both. The largest loss of a bet
    is known, because the rival's samples and the floor are; the capital is spread over five `FRACTIONS` of the bet that
    would risk all.

    Args:
        seen: Signals of the candidate, lower is better, shape (..., n).
        rival: Signals of the rival on all samples, the same n first, shape (..., N).
        floor: Lower bound of all signals of the candidate.

    Returns:
        Logarithm of the capital after each sample, shape (..., n).

    Reference:
        Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 2024,
        arXiv:2010.09686, section 5 on sampling without replacement. There both ends are bounded, and bets adapt.
    """
    n, total = seen.shape[-1], rival.shape[-1]
    # A single large signal of the rival would raise the risk of every bet; a cap keeps bets large, and any known value
    # for each sample leaves them fair.
    known = np.minimum(rival, np.quantile(rival, QUANTILE, axis=-1, keepdims=True)).astype(np.float64)
    # Without replacement, samples seen determine the mean of the rest if the means over all are equal.
    left = total - np.arange(n)
    before = np.cumsum(seen, axis=-1, dtype=np.float64) - seen
    expected = (rival.sum(axis=-1, keepdims=True, dtype=np.float64) - before) / left
    known_left = (np.cumsum(known[..., ::-1], axis=-1)[..., ::-1])[..., :n] / left
    highest_left = np.maximum.accumulate(known[..., ::-1], axis=-1)[..., ::-1][..., :n]
    # Both differences have mean 0 over the rest in a random order, so their difference is a fair bet.
    gain = (seen - expected) - (known[..., :n] - known_left)
    # The worst sample has the floor as its signal and the highest known value: that loss must not exceed the capital.
    risk = np.maximum((expected - floor) + (highest_left - known_left), np.finfo(np.float64).tiny)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        steps = np.log(np.maximum(1 + FRACTIONS * (gain / risk)[..., None], 0.0))
        # The best fraction is not known before, and a mean of supermartingales is one, too.
        capital: FloatArray = np.logaddexp.reduce(np.cumsum(steps, axis=-2), axis=-1) - np.log(len(FRACTIONS))
    return capital


Rule = Racing | Rungs | Interim
"""Rules by which candidates are stopped early."""

Contest = Race | Interrupted | Ladder
"""Contest that may end the evaluation of a candidate early."""


def evaluate(evaluator: Evaluator, candidate: IntArray, race: Contest | None = None) -> Measurement | Failure:
    """Score a candidate, shape (d,), on all validation batches, or on some after the other until its race is lost.

    With rungs, score it at one rung of its training after the other, until it is behind. The score of a candidate that
    survives is that of an evaluation of all at once, to the last bit.
    """
    if isinstance(race, Ladder):
        return climb(evaluator, candidate, race)
    if race is None:
        return only(evaluator, evaluator.evaluate(candidate[None].copy()))
    parts: list[Measurement] = []
    seen = 0
    chunk = slice(0, 0)
    while seen < race.total:
        chunk = race.chunk(len(parts), chunk.stop)
        part = only(evaluator, evaluator.evaluate(candidate[None].copy(), chunk))
        if isinstance(part, Failure):
            return replace(part, seconds=part.seconds + sum(before.seconds for before in parts))
        parts.append(part)
        seen += len(part.signal)
        whole = _joined(parts, race.expected_distances(seen))
        if seen < race.total:
            reason = race.why_stopped(whole.signal.astype(np.float32), whole.metric.astype(np.float32))
            if reason:
                return replace(whole, raced=reason, control=race.control)
    return whole


def _joined(parts: list[Measurement], distances: int) -> Measurement:
    """Join measurements of consecutive chunks; without a distortion unless it is complete."""
    signal, metric, distortion, weights = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("signal", "metric", "distortion", "weights")
    )
    distortion = distortion if len(distortion) == distances else np.empty(0)
    return Measurement(signal, metric, sum(part.seconds for part in parts), distortion, weights=weights)
