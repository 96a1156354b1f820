"""What a person sees while a command works: a live view on a terminal, else one line an epoch and run."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cluster.carry.decide import Status
    from imgcls.records import SuiteResults


class Lines:
    """Prints lines; behind SYNTHETIC where no photograph is in play."""

    def __init__(self, *, synthetic: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.mark = "SYNTHETIC " if synthetic else ""

    def say(self, text: str) -> None:
        for line in text.splitlines():
            self.console.print(Text(f"{self.mark}{line}"))
        self.console.file.flush()


@contextmanager
def bar(lines: Lines, what: str) -> Iterator[Any]:
    """A function (done, total) that shows how far `what` is: a bar on a terminal, else a line every ten seconds."""
    on_terminal, last = lines.console.is_terminal, time.monotonic()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=lines.console, transient=True, disable=not on_terminal) as progress:
        task = progress.add_task(f"{lines.mark}{what}")

        def tell(done: int, total: int) -> None:
            nonlocal last
            progress.update(task, completed=done, total=total)
            if not on_terminal and time.monotonic() - last > 10:
                last = time.monotonic()
                lines.say(f"{what}: {done:,} of {total:,}")

        yield tell


class SuiteView:
    """The runs of a suite while they run. A `cluster.carry.searcher.View`."""

    def __init__(self, lines: Lines, runs: Mapping[str, str | None]) -> None:
        self.lines, self.say = lines, lines.say
        self.began = time.monotonic()
        self.rows: dict[str, dict[str, Any]] = {run: {"state": "Ray starts"} for run in runs}
        self.sources = runs

    def shown(self) -> Live:
        """Inside it. What is no terminal is shown nothing: a live view that is transient leaves no trace there."""
        console = self.lines.console
        refresh = {"refresh_per_second": 2, "auto_refresh": console.is_terminal}
        return Live(get_renderable=self._table, console=console, transient=True, **refresh)

    def already(self, run: str, status: "Status") -> None:
        self.rows[run]["state"] = f"{status.value} before"
        if status.value == "failed":
            self.lines.say(f"{run}: failed before; --retry-failed tries it again")

    def connected(self) -> None:
        for run, row in self.rows.items():
            if row["state"] == "Ray starts":
                row["state"] = f"waits for {self.sources[run] or 'room'}"

    def started(self, run: str) -> None:
        self.rows[run]["state"] = "workers start"
        self.lines.say(f"{run}: started")

    def progress(self, run: str, progress: Mapping[str, Any]) -> None:
        if progress["tries"] > self.rows[run].get("tries", 1):
            self.lines.say(f"{run}: a worker or its controller was lost; begun again from the last checkpoint")
            self.rows[run].pop("since", None)
        if progress["phase"] in ("workers import", "cache"):  # each may take long
            self.lines.say(f"{run}: {progress['phase']}")
        self.rows[run] |= {"state": progress["phase"], **progress}
        if progress["phase"] == "train":
            # Since then, not since the start: imports, cache and what an earlier attempt did do not count.
            self.rows[run].setdefault("since", (time.monotonic(), progress["step"]))
        if row := progress.get("row"):
            left = _left(self.rows[run])
            self.lines.say(
                f"{run}: epoch {row['epoch']}/{progress['epochs']}  train/loss {row['train/loss']:.4f}  "
                f"val/loss {row['val/loss']:.4f}  val/accuracy {row['val/accuracy']:.4f}  "
                f"{progress['images_per_s']:,.0f} images/s{f'  about {left} left' if left else ''}"
            )

    def ended(self, run: str, status: "Status") -> None:
        self.rows[run]["state"] = status.value
        self.lines.say(f"{run}: {status.value}")

    def _table(self) -> Table:
        elapsed = duration(time.monotonic() - self.began)
        table = Table("run", "state", "epoch", "step", "images/s", "left", title=f"{self.lines.mark}{elapsed}")
        for run, row in self.rows.items():
            epochs, steps = row.get("epochs"), row.get("total_steps")
            table.add_row(
                run,
                str(row["state"]),
                f"{row['epoch']}/{epochs}" if epochs else "",
                f"{row['step']}/{steps}" if steps else "",
                f"{row['images_per_s']:,.0f}" if row.get("images_per_s") else "",
                _left(row),
            )
        return table


def _left(row: Mapping[str, Any]) -> str:
    """Until its training ends, where that can be told."""
    if row.get("state") != "train" or row["step"] in (row["since"][1], row["total_steps"]):
        return ""
    began, first = row["since"]
    return duration((time.monotonic() - began) * (row["total_steps"] - row["step"]) / (row["step"] - first))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def say_table(lines: Lines, rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        lines.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def say_work(lines: Lines, results: "SuiteResults") -> None:
    """What the last command took, beside what was predicted."""
    lines.say(f"took {duration(results.seconds)}, predicted {duration(results.predicted_s)}")
    if results.predicted_s is not None:
        lines.say("  " + ", ".join(f"{run} {s:.0f} s of {results.predicted[run]:.0f}" for run, s in results.took.items()))


def say_results(lines: Lines, results: "SuiteResults") -> None:
    """The printed table, and the end of the log of what failed."""
    from imgcls.results.compare import HEADER, table_row

    say_table(lines, [HEADER, *map(table_row, results.runs)])
    for run in results.runs:
        if run.status != "finished":
            lines.say(f"{run.name} {run.status}: {run.error}")
            for text in run.log_tail[-8:]:
                lines.say(f"  | {text}")


def stderr(text: str) -> None:
    print(text, file=sys.stderr)
