"""What would go wrong on a cluster, before it costs anything: facts of every node, judged, with what to do."""

import re
import time
from collections.abc import Iterator
from typing import Annotated

import tyro

from cluster import session
from cluster.preflight import Asked, Check, examine
from imgcls.errors import ClusterError
from imgcls.records import Record
from jobs._door import DONE, MISSING_OR_BROKEN, enter
from jobs._request import place
from jobs._terminal import Lines


class Report(Record):
    """What `--json` prints."""

    healthy: bool
    seconds: float
    checks: tuple[Check, ...]


def doctor(
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None,
    data: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None,
    storage: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None,
    num_workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    gpus_per_worker: Annotated[float | None, tyro.conf.arg(metavar="F")] = None,
    json: bool = False,
    verbose: bool = False,
) -> int:
    """Look at a cluster, or at this machine, and say what would go wrong and what to do.

    Args:
        address: The cluster's head; RAY_ADDRESS unless said, else local Ray.
        data: Folder or URL of packed sets that every node is to read.
        storage: Folder or URL that every node is to write to.
        num_workers: Of a run that is to fit; so many try an all-reduce, unless said one on each node.
        gpus_per_worker: Of that run.
        json: Print one JSON object.
        verbose: Ray's own lines too, and tracebacks.
    """
    asked = Asked(
        data=data and place(data, "--data"),
        storage=storage and place(storage, "--storage"),
        num_workers=num_workers,
        gpus_per_worker=gpus_per_worker,
    )
    if address is not None and address.startswith("http"):
        raise NotImplementedError(address)  # `doctor --json` as a job, whose Report is told here
    report = report_of(asked, address=address, verbose=verbose)
    lines = Lines()
    for line in [report.model_dump_json(indent=1)] if json else told(report):
        lines.say(line)
    return DONE if report.healthy else MISSING_OR_BROKEN


def report_of(asked: Asked, *, address: str | None, verbose: bool) -> Report:
    """Of the cluster at this address, or that `RAY_ADDRESS` names, or of local Ray; that none answers is a fault too."""
    began = time.monotonic()
    try:
        with session.naming(address), session.session(verbose=verbose):
            checks = examine(asked)
    except ClusterError as error:
        checks = [Check.refused("cluster", "client", error)]
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        checks = [mismatch(str(error))]
    seconds = round(time.monotonic() - began, 1)
    return Report(healthy=all(check.ok for check in checks), seconds=seconds, checks=tuple(checks))


def mismatch(message: str) -> Check:
    """The fault in what Ray says to a process that may not join."""
    theirs, ours = [f"Ray {ray}, Python {python}" for ray, python in re.findall(r"Ray: (\S+)\s+Python: (\S+)", message)]
    remedy = f"run this with {theirs}, or give every node {ours}"
    return Check(name="versions", where="client", ok=False, found=f"the cluster has {theirs}, here is {ours}", remedy=remedy)


def told(report: Report) -> Iterator[str]:
    """The table, a line a check; those that say the same share one. Under each fault what to do."""
    rows: dict[Check, list[str]] = {}
    for check in report.checks:
        rows.setdefault(check.model_copy(update={"where": ""}), []).append(check.where)
    places = [", ".join(where) if not check.ok or len(where) == 1 else f"all {len(where)}" for check, where in rows.items()]
    widths = max(len(check.name) for check in rows), max(map(len, places))
    for check, where in zip(rows, places, strict=True):
        yield f"{check.name.ljust(widths[0])}  {where.ljust(widths[1])}  {'ok   ' if check.ok else 'FAULT'}  {check.found}"
        if not check.ok:
            yield f"  do: {check.remedy}"
    faults = sum(not check.ok for check in report.checks)
    yield f"{faults or 'no'} fault{'' if faults == 1 else 's'} in {len(report.checks)} checks, {report.seconds:.1f} s"


if __name__ == "__main__":
    enter(doctor)
