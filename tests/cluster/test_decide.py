from hypothesis import given
from hypothesis import strategies as st

from cluster.carry.decide import (
    Done,
    GoOn,
    Leave,
    Start,
    Status,
    Stop,
    SuiteState,
    Wait,
    after_end,
    after_loss,
    next_start,
    start_order,
    verdict,
)
from imgcls.runs import Attempt, End, RunState

OPEN, STARTED, FINISHED, FAILED = Status.OPEN, Status.STARTED, Status.FINISHED, Status.FAILED
PAIR = {"finetuned": "resnet18", "resnet18": None}


def next_action(statuses, sources, *, room: int):
    return next_start(SuiteState(statuses, sources), room=room)[1]


def at_begin(*attempts: Attempt, max_failures: int = 3, result=None, holder: str = "me"):
    return verdict(RunState(result, attempts, holder), command="me", max_failures=max_failures)


DIED = Attempt("me")
PREEMPTED = Attempt("me", End.PREEMPTED)


def crashed(step: int, error: str = "ValueError: x") -> Attempt:
    return Attempt("me", End.CRASHED, error, step)


def test_a_run_waits_for_its_source_and_starts_when_it_is_finished():
    assert next_action({"finetuned": OPEN, "resnet18": STARTED}, PAIR, room=9) == Wait()
    assert next_action({"finetuned": OPEN, "resnet18": FINISHED}, PAIR, room=9) == Start("finetuned")


def test_a_failed_source_blocks_all_below_it_and_leaves_the_others():
    sources = {"a": None, "b": "a", "c": "b", "d": None}
    statuses = {"a": FAILED, "b": OPEN, "c": OPEN, "d": OPEN}
    assert next_action(statuses, sources, room=1) == Start("d")
    assert next_action(statuses | {"d": FINISHED}, sources, room=1) == Done()


def test_no_more_runs_start_than_there_is_room_for():
    assert next_action({"a": STARTED, "b": OPEN}, {}, room=1) == Wait()
    assert next_action({"a": STARTED, "b": OPEN}, {}, room=2) == Start("b")


def test_sources_start_first():
    assert start_order({"basic-cnn": None, "finetuned": "resnet18", "resnet18": None}) == [
        "resnet18",
        "basic-cnn",
        "finetuned",
    ]


def test_a_run_goes_on_after_as_many_failures_as_are_allowed_and_not_after_one_more():
    assert at_begin() == GoOn()
    assert at_begin(DIED, crashed(1), DIED) == GoOn()
    stop = at_begin(DIED, crashed(1), DIED, crashed(2, "OSError: y"))
    assert stop == Stop("failed 4 times, --max-failures is 3; at last: OSError: y")


def test_preempted_attempts_and_those_of_other_commands_do_not_count():
    others = Attempt("other", End.CRASHED, "ValueError: x", 5)
    assert at_begin(others, others, *[PREEMPTED] * 9, DIED, max_failures=1) == GoOn()


def test_the_same_exception_at_the_same_step_is_not_tried_a_third_time():
    assert at_begin(crashed(5), crashed(6)) == GoOn()
    assert at_begin(crashed(5), crashed(5, "ValueError: y")) == GoOn()
    stop = at_begin(crashed(5), DIED, crashed(5))
    assert isinstance(stop, Stop)
    assert stop.reason.startswith("the same exception twice at step 5")


def test_nobody_begins_a_run_that_is_over_refused_or_anothers():
    assert at_begin(result="finished") == Leave()
    assert at_begin(result="failed") == Leave()
    assert at_begin(holder="other") == Leave()
    assert at_begin(Attempt("me", End.REFUSED)) == Leave()
    assert at_begin(Attempt("before", End.REFUSED)) == GoOn()  # another command may accept it


def test_a_run_that_ended_is_what_its_records_say():
    def status_after(committed: RunState, before: Status = STARTED):
        state = SuiteState({"run": before})
        after, stop = after_end(state, "run", committed, command="me", max_failures=3)
        return after.statuses["run"], stop

    assert status_after(RunState("finished", holder="me")) == (FINISHED, None)
    assert status_after(RunState("failed", holder="me")) == (FAILED, None)
    assert status_after(RunState(holder="other")) == (Status.ELSEWHERE, None)
    assert status_after(RunState(None, (Attempt("me", End.REFUSED),), "me")) == (Status.REFUSED, None)
    status, stop = status_after(RunState(None, (DIED,), "me"))
    assert status is FAILED
    assert isinstance(stop, Stop)
    assert status_after(RunState(None, (), "me"), FINISHED) == (FINISHED, None)  # a late word changes nothing
    assert status_after(RunState(None, (), "me"), OPEN) == (OPEN, None)


def test_a_run_whose_lease_is_lost_is_not_started_here():
    def after(status: Status) -> Status:
        return after_loss(SuiteState({"run": status}), "run").statuses["run"]

    assert after(OPEN) is Status.ELSEWHERE
    assert after(STARTED) is STARTED  # until it has ended
    assert after(FINISHED) is FINISHED


@given(parents=st.lists(st.integers(-1, 8), min_size=1, max_size=9))
def test_start_order_keeps_every_run(parents: list[int]):
    runs = {f"r{i}": f"r{p % i}" if i and p >= 0 else None for i, p in enumerate(parents)}
    assert sorted(start_order(runs)) == sorted(runs)


def test_a_run_whose_attempts_cannot_be_counted_has_failed_unless_another_command_holds_it():
    damaged = RunState(None, (), "me", "began.json was altered")
    assert verdict(damaged, command="me", max_failures=9) == Stop("began.json was altered")
    assert verdict(damaged, command="mine", max_failures=9) == Leave()
    assert verdict(RunState(damage="the lease"), command="me", max_failures=9) == Leave()
    state, stop = after_end(SuiteState({"a": STARTED}), "a", damaged, command="me", max_failures=9)
    assert (state.statuses["a"], stop) == (FAILED, Stop("began.json was altered"))
