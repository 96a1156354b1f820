"""Intervals: how sure a figure is. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, stdev

from mpmath import betainc, findroot

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)

Tested = Sequence[tuple[int, int]]
"""(correct, counted) on the test set, for each seed of a recipe."""


@dataclass(frozen=True, slots=True)
class Interval:
    center: float
    low: float
    high: float
    num_seeds: int

    @property
    def of(self) -> str:
        """The sources of variation that it covers."""
        spread = f" and the spread of {self.num_seeds} seeds" if self.num_seeds > 1 else ", not the seeds' spread"
        return f"the test set's sampling{spread}"


def accuracy_interval(tested: Tested) -> Interval:
    """For the mean accuracy over seeds, in [0, 1]: what another test set of this size and other seeds might have shown."""
    return _with_seeds(*_wilson(tested), [right / count for right, count in tested], least=0.0)


def difference_interval(a: Tested, b: Tested) -> Interval:
    """For the mean accuracy of `a` minus that of `b` over the same seeds, in [-1, 1]. Source: Newcombe 1998, method 10.

    It treats the two as independent; for the same test images it is wider than necessary.
    """
    (p, p_low, p_high), (q, q_low, q_high) = _wilson(a), _wilson(b)
    center = p - q
    low, high = center - math.hypot(p - p_low, q_high - q), center + math.hypot(p_high - p, q - q_low)
    return _with_seeds(center, low, high, [i / m - j / n for (i, m), (j, n) in zip(a, b, strict=True)], least=-1.0)


def _wilson(tested: Tested) -> tuple[float, float, float]:
    """The mean accuracy and its Wilson interval on one test set. All seeds share its images, so they do not enlarge it."""
    p, n = sum(right / count for right, count in tested) / len(tested), min(count for _, count in tested)
    middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return p, (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)


def _student(df: int) -> float:
    """Student's quantile: 1 - LEVEL of the distribution lies outside plus and minus this value.

    df: degrees of freedom. Source: Abramowitz and Stegun 26.7.1.
    """
    x = findroot(lambda x: betainc(df / 2, 0.5, 0, x, regularized=True) - 1 + LEVEL, (0, 1), solver="illinois", tol=1e-12)
    return math.sqrt(df * (1 / float(x) - 1))


def _with_seeds(center: float, low: float, high: float, values: Sequence[float], *, least: float) -> Interval:
    """The test set's interval within [least, 1]; with several seeds, Student's interval over their values widens it.

    Independent parts are added as squares. Source: Zou and Donner 2008. The seeds' values contain a part of the test
    set's sampling, so the result is rather too wide.
    """
    count = len(values)
    spread = stdev(values) / math.sqrt(count) * _student(count - 1) if count > 1 else 0.0
    low, high = center - math.hypot(center - low, spread), center + math.hypot(high - center, spread)
    return Interval(center, max(least, low), min(1.0, high), count)
