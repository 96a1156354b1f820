"""What a trial makes of a run whose workers Train has given up, without Ray's processes."""

from pathlib import Path

import pytest
from ray.train import WorkerGroupError

from cluster.carry import run as carrying
from cluster.carry.run import Assignment, trial
from imgcls import records
from imgcls.catalogue import quick
from imgcls.records import Placement, RunConfig, RunOptions
from imgcls.runs import End, Ending, Lease, RunFolder

CONFIG = RunConfig(catalogue="quick", recipe=quick.SCRATCH, seed=0, data_digest="d", init=None, synthetic=True)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Held by the command `me`."""
    folder = RunFolder(str(tmp_path / CONFIG.name))
    records.write(Lease(command="me", host="here", pid=1, renewals=0), folder.lease_url(1))
    return folder


@pytest.fixture
def tried(run: RunFolder, monkeypatch: pytest.MonkeyPatch):
    """Carries the run out; Train gives its workers up once after each of these endings of an attempt."""

    def carry_out(*endings: Ending | None, max_failures: int = 0) -> int:
        calls = []

        def train(given: Assignment, loop_config: dict) -> None:
            if len(calls) < len(endings):
                number = run.begin("me")
                calls.append(number)
                if (ending := endings[number - 1]) is not None:
                    run.end(number, ending, rank=0)
                raise WorkerGroupError("given up", {1: RuntimeError("gloo: a rank has gone")})
            run.finish(_finished())

        monkeypatch.setattr(carrying, "_train", train)
        placement = Placement(num_workers=2, cpus_per_worker=1, gpus_per_worker=0)
        given = Assignment(
            command="me",
            config=CONFIG,
            data_url="d",
            run_url=run.url,
            placement=placement,
            options=RunOptions(max_failures=max_failures),
            environment={},
        )
        trial({"run": CONFIG.name}, {CONFIG.name: given.model_dump_json()})
        return len(calls)

    return carry_out


def _finished():
    from imgcls.records import RunResult

    return RunResult.of(CONFIG, status="finished")


def reason(run: RunFolder) -> str | None:
    result = run.result()
    assert result is not None
    return result.error if result.status == "failed" else None


def test_what_the_other_ranks_make_of_preempted_nodes_does_not_fail_the_run(run: RunFolder, tried):
    assert tried(*[Ending(end=End.PREEMPTED)] * 5) == 5
    assert reason(run) is None


def test_a_run_that_failed_too_often_says_so(run: RunFolder, tried):
    assert tried(Ending(end=End.CRASHED, error="OSError: x", step=3)) == 1
    assert reason(run) == "failed 1 times, --max-failures is 0; at last: OSError: x"


def test_a_run_that_train_gave_up_for_a_reason_on_no_record_says_what_the_first_rank_raised(run: RunFolder, tried):
    tried(None, max_failures=9)
    assert reason(run) == "rank 1: RuntimeError: gloo: a rank has gone"


def test_a_damaged_record_of_an_attempt_fails_the_run_at_once_and_is_named(run: RunFolder, tried, tmp_path: Path):
    run.begin("me")
    next(tmp_path.rglob("began.json")).write_text("{}")
    assert tried(None, Ending(end=End.PREEMPTED)) == 1
    assert "began.json is damaged" in str(reason(run))
