from pathlib import Path

from cluster import attempts
from cluster.attempts import Ending
from cluster.decide import Attempt, End


def begin(run: Path) -> int:
    return attempts.begin(str(run), command="me", host="here", pid=1)


def test_what_ranks_told_of_an_attempt_is_read_back(tmp_path: Path):
    assert [begin(tmp_path), begin(tmp_path), begin(tmp_path)] == [1, 2, 3]
    attempts.end(str(tmp_path), 2, Ending(end="crashed", error="x", step=4), rank=1)
    assert attempts.look(str(tmp_path)).attempts == (Attempt("me"), Attempt("me", End.CRASHED, "x", 4), Attempt("me"))


def test_a_preemption_counts_before_whatever_came_of_it(tmp_path: Path):
    begin(tmp_path)
    attempts.end(str(tmp_path), 1, Ending(end="crashed", error="x"), rank=0)
    attempts.end(str(tmp_path), 1, Ending(end="preempted"), rank=1)
    attempts.end(str(tmp_path), 1, Ending(end="crashed", error="y"), rank=1)
    assert attempts.look(str(tmp_path)).attempts[0].end is End.PREEMPTED


def test_an_attempt_whose_beginning_was_not_written_is_none(tmp_path: Path):
    attempts.end(str(tmp_path), 1, Ending(end="preempted"), rank=1)
    assert attempts.look(str(tmp_path)).attempts == ()
    assert begin(tmp_path) == 2
