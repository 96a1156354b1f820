"""What a run's attempts leave on record, each written once by who knew it; and all that is committed of a run.

<run>/attempts/00001/began.json     by rank 0, when it goes on
                     rank-0.json    by a rank that could tell how it ended
"""

from datetime import UTC, datetime
from typing import Literal

from cluster import decide
from cluster.decide import End, Seen, Status
from cluster.lease import holder_of
from imgcls import records, storage
from imgcls.records import Record, RunResult


class Began(Record):
    command: str
    at: str
    host: str
    pid: int


class Ending(Record):
    end: Literal["crashed", "preempted", "refused"]
    error: str = ""
    step: int = 0
    trace: str = ""


def look(run_url: str) -> Seen:
    """What is committed of a run."""
    result = records.read_if_there(RunResult, storage.join(run_url, "result.json"))
    return Seen(
        result=None if result is None else Status.FINISHED if result.status == "finished" else Status.FAILED,
        attempts=tuple(_attempt(storage.join(run_url, "attempts", name)) for name in _numbers(run_url)),
        holder=holder_of(run_url),
    )


def begin(run_url: str, *, command: str, host: str, pid: int) -> int:
    """A new attempt is on record; returns its number."""
    number = int(max(storage.folders(storage.join(run_url, "attempts")), default="0")) + 1
    began = Began(command=command, at=datetime.now(UTC).isoformat(timespec="seconds"), host=host, pid=pid)
    records.write(began, storage.join(_url(run_url, number), "began.json"))
    return number


def end(run_url: str, number: int, ending: Ending, *, rank: int) -> None:
    """How the attempt ended is on record. A preemption that was told stays: what comes after it is its consequence."""
    storage.create_bytes(storage.join(_url(run_url, number), f"rank-{rank}.json"), records.sealed(ending))


def last_trace(run_url: str) -> str:
    """The traceback of a rank of the last attempt, where one left it."""
    numbers = _numbers(run_url)
    endings = _endings(storage.join(run_url, "attempts", numbers[-1])) if numbers else []
    return next((one.trace for one in endings if one.trace), "")


def _url(run_url: str, number: int) -> str:
    return storage.join(run_url, "attempts", f"{number:05d}")


def _numbers(run_url: str) -> list[str]:
    """Of the attempts that began; a folder without a beginning is a lost write."""
    url = storage.join(run_url, "attempts")
    return [name for name in storage.folders(url) if storage.exists(storage.join(url, name, "began.json"))]


def _attempt(url: str) -> decide.Attempt:
    began = records.read(Began, storage.join(url, "began.json"))
    endings = _endings(url)
    if not endings:
        return decide.Attempt(began.command)
    first = endings[0]
    return decide.Attempt(began.command, End(first.end), first.error, first.step)


def _endings(url: str) -> list[Ending]:
    """Of all ranks that told one: a preemption first, whoever saw it."""
    ranks = [name for name in storage.files(url) if name.startswith("rank-")]
    endings = [records.read(Ending, storage.join(url, name)) for name in ranks]
    return sorted(endings, key=lambda one: one.end != "preempted")
