"""Under Ray: a run whose worker, driver or controller was killed at a random moment ends with the same bits.

`--kills N` asks for so many of each; `make proof` for 10, 5 and 2, and 5 of each for three and for four ranks. Each
moment is drawn from a seed that is printed.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from imgcls import records
from imgcls.records import SuiteResults
from imgcls.runs import RunFolder
from tests.processes import alive, until
from tests.proof.commands import Running, assert_same, flags_of, start, train

SEED = 20261125


def at_a_random_moment(running: Running, moment: random.Random) -> str:
    """Returns between the run's first and last step."""
    step, delay_s = moment.randrange(1, 11), moment.uniform(0, 0.3)
    running.wait_for_step(step)
    time.sleep(delay_s)
    return f"{delay_s:.2f} s after step {step}"


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
    assert RunFolder(str(again.run)).holder() is None
    assert_same(again.run, whole[num_workers])
    proved(f"driver {how.name}", f"seed {SEED - driver_kill}: {when}; all gone after {gone_s:.1f} s")


@pytest.mark.timeout(420)
def test_a_run_whose_controller_is_killed_ends_with_the_same_bits(
    controller_kill: int, whole: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    moment = random.Random(SEED + 100 + controller_kill)
    running = train(tmp_path, packed)
    when = at_a_random_moment(running, moment)
    running.kill("ray::ImplicitFunc")  # a trial of Tune, in which Train's controller is
    running.wait()
    assert len(list((running.run / "attempts").iterdir())) == 2
    assert_same(running.run, whole[1])
    proved("controller killed", f"seed {SEED + 100 + controller_kill}: {when}")


@pytest.mark.timeout(420)
@pytest.mark.parametrize("victim", ["ray::RayTrainWorker", ""], ids=["worker", "command"])
@pytest.mark.parametrize("num_workers", [3, 4])
def test_a_run_of_many_ranks_that_is_killed_ends_with_the_same_bits(
    many_kill: int, num_workers: int, victim: str, whole: dict[int, Path], packed: Path, tmp_path: Path, proved
):
    seed = SEED + 1000 * num_workers + many_kill
    moment, flags = random.Random(f"{seed} {victim}"), flags_of(num_workers)
    running = train(tmp_path, packed, *flags)
    when = at_a_random_moment(running, moment)
    if victim:
        running.kill(victim, moment.randrange(num_workers))
    else:
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait(30)
        running = train(tmp_path, packed, *flags)
    running.wait()
    assert_same(running.run, whole[num_workers])
    proved(f"{num_workers} ranks, {'worker' if victim else 'command'} killed", f"seed {seed}: {when}")


@pytest.mark.timeout(420)
def test_two_commands_of_different_recipes_under_one_id_lose_nothing_and_exit_honestly(
    pair: int, packed: Path, tmp_path: Path, proved
):
    """Started at the same moment; in every third pair one of them diverges, and says so."""
    diverges = ("--set", "optimizer.lr=1e30") if pair % 3 == 2 else ()
    short = ("--data", packed, "--set", "length.epochs=1", "--set", "train_fraction=1.0", "--set", "global_batch_size=64")
    one = start(tmp_path, "train", "basic-cnn", *short, *diverges, run="basic-cnn-seed0")
    two = start(tmp_path, "train", "scratch", *short)
    codes = [running.process.wait(240) for running in (one, two)]
    assert codes == [1 if diverges else 0, 0], one.said.read_text() + two.said.read_text()
    results = records.read(SuiteResults, str(two.run.parent / "results.json"))
    statuses = {run.name: run.status for run in results.runs}
    assert statuses == {"basic-cnn-seed0": "failed" if diverges else "finished", "scratch-seed0": "finished"}
    page = (two.run.parent / "report.html").read_text()
    assert all(name in page for name in statuses)
    proved("two commands at once under one id", f"exit codes {codes}")
