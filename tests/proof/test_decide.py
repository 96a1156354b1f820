"""Thousands of schedules of kills, lost writes, repeated and late events, played against `decide` with an oracle.

The world below is what stands around `decide`: storage, commands, trials that Tune starts, processes that Train starts
again. It knows what really happened; `decide` knows what is on record. Mutations of `decide` have to be found.
"""

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import cluster.carry.decide as shipped
from imgcls.runs import Attempt, held_up

STEPS = 3
"""Of every run."""
ROOM = 2
RUNS = {"finetuned": "resnet18", "scratch": None, "regularized": None, "resnet18": None, "grandchild": "finetuned"}
MAX_FAILURES = 2


@dataclass
class Stored:
    """A run's folder."""

    result: str | None = None
    attempts: list = field(default_factory=list)
    holder: str | None = None
    committed: int = 0


@dataclass
class Process:
    """Rank 0 of a run, or Train about to start one."""

    command: str
    run: str
    number: int | None = None
    """Of its attempt in the store, once it goes on."""
    leaving: bool = False


class World:
    def __init__(self, decide: ModuleType) -> None:
        self.d = decide
        self.store = {run: Stored() for run in RUNS}
        self.states: dict[str, object] = {}
        """Of the commands that live."""
        self.processes: list[Process] = []
        self.ended: list[tuple[str, str]] = []
        """(command, run): events that have happened, and may be told late, or twice."""
        self.failures: dict[tuple[str, str], list[object]] = {}
        """What really went wrong in a command's run and counts."""
        self.num_commands = 0

    def committed(self, run: str):
        s = self.store[run]
        return self.d.RunState(s.result, tuple(Attempt(*facts) for facts in s.attempts), s.holder)

    def command(self) -> None:
        """A command begins, where the leases of what it wants are nobody's that lives."""
        wanted = [run for run, s in self.store.items() if s.result is None]
        if any(self.store[run].holder in self.states for run in wanted):
            return
        self.num_commands += 1
        name = f"c{self.num_commands}"
        for run in wanted:
            self.store[run].holder = name
        order = self.d.start_order(RUNS)
        statuses = {run: self.d.Status(self.store[run].result or "open") for run in order}
        self.states[name] = self.d.SuiteState(statuses, RUNS)

    def ask(self, command: str):
        self.states[command], action = self.d.next_start(self.states[command], room=ROOM)
        if isinstance(action, self.d.Start):
            run = action.run
            source = RUNS[run]
            assert source is None or self.store[source].result == "finished", f"{run} starts before {source} is finished"
            here = [p for p in self.processes if p.command == command]
            assert run not in [p.run for p in here], f"{run} is started twice"
            assert (command, run) not in self.ended, f"{run} is started again in one command"
            assert len(here) < ROOM, "more are under way than there is room for"
            self.processes.append(Process(command, run))
        return action

    def begin(self, process: Process, *, lost: bool) -> None:
        """Rank 0 looks at the records. lost: it dies before it can write."""
        stored, key = self.store[process.run], (process.command, process.run)
        committed = self.committed(process.run)
        action = self.d.verdict(committed, command=process.command, max_failures=MAX_FAILURES)
        happened = self.failures.setdefault(key, [])
        if isinstance(action, self.d.GoOn):
            assert stored.result is None, "a run that is over is carried out again"
            assert stored.holder == process.command, "a run is carried out by two commands"
            recorded = [a for a in stored.attempts if a[0] == process.command and a[1].value in ("unknown", "crashed")]
            assert len(recorded) <= MAX_FAILURES, "more failures than are allowed"
            assert not _repeated(recorded), "the same exception at the same step is tried a third time"
            if lost:
                self.fail(process, None)
                return
            stored.attempts.append((process.command, self.d.End.UNKNOWN, "", 0))
            process.number = len(stored.attempts) - 1
        elif isinstance(action, self.d.Stop):
            assert len(happened) > MAX_FAILURES or _repeated(happened), f"stopped too early: {action.reason}"
            if not lost:
                self.write_result(process.run, "failed")
            self.end(process)
        else:
            over = stored.result is not None or stored.holder != process.command
            refused = bool(stored.attempts) and stored.attempts[-1][1] is self.d.End.REFUSED
            assert over or refused, "a run is left that nobody else carries out"
            self.end(process)

    def train(self, process: Process, *, lost: bool, again: bool = False) -> None:
        """A step, and its commit; with the last one the result. lost: it dies before the write; again: right after it."""
        stored = self.store[process.run]
        if lost:
            self.fail(process, None)
        elif stored.committed < STEPS:
            stored.committed += 1
        else:
            self.write_result(process.run, "finished")
            if again:
                process.number, process.leaving = None, False
            else:
                self.end(process)

    def crash(self, process: Process, error: str, *, lost: bool) -> None:
        step = self.store[process.run].committed
        if not lost and not process.leaving:
            self.record(process, self.d.End.CRASHED, error, step)
        self.fail(process, None if lost else (error, step))

    def preempt(self, process: Process, *, lost: bool) -> None:
        if not lost:
            self.record(process, self.d.End.PREEMPTED)
            process.leaving = True

    def refuse(self, process: Process) -> None:
        self.record(process, self.d.End.REFUSED)
        self.end(process)

    def record(self, process: Process, end, error: str = "", step: int = 0) -> None:
        assert process.number is not None
        self.store[process.run].attempts[process.number] = (process.command, end, error, step)

    def write_result(self, run: str, result: str) -> None:
        if self.store[run].result is not None:
            assert result != "finished", f"{run} was over, and is {result} again"
            return  # an earlier result stays
        assert result != "finished" or self.store[run].committed == STEPS
        self.store[run].result = result

    def fail(self, process: Process, error: tuple[str, int] | None) -> None:
        """The process is gone; Train, or Tune where the controller went with it, starts another."""
        if not process.leaving:
            self.failures.setdefault((process.command, process.run), []).append(error)
        process.number, process.leaving = None, False
        if process.command not in self.states:
            self.processes.remove(process)

    def give_up(self, process: Process) -> None:
        """Train and Tune have tried as often as each may."""
        self.end(process)

    def end(self, process: Process) -> None:
        self.processes.remove(process)
        if process.command in self.states:
            self.ended.append((process.command, process.run))

    def hear(self, command: str, run: str) -> None:
        """The searcher is told that a trial is over."""
        if command not in self.states:
            return
        if any(p.command == command and p.run == run for p in self.processes):
            return
        committed, bound = self.committed(run), {"command": command, "max_failures": MAX_FAILURES}
        self.states[command], stop = self.d.after_end(self.states[command], run, committed, **bound)
        if stop is not None:
            assert self.store[run].holder == command, "another command's run is failed"
            self.write_result(run, "failed")
        status = self.states[command].statuses[run].value  # pyright: ignore[reportAttributeAccessIssue]
        if status in ("finished", "failed", "stopped"):
            assert self.store[run].result == status, f"{run} counts as {status}, and its records say otherwise"
        assert status != "started", f"{run} has ended and counts as under way"

    def kill_command(self, command: str, *, zombies: bool) -> None:
        """SIGKILL; its processes die with it, or a moment later."""
        del self.states[command]
        if not zombies:
            self.processes = [p for p in self.processes if p.command != command]

    def finish(self) -> None:
        """No more faults: what was begun ends, and a last command does what is left."""
        for command in list(self.states):
            self.play_on(command)
            for s in self.store.values():
                s.holder = None if s.holder == command else s.holder
            self.kill_command(command, zombies=False)
        self.processes = []
        self.command()
        for command in list(self.states):
            assert self.play_on(command), "the suite does not end"
        results = {run: s.result for run, s in self.store.items()}
        blocked = held_up(RUNS, {run for run, result in results.items() if result in ("failed", "stopped")})
        assert all(results[run] in ("finished", "failed", "stopped") or run in blocked for run in RUNS), results
        assert not self.processes, "a process is left"

    def play_on(self, command: str) -> bool:
        for _ in range(200):
            for process in [p for p in self.processes if p.command == command]:
                if process.number is None:
                    self.begin(process, lost=False)
                else:
                    self.train(process, lost=False)
            for told in list(self.ended):
                self.hear(*told)
            if isinstance(self.ask(command), self.d.Done) and not any(p.command == command for p in self.processes):
                return True
        return False


def _repeated(failures: list) -> bool:
    told = [one[-2:] if one is not None and len(one) > 2 else one for one in failures]
    crashes = [one for one in told if one is not None and one[0]]
    return len(set(crashes)) < len(crashes)


class Schedule(RuleBasedStateMachine):
    decide: ModuleType = shipped

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.decide)
        self.world.command()

    def pick(self, pick: int, beginning: bool) -> Process | None:
        found = [p for p in self.world.processes if (p.number is None) == beginning]
        return found[pick % len(found)] if found else None

    def command_of(self, pick: int) -> str | None:
        found = list(self.world.states)
        return found[pick % len(found)] if found else None

    @rule(pick=st.integers(0, 3))
    def asks(self, pick: int) -> None:
        if command := self.command_of(pick):
            self.world.ask(command)

    @rule(pick=st.integers(0, 7), lost=st.sampled_from([False, False, True]))
    def begins(self, pick: int, lost: bool) -> None:
        if process := self.pick(pick, beginning=True):
            self.world.begin(process, lost=lost)

    @rule(
        pick=st.integers(0, 7),
        steps=st.integers(1, STEPS + 1),
        lost=st.sampled_from([False, False, False, True]),
        again=st.sampled_from([False, False, True]),
    )
    def trains(self, pick: int, steps: int, lost: bool, again: bool) -> None:
        process = self.pick(pick, beginning=False)
        for step in range(steps):
            if process in self.world.processes and process.number is not None:
                self.world.train(process, lost=lost and step == steps - 1, again=again)

    @rule(
        pick=st.integers(0, 7),
        how=st.sampled_from(["killed", "error a", "error b", "preempted"]),
        times=st.integers(1, 3),
        lost=st.sampled_from([False, False, True]),
    )
    def fails(self, pick: int, how: str, times: int, lost: bool) -> None:
        """Once, or again and again. lost: the last time it cannot tell how."""
        process = self.pick(pick, beginning=False) or self.pick(pick, beginning=True)
        for time in range(times):
            if process in self.world.processes and process.number is None:
                self.world.begin(process, lost=False)
            if process in self.world.processes and process.number is not None:
                tells = not (lost and time == times - 1)
                if how == "preempted":
                    self.world.preempt(process, lost=not tells)
                if how in ("killed", "preempted"):
                    self.world.fail(process, None)
                else:
                    self.world.crash(process, how, lost=not tells)

    @rule(pick=st.integers(0, 7), lost=st.booleans())
    def is_preempted(self, pick: int, lost: bool) -> None:
        if process := self.pick(pick, beginning=False):
            self.world.preempt(process, lost=lost)

    @rule(pick=st.integers(0, 7))
    def is_refused(self, pick: int) -> None:
        if process := self.pick(pick, beginning=False):
            self.world.refuse(process)

    @rule(pick=st.integers(0, 7), again=st.booleans(), result=st.sampled_from(["failed", "stopped"]))
    def diverges_or_is_stopped(self, pick: int, again: bool, result: str) -> None:
        """again: only one rank knows, the others wait, and Train starts all of them again."""
        if process := self.pick(pick, beginning=False):
            self.world.write_result(process.run, result)
            if again:
                process.number = None
            else:
                self.world.end(process)

    @rule(pick=st.integers(0, 7))
    def is_given_up(self, pick: int) -> None:
        if process := self.pick(pick, beginning=True):
            self.world.give_up(process)

    @precondition(lambda self: self.world.ended)
    @rule(pick=st.integers(0, 20))
    def an_end_is_told_late_or_again(self, pick: int) -> None:
        self.world.hear(*self.world.ended[pick % len(self.world.ended)])

    @rule(pick=st.integers(0, 3), zombies=st.booleans())
    def a_command_is_killed(self, pick: int, zombies: bool) -> None:
        if command := self.command_of(pick):
            self.world.kill_command(command, zombies=zombies)

    @rule()
    def a_command_begins(self) -> None:
        self.world.command()

    @rule(pick=st.integers(0, 3), run=st.sampled_from(sorted(RUNS)))
    def a_lease_is_lost(self, pick: int, run: str) -> None:
        """The command did not live for a while, and another took this run."""
        command = self.command_of(pick)
        if command and self.world.store[run].holder == command and self.world.store[run].result is None:
            self.world.store[run].holder = "other"
            self.world.states[command] = self.world.d.after_loss(self.world.states[command], run)

    @invariant()
    def what_is_committed_stays(self) -> None:
        for s in self.world.store.values():
            assert s.result != "finished" or s.committed == STEPS

    def teardown(self) -> None:
        self.world.finish()


def test_no_schedule_loses_doubles_hurries_or_leaves_anything(num_schedules: int, proved):
    play(shipped, num_schedules)
    proved("schedules through decide", "no violation", n=num_schedules)


MUTATIONS = {
    "a run starts before its source is finished": (
        "state.statuses[source] is Status.FINISHED",
        "state.statuses[source] is not Status.OPEN",
    ),
    "one run too many is under way": ("if under_way < room", "if under_way <= room"),
    "a finished run is begun again": ("if committed.result is not None or committed.holder", "if committed.holder"),
    "another command's run is begun": ("or committed.holder != command or", "or"),
    "preemptions are counted": ("in (End.UNKNOWN, End.CRASHED)]", "is not End.REFUSED]"),
    "one failure too few is allowed": ("len(failures) > max_failures", "len(failures) >= max_failures"),
    "one failure too many is allowed": ("len(failures) > max_failures", "len(failures) > max_failures + 1"),
    "a bug is tried for ever": ("if times > 1:", "if times > 9:"),
    "failures of earlier commands are counted": ("if attempt.command == command]", "]"),
    "a run that died stays under way": ("return _with(state, run, Status.FAILED), stop", "return state, None"),
    "a failed source is waited for": ("(Status.FAILED, Status.STOPPED, Status.REFUSED, Status.ELSEWHERE)", "()"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_of_decide_is_found(mutation: str, num_schedules: int, proved):
    old, new = MUTATIONS[mutation]
    assert shipped.__file__ is not None
    source = Path(shipped.__file__).read_text()
    assert source.count(old) == 1
    spec = importlib.util.spec_from_loader("mutated_decide", loader=None)
    assert spec is not None
    mutated = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutated  # dataclasses look their module up
    exec(compile(source.replace(old, new), "mutated", "exec"), mutated.__dict__)
    with pytest.raises(AssertionError):
        play(mutated, max(2000, num_schedules), report=False)
    proved("mutations of decide found", mutation)


def play(decide: ModuleType, num_schedules: int, *, report: bool = True) -> None:
    machine = type("Schedule", (Schedule,), {"decide": decide})
    phases = [Phase.generate, Phase.shrink] if report else [Phase.generate]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_schedules,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=phases,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        ),
    )
