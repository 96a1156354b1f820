from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from imgcls.records import Audit
from imgcls.runs import Attempt, End, Ending, RunFolder, held_up


def crashed(error: str, step: int = 0) -> Ending:
    return Ending(end=End.CRASHED, error=error, step=step)


def test_what_ranks_said_of_an_attempt_is_read_back(tmp_path: Path):
    run = RunFolder(str(tmp_path))
    assert [run.begin("me"), run.begin("me"), run.begin("me")] == [1, 2, 3]
    run.end(2, crashed("x", 4), rank=1)
    assert run.attempts() == (Attempt("me"), Attempt("me", End.CRASHED, "x", 4), Attempt("me"))


def test_a_preemption_counts_before_whatever_came_of_it(tmp_path: Path):
    run = RunFolder(str(tmp_path))
    run.begin("me")
    run.end(1, crashed("x"), rank=0)
    run.end(1, Ending(end=End.PREEMPTED), rank=1)
    run.end(1, crashed("y"), rank=1)
    assert run.attempts()[0].end is End.PREEMPTED


def test_an_attempt_whose_beginning_was_not_written_is_none(tmp_path: Path):
    run = RunFolder(str(tmp_path))
    run.end(1, Ending(end=End.PREEMPTED), rank=1)
    assert run.attempts() == ()
    assert run.begin("me") == 2


def test_whatever_waits_near_or_far_for_a_failed_run_is_held_up_by_it():
    sources = {"a": None, "b": "a", "c": "b", "d": None}
    assert held_up(sources, {"a"}) == {"b": "a", "c": "a"}
    assert held_up(sources, {"d"}) == {}


def test_no_audit_takes_the_place_of_another(tmp_path: Path):
    run = RunFolder(str(tmp_path))
    audits = [Audit(at=at, seed=0, steps=(), num_pieces=0, difference="", commit="", hardware={}) for at in "abc"]
    run.keep_audit(audits[0])
    run.keep_audit(audits[1])
    (tmp_path / "audits" / "00001.json").unlink()
    with ThreadPoolExecutor() as pool:
        list(pool.map(run.keep_audit, [audits[2]] * 8))
    assert [audit.at for audit in run.audits()] == ["b", *["c"] * 8]
