"""How fast things go on which hardware: measured, kept beside the cache, asked by whoever predicts.

Comes in: rates of `bench calibrate`, and of every finished run. Goes out: the newest of a kind for a hardware's name.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Literal

from imgcls import records, storage
from imgcls.disk import shared_lock
from imgcls.errors import ImgclsError
from imgcls.recipe import Recipe, digest_of
from imgcls.records import Manifest, Placement, Record, RunResult

MEASUREMENTS = Path(__file__).parent.parent / "docs" / "measurements"

What = Literal["train", "evaluate", "decode", "overhead", "session"]
Source = Literal["run", "calibrate", "record", "guess"]
"""guess: multiplied out of something else that was measured; it stands until a run has shown the rate itself."""


class Rate(Record):
    what: What
    """train, evaluate, decode: images/s of a run. overhead: seconds of a run beside these. session: of a command beside
    its runs."""
    of: str
    """What it depends on, beside the hardware."""
    hardware: str
    value: float
    source: Source
    date: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.what, self.of, self.hardware


class Rates(Record):
    """The newest of each kind."""

    rates: tuple[Rate, ...] = ()

    def find(self, what: What, of: str, hardware: str) -> Rate | None:
        return next((rate for rate in self.rates if rate.key == (what, of, hardware)), None)

    def get(self, what: What, of: str, hardware: str) -> float | None:
        rate = self.find(what, of, hardware)
        return rate and rate.value


def work_of(recipe: Recipe, placement: Placement) -> str:
    """Names what decides how much a sample costs: neither data, nor length, nor weights, nor a learning rate."""
    size = {"global_batch_size": recipe.global_batch_size, "precision": recipe.precision, "numerics": recipe.numerics}
    parts = {name: recipe.to_json()[name] for name in ("input", "model", "augment")} | {"kind": recipe.optimizer.kind}
    work = digest_of([size, parts, placement.model_dump(mode="json")])[:12]
    return f"{recipe.model.kind} {recipe.input.px} px {work}"


def decoding_of(manifest: Manifest, px: int, channels: int) -> str:
    return f"{manifest.name} {px} px {channels} {manifest.digest[:12]}"


def overhead_of(placement: Placement) -> str:
    return f"{placement.num_workers} workers"


def hardware_name(hardware: dict[str, str]) -> str:
    return hardware.get("gpu") or f"{hardware['cpu']}, {hardware['cpus']} CPUs, {hardware['vectors']}"


def rates_of(run: RunResult, *, took_s: float | None = None, source: Source = "run") -> list[Rate]:
    """What a finished run shows. took_s: of the whole run, from its start to its end, where it was not cut in two."""
    assert run.placement is not None
    assert run.val is not None
    seconds, tested = run.seconds, run.test.num_samples if run.test else 0
    evaluated, evaluating_s = run.val.num_samples * run.epochs + tested, seconds["validate"] + seconds.get("test", 0.0)
    work = work_of(run.recipe, run.placement)
    values: list[tuple[What, str, float | None]] = [
        ("train", work, run.images_per_s),
        ("evaluate", work, evaluated / evaluating_s),
        ("overhead", overhead_of(run.placement), took_s and took_s - seconds["train"] - evaluating_s - seconds["cache"]),
    ]
    hardware = hardware_name(run.hardware)
    return [new(what, of, hardware, value, source) for what, of, value in values if value and value > 0]


def new(what: What, of: str, hardware: str, value: float, source: Source) -> Rate:
    day = date.today().isoformat()
    return Rate(what=what, of=of, hardware=hardware, value=round(value, 3), source=source, date=day)


def known(measurements: Path = MEASUREMENTS) -> Rates:
    """What was measured on this node; what it lacks, out of the records under docs/measurements."""
    return Rates(rates=_newest([*_recorded(measurements), *_kept().rates]))


def keep(rates: Sequence[Rate]) -> Path:
    """Beside the cache, in place of earlier ones of their kind; a guess of none that was measured. Raises StorageError."""
    path = _path()
    storage.check_places(writes=[str(path.parent)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with shared_lock(path):
        records.write(Rates(rates=_newest([*_kept().rates, *rates])), str(path))
    return path


def _path() -> Path:
    return storage.cache_root() / "rates.json"


def _kept() -> Rates:
    with suppress(ImgclsError):  # of another version, or damaged: measured again
        return records.read_if_there(Rates, str(_path())) or Rates()
    return Rates()


def _newest(rates: Iterable[Rate]) -> tuple[Rate, ...]:
    guesses_first = sorted(rates, key=lambda rate: rate.source != "guess")
    return tuple({rate.key: rate for rate in guesses_first}.values())


class _Recorded(Record, extra="ignore"):
    """What a record of a suite has for rates."""

    runs: tuple[RunResult, ...]


def _recorded(measurements: Path) -> list[Rate]:
    found: list[Rate] = []
    for path in sorted(measurements.glob("suite-*.json"), key=lambda path: path.stem.rpartition("_")[2]):
        with suppress(ImgclsError):
            record = _Recorded.from_bytes(path.read_bytes(), where=str(path))
            for run in record.runs:  # without what Tune takes before and after it
                found += rates_of(run, took_s=run.seconds["start"] + run.seconds["fit"], source="record")
    return found
