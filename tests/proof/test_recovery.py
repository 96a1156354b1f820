"""A hundred kills in a row: the same bits, and the seconds that they cost.

One command, and its record: `python -m pytest tests/proof/test_recovery.py --proof --record`
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.processes import until
from tests.proof.commands import assert_same, flags_of, train
from tests.proof.conftest import Whole
from tests.proof.killed import LOCAL, Killed, commits_of
from tests.system.autoscaled import autoscaled, node_type
from tests.system.heads import Head

pytestmark = pytest.mark.usefixtures("asked_for")

SEED = 20261129
NUM_STEPS = 240
STEPS = (
    *("--set", f"length.epochs={NUM_STEPS // 4}", "--set", "length.patience=null", "--checkpoint-every-n-steps", "1"),
    *("--set", 'model={"kind": "basic-cnn", "dropout": 0.3}', "--set", "input.px=16", "--set", "input.stored_px=16"),
)
"""Flags added to those of `train`: a small model, and a checkpoint at each of so many steps."""
NODES = ("node",) * 5
spent: dict[str, list[float]] = {}
"""Seconds from each kill to the next step, by what was killed."""


@pytest.fixture(scope="module")
def three_at_most() -> Iterator[Head]:
    with autoscaled({"cpu1": node_type(1, 3)}, max_workers=3) as head:
        yield head


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(packed, tmp_path_factory.mktemp("undisturbed"), *STEPS)


@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    killed_run: int, undisturbed: Whole, packed: Path, tmp_path: Path, request: pytest.FixtureRequest, proved
):
    """Every fourth on nodes that an autoscaler replaces; else a local Ray's worker, controller or command is killed."""
    seed, num_workers, on_nodes = SEED + killed_run, 1 + killed_run % 3, killed_run % 4 == 3
    chance, nodes = random.Random(seed), request.getfixturevalue("three_at_most") if on_nodes else None
    flags = (*flags_of(num_workers), *STEPS, "--max-failures", "1000")
    killed = Killed(lambda: train(tmp_path, packed, *flags, env=nodes and nodes.joining), nodes)
    kinds, told = list(NODES if on_nodes else LOCAL), []
    chance.shuffle(kinds)
    for what in kinds:
        killed.wait_for(killed.step() + chance.randrange(4))
        time.sleep(chance.uniform(0, 0.3))
        step = killed.step()
        assert step < NUM_STEPS, "the run came to its end before it was killed"
        began, seconds = killed.kill(what, chance)
        until(lambda began=began: max(commits_of(killed.run).values()) > began, 240, "the attempt's first step")
        seconds += max(commits_of(killed.run).values()) - began
        told.append(f"seed {seed}: one of {num_workers} workers, after step {step}; the next step after {seconds:.1f} s")
        spent.setdefault(what, []).append(seconds)
        print(what, told[-1])
    killed.running.wait(420)
    assert_same(killed.run, undisturbed[num_workers])
    for what, detail in zip(kinds, told, strict=True):
        proved(f"{what} killed, in a run that was killed {len(kinds)} times", detail)


def test_what_a_kill_costs(proved):
    if not spent:
        pytest.skip("nothing was killed")
    local = [seconds for what, some in spent.items() if what != "node" for seconds in some]
    for what, some in {**spent, "worker, controller or command": local}.items():
        median, p95 = np.percentile(some, (50, 95))
        figures = f"median {median:.1f} s, p95 {p95:.1f} s, longest {max(some):.1f} s; n = {len(some)}"
        proved(f"from a kill to the next step: {what}", figures)
