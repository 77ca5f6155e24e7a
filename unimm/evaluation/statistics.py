"""How sure a figure is: Wilson intervals for shares, bootstrap intervals for means.

Shares: Wilson's score interval (Wilson 1927; Brown, Cai and DasGupta 2001, "Interval Estimation for
a Binomial Proportion", recommend it for its coverage near 0 and 1, where accuracies stand). Means:
the percentile bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", 13.3),
deterministic under its seed. Nothing here guesses: an empty or non-finite sample is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
_CHUNK = 2**22  # resampled values held at once: 32 MiB


class Interval(NamedTuple):
    """Both ends of a confidence interval, in the unit of what was measured."""

    low: float
    high: float


def wilson_interval(successes: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share.

    Raises:
        ValueError: there are no trials, more successes than trials, or no such confidence.
    """
    _check_confidence(confidence)
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"share: {successes} of {total} is no share; count at least one trial")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / total
    scale = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At 0 and at all successes one end is exactly 0 or 1; rounding would leave 1e-17 there.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == total else middle + half
    return Interval(low, high)


@dataclass(frozen=True)
class Share:
    """`successes` of `total` trials, with its 95% Wilson interval."""

    successes: int
    total: int

    def __post_init__(self) -> None:
        wilson_interval(self.successes, self.total)  # refuses what is no share

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.successes / self.total

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return wilson_interval(self.successes, self.total).low

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return wilson_interval(self.successes, self.total).high

    def to_dict(self) -> dict[str, float | int]:
        """Plain JSON: value, interval and counts."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "successes": self.successes,
            "total": self.total,
        }

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%}, n = {self.total})"


class Mean(NamedTuple):
    """A mean of `count` values with its bootstrap interval."""

    value: float
    low: float
    high: float
    count: int


def bootstrap_mean(
    values: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Mean:
    """Mean of values, one per sample, and its percentile bootstrap interval.

    Args:
        values: at least one finite number; of a single one the interval is that number.
        confidence: share of such intervals that hold the true mean.
        resamples: number of resampled means, at least 100.
        seed: fixes the resampling.

    Raises:
        ValueError: no values, a value that is not finite, or settings out of range.
    """
    _check_confidence(confidence)
    if resamples < 100:
        raise ValueError(f"bootstrap: {resamples} resamples are too few; take 100 or more")
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not sample.size:
        raise ValueError("bootstrap: there are no values to take a mean of")
    if not np.isfinite(sample).all():
        where = int(np.flatnonzero(~np.isfinite(sample))[0])
        raise ValueError(f"bootstrap: value {where} is {sample[where]}; count it apart first")
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, _CHUNK // sample.size)
    means = [
        sample[
            generator.integers(sample.size, size=(min(rows, resamples - start), sample.size))
        ].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Mean(float(sample.mean()), float(low), float(high), int(sample.size))


def paired_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Mean:
    """Mean of `first - second` over the same samples; an interval without 0 tells them apart.

    Raises:
        ValueError: the two have different lengths, or `bootstrap_mean` refuses them.
    """
    if len(first) != len(second):
        raise ValueError(
            f"paired difference: {len(first)} and {len(second)} values; give the same samples"
        )
    return bootstrap_mean([a - b for a, b in zip(first, second, strict=True)], seed=seed)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
