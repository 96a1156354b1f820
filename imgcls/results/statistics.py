"""How sure a figure is, from which seeds were right on which test images. Pure.

Other seeds, and other test images, would have given another mean. The variance of the mean is the sum of both parts, as in
the crossed two-way layout (Searle, Casella, McCulloch 1992, section 4.3): the images' part is what an image has in common
over all seeds, the seeds' part is the whole spread of the seeds' means. The distribution of the error is a mixture of a
normal one for the images, which are many, and Student's for the seeds, which are few, weighted by each part's share of the
variance. Decision 27 compares the coverage of the alternatives.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from mpmath import betainc, findroot
from numpy.typing import NDArray

LEVEL, POWER = 0.95, 0.8
BINS = 15

Hits = NDArray[np.bool_]
"""(seeds, images): whether a seed's prediction was the label. All seeds have the same images."""


@dataclass(frozen=True, slots=True)
class Estimate:
    center: float
    low: float
    high: float
    num_seeds: int
    deviation: float
    """Standard deviation of the seeds' own values; 0 for one."""

    @property
    def of(self) -> str:
        """The sources of variation that it covers."""
        spread = f" and the spread of {self.num_seeds} seeds" if self.num_seeds > 1 else ", not the seeds' spread"
        return f"the test set's sampling{spread}"


@dataclass(frozen=True, slots=True)
class Difference(Estimate):
    probability: float
    """That the true value is above 0, if nothing else is known of it."""
    detectable: float
    """The smallest true value that such seeds and images tell from 0 in about `POWER` of all cases."""


def accuracy(hits: Hits) -> Estimate:
    """Of the recipe's accuracy over all seeds and images; of one seed, of this network's. Within [0, 1].

    Wilson's interval, of as many images as have this variance. Source: Franco, Little, Louis, Slud 2019.
    """
    error, p = _error(hits), float(hits.mean())
    q = error.quantile((1 - LEVEL) / 2)
    n = p * (1 - p) / error.scale**2 if error.scale else hits.shape[1]
    middle, half, whole = p + q**2 / (2 * n), q * math.sqrt(p * (1 - p) / n + q**2 / (4 * n**2)), 1 + q**2 / n
    low, high = max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)
    return Estimate(p, min(low, p), max(high, p), len(hits), _deviation(hits))


def difference(a: Hits, b: Hits) -> Difference:
    """Of the accuracy of `a` minus that of `b`, by the same seeds on the same images, in pairs. Within [-1, 1]."""
    pairs = a.astype(np.int8) - b.astype(np.int8)
    error = _error(pairs, least=1 / pairs.size)  # agreement on all images still leaves some uncertainty
    q, center = error.quantile((1 - LEVEL) / 2), float(pairs.mean())
    above = _tail(abs(center) / error.scale, error.share, error.df)
    low, high = max(-1.0, center - q * error.scale), min(1.0, center + q * error.scale)
    probability, detectable = 1 - above if center > 0 else above, (q + error.quantile(1 - POWER)) * error.scale
    return Difference(center, low, high, len(pairs), _deviation(pairs), probability, detectable)


def _deviation(values: NDArray) -> float:
    return float(values.mean(axis=1).std(ddof=1)) if len(values) > 1 else 0.0


def calibration(right: NDArray[np.bool_], probability: NDArray[np.floating]) -> tuple[NDArray[np.float64], float]:
    """(a row a bin of probability: how many, their mean probability, how many of them were right; the calibration error).

    The error is the mean distance of a bin's probability from its accuracy, weighted by its count (Guo et al. 2017).
    """
    places = np.minimum((probability * BINS).astype(int), BINS - 1)
    counts, sums, hits = (np.bincount(places, weights, BINS) for weights in (None, probability, right))
    rows = np.stack([counts, sums, hits], axis=1)[counts > 0].astype(float)
    rows[:, 1:] /= rows[:, :1]
    return rows, float((rows[:, 0] * abs(rows[:, 1] - rows[:, 2])).sum() / len(right))


@dataclass(frozen=True, slots=True)
class _Error:
    scale: float
    share: float
    """Of the seeds' part in the variance."""
    df: int

    def quantile(self, tail: float) -> float:
        """In units of `scale`."""
        return _quantile(tail, math.ceil(1000 * self.share) / 1000, self.df)


def _error(values: NDArray, *, least: float = 0.0) -> _Error:
    """Of the mean of (seeds, images). The means of few seeds may agree by chance: the interval is never narrower than with a
    third of the variance that independent values would have.

    least: one value's share in the mean.
    """
    seeds, images = values.shape
    mean, by_image, by_seed = values.mean(), values.mean(axis=0), values.mean(axis=1)
    of_seeds = float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    rest = float(((values - by_image - by_seed[:, None] + mean) ** 2).sum()) / (max(1, seeds - 1) * images)
    of_images = max(0.0, float(by_image.var()) - rest / seeds) / images
    total, bound = of_seeds + of_images + least**2 * seeds, math.sqrt(float(values.var()) / values.size / 3)
    error = _Error(math.sqrt(total), of_seeds / total if total else 0.0, seeds - 1)
    at_least, tail = _Error(bound, 0.0, seeds - 1), (1 - LEVEL) / 2
    return max(error, at_least, key=lambda one: one.quantile(tail) * one.scale)


def _tail(q: float, share: float, df: int) -> float:
    """The probability of an error of more than `q` scales, at least 0, by both distributions, mixed. Student's: Abramowitz
    and Stegun 26.7.1.
    """
    students = float(betainc(df / 2, 0.5, 0, df / (df + q * q), regularized=True)) / 2 if share else 0.0
    return share * students + (1 - share) * NormalDist().cdf(-q)


@lru_cache(100_000)
def _quantile(tail: float, share: float, df: int) -> float:
    return float(findroot(lambda q: _tail(q, share, df) - tail, (0, 40), solver="illinois", tol=1e-14))
