"""Plain Lightning, no Ray: a run that was killed at any step ends with the bits of one that was not."""

import signal
from pathlib import Path

import pytest

from tests.proof.alone import MOMENTS, TWELVE, result_in, run_alone


@pytest.fixture(scope="module")
def whole(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "twelve-seed0"
    assert run_alone(TWELVE, packed, folder) == [0]
    assert result_in(folder).steps == 12
    return folder


@pytest.mark.parametrize("step", [5, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 13) if s != 5)])
def test_a_run_killed_at_a_step_ends_with_the_same_bits(step: int, whole: Path, packed: Path, tmp_path: Path, proved):
    moment = MOMENTS[(step + 2) % 3]
    every = 3 if moment == "in the step" else 1  # so that some kills lose steps, and the others meet a commit
    assert run_alone(TWELVE, packed, tmp_path, every=every, dies=(step, moment)) == [-signal.SIGKILL]
    assert run_alone(TWELVE, packed, tmp_path, every=every) == [0]
    killed, uninterrupted = result_in(tmp_path), result_in(whole)
    assert killed.weights_sha256 == uninterrupted.weights_sha256
    assert killed.best_weights_sha256 == uninterrupted.best_weights_sha256
    assert killed.test == uninterrupted.test
    assert (tmp_path / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()
    if 3 < step < 12:
        assert "begins with samples [" in (tmp_path / "log.txt").read_text()
    proved("killed at each of twelve steps, without Ray", f"step {step}, {moment}")
