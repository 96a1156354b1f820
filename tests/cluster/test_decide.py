from hypothesis import given
from hypothesis import strategies as st

from cluster.decide import Done, Start, Status, Wait, blocked_by, next_action, start_order

OPEN, STARTED, FINISHED, FAILED = Status.OPEN, Status.STARTED, Status.FINISHED, Status.FAILED
PAIR = {"finetuned": "resnet18", "resnet18": None}


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


@given(
    parents=st.lists(st.integers(-1, 8), min_size=1, max_size=9),
    fates=st.lists(st.booleans(), min_size=9, max_size=9),
    room=st.integers(1, 4),
    ends=st.randoms(use_true_random=False),
)
def test_every_suite_ends_with_each_run_finished_failed_or_blocked(parents, fates, room, ends):
    runs = [f"r{i}" for i in range(len(parents))]
    # A parent comes earlier: no circles.
    sources = {run: runs[p % i] if i and p >= 0 else None for i, (run, p) in enumerate(zip(runs, parents, strict=True))}
    statuses = dict.fromkeys(reversed(runs), OPEN)
    for _ in range(10 * len(runs)):
        action = next_action(statuses, sources, room=room)
        if isinstance(action, Done):
            break
        if isinstance(action, Start):
            source = sources[action.run]
            assert statuses[action.run] is OPEN
            assert source is None or statuses[source] is FINISHED
            statuses[action.run] = STARTED
            assert list(statuses.values()).count(STARTED) <= room
        else:
            under_way = [run for run, status in statuses.items() if status is STARTED]
            ended = ends.choice(under_way)
            statuses[ended] = FINISHED if fates[runs.index(ended)] else FAILED
    else:
        raise AssertionError("the suite does not end")
    for run in list(statuses):
        if statuses[run] is STARTED:
            statuses[run] = FINISHED
    blocked = blocked_by(statuses, sources)
    assert all(status in (FINISHED, FAILED) or run in blocked for run, status in statuses.items())
