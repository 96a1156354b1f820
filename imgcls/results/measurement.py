"""A suite's figures as a record that stays: what was found, by which command, on what. The README's tables read it."""

from datetime import date
from pathlib import Path

from imgcls.catalogue.published import PUBLISHED
from imgcls.errors import DataError
from imgcls.records import Placement, Record, RunResult, SuiteResults
from imgcls.results.compare import counts
from imgcls.results.statistics import accuracy_interval


class Figures(Record):
    """One finished run."""

    run: str
    seed: int
    test_accuracy: float
    test_accuracy_95: tuple[float, float]
    """Wilson's interval: the test set's sampling alone."""
    num_test: int
    test_loss: float
    val_accuracy: float
    val_loss: float
    num_train: int
    epochs: int
    best_epoch: int
    images_per_s: float
    """Training samples per second of training steps, beside whatever else ran on the machine at that time."""
    seconds: dict[str, float]
    placement: Placement | None
    weights_sha256: str
    data_digest: str


class Measurement(Record):
    subject: str
    claim: str
    command: str
    date: str
    commit: str
    hardware: dict[str, str]
    versions: dict[str, str]
    seconds: float
    """Of the whole command, without packing."""
    rows: tuple[Figures, ...]

    @property
    def file_name(self) -> str:
        vectors = self.hardware.get("vectors", "unknown").lower()
        where = self.hardware.get("gpu", f"{self.hardware['cpus']}cpu-{vectors}").lower().replace(" ", "-")
        return f"{self.subject}_{where}_{self.date}.json"


def measure(results: SuiteResults) -> Measurement:
    """Raises DataError where a figure would not be honest: synthetic data, changed code, or nothing finished."""
    done = [row.result for row in results.rows if row.result is not None and row.status == "finished"]
    if not done:
        raise DataError(f"{results.id}: no run is finished, there is nothing to record")
    if results.synthetic:
        raise DataError(f"{results.id} is SYNTHETIC: its figures say nothing, and are not recorded")
    commits = {one.commit or "unknown" for one in done}
    if len(commits) > 1 or any(c == "unknown" or c.endswith("+changes") for c in commits):
        raise DataError(
            f"{results.id} ran at {', '.join(sorted(commits))}: a figure needs one commit, with nothing changed\n"
            "  do: commit, and run it again under another --id"
        )
    return Measurement(
        subject=f"suite-{results.catalogue}",
        claim=f"test accuracy of the catalogue {results.catalogue}, each run tested once on its best checkpoint",
        command=results.command,
        date=date.today().isoformat(),
        commit=commits.pop(),
        hardware=done[0].hardware,
        versions=done[0].versions,
        seconds=results.seconds,
        rows=tuple(_figures(one) for one in done),
    )


def _figures(result: RunResult) -> Figures:
    assert result.test is not None
    assert result.val is not None
    interval = accuracy_interval(*counts(result))
    return Figures(
        run=result.name,
        seed=result.seed,
        test_accuracy=result.test.accuracy,
        test_accuracy_95=(interval.low, interval.high),
        num_test=result.test.num_samples,
        test_loss=result.test.loss,
        val_accuracy=result.val.accuracy,
        val_loss=result.val.loss,
        num_train=result.num_train,
        epochs=result.epochs,
        best_epoch=result.best_epoch or 0,
        images_per_s=result.images_per_s or 0.0,
        seconds=result.seconds,
        placement=result.placement,
        weights_sha256=result.weights_sha256 or "",
        data_digest=result.data_digest,
    )


def newest(folder: Path, subject: str) -> tuple[Path, Measurement] | None:
    found = sorted(folder.glob(f"{subject}_*.json"), key=lambda path: path.stem.rpartition("_")[2])
    return (found[-1], Measurement.from_bytes(found[-1].read_bytes(), where=str(found[-1]))) if found else None


def markdown_table(found: tuple[Path, Measurement] | None) -> str:
    """A row a recipe; what has no record is unmeasured."""
    rows = {figures.run.rpartition("-seed")[0]: figures for figures in reversed(found[1].rows)} if found else {}
    lines = [
        "| run | test accuracy | 95% | test n | epochs | images/s | run time | published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe, published in PUBLISHED.items():
        one = rows.get(recipe)
        if one is None:
            lines.append(f"| `{recipe}` | unmeasured | | | | | | {published.accuracy:.4f} |")
            continue
        low, high = one.test_accuracy_95
        seconds = f"{one.seconds['fit'] / 60:.1f} min"
        lines.append(
            f"| `{recipe}` | {one.test_accuracy:.4f} | {low:.3f} to {high:.3f} | {one.num_test:,} | {one.epochs} | "
            f"{one.images_per_s:,.0f} | {seconds} | {published.accuracy:.4f} |"
        )
    if found is None:
        return "\n".join(lines)
    path, record = found
    hardware = ", ".join(f"{name} {value}" for name, value in record.hardware.items())
    seeds = len({figures.seed for figures in record.rows})
    lines.append("")
    lines.append(
        f"`{record.command}`: {record.seconds / 60:.1f} min without packing; n = {seeds} seed; {hardware}; "
        f"torch {record.versions['torch']}; commit {record.commit}; {record.date}. "
        f"Record: [{path.name}](docs/measurements/{path.name})."
    )
    return "\n".join(lines)
