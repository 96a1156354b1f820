"""`bench speed WHAT`: the record of ours beside what a user would take in its place, measured in turns in one call."""

import time
from collections.abc import Callable
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from imgcls import storage
from imgcls.errors import RecipeError
from imgcls.training import environment
from tests.proof.records import SpeedRecord, Timed

What = Literal["data", "step", "start", "suite"]
REPEATS: dict[What, int] = {"data": 5, "step": 5, "start": 5, "suite": 1}
CLAIMS: dict[What, str] = {
    "data": "images/s from files or shards to inputs of the network, beside other loaders",
    "step": "images/s of training, beside a loop written by hand",
    "start": "seconds from the command to the end of the first training step, beside plain Lightning and Ray by the book",
    "suite": "seconds of the catalogue quick, beside its five trainings written by hand",
}
PACKAGES = ("litdata", "mosaicml-streaming")


def measure_speed(what: What, data: str, repeats: int | None, say: Callable[[str], None]) -> SpeedRecord:
    """Raises DataError where something that is compared with is not installed, before anything is measured."""
    repeats = REPEATS[what] if repeats is None else repeats
    if repeats < 1:
        raise RecipeError(f"--repeats {repeats}: 1 is the least")
    began, module = time.monotonic(), import_module(f"tests.speed.{what}")
    timed: list[Timed] = getattr(module, f"measure_{what}")(storage.absolute(data), repeats, say)
    return SpeedRecord(
        subject=f"speed-{what}",
        claim=CLAIMS[what],
        command=f"python -m jobs.bench speed {what} --repeats {repeats}",
        date=date.today().isoformat(),
        seconds=round(time.monotonic() - began, 1),
        commit=environment.commit() or "unknown",
        versions=environment.versions() | (_versions_of_peers() if what == "data" else {}),
        hardware=environment.hardware(),
        timed=tuple(timed),
        notes=module.NOTES,
    )


def _versions_of_peers() -> dict[str, str]:
    versions = {}
    for peer in PACKAGES:
        try:
            versions[peer] = version(peer)
        except PackageNotFoundError:
            continue
    return versions
