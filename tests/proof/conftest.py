"""How much is proved: a little of everything by `make test-all`, the full counts by `make proof`, with a record."""

from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

from imgcls.training import environment
from tests.conftest import ROOT
from tests.proof.commands import EIGHTY_STEPS, flags_of, train
from tests.proof.records import Proof, Proved

tried: list[Proved] = []
MEASUREMENTS = ROOT / "docs" / "measurements"
RECORDS: dict[str, dict[str, str]] = {
    "tests/proof": {},
    "tests/proof/test_hosts.py": {
        "subject": "hosts",
        "claim": "a run over several hosts ends with the bits of one on one host; a cut link or a lost host costs time",
        "command": "python -m pytest tests/proof/test_hosts.py --proof --record",
    },
    **{
        f"tests/proof/test_{part}.py": {
            "subject": part,
            "command": f"python -m pytest tests/proof/test_{part}.py --proof --record",
        }
        for part in ("autoscaling", "recovery", "goodput", "search")
    },
}
"""What pytest is given -> fields of the record that it leaves."""


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--proof"))


@pytest.fixture(scope="session")
def only_in_full(full: bool) -> None:
    if not full:
        pytest.skip("make proof")


@pytest.fixture(scope="session")
def asked_for(full: bool, request: pytest.FixtureRequest) -> None:
    if not full and not request.config.getoption("--kills"):
        pytest.skip("make proof, or --kills N")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """So many times is each kind of kill tried."""
    most = {"worker_kill": 10, "driver_kill": 5, "controller_kill": 2, "many_kill": 5, "pair": 10}
    most |= {"node_kill": 10, "killed_run": 20}
    for name, count in most.items():
        if name in metafunc.fixturenames:
            asked = int(metafunc.config.getoption("--kills") or 0)
            count = count if metafunc.config.getoption("--proof") else min(count, asked)
            none = pytest.param(0, marks=pytest.mark.skip(reason="make proof, or --kills N"))
            metafunc.parametrize(name, list(range(count)) or [none])


@pytest.fixture(scope="session")
def num_schedules(full: bool) -> int:
    return 10_000 if full else 300


class Whole(dict[int, Path]):
    """Runs under Ray that nobody killed, by their number of workers; each is made when it is first asked for."""

    def __init__(self, packed: Path, folder: Path, *flags: str) -> None:
        super().__init__()
        self.packed, self.folder, self.flags = packed, folder, flags

    def __missing__(self, num_workers: int) -> Path:
        running = train(self.folder / str(num_workers), self.packed, *flags_of(num_workers), *self.flags)
        running.wait(420)
        return self.setdefault(num_workers, running.run)


@pytest.fixture(scope="session")
def whole(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(packed, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def whole_of_80(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Runs of eighty steps."""
    return Whole(packed, tmp_path_factory.mktemp("whole-of-80"), *EIGHTY_STEPS)


@pytest.fixture
def proved() -> Callable[..., None]:
    """Adds to the record what has just come out equal: called at a test's end."""

    def add(what: str, detail: str = "", *, n: int = 1) -> None:
        tried.append(Proved(what=what, n=n, equal=n, detail=detail))

    return add


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.failed:
        tried.append(Proved(what=item.name, n=1, equal=0, detail=str(call.excinfo and call.excinfo.value)[:300]))
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """docs/measurements/<subject>_<hardware>_<date>.json, whatever it came to; none where everything was skipped."""
    option = session.config.option
    fields = RECORDS.get(" ".join(session.config.args))
    if fields is None or option.keyword or not (tried and option.proof and option.record):
        return
    commit = environment.commit()
    if commit is None or commit.endswith("+changes"):
        print(f"\nno record: {commit} is no commit; commit first")
        return
    found = Proof(
        date=date.today().isoformat(),
        commit=commit,
        versions=environment.versions(),
        hardware=environment.hardware(),
        tried=tuple(tried),
    ).model_copy(update=fields)
    path = MEASUREMENTS / found.file_name
    path.write_bytes(found.to_bytes())
    print(f"\nwrote {path.relative_to(ROOT)}")
