"""The epochs of a run so far: rows, the best of them, whether another one follows. Pure.

`rows` hold only what the recipe decides: they are part of the checkpoint, and a resumed run cuts its files back to them.
Times stand apart, in `timing`.
"""

import csv
import io
from dataclasses import dataclass, field
from typing import Any

from imgcls.records import Scores
from imgcls.training.progress import Row

HISTORY = (
    *("epoch", "step", "lr", "samples", "ledger", "train/loss", "train/accuracy"),
    *("val/samples", "val/loss", "val/accuracy"),
)
METRICS = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr")
"""Columns of a history that are followed from outside: by TensorBoard, and on an MLflow server."""
TIMING = ("epoch", "train_s", "validate_s", "images_per_s", "ended_at")
"""`ended_at`: seconds since 1970."""


@dataclass
class History:
    epochs: int
    """At most."""
    patience: int | None
    rows: list[Row] = field(default_factory=list)
    timing: list[Row] = field(default_factory=list)
    best: Scores | None = None
    """On the validation part."""

    def add(self, row: Row, val: Scores, *, train_s: float, validate_s: float, ended_at: float) -> float:
        """Another epoch; returns its training images/s."""
        if self.best is None or val.loss < self.best.loss:
            self.best = val
        self.rows.append(row)
        images_per_s = round(float(row["samples"]) / train_s, 1)
        values = (row["epoch"], round(train_s, 3), round(validate_s, 3), images_per_s, round(ended_at, 1))
        self.timing.append(dict(zip(TIMING, values, strict=True)))
        return images_per_s

    @property
    def best_row(self) -> Row:
        """The epoch of the lowest val/loss, of equals the earliest: from the rows, so that every rank names the same."""
        return min(self.rows, key=lambda row: float(row["val/loss"]))

    @property
    def is_over(self) -> bool:
        """Nothing is left to train: the epochs are done, or patience is at its end."""
        since_best = len(self.rows) - int(self.best_row["epoch"]) if self.rows else 0
        return len(self.rows) >= self.epochs or bool(self.patience and since_best >= self.patience)

    def state(self) -> dict[str, Any]:
        best = self.best.model_dump_json() if self.best else None
        return {"history": self.rows, "timing": self.timing, "best": best}

    def load(self, state: dict[str, Any]) -> None:
        self.rows, self.timing = list(state["history"]), list(state["timing"])
        self.best = Scores.model_validate_json(state["best"]) if state["best"] else None

    def as_csv(self) -> bytes:
        return _csv(HISTORY, self.rows)

    def timing_as_csv(self) -> bytes:
        return _csv(TIMING, self.timing)


def read_csv(data: bytes) -> list[dict[str, float]]:
    """The numbers of a history, or of its timing."""
    rows = csv.DictReader(io.StringIO(data.decode()))
    return [{name: float(value) for name, value in row.items() if name != "ledger"} for row in rows]


def _csv(columns: tuple[str, ...], rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
