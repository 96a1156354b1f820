"""What would go wrong on a cluster, before it costs anything: facts of every node, judged, with what to do."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated, Literal

import tyro

from cluster import session
from cluster.look.preflight import Check, examine
from cluster.look.probes import Questions
from cluster.send.staging import prepare
from cluster.send.submission import connected
from imgcls.errors import ClusterError, DataError
from imgcls.records import Record
from jobs._door import DONE, MISSING_OR_BROKEN, enter
from jobs._request import place
from jobs._terminal import Lines, stderr


class Report(Record):
    """What `--json` prints."""

    kind: Literal["imgcls-doctor"] = "imgcls-doctor"
    """By which other programs know it."""
    healthy: bool
    seconds: float
    checks: tuple[Check, ...]


def doctor(
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT|URL")] = None,
    data: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None,
    storage: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None,
    num_workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    gpus_per_worker: Annotated[float | None, tyro.conf.arg(metavar="F")] = None,
    json: bool = False,
    verbose: bool = False,
) -> int:
    """Look at a cluster, or at this machine, and say what would go wrong and what to do.

    Args:
        address: The cluster's head, joined from here; or its dashboard's URL, where this goes as a job. RAY_ADDRESS unless
            said, else local Ray.
        data: Folder or URL of packed sets that every node is to read.
        storage: Folder or URL that every node is to write to.
        num_workers: Of a run that is to fit; so many try an all-reduce, unless said one on each node.
        gpus_per_worker: Of that run.
        json: Print one JSON object.
        verbose: Ray's own lines too, and tracebacks.
    """
    began = time.monotonic()
    places = {name: url for name, url in (("data", data), ("storage", storage)) if url}
    sizes = {"num_workers": num_workers, "gpus_per_worker": gpus_per_worker}
    try:
        if address is not None and address.startswith("http"):
            checks = checks_by_job(address, places | sizes, verbose=verbose)
        else:
            places = {name: place(url, f"--{name}") for name, url in places.items()}
            checks = checks_from_here(address, Questions(places=places, **sizes), verbose=verbose)
    except ClusterError as error:
        checks = [Check.refused("cluster", "client", error)]
    seconds = round(time.monotonic() - began, 1)
    report = Report(healthy=all(check.ok for check in checks), seconds=seconds, checks=tuple(checks))
    # The log of a job has lines of others too: there the report is one line.
    Lines().say(report.model_dump_json(indent=None if session.in_job() else 1) if json else "\n".join(table(report)))
    return DONE if report.healthy else MISSING_OR_BROKEN


def checks_from_here(address: str | None, questions: Questions, *, verbose: bool) -> list[Check]:
    """Of the cluster at this address, or that `RAY_ADDRESS` names, or of local Ray. Raises ClusterError."""
    try:
        with session.naming(address), session.session(verbose=verbose):
            return examine(questions)
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        return [mismatch(str(error))]


def checks_by_job(address: str, flags: Mapping[str, object], *, verbose: bool) -> list[Check]:
    """Of a cluster that is reached by its dashboard alone: this command as a job of it, and how it was reached."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items() if value is not None]
    log: list[str] = []
    with connected(address) as jobs:
        job = prepare(["doctor", *words, *["--verbose"] * verbose, "--json"])
        jobs.submit(job)
        _, message = jobs.follow(job.id, log.append, stderr, give_up_s=120)
        client = _same_ray(jobs.ray_version)
    report = report_in("".join(log))
    if report is None:
        refused = ClusterError(f"the job ended without a report: {message}\n  do: its log: {''.join(log)[-1000:]}")
        return [client, Check.refused("cluster", "head", refused)]
    return [client, *report.checks]


def report_in(log: str) -> Report | None:
    """The report that a job printed, in its log."""
    for line in log.splitlines():
        with suppress(DataError):  # another line, or one that is cut off
            return Report.from_bytes(line.encode(errors="replace"), where="the job's report")
    return None


def _same_ray(theirs: str) -> Check:
    ours = version("ray")
    remedy = "" if ours == theirs else f"install ray=={theirs} here"
    return Check(name="versions", where="client", ok=not remedy, found=f"Ray {ours} here, {theirs} there", remedy=remedy)


def mismatch(message: str) -> Check:
    """The fault in what Ray says to a process that may not join."""
    theirs, ours = [f"Ray {ray}, Python {python}" for ray, python in re.findall(r"Ray: (\S+)\s+Python: (\S+)", message)]
    remedy = f"run this with {theirs}, or give every node {ours}"
    return Check(name="versions", where="client", ok=False, found=f"the cluster has {theirs}, here is {ours}", remedy=remedy)


def table(report: Report) -> Iterator[str]:
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
