"""What stopping trials early saves, and what it costs: on photographs, beside the same trials trained to their ends.

One command, and its record: `python -m pytest tests/proof/test_search.py --proof --record`, with `IMGCLS_SOURCES`.
"""

import time
from pathlib import Path

import pytest

from imgcls import records
from imgcls.data import shards
from imgcls.data.sources import find_source, open_source
from imgcls.records import RunResult, SuiteResults
from imgcls.results.compare import of_scores
from imgcls.runs import Began
from tests.conftest import run_in
from tests.proof.commands import start

FREED_S = 10
SIXTEEN = ("--num-trials", "16", "--max-epochs", "9", "--set", "train_fraction=0.3")


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def workers_of_stopped(suite: Path) -> dict[str, int]:
    """By trial that was stopped, the process of its last attempt."""
    results = [records.read(RunResult, str(file)) for file in suite.glob("*/result.json")]
    trials = [suite / result.name for result in results if result.status == "stopped"]
    last = {trial.name: max(trial.glob("attempts/*/began.json")) for trial in trials}
    return {name: records.read(Began, str(began)).pid for name, began in last.items()}


@pytest.mark.timeout(3 * 3600)
def test_a_search_takes_half_the_time_of_whole_trials_and_finds_no_worse(tmp_path: Path, only_in_full, proved):
    source = find_source("imagenette")
    if source is None:
        pytest.skip("IMGCLS_SOURCES names no folder with imagenette")
    shards.pack(open_source(source), str(tmp_path / "packed" / "imagenette"), name="imagenette")
    began, suite, seen, slowest_s = time.time(), tmp_path / "runs" / "proof", dict[str, float](), 0.0
    running = start(tmp_path, "search", "basic-cnn", "--data", "packed", *SIXTEEN)
    while running.process.poll() is None:
        for trial, pid in workers_of_stopped(suite).items():
            if exists(pid):
                seen.setdefault(trial, (suite / trial / "result.json").stat().st_mtime)
                slowest_s = max(slowest_s, time.time() - seen[trial])
        time.sleep(0.2)
    running.wait()
    search_s, whole_began = time.time() - began, time.time()
    configs = [word for trial in sorted(suite.glob("*/config.json")) for word in ("--recipe", trial)]
    flags = ("--data", "packed", "--storage", "runs", "--id", "whole")
    done = run_in(tmp_path, "suite", *configs, *flags, env={"RAY_ADDRESS": ""}, timeout_s=7200)
    assert done.returncode == 0, done.stdout + done.stderr
    whole_s = time.time() - whole_began
    searched, whole = (
        records.read(SuiteResults, str(tmp_path / "runs" / name / "results.json")) for name in ("proof", "whole")
    )
    weights = {run.name: run.weights_sha256 for run in whole.finished}
    assert all(weights[run.name] == run.weights_sha256 for run in searched.finished)
    assert searched.best is not None
    assert searched.best.val is not None
    ours, best = searched.best.val.accuracy, max(run.val.accuracy for run in whole.finished if run.val)
    noise = of_scores(searched.best.val)
    proved(
        "16 trials of basic-cnn, the worse stopped early, beside the same trials to their ends",
        f"{search_s:.0f} s and {whole_s:.0f} s, {search_s / whole_s:.2f} of the time; val/accuracy of the best {ours:.4f} "
        f"and {best:.4f}; {len(searched.finished)} of 16 came to their ends, with the same bits; the last worker of a "
        f"stopped trial was gone after {slowest_s:.1f} s at most",
    )
    assert slowest_s < FREED_S
    assert search_s < whole_s / 2
    assert ours >= best - (noise.high - noise.low) / 2
