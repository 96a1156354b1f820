import threading
import time
from pathlib import Path

import pytest

from cluster.carry import lease
from cluster.carry.lease import Leases, leases
from imgcls import records, storage
from imgcls.errors import LeaseError, StorageError
from imgcls.runs import Lease, RunFolder
from sandbox.s3.proxy import faulty
from sandbox.s3.server import Server
from tests.conftest import reached_by
from tests.processes import until


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """A run's folder."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "LAPSE_S", 1.5)


def left_behind(run: Path, *, pid: int, host: str = "elsewhere", number: int = 1) -> None:
    one = Lease(command="before", host=host, pid=pid, renewals=3)
    records.write(one, str(run / "leases" / f"{number:05d}.json"))


def test_a_lease_is_held_renewed_and_given_back(tmp_path: Path):
    with leases([RunFolder(str(tmp_path))], command="me", say=print) as held:
        assert RunFolder(str(tmp_path)).holder() == "me"
        before = (tmp_path / "leases" / "00001.json").read_bytes()
        until(lambda: (tmp_path / "leases" / "00001.json").read_bytes() != before, 60, "a renewal")
        assert not held.lost
    assert RunFolder(str(tmp_path)).holder() is None


def test_a_lease_is_renewed_on_whatever_a_look_at_it_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    looks: list[str] = []

    def fault(run: RunFolder) -> str:
        looks.append(run.url)
        raise ValueError("a fault in code")

    with leases([RunFolder(str(tmp_path))], command="me", say=print):
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "holder", fault)
            until(lambda: bool(looks), 60, "a look at it")
        before = (tmp_path / "leases" / "00001.json").read_bytes()
        until(lambda: (tmp_path / "leases" / "00001.json").read_bytes() != before, 60, "a renewal")


def test_a_lease_that_is_renewed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LAPSE_S", 60.0)
    said: list[str] = []
    with leases([RunFolder(str(tmp_path))], command="first", say=print):
        with (
            pytest.raises(LeaseError, match=r"another command is at run \(process \d+ on "),
            leases([RunFolder(str(tmp_path))], command="second", say=said.append),
        ):
            pass
        assert RunFolder(str(tmp_path)).holder() == "first"
    assert said == ["another command was at run: waiting up to 60 s for it to answer or to lapse"]


def test_a_command_that_is_refused_takes_no_other_run_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LAPSE_S", 60.0)
    left_behind(tmp_path / "a", pid=1)
    with leases([RunFolder(str(tmp_path / "b"))], command="first", say=print):
        began = time.monotonic()
        both = [RunFolder(str(tmp_path / name)) for name in "ab"]
        with pytest.raises(LeaseError), leases(both, command="second", say=print):
            pass
        assert time.monotonic() - began < lease.LAPSE_S
        assert [run.numbers("leases") for run in both] == [[1], [1]]


def test_a_lease_that_nobody_renews_lapses_and_is_taken_over(tmp_path: Path):
    left_behind(tmp_path, pid=1)
    with leases([RunFolder(str(tmp_path))], command="me", say=print):
        assert RunFolder(str(tmp_path)).holder() == "me"


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path: Path):
    said: list[str] = []
    left_behind(tmp_path, pid=2**22 + 1, host=lease._here())
    with leases([RunFolder(str(tmp_path))], command="me", say=said.append):
        assert RunFolder(str(tmp_path)).holder() == "me"
    assert said == []


def test_a_lease_that_was_taken_over_is_lost_and_left_alone(tmp_path: Path):
    with leases([RunFolder(str(tmp_path))], command="me", say=print) as held:
        left_behind(tmp_path, pid=1, number=2)
        until(lambda: held.lost == {"run"}, 60, "a look at it")
    assert RunFolder(str(tmp_path)).holder() == "before"


def test_of_two_that_take_over_one_lapsed_lease_at_once_one_holds_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left_behind(tmp_path, pid=2**22 + 1, host=lease._here())
    create, both = storage.create_bytes, threading.Barrier(2)

    def create_together(url: str, data: bytes) -> bool:
        both.wait(60)  # each has seen the lapsed lease, and no other
        return create(url, data)

    monkeypatch.setattr(storage, "create_bytes", create_together)
    came_to: list[str | None] = []

    def take(command: str) -> None:
        try:
            with leases([RunFolder(str(tmp_path))], command=command, say=print):
                came_to.append(RunFolder(str(tmp_path)).holder())
                threading.Event().wait(1)
        except LeaseError:
            came_to.append(None)

    threads = [threading.Thread(target=take, args=(command,)) for command in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(came_to, key=str) in (["a", None], ["b", None], [None, "a"], [None, "b"])


def test_a_holder_that_was_away_does_not_take_back_what_was_taken_over(tmp_path: Path):
    with leases([RunFolder(str(tmp_path))], command="me", say=print) as held:
        records.write(held_by("other"), str(tmp_path / "leases" / "00002.json"))
        # Between its look and its write another command took over: what it writes is its own number.
        records.write(held_by("me"), str(tmp_path / "leases" / "00001.json"))
        assert RunFolder(str(tmp_path)).holder() == "other"
        held.renew()
        assert held.lost == {"run"}


def test_a_number_is_not_used_again_and_who_lost_a_lease_gives_nothing_back(tmp_path: Path):
    away = Leases([RunFolder(str(tmp_path))], "away", print)
    away.take()
    records.write(held_by("taker"), str(tmp_path / "leases" / "00002.json"))
    away.renew()
    records.write(held_by("taker").model_copy(update={"released": True}), str(tmp_path / "leases" / "00002.json"))
    with leases([RunFolder(str(tmp_path))], command="third", say=print) as held:
        assert held.numbers == {"run": 3}
        away.release()
        assert RunFolder(str(tmp_path)).holder() == "third"


def held_by(command: str) -> Lease:
    return Lease(command=command, host="elsewhere", pid=1, renewals=0)


def test_of_several_that_create_an_object_one_succeeds(tmp_path: Path):
    made: list[bool] = []
    begin = threading.Barrier(8)

    def create(name: int) -> None:
        begin.wait()
        made.append(storage.create_bytes(str(tmp_path / "one"), b"%d" % name))

    threads = [threading.Thread(target=create, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_storage_that_answers_no_more_is_told_once_and_gives_up_in_time(s3: Server, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(lease, "LAPSE_S", 6.0)
    with (
        faulty(s3.host, s3.port, faults=("hang",)) as proxy,
        reached_by(s3.env(port=proxy.port)),
        leases([RunFolder("s3://runs/gone")], command="me", say=said.append) as held,
    ):
        proxy.fail = 1.0
        until(lambda: bool(said), 60, "word of it")
        held.check_answered()
        proxy.fail = 0.0
        until(lambda: len(said) >= 2, 60, "word that it answers")
        monkeypatch.setattr(lease, "GIVE_UP_S", 1.0)
        proxy.fail = 1.0
        until(lambda: len(said) >= 3, 60, "word of it")
        time.sleep(1)
        with pytest.raises(StorageError, match="same command again"):
            held.check_answered()
        proxy.fail = 0.0
    assert "leases" in said[0]
    assert "cannot be" in said[0]
    assert said[1] == "storage answers again"


def test_what_others_make_of_storage_that_answers_no_more_is_said_to_be_that(tmp_path: Path):
    def fail(silent_s: float) -> None:
        with leases([RunFolder(str(tmp_path))], command="me", say=print) as held:
            held._error, held._answered_s = "no answer", time.monotonic() - silent_s
            raise RuntimeError("in Tune's words")

    with pytest.raises(RuntimeError, match="in Tune's words"):
        fail(silent_s=0)
    with pytest.raises(StorageError, match="storage has not answered"):
        fail(silent_s=2 * lease.GIVE_UP_S)
    assert RunFolder(str(tmp_path)).holder() is None


def test_what_storage_does_not_answer_at_once_is_asked_again(tmp_path: Path):
    answers = iter([StorageError("no"), StorageError("no"), "yes"])

    def read() -> str:
        answer = next(answers)
        if isinstance(answer, StorageError):
            raise answer
        return answer

    assert lease.when_answered(read) == "yes"


def test_a_lease_that_cannot_be_read_leaves_the_others_alone(tmp_path: Path):
    said: list[str] = []
    with leases([RunFolder(str(tmp_path / name)) for name in ("bad", "good")], command="me", say=said.append) as held:
        (tmp_path / "bad" / "leases" / "00001.json").write_text("{")
        before = (tmp_path / "good" / "leases" / "00001.json").read_bytes()
        until(lambda: (tmp_path / "good" / "leases" / "00001.json").read_bytes() != before, 60, "a renewal")
        held.check_answered()
    assert said == []
    assert RunFolder(str(tmp_path / "good")).holder() is None
