from hypothesis import given
from hypothesis import strategies as st

from cluster.decide import (
    Asked,
    Attempt,
    Begins,
    Done,
    End,
    Ended,
    GoOn,
    Leave,
    Lost,
    Seen,
    Start,
    State,
    Status,
    Stop,
    Wait,
    blocked_by,
    decide,
    start_order,
)

OPEN, STARTED, FINISHED, FAILED = Status.OPEN, Status.STARTED, Status.FINISHED, Status.FAILED
PAIR = {"finetuned": "resnet18", "resnet18": None}


def state(statuses=None, sources=PAIR, *, max_failures: int = 3) -> State:
    return State(command="me", max_failures=max_failures, statuses=statuses or {"run": STARTED}, sources=sources)


def next_action(statuses, sources, *, room: int):
    return decide(state(statuses, sources), Asked(room))[1]


def at_begin(*attempts: Attempt, max_failures: int = 3, result: Status | None = None, holder: str = "me"):
    return decide(state(max_failures=max_failures), Begins("run", Seen(result, attempts, holder)))[1]


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
    assert blocked_by(statuses, sources) == {"b": "a", "c": "a"}
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
    assert at_begin(result=FINISHED) == Leave()
    assert at_begin(result=FAILED) == Leave()
    assert at_begin(holder="other") == Leave()
    assert at_begin(Attempt("me", End.REFUSED)) == Leave()
    assert at_begin(Attempt("before", End.REFUSED)) == GoOn()  # another command may accept it


def test_a_run_that_ended_is_what_its_records_say():
    def status_after(seen: Seen, before: Status = STARTED):
        after, action = decide(state({"run": before}), Ended("run", seen))
        return after.statuses["run"], action

    assert status_after(Seen(FINISHED, holder="me")) == (FINISHED, Wait())
    assert status_after(Seen(FAILED, holder="me")) == (FAILED, Wait())
    assert status_after(Seen(holder="other")) == (Status.ELSEWHERE, Wait())
    assert status_after(Seen(None, (Attempt("me", End.REFUSED),), "me")) == (Status.REFUSED, Wait())
    status, stop = status_after(Seen(None, (DIED,), "me"))
    assert status is FAILED
    assert isinstance(stop, Stop)
    assert status_after(Seen(None, (), "me"), FINISHED) == (FINISHED, Wait())  # a late word changes nothing
    assert status_after(Seen(None, (), "me"), OPEN) == (OPEN, Wait())


def test_a_run_whose_lease_is_lost_is_not_started_here():
    assert decide(state({"run": OPEN}), Lost("run"))[0].statuses["run"] is Status.ELSEWHERE
    assert decide(state({"run": STARTED}), Lost("run"))[0].statuses["run"] is STARTED  # until it has ended
    assert decide(state({"run": FINISHED}), Lost("run"))[0].statuses["run"] is FINISHED


@given(parents=st.lists(st.integers(-1, 8), min_size=1, max_size=9))
def test_start_order_keeps_every_run(parents: list[int]):
    runs = {f"r{i}": f"r{p % i}" if i and p >= 0 else None for i, p in enumerate(parents)}
    assert sorted(start_order(runs)) == sorted(runs)
