"""A whole search on synthetic images: what it leaves, and that its command may be killed."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from imgcls import records
from imgcls.records import RunResult
from tests.conftest import run_in
from tests.processes import until
from tests.proof.commands import start

SMALL = ("--set", "global_batch_size=32", "--set", "input.px=32", "--set", "input.stored_px=32")
SEARCH = ("search", "basic-cnn", "--metric", "val/loss", "--num-trials", "8", "--max-epochs", "3", *SMALL)


def over(suite: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in suite.glob("*/result.json")}


@pytest.mark.slow
def test_a_search_stops_the_worse_trials_outlives_its_command_and_leaves_a_recipe_that_trains(packed: Path, tmp_path: Path):
    running, suite = start(tmp_path, *SEARCH, "--data", packed), tmp_path / "runs" / "proof"
    until(lambda: len(over(suite)) > 2, 240, "three trials that are over")
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    before = over(suite)
    said = start(tmp_path, *SEARCH, "--data", packed).wait()
    after = over(suite)
    assert {name: after[name] for name in before} == before
    results = [records.read(RunResult, str(suite / name / "result.json")) for name in after]
    counts = Counter(one.status for one in results)
    assert counts["finished"] + counts["stopped"] == 8, said
    assert counts["finished"] > 0 < counts["stopped"]

    assert all(one.test is None for one in results)
    assert not [*suite.glob("*/predictions.npy")]
    assert not [log for log in suite.glob("*/log.txt") if "tested" in log.read_text()]
    assert "Which trial is the best?" in (suite / "report.html").read_text()

    best = min((one for one in results if one.val), key=lambda one: one.val.loss if one.val else 0.0)
    assert best.name in said
    words = ("train", "--recipe", suite / "recipe.json", "--data", packed, "--storage", tmp_path / "runs", "--id", "found")
    trained = run_in(tmp_path, *words, env={"RAY_ADDRESS": ""})
    assert trained.returncode == 0, trained.stdout + trained.stderr
    found = records.read(RunResult, str(tmp_path / "runs" / "found" / "basic-cnn-seed0" / "result.json"))
    assert (found.weights_sha256, found.val) == (best.weights_sha256, best.val), "the same bits as the trial"
    assert found.test is not None
