"""What a suite and a run do next: pure functions of what is known and what happened. No Ray, no clock, no storage.

`suite` and `searcher` ask for a suite (`next_start`, `after_end`, `after_loss`) in the process of the command. `run` asks
`verdict` at each beginning of a run, in the run's own process, with nothing but what is committed. Ray Train restarts
workers and Ray Tune runs whose controller died; whether such a start goes on is said here, and is the one bound on them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from imgcls.errors import STORAGE_FAILED
from imgcls.runs import End, RunState, held_up


class Status(StrEnum):
    OPEN = "open"
    """Ready, or waiting for its source."""
    STARTED = "started"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    """By the search that it is a trial of."""
    REFUSED = "refused"
    """It would go on under other numerics, and nobody has accepted that: open for the next command."""
    ELSEWHERE = "elsewhere"
    """Another command has taken it over."""


LOST = (Status.FAILED, Status.STOPPED, Status.REFUSED, Status.ELSEWHERE)
"""What waits for such a run does not start."""


@dataclass(frozen=True, slots=True)
class SuiteState:
    statuses: Mapping[str, Status]
    """By run, in the order in which they should start."""
    sources: Mapping[str, str | None] = field(default_factory=dict)
    """The run that each one waits for."""


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


@dataclass(frozen=True, slots=True)
class GoOn:
    """From the last committed checkpoint, or from the beginning."""


@dataclass(frozen=True, slots=True)
class Leave:
    """There is nothing to do here: the run is over, refused, or another command's."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The run has failed, for this reason: to be recorded, and not tried again."""

    reason: str


def next_start(state: SuiteState, *, room: int) -> tuple[SuiteState, Start | Wait | Done]:
    """Another run could start, while fewer than `room` are under way."""
    lost = {run for run, status in state.statuses.items() if status in LOST}
    waiting = held_up(state.sources, lost)
    left = [run for run, status in state.statuses.items() if status is Status.OPEN and run not in waiting]
    if not left:
        return state, Done()
    under_way = sum(status is Status.STARTED for status in state.statuses.values())
    for run in left:
        source = state.sources.get(run)
        if under_way < room and (source is None or state.statuses[source] is Status.FINISHED):
            return _with(state, run, Status.STARTED), Start(run)
    return state, Wait()


def after_end(
    state: SuiteState, run: str, committed: RunState, *, command: str, max_failures: int
) -> tuple[SuiteState, Stop | None]:
    """Nobody carries the run out for this command any more. Told late or again, a run is what its result says."""
    if committed.result is not None:
        return _with(state, run, Status(committed.result)), None
    if state.statuses[run] is not Status.STARTED:
        return state, None
    if committed.holder != command:
        return _with(state, run, Status.ELSEWHERE), None
    action = verdict(committed, command=command, max_failures=max_failures)
    if isinstance(action, Leave):
        return _with(state, run, Status.REFUSED), None
    stop = action if isinstance(action, Stop) else Stop("its process died; the node's logs may say why")
    return _with(state, run, Status.FAILED), stop


def after_loss(state: SuiteState, run: str) -> SuiteState:
    """Another command holds the run's lease. A run under way stays so until its end: its workers hold their place."""
    return _with(state, run, Status.ELSEWHERE) if state.statuses[run] is Status.OPEN else state


def verdict(committed: RunState, *, command: str, max_failures: int) -> GoOn | Leave | Stop:
    """A process has begun to carry the run out: the first time, or after a failure."""
    mine = [attempt for attempt in committed.attempts if attempt.command == command]
    refused = bool(mine) and mine[-1].end is End.REFUSED
    if committed.result is not None or committed.holder != command or refused:
        return Leave()
    if committed.damage:
        return Stop(committed.damage)
    # Storage may answer another time: its errors are counted below, and are no bug however often they come.
    crashes = Counter((a.error, a.step) for a in mine if a.end is End.CRASHED and not a.error.startswith(STORAGE_FAILED))
    for (error, step), times in crashes.items():
        if times > 1:
            return Stop(f"the same exception twice at step {step}, which another try would not change: {error}")
    failures = [attempt for attempt in mine if attempt.end in (End.UNKNOWN, End.CRASHED)]
    if len(failures) > max_failures:
        last = failures[-1].error or "a worker died without a word; the node's logs may say why"
        return Stop(f"failed {len(failures)} times, --max-failures is {max_failures}; at last: {last}")
    return GoOn()


def _with(state: SuiteState, run: str, status: Status) -> SuiteState:
    return replace(state, statuses={**state.statuses, run: status})


def start_order(runs: Mapping[str, str | None]) -> list[str]:
    """Sources before the others, so that their dependents wait the least; else as they were asked for."""
    return sorted(runs, key=lambda run: run not in runs.values())
