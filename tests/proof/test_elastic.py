"""Elastic numerics under Ray: the same bits at 1, 2 and 4 workers, and for a run that moves between them."""

import os
import signal
from pathlib import Path

import pytest

from tests.proof.commands import Running, assert_same, result_in, train

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("only_in_full")]


def elastic(folder: Path, packed: Path, num_workers: int) -> Running:
    # Half a CPU each: four workers on two cores.
    return train(folder, packed, "--set", "numerics=elastic", "--num-workers", str(num_workers), "--cpus-per-worker", "0.5")


@pytest.fixture(scope="module")
def whole(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    running = elastic(tmp_path_factory.mktemp("elastic"), packed, 1)
    running.wait()
    return running.run


@pytest.mark.parametrize("num_workers", [2, 4])
def test_elastic_runs_under_ray_end_with_the_same_bits(num_workers: int, whole: Path, packed: Path, tmp_path: Path, proved):
    running = elastic(tmp_path, packed, num_workers)
    running.wait()
    assert_same(running.run, whole)
    proved("elastic numerics, under Ray", f"{num_workers} workers as 1")


def test_an_elastic_run_under_ray_moves_from_four_workers_to_one_to_two(whole: Path, packed: Path, tmp_path: Path, proved):
    for num_workers, step in ((4, 3), (1, 7)):
        running = elastic(tmp_path, packed, num_workers)
        running.wait_for_step(step)
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
        assert not (running.run / "result.json").exists()
    running = elastic(tmp_path, packed, 2)
    running.wait()
    assert_same(running.run, whole)
    placement = result_in(running.run).placement
    assert placement is not None
    assert placement.num_workers == 2
    proved("elastic numerics, under Ray", "4, then 1, then 2 workers")
