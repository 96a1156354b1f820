"""Under Ray: a run whose worker, driver or controller was killed at a random moment ends with the same bits.

`--kills N` asks for so many of each; `make proof` for 10, 5 and 2. Each moment is drawn from a seed that is printed.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from infra.processes import alive, until
from tests.proof.commands import Running, assert_same, train

SEED = 20261125


def at_a_random_moment(running: Running, moment: random.Random) -> str:
    """Returns between the run's first and last step."""
    step, delay_s = moment.randrange(1, 11), moment.uniform(0, 0.3)
    running.wait_for_step(step)
    time.sleep(delay_s)
    return f"{delay_s:.2f} s after step {step}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    most = {"worker_kill": 10, "driver_kill": 5, "controller_kill": 2}
    for name, count in most.items():
        if name in metafunc.fixturenames:
            asked = int(metafunc.config.getoption("--kills") or 0)
            count = count if metafunc.config.getoption("--proof") else min(count, asked)
            none = pytest.param(0, marks=pytest.mark.skip(reason="make proof, or --kills N"))
            metafunc.parametrize(name, list(range(count)) or [none])


@pytest.mark.timeout(420)
def test_a_run_whose_worker_is_killed_ends_with_the_same_bits(
    worker_kill: int, whole: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    moment, num_workers = random.Random(SEED + worker_kill), 1 + (worker_kill + 1) % 2
    running = train(tmp_path, packed, "--num-workers", str(num_workers))
    when = at_a_random_moment(running, moment)
    running.kill("ray::RayTrainWorker", moment.randrange(num_workers))
    said = running.wait()
    assert "begun again from the last checkpoint" in said
    assert len(list((running.run / "attempts").iterdir())) == 2
    assert_same(running.run, whole[num_workers])
    proved("worker killed", f"seed {SEED + worker_kill}: of {num_workers}, {when}")


@pytest.mark.timeout(420)
def test_a_run_whose_driver_is_killed_leaves_nothing_and_goes_on_to_the_same_bits(
    driver_kill: int, whole: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    moment, num_workers = random.Random(SEED - driver_kill), 1 + driver_kill % 2
    how = signal.SIGTERM if driver_kill % 3 == 2 else signal.SIGKILL
    running = train(tmp_path, packed, "--num-workers", str(num_workers))
    when = at_a_random_moment(running, moment)
    theirs = running.pids()
    assert any(pid in theirs for pid in running.pids("ray::RayTrainWorker"))
    os.kill(running.process.pid, how)
    code = running.process.wait(30)
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    gone_s = until(lambda: not alive(theirs), 60, f"no process of it to be left: {alive(theirs)}")
    again = train(tmp_path, packed, "--num-workers", str(num_workers))
    again.wait()
    assert not (again.run / "lease.json").exists()
    assert_same(again.run, whole[num_workers])
    proved(f"driver {how.name}", f"seed {SEED - driver_kill}: {when}; all gone after {gone_s:.1f} s")


@pytest.mark.timeout(420)
def test_a_run_whose_controller_is_killed_ends_with_the_same_bits(
    controller_kill: int, whole: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    moment = random.Random(SEED + 100 + controller_kill)
    running = train(tmp_path, packed)
    when = at_a_random_moment(running, moment)
    running.kill("ray::TrainController")
    running.wait()
    assert len(list((running.run / "attempts").iterdir())) == 2
    assert_same(running.run, whole[1])
    proved("controller killed", f"seed {SEED + 100 + controller_kill}: {when}")
