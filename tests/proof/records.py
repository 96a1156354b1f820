"""What `make proof` and `bench faults` leave on record, and the README's tables of it."""

import statistics
from pathlib import Path

import numpy as np

from imgcls.records import Record
from imgcls.results.measurement import Figures, newest, rows_of, source


class Proved(Record):
    what: str
    n: int
    """Number of tries."""
    equal: int
    """Number of tries whose result was the expected one."""
    detail: str


class Proof(Figures):
    """What `make proof` tried, and whether it came out equal."""

    subject: str = "proof"
    claim: str = "a run that was killed, moved or cut otherwise ends with the bits of one that was not"
    command: str = "make proof"
    tried: tuple[Proved, ...]


class FaultyRun(Record):
    """A run with one kind of fault."""

    fault: str
    injected: int
    recovered: int
    """After so many of them it went on to its end."""
    seconds_to_step: tuple[float, ...]
    """From each fault after the first step to the next one that was committed; those behind the last step, and of an
    attempt that came to its end before it had died, have none."""
    goodput: float
    """Seconds from the first step to the last without faults, over the same with them."""
    identical: bool
    """Weights, history and model.pt are those of the run without faults."""


class FaultRecord(Figures):
    """What `jobs.bench faults` found."""

    subject: str = "faults"
    claim: str = "a run on S3 ends with the same bits, whatever the storage or a kill does to it"
    command: str
    seconds: float
    seconds_without_faults: float
    """From the first of twelve steps to the last."""
    runs: tuple[FaultyRun, ...]


def proof_table(folder: Path) -> str:
    found = newest(Proof, folder, "proof")
    header = ("tried", "as it has to be")
    if found is None:
        return rows_of(header, [("", "unmeasured")])
    path, record = found
    kinds = list(dict.fromkeys(one.what for one in record.tried))
    counts = {kind: [one for one in record.tried if one.what == kind] for kind in kinds}
    rows = [(kind, f"{sum(one.equal for one in some):,} of {sum(one.n for one in some):,}") for kind, some in counts.items()]
    return f"{rows_of(header, rows)}\n\n{source(path, record.command, 'each row in the record', record)}"


def faults_table(folder: Path) -> str:
    found = newest(FaultRecord, folder, "faults")
    header = ("fault", "times", "recovered", "to the next step, median", "p95", "goodput", "the same bits")
    if found is None:
        return rows_of(header, [("", "unmeasured", "", "", "", "", "")])
    path, record = found
    groups: dict[str, list[FaultyRun]] = {}
    for run in record.runs:
        for group in (run.fault, "all kills") if run.fault.endswith(" killed") else (run.fault,):
            groups.setdefault(group, []).append(run)
    rows = []
    for fault, some in sorted(groups.items(), key=lambda item: item[0] == "all kills"):
        seconds = [value for one in some for value in one.seconds_to_step]
        median, p95 = (f"{value:.1f} s" for value in np.percentile(seconds, (50, 95))) if seconds else ("", "")
        same = f"{sum(one.identical for one in some)} of {len(some)} runs"
        goodput = f"{statistics.median(one.goodput for one in some):.2f}"
        counts = (str(sum(one.injected for one in some)), str(sum(one.recovered for one in some)))
        rows.append((fault, *counts, median, p95, goodput, same))
    about = f"each step committed, twelve together in {record.seconds_without_faults:.1f} s without faults"
    return f"{rows_of(header, rows)}\n\n{source(path, record.command, about, record)}"


TABLES = {"proof": proof_table, "faults": faults_table}
