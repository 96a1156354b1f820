"""What becomes of a run whose workers Train has given up. Without Ray, which would keep the settings of its first import."""

from pathlib import Path

import pytest

from cluster.carry.run import Assignment, after_giving_up
from imgcls import records
from imgcls.catalogue import quick
from imgcls.records import Placement, RunConfig, RunOptions, SuiteRecord
from imgcls.runs import End, Ending, Lease, RunFolder

CONFIG = RunConfig(catalogue="quick", recipe=quick.SCRATCH, seed=0, data_digest="d", init=None, synthetic=True)
PREEMPTED = Ending(end=End.PREEMPTED)


class GivenUpError(Exception):
    """As Train's own, it holds what each rank raised."""

    def __init__(self) -> None:
        super().__init__("given up")
        self.worker_failures = {2: ValueError("x"), 1: RuntimeError("gloo: a rank has gone")}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Held by the command `me`."""
    folder = RunFolder(str(tmp_path / CONFIG.name))
    records.write(Lease(command="me", host="here", pid=1, renewals=0), folder.lease_url(1))
    return folder


def given_up(run: RunFolder, ending: Ending | None, *, max_failures: int = 0, num_attempts: int = 0) -> int | None:
    """After one more attempt, that ended so."""
    number = run.begin("me")
    if ending is not None:
        run.end(number, ending, rank=0)
    given = Assignment(
        command="me",
        config=CONFIG,
        data_url="d",
        run_url=run.url,
        placement=Placement(num_workers=2, cpus_per_worker=1, gpus_per_worker=0),
        options=RunOptions(max_failures=max_failures),
        tested=True,
        environment={},
    )
    return after_giving_up(given, GivenUpError(), num_attempts)


def reason(run: RunFolder) -> str:
    result = run.result()
    assert result is not None
    assert result.status == "failed"
    return str(result.error)


def test_what_the_other_ranks_make_of_preempted_nodes_does_not_fail_the_run(run: RunFolder):
    assert [given_up(run, PREEMPTED, num_attempts=number) for number in range(5)] == [1, 2, 3, 4, 5]
    assert run.result() is None


def test_a_preemption_of_an_earlier_time_is_no_reason_to_begin_anew(run: RunFolder):
    assert given_up(run, PREEMPTED, num_attempts=1) is None
    assert reason(run) == "rank 1: RuntimeError: gloo: a rank has gone"


def test_a_run_that_failed_too_often_says_so(run: RunFolder):
    assert given_up(run, Ending(end=End.CRASHED, error="OSError: x", step=3)) is None
    assert reason(run) == "failed 1 times, --max-failures is 0; at last: OSError: x"


def test_a_run_that_train_gave_up_for_a_reason_on_no_record_says_what_the_first_rank_raised(run: RunFolder):
    assert given_up(run, None, max_failures=9) is None
    assert reason(run) == "rank 1: RuntimeError: gloo: a rank has gone"


OF_ANOTHER_VERSION = records.sealed(CONFIG)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("attempts/00001/began.json", b"damaged"),
        ("attempts/00001/rank-0.json", b"damaged"),
        ("attempts/00001/rank-0.json", OF_ANOTHER_VERSION),
    ],
)
def test_a_run_whose_attempts_cannot_be_counted_has_failed_and_says_why(run: RunFolder, record: str, said: bytes):
    run.end(run.begin("me"), PREEMPTED, rank=0)
    (Path(run.url) / record).write_bytes(said)
    assert given_up(run, PREEMPTED) is None
    assert record in reason(run)


def test_a_run_whose_lease_cannot_be_read_is_left_alone(run: RunFolder):
    Path(run.lease_url(1)).write_text("damaged")
    assert given_up(run, PREEMPTED) is None
    assert run.result() is None
    assert "leases/00001.json was altered" in run.state().damage


def test_a_suite_says_which_record_of_a_run_is_damaged_that_another_command_holds(run: RunFolder):
    records.write(SuiteRecord(id="quick", data="d", search=None), run.suite.record_url)
    assert run.create_config(CONFIG)
    (Path(run.url) / "attempts" / f"{run.begin('other'):05d}" / "began.json").write_text("damaged")
    (open_run,) = run.suite.results().runs
    assert (open_run.status, "began.json was altered" in str(open_run.error)) == ("open", True)
