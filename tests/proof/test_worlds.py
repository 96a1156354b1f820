"""Several ranks over gloo, without Ray: what does not depend on their number, and what does not under elastic numerics."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from imgcls.recipe import ResNet18
from tests.proof.alone import TWELVE, result_in, run_alone

ELASTIC = replace(TWELVE, name="elastic", model=ResNet18(dropout=0.2), numerics="elastic")


@pytest.fixture(scope="module")
def elastic(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    assert run_alone(ELASTIC, packed, folder) == [0]
    return folder


@pytest.mark.parametrize("world_size", [2, 4])
def test_elastic_numerics_give_the_same_bits_at_any_number_of_workers(
    world_size: int, elastic: Path, packed: Path, tmp_path: Path
):
    assert run_alone(ELASTIC, packed, tmp_path, world_size=world_size) == [0] * world_size
    assert_same(tmp_path, elastic)


def test_an_elastic_run_begins_with_four_goes_on_with_one_and_ends_with_two(elastic: Path, packed: Path, tmp_path: Path):
    killed = -signal.SIGKILL
    assert run_alone(ELASTIC, packed, tmp_path, world_size=4, every=1, dies=(3, "in the step")) == [killed] * 4
    assert run_alone(ELASTIC, packed, tmp_path, world_size=1, every=1, dies=(7, "after the commit")) == [killed]
    assert run_alone(ELASTIC, packed, tmp_path, world_size=2, every=1) == [0, 0]
    assert_same(tmp_path, elastic)


def test_two_ranks_killed_in_mid_epoch_end_with_the_bits_of_two_that_were_not(packed: Path, tmp_path: Path):
    recipe = replace(TWELVE, model=ResNet18(dropout=0.2))
    killed = -signal.SIGKILL
    assert run_alone(recipe, packed, tmp_path / "a", world_size=2, every=1, dies=(6, "in the step")) == [killed] * 2
    assert run_alone(recipe, packed, tmp_path / "a", world_size=2, every=1) == [0, 0]
    assert run_alone(recipe, packed, tmp_path / "b", world_size=2) == [0, 0]
    assert_same(tmp_path / "a", tmp_path / "b")


def assert_same(one: Path, other: Path) -> None:
    a, b = result_in(one), result_in(other)
    assert a.weights_sha256 == b.weights_sha256
    assert a.best_weights_sha256 == b.best_weights_sha256
    assert a.test == b.test
    assert (one / "history.csv").read_bytes() == (other / "history.csv").read_bytes()
