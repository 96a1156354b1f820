"""An hour of training with a kill every five minutes: how much of it counts.

One command, and its record: `python -m pytest tests/proof/test_goodput.py --proof --record`
"""

import random
import time
from itertools import pairwise
from pathlib import Path

import pytest

from imgcls.data import shards
from imgcls.data.synthetic import synthetic_source
from imgcls.training.weights import read_checkpoint
from tests.proof.commands import flags_of, start
from tests.proof.killed import LOCAL, Killed, attempts_of, commits_of

SEED = 20261130
HOUR_S, EVERY_S = 3600, 300
AN_HOUR = ("--set", "train_fraction=1.0", "--set", "length.epochs=1000", "--set", "length.patience=null")
"""`scratch`, an epoch of some minutes."""


@pytest.mark.timeout(HOUR_S + 1200)
def test_goodput_of_an_hour_with_a_kill_every_five_minutes(tmp_path: Path, only_in_full, proved):
    """How often a checkpoint is made is the run's own choice.

    Goodput: what the steps that count take where nothing comes between, by the commits of the same hour, without the
    checkpoints' part of it; over the hour.
    """
    shards.pack(synthetic_source("cifar10", 20_000), str(tmp_path / "packed" / "cifar10"), name="cifar10")
    killed = Killed(
        lambda: start(tmp_path, "train", "scratch", "--data", "packed", *AN_HOUR, *flags_of(2), "--max-failures", "1000")
    )
    chance, seen = random.Random(SEED), set[tuple[float, int]]()
    began = next_kill = time.time()
    while time.time() < began + HOUR_S:
        seen |= {(at, step) for step, at in commits_of(killed.run).items()}
        if time.time() > next_kill + EVERY_S:
            next_kill += EVERY_S
            what = chance.choice(LOCAL)
            spent_s = killed.kill(what, chance)[1]
            print(f"{what} killed, begun again after {spent_s:.1f} s")
        time.sleep(0.5)
    last = read_checkpoint(str(max((killed.run / "checkpoints").glob("*/committed.json")).parent))
    killed.running.process.terminate()
    assert killed.running.process.wait(120) == 130
    (state,) = (state for name, state in last["callbacks"].items() if name.startswith("Recorder"))
    checkpoints = state["seconds"].get("checkpoint", 0.0) / state["seconds"]["fit"]
    attempts, commits = attempts_of(killed.run), sorted(seen)
    clean = [
        (at - before, step - earlier)
        for (before, earlier), (at, step) in pairwise(commits)
        if step > earlier and not any(before < attempt < at for attempt in attempts)
    ]
    pace_s = sum(seconds for seconds, _ in clean) / sum(steps for _, steps in clean)
    (first_at, first), (last_at, step) = commits[0], commits[-1]
    goodput = (step - first) * pace_s * (1 - checkpoints) / (last_at - first_at)
    assert len(attempts) == HOUR_S // EVERY_S  # none at the end
    proved(
        f"an hour with a kill every {EVERY_S / 60:.0f} minutes: goodput {goodput:.1%}",
        f"seed {SEED}: {len(attempts) - 1} kills of worker, controller or command, two workers; {step - first} steps in "
        f"{last_at - first_at:.0f} s, at {pace_s:.3f} s each where nothing came between; {len(clean)} checkpoints in whole "
        f"stretches, {checkpoints:.2%} of the time",
    )
