import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from imgcls.results.statistics import Hits, _quantile, accuracy, calibration, difference

QUANTILES = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 30: 2.042272, 1000: 1.962339}
"""Of Student's distribution, at 0.975, by its degrees of freedom; from a printed table."""


def first(right: int, count: int) -> Hits:
    """One seed."""
    return np.arange(count)[None] < right


def test_one_seeds_interval_is_wilsons_of_the_textbook():
    found = accuracy(first(81, 263))
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_the_published_standard_error_fits():
    found = accuracy(first(2355, 3925))
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(0.0078, abs=2e-4)


@pytest.mark.parametrize(("freedom", "quantile"), QUANTILES.items())
def test_students_quantile_is_that_of_a_printed_table(freedom: int, quantile: float):
    assert _quantile(0.025, 1.0, freedom) == pytest.approx(quantile, abs=1e-6)


def test_a_difference_by_one_seed_counts_the_images_that_tell_the_two_apart():
    """McNemar's: of 100 images 30 are right by the first alone, and 10 by the second."""
    a, b = first(70, 100), np.concatenate([np.zeros(30), np.ones(50), np.zeros(20)])[None] > 0
    assert ((a & ~b).sum(), (b & ~a).sum()) == (30, 10)
    found, by_hand = difference(a, b), 1.959964 * math.sqrt((0.40 - 0.2**2) / 100 + 0.01**2)
    assert (found.center, found.high - found.center) == (pytest.approx(0.2), pytest.approx(by_hand, rel=1e-6))
    assert found.detectable == pytest.approx(by_hand * (1.959964 + 0.841621) / 1.959964, rel=1e-6)
    assert found.probability == pytest.approx(NormalDist().cdf(0.2 / (by_hand / 1.959964)), abs=1e-9)


def test_two_that_agree_on_every_image_are_not_said_to_be_equal():
    found = difference(first(50, 100), first(50, 100))
    assert (found.low, found.center, found.high, found.probability) == (pytest.approx(-0.0196, abs=1e-4), 0, -found.low, 0.5)


def test_seeds_that_differ_more_than_images_do_have_students_interval():
    hits = np.repeat([[0.1], [0.2], [0.3]], 100_000, axis=1) > np.random.default_rng(1).random((3, 100_000))
    found = accuracy(hits)
    assert found.deviation == pytest.approx(0.1, abs=0.003)
    assert found.high - found.low == pytest.approx(2 * 4.302653 * 0.1 / math.sqrt(3), rel=0.1)


def test_seeds_whose_means_agree_by_chance_are_not_taken_to_be_sure():
    chance = np.random.default_rng(2)
    one, other = (np.stack([chance.permutation(1000) < right for _ in range(3)]) for right in (600, 580))
    for found, variance in ((accuracy(one), 0.24), (difference(one, other), 0.24 + 0.2436)):
        assert found.high - found.low >= 2 * 1.9 * math.sqrt(variance / 3000 / 3)


hits = st.tuples(st.integers(1, 4), st.integers(1, 30)).flatmap(lambda shape: st.tuples(*[arrays(bool, shape)] * 2))


@settings(deadline=None)
@given(hits)
def test_intervals_are_possible_values_and_a_difference_is_antisymmetric(both: tuple[Hits, Hits]):
    a, b = both
    for found, least in ((accuracy(a), 0), (difference(a, b), -1)):
        assert least <= found.low <= found.center <= found.high <= 1
    one, other = difference(a, b), difference(b, a)
    assert 0 <= one.probability <= 1
    assert 0 < one.detectable < math.inf
    assert (one.low, one.center) == (pytest.approx(-other.high), pytest.approx(-other.center))
    assert one.probability == pytest.approx(1 - other.probability)


def drawn(chance: np.random.Generator, mean: float, sd: float, seeds: int, hardness: np.ndarray, alike: float) -> Hits:
    """Seeds whose own accuracies scatter by `sd` around `mean`, on images as hard as `hardness` says, `alike` for all."""
    abilities = np.full(seeds, mean)
    if sd:
        size = mean * (1 - mean) / sd**2 - 1
        abilities = chance.beta(mean * size, (1 - mean) * size, seeds).clip(1e-9, 1 - 1e-9)
    own = chance.standard_normal((seeds, len(hardness)), dtype=np.float32)
    limits = np.array([NormalDist().inv_cdf(ability) for ability in abilities])
    return alike * hardness + math.sqrt(1 - alike**2) * own < limits[:, None]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seeds", [1, 3, 10])
@pytest.mark.parametrize(
    ("mean", "other", "sd"), [(0.1, 0.12, 0.01), (0.6, 0.59, 0.0), (0.6, 0.59, 0.02), (0.99, 0.985, 0.002)]
)
def test_of_10000_draws_93_to_97_of_100_intervals_hold_the_truth(seeds: int, mean: float, other: float, sd: float):
    """One seed has its own network's accuracy for a truth, several the mean of all seeds. 1,000 images."""
    chance, held, sd = np.random.default_rng(20261128), [], sd if seeds > 1 else 0.0
    for _ in range(10_000):
        hardness = chance.standard_normal(1000, dtype=np.float32)
        a, b = (drawn(chance, true, sd, seeds, hardness, 0.8) for true in (mean, other))
        one, gap = accuracy(a), difference(a, b)
        held.append((one.low <= mean <= one.high, gap.low <= mean - other <= gap.high))
    for often in np.mean(held, axis=0):
        assert 0.93 <= often <= 0.97


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seeds", [1, 3, 10])
def test_the_probability_of_being_better_is_calibrated(seeds: int):
    """Over differences of which none is more probable than another."""
    chance, said = np.random.default_rng(20261129), []
    for _ in range(10_000):
        hardness = chance.standard_normal(1000, dtype=np.float32)
        gap, sd = chance.uniform(-0.12, 0.12), 0.01 if seeds > 1 else 0.0
        a, b = (drawn(chance, true, sd, seeds, hardness, 0.8) for true in (0.6 + gap / 2, 0.6 - gap / 2))
        said.append((difference(a, b).probability, gap > 0))
    table = np.array(said)
    for low, high in ((0.5, 0.8), (0.8, 0.95), (0.95, 0.99), (0.99, 1.01), (0.2, 0.5), (0.05, 0.2), (-0.01, 0.01)):
        inside = table[(table[:, 0] >= low) & (table[:, 0] < high)]
        assert len(inside) > 80
        stated, found = inside[:, 0].mean(), inside[:, 1].mean()
        assert found == pytest.approx(stated, abs=0.01 + 4 * math.sqrt(stated * (1 - stated) / len(inside))), (low, high)


def test_the_calibration_error_is_the_distance_of_probability_from_accuracy():
    right, probability = np.array([True, True, False, True]), np.array([0.9, 0.9, 0.9, 0.5])
    rows, error = calibration(right, probability)
    assert rows == pytest.approx(np.array([[1, 0.5, 1.0], [3, 0.9, 2 / 3]]))
    assert error == pytest.approx((1 * 0.5 + 3 * (0.9 - 2 / 3)) / 4)
    assert calibration(np.ones(5, bool), np.ones(5, np.float32))[1] == 0
