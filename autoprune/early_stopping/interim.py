"""Interim looks, the default: a candidate is scored on a part of the validation samples, and on all if it may be good.

Unlike a race this is a heuristic: it looks after a quarter and after half of the samples, and drops what is worse than
its rival by two standard errors of the paired difference. One in forty candidates that are exactly as good as their
rivals is dropped at each look. A probe, which is over a limit and so never on the front, ends at the first look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autoprune.pareto import Direction
from autoprune.protocols import FloatArray, Measurement

SHARES = (0.25, 0.5)
"""Shares of the validation samples after which a candidate is looked at."""

FEWEST = 64
"""Fewest samples of the first look; with less than four times as many, candidates are scored without looks."""

ERRORS = 2.0
"""Standard errors of the paired difference by which a candidate must be worse than its rival to be dropped."""


@dataclass(frozen=True)
class Interim:
    """Rule of ``search(early_stopping="auto")``.

    Attributes:
        errors: See `ERRORS`.
    """

    errors: float = ERRORS


def looks_of(sizes: Sequence[int]) -> tuple[int, ...]:
    """Numbers of batches after which to look, from the samples in each; empty where there are too few samples."""
    counts = np.cumsum(sizes)
    total = int(counts[-1])
    if SHARES[0] * total < FEWEST:
        return ()
    ends = {int(np.searchsorted(counts, share * total)) + 1 for share in SHARES}
    return tuple(sorted(end for end in ends if end < len(sizes)))


@dataclass(frozen=True)
class Interrupted:
    """Evaluation of one candidate with interim looks. It is sent to workers: 8 bytes a sample.

    Attributes:
        batches: Numbers of validation batches after which it is looked at, and that of all.
        total: Validation samples.
        distances: Samples that the distortion is measured on.
        direction: Direction of the metric.
        errors: As in `Interim`.
        rival: The trial to beat, which costs no more; -1 for a probe, which ends at the first look.
        signal: Signal of the rival on each validation sample, float32 as in the journal, shape (N,).
        metric: Its metric on each, float32, shape (N,).
    """

    batches: tuple[int, ...]
    total: int
    distances: int
    direction: Direction
    errors: float
    rival: int = -1
    signal: FloatArray = field(default_factory=lambda: np.empty(0))
    metric: FloatArray = field(default_factory=lambda: np.empty(0))

    @property
    def control(self) -> Measurement | None:
        """Measurement of the rival, to which a candidate is nearer than to the dense model; None for a probe."""
        if self.rival < 0:
            return None
        return Measurement(self.signal.astype(np.float64), self.metric.astype(np.float64), 0.0)

    def chunk(self, parts: int, seen: int) -> slice:
        """Batches to score next, after a number of parts that held `seen` batches."""
        return slice(seen, self.batches[parts])

    def expected_distances(self, samples: int) -> int:
        """Number of values of the distortion after this number of samples."""
        return min(samples, self.distances)

    def why_stopped(self, signal: FloatArray, metric: FloatArray) -> str:
        """Reason to stop a candidate by its values on the first n samples, shape (n,) each; empty if it goes on.

        One that is ahead in the metric so far goes on, because users choose by the metric.
        """
        seen = len(signal)
        after = f"after {seen} of {self.total} samples"
        if self.rival < 0:
            return f"probe of one dimension, {after}"
        if self.direction.better((metric - self.metric[:seen]).mean(), 0.0):
            return ""
        worse = (signal - self.signal[:seen]).astype(np.float64)
        # Without replacement: nothing is uncertain once all samples are seen (Cochran, "Sampling Techniques", 2.6).
        error = worse.std(ddof=1) / seen**0.5 * (1 - seen / self.total) ** 0.5
        return f"behind trial {self.rival} {after}" if worse.mean() > self.errors * error else ""
