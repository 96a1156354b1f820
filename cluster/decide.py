"""What a suite does next: a pure function of what its runs came to. No Ray, no clock, no storage.

Called by `cluster.searcher` whenever Tune asks for another trial, and once more at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    OPEN = "open"
    STARTED = "started"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Start:
    """This run is next."""

    run: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Something under way has to end first."""


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing is left to start."""


def next_action(statuses: Mapping[str, Status], sources: Mapping[str, str | None], *, room: int) -> Start | Wait | Done:
    """statuses: by run, in the order in which they should start. sources: the run that each one waits for.

    room: runs that may be under way at the same time.
    """
    blocked = blocked_by(statuses, sources)
    left = [run for run, status in statuses.items() if status is Status.OPEN and run not in blocked]
    if not left:
        return Done()
    under_way = sum(status is Status.STARTED for status in statuses.values())
    for run in left:
        source = sources.get(run)
        if under_way < room and (source is None or statuses[source] is Status.FINISHED):
            return Start(run)
    return Wait()


def blocked_by(statuses: Mapping[str, Status], sources: Mapping[str, str | None]) -> dict[str, str]:
    """Runs that can never start, with the failed run, near or far, that they wait for."""
    blocked = {}
    for run in statuses:
        source = sources.get(run)
        while source is not None and statuses[source] is not Status.FAILED:
            source = sources.get(source)
        if source is not None and statuses[run] is Status.OPEN:
            blocked[run] = source
    return blocked


def start_order(runs: Mapping[str, str | None]) -> list[str]:
    """Sources before the others, so that their dependents wait the least; else as they were asked for."""
    wanted = {source for source in runs.values() if source is not None}
    return sorted(runs, key=lambda run: run not in wanted)
