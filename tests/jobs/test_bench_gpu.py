"""`bench gpu` without a GPU and without Ray: which steps are done, when their records lie there, what a kill leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from imgcls.errors import DataError
from jobs._door import DONE, SOME_FAILED
from tests.conftest import ROOT
from tests.processes import alive, descendants, title_of, until
from tests.proof.gpu import SMALL, STEPS, Bench, NotDoneError, Step, StepRecord, carry_out
from tests.proof.records import newest

HARDWARE = {"cpu": "x", "cpus": "2", "vectors": "AVX2"}
FOR_EVER = ("http.server", "0", "--bind", "127.0.0.1")


def bench(folder: Path, seconds: float = 60.0) -> Bench:
    return Bench(folder, SMALL, HARDWARE, time.monotonic() + seconds, print)


def recorded(folder: Path, step: str) -> StepRecord | None:
    found = newest(StepRecord, folder, f"gpu-{step}")
    return found and found[1]


def status(folder: Path, step: str) -> str:
    record = recorded(folder, step)
    return record.status if record else "none"


def test_each_step_is_recorded_before_the_next_begins_and_done_once(tmp_path: Path):
    seen: list[str] = []

    def first(b: Bench) -> None:
        seen.append(status(tmp_path, "first"))
        b.found["figure"] = 2.5
        b.run("json.tool", "--help")

    def second(_: Bench) -> None:
        seen.append(status(tmp_path, "first"))
        raise NotDoneError("skipped", "no such thing here")

    steps = (Step("first", 1, 9, first), Step("second", 1, 9, second))
    assert carry_out(bench(tmp_path), steps) == DONE
    assert carry_out(bench(tmp_path), steps) == DONE
    assert seen == ["none", "done"]
    record = recorded(tmp_path, "first")
    assert record is not None
    assert (record.found, record.commands, record.synthetic) == ({"figure": 2.5}, ("python -m json.tool --help",), True)
    assert record.hardware == HARDWARE
    other = recorded(tmp_path, "second")
    assert other is not None
    assert (other.status, other.why) == ("skipped", "no such thing here")


@pytest.mark.parametrize("error", [DataError("no data"), ValueError("a fault of ours")])
def test_a_step_that_fails_stops_no_other_and_is_tried_again(tmp_path: Path, error: Exception):
    tries: list[int] = []

    def fails_once(_: Bench) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise error

    steps = (Step("a", 1, 9, fails_once), Step("b", 1, 9, lambda _: None))
    assert carry_out(bench(tmp_path), steps) == SOME_FAILED
    assert (status(tmp_path, "a"), status(tmp_path, "b")) == ("failed", "done")
    assert carry_out(bench(tmp_path), steps) == DONE
    assert status(tmp_path, "a") == "done"


def test_a_command_that_fails_is_told_with_the_end_of_its_output(tmp_path: Path):
    assert carry_out(bench(tmp_path), [Step("a", 1, 9, lambda b: b.run("json.tool", "/no/such/file"))]) == SOME_FAILED
    record = recorded(tmp_path, "a")
    assert record is not None
    assert "exit code" in record.why
    assert "No such file" in record.why


def test_what_does_not_fit_is_not_begun_and_what_does_is(tmp_path: Path):
    steps = (Step("long", 1000, 2000, lambda _: None), Step("short", 1, 2, lambda _: None))
    assert carry_out(bench(tmp_path, 20), steps) == DONE
    assert (status(tmp_path, "long"), status(tmp_path, "short")) == ("none", "done")


@pytest.mark.parametrize(("seconds", "most_s"), [(60.0, 0.5), (0.5, 60.0)])
def test_a_command_whose_time_is_over_ends_and_its_step_goes_on_another_time(tmp_path: Path, seconds: float, most_s: float):
    pids: list[int] = []

    def forever(b: Bench) -> None:
        process = b.start(*FOR_EVER)
        pids.append(process.pid)
        try:
            b.finish(process)
        finally:
            b.found["so far"] = 1.0

    runs = tmp_path / "runs" / "a"
    runs.mkdir(parents=True)
    assert carry_out(bench(tmp_path, seconds), [Step("a", 0, most_s, forever, goes_on=True)]) == DONE
    assert alive(pids) == []
    record = recorded(tmp_path, "a")
    assert record is not None
    assert (record.status, record.found) == ("open", {"so far": 1.0})
    assert (
        carry_out(bench(tmp_path), [Step("a", 0, 60, lambda b: b.found.update(runs=str(runs.exists())), goes_on=True)])
        == DONE
    )
    assert status(tmp_path, "a") == "done"
    assert runs.exists()


def test_a_killed_run_that_does_not_go_on_fails_its_step_and_the_one_left_alone_is_not_waited_for(tmp_path: Path):
    class Fake(Bench):
        def training(self, job: str, id: str, *words: str, gpus: float, changes: Sequence[str] = ()) -> list[str]:
            return list(FOR_EVER) if id.endswith("whole") else ["json.tool", "/no/such/file"]

    began, here = time.monotonic(), Fake(tmp_path, SMALL, HARDWARE, time.monotonic() + 60, print)
    step = next(step for step in STEPS if step.name == "killed-1")
    assert carry_out(here, [step]) == SOME_FAILED
    record = recorded(tmp_path, "killed-1")
    assert record is not None
    assert "json.tool /no/such/file" in record.why
    assert time.monotonic() - began < 40
    assert not [pid for pid in descendants(os.getpid()) if "http.server 0" in title_of(pid)]


KILLED = """
import sys
from pathlib import Path
from tests.jobs.test_bench_gpu import FOR_EVER, Step, bench, carry_out
folder, second = Path(sys.argv[1]), FOR_EVER if sys.argv[2] == "hang" else ("json.tool", "--help")
def do(b):
    (folder / f"did-{b.step}").open("a").write("x")
    (folder / "runs" / f"{b.step}-run").mkdir(parents=True)
    b.run(*(second if b.step == "second" else ("json.tool", "--help")))
sys.exit(carry_out(bench(folder), [Step(name, 1, 60, do) for name in ("first", "second", "third")]))
"""


def test_killed_in_the_middle_it_leaves_no_command_behind_and_does_what_is_left(tmp_path: Path):
    def call(second: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), second], cwd=ROOT)

    process = call("hang")
    theirs: list[int] = []

    def begun() -> bool:
        theirs[:] = [pid for pid in descendants(process.pid) if "http.server" in title_of(pid)]
        return len(theirs) == 1 and status(tmp_path, "first") == "done"

    until(begun, 60, "the second step")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not alive(theirs), 10, "its command to end")
    assert [status(tmp_path, name) for name in ("first", "second", "third")] == ["done", "none", "none"]
    assert call("end").wait(60) == DONE
    assert [status(tmp_path, name) for name in ("first", "second", "third")] == ["done", "done", "done"]
    assert [len((tmp_path / f"did-{name}").read_text()) for name in ("first", "second", "third")] == [1, 2, 1]
