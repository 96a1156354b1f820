"""What a suite and a run do next: a pure function of what is known and what happened. No Ray, no clock, no storage.

    (state, event) -> (state, action)

`cluster.searcher` asks it for a suite, in the process of the command; `cluster.run` asks it at each start of a run, in
the run's own process, with nothing but what is committed. Ray Train restarts workers and Ray Tune runs whose
controller died; whether such a start goes on is said here.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import assert_never

from imgcls.errors import STORAGE_FAILED


class Status(Enum):
    OPEN = "open"
    """Ready, or waiting for its source."""
    STARTED = "started"
    FINISHED = "finished"
    FAILED = "failed"
    REFUSED = "refused"
    """It would go on under other numerics, and nobody has accepted that: open for the next command."""
    ELSEWHERE = "elsewhere"
    """Another command has taken it over."""


class End(Enum):
    """How an attempt ended."""

    UNKNOWN = "unknown"
    """It told nobody: killed, or under way."""
    CRASHED = "crashed"
    PREEMPTED = "preempted"
    """Its node was about to be taken away; whatever came then is not counted."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a run, as its records tell."""

    command: str
    end: End = End.UNKNOWN
    error: str = ""
    step: int = 0
    """At which it crashed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is committed of one run."""

    result: Status | None = None
    """FINISHED or FAILED, where a result lies there."""
    attempts: tuple[Attempt, ...] = ()
    holder: str | None = None
    """The command that holds the run's lease."""


@dataclass(frozen=True, slots=True)
class State:
    command: str
    max_failures: int
    statuses: Mapping[str, Status] = field(default_factory=dict)
    """By run, in the order in which they should start."""
    sources: Mapping[str, str | None] = field(default_factory=dict)
    """The run that each one waits for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Another run could start, while fewer than `room` are under way."""

    room: int


@dataclass(frozen=True, slots=True)
class Begins:
    """A process has begun to carry the run out: the first time, or after a failure."""

    run: str
    seen: Seen


@dataclass(frozen=True, slots=True)
class Ended:
    """Nobody carries the run out for this command any more."""

    run: str
    seen: Seen


@dataclass(frozen=True, slots=True)
class Lost:
    """Another command holds the run's lease."""

    run: str


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


Event = Asked | Begins | Ended | Lost
Action = Start | Wait | Done | GoOn | Leave | Stop


def decide(state: State, event: Event) -> tuple[State, Action]:
    """Repeated and late events are answered as they were; a run that is over stays so."""
    match event:
        case Asked(room):
            return _next_start(state, room)
        case Begins(_, seen):
            return state, _at_begin(state, seen)
        case Ended(run, seen):
            return _at_end(state, run, seen)
        case Lost(run):
            # A run under way is so until it has ended: its workers still hold their place.
            return (_with(state, run, Status.ELSEWHERE) if state.statuses[run] is Status.OPEN else state), Wait()
        case _:
            assert_never(event)


def _next_start(state: State, room: int) -> tuple[State, Action]:
    held_up = _held_up_by(state.statuses, state.sources, (Status.FAILED, Status.REFUSED, Status.ELSEWHERE))
    left = [run for run, status in state.statuses.items() if status is Status.OPEN and run not in held_up]
    if not left:
        return state, Done()
    under_way = sum(status is Status.STARTED for status in state.statuses.values())
    for run in left:
        source = state.sources.get(run)
        if under_way < room and (source is None or state.statuses[source] is Status.FINISHED):
            return _with(state, run, Status.STARTED), Start(run)
    return state, Wait()


def _at_begin(state: State, seen: Seen) -> Action:
    mine = [one for one in seen.attempts if one.command == state.command]
    if seen.result is not None or seen.holder != state.command or (mine and mine[-1].end is End.REFUSED):
        return Leave()
    crashes = Counter((one.error, one.step) for one in mine if one.end is End.CRASHED and not _of_storage(one))
    for (error, step), times in crashes.items():
        if times > 1:
            return Stop(f"the same exception twice at step {step}, which another try would not change: {error}")
    failures = [one for one in mine if one.end in (End.UNKNOWN, End.CRASHED)]
    if len(failures) > state.max_failures:
        told = failures[-1].error or "a worker died without a word; the node's logs may say why"
        return Stop(f"failed {len(failures)} times, --max-failures is {state.max_failures}; at last: {told}")
    return GoOn()


def _of_storage(attempt: Attempt) -> bool:
    """It may answer another time: counted, and no bug however often."""
    return attempt.error.startswith(STORAGE_FAILED)


def _at_end(state: State, run: str, seen: Seen) -> tuple[State, Action]:
    if state.statuses[run] in (Status.FINISHED, Status.FAILED):
        return state, Wait()
    if seen.result is not None:
        return _with(state, run, seen.result), Wait()
    if state.statuses[run] is not Status.STARTED:
        return state, Wait()
    if seen.holder != state.command:
        return _with(state, run, Status.ELSEWHERE), Wait()
    begun = _at_begin(state, seen)
    if isinstance(begun, Leave):
        return _with(state, run, Status.REFUSED), Wait()
    told = begun.reason if isinstance(begun, Stop) else "its process died; the node's logs may say why"
    return _with(state, run, Status.FAILED), Stop(told)


def _with(state: State, run: str, status: Status) -> State:
    return replace(state, statuses={**state.statuses, run: status})


def _held_up_by(statuses: Mapping[str, Status], sources: Mapping[str, str | None], by: tuple[Status, ...]) -> dict[str, str]:
    found = {}
    for run in statuses:
        source = sources.get(run)
        while source is not None and statuses[source] not in by:
            source = sources.get(source)
        if source is not None and statuses[run] is Status.OPEN:
            found[run] = source
    return found


def blocked_by(statuses: Mapping[str, Status], sources: Mapping[str, str | None]) -> dict[str, str]:
    """Runs that can never start, with the failed run, near or far, that they wait for."""
    return _held_up_by(statuses, sources, (Status.FAILED,))


def start_order(runs: Mapping[str, str | None]) -> list[str]:
    """Sources before the others, so that their dependents wait the least; else as they were asked for."""
    wanted = {source for source in runs.values() if source is not None}
    return sorted(runs, key=lambda run: run not in wanted)
