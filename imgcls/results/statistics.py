"""Intervals: how sure a figure is. Pure; scipy does the arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    center: float
    low: float
    high: float
    of: str
    """What varies inside it: the test set's sampling, or seeds."""


def accuracy_interval(correct: int, count: int) -> Interval:
    """Wilson's interval for one run's accuracy: what another test set of this size might have shown."""
    found = stats.binomtest(correct, count).proportion_ci(confidence_level=LEVEL, method="wilson")
    return Interval(correct / count, float(found.low), float(found.high), "test set")


def seeds_interval(values: Sequence[float]) -> Interval:
    """Student's interval for the mean over seeds; values: one accuracy a seed, two or more."""
    mean = sum(values) / len(values)
    spread = float(stats.sem(values)) * float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Interval(mean, mean - spread, mean + spread, f"{len(values)} seeds")


def difference_interval(a: tuple[int, int], b: tuple[int, int]) -> Interval:
    """Newcombe's interval for accuracy a - b from (correct, count) of two runs. Source: Newcombe 1998, method 10.

    It takes the two as independent; on the same test images that is wider than need be. Seeds' spread is not in it.
    """
    one, two = accuracy_interval(*a), accuracy_interval(*b)
    center = one.center - two.center
    low = center - math.hypot(one.center - one.low, two.high - two.center)
    high = center + math.hypot(one.high - one.center, two.center - two.low)
    return Interval(center, low, high, "test set, one seed")


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Student's interval for the mean of a - b over seeds that both have; two seeds or more."""
    return seeds_interval([x - y for x, y in zip(a, b, strict=True)])
