"""How much is proved: by `make test` a little of everything, by `make proof` the full counts, with a record."""

import json
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest

from imgcls.training import environment
from tests.conftest import ROOT

rows: list[dict[str, Any]] = []
MEASUREMENTS = ROOT / "docs" / "measurements"


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--proof"))


@pytest.fixture(scope="session")
def only_in_full(full: bool) -> None:
    if not full:
        pytest.skip("make proof")


@pytest.fixture(scope="session")
def num_schedules(full: bool) -> int:
    return 10_000 if full else 300


@pytest.fixture
def proof_row() -> Callable[..., None]:
    """Adds to the record: what was tried, how often, and how often it came out equal."""

    def add(what: str, *, n: int, equal: int, detail: str = "") -> None:
        rows.append({"what": what, "n": n, "equal": equal, "detail": detail})

    return add


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """docs/measurements/proof_<hardware>_<date>.json, where all of it passed at a commit."""
    if not session.config.getoption("--proof") or exitstatus != 0 or not rows:
        return
    hardware, commit = environment.hardware(), environment.commit()
    if commit is None or commit.endswith("+changes"):
        print(f"\nno record: {commit} is no commit; commit first")
        return
    where = hardware.get("gpu", f"{hardware['cpus']}cpu-{hardware['vectors']}").lower().replace(" ", "-")
    found = {
        "subject": "proof",
        "claim": "a run that was killed, moved or cut otherwise ends with the bits of one that was not",
        "command": "make proof",
        "date": date.today().isoformat(),
        "commit": commit,
        "versions": environment.versions(),
        "hardware": hardware,
        "rows": rows,
    }
    path = MEASUREMENTS / f"proof_{where}_{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwrote {path.relative_to(ROOT)}")
