"""What would go wrong on a cluster, before it costs anything: facts of every node, judged, with what to do."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated

import tyro

from cluster import session
from cluster.preflight import Check, examine
from cluster.probes import Questions
from cluster.staging import prepare
from cluster.submission import connected
from imgcls.errors import ClusterError, DataError
from imgcls.records import Record
from jobs._door import DONE, MISSING_OR_BROKEN, enter
from jobs._request import place
from jobs._terminal import Lines, stderr


class Report(Record):
    """What `--json` prints."""

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
    if address is not None and address.startswith("http"):
        report = report_of_job(address)
    else:
        questions = Questions(
            data=data and place(data, "--data"),
            storage=storage and place(storage, "--storage"),
            num_workers=num_workers,
            gpus_per_worker=gpus_per_worker,
        )
        report = report_of(questions, address=address, verbose=verbose)
    lines = Lines()
    for line in [report.model_dump_json(indent=1)] if json else told(report):
        lines.say(line)
    return DONE if report.healthy else MISSING_OR_BROKEN


def report_of(questions: Questions, *, address: str | None, verbose: bool) -> Report:
    """Of the cluster at this address, or that `RAY_ADDRESS` names, or of local Ray; that none answers is a fault too."""
    began = time.monotonic()
    try:
        with session.naming(address), session.session(verbose=verbose):
            checks = examine(questions)
    except ClusterError as error:
        if (report := _report_of_open_cluster()) is not None:
            return report
        checks = [Check.refused("cluster", "client", error)]
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        checks = [mismatch(str(error))]
    seconds = round(time.monotonic() - began, 1)
    return Report(healthy=all(check.ok for check in checks), seconds=seconds, checks=tuple(checks))


def _report_of_open_cluster() -> Report | None:
    """Where nobody has given a token, perhaps since the cluster wants none: Ray's mode is fixed in this process by now."""
    env = session.open_environment()
    if env is None:
        return None
    words = [sys.executable, "-m", "jobs.doctor", *sys.argv[1:], "--json"]
    done = subprocess.run(words, env=env, capture_output=True, check=False)
    report = _parsed(done.stdout.decode())
    return report if report and any(check.name == "auth" for check in report.checks) else None


def report_of_job(address: str) -> Report:
    """Of a cluster that is reached by its dashboard alone: this command as a job of it, and how it was reached."""
    began, said = time.monotonic(), list[str]()
    words = [word for word in _without_address(sys.argv[1:]) if word != "--json"]
    try:
        with connected(address) as jobs:
            job = prepare(["doctor", *words, "--json"])
            jobs.submit(job)
            ended = jobs.follow(job.id, said.append, stderr)
            checks = [_same_ray(jobs.ray_version())]
    except ClusterError as error:
        return Report(
            healthy=False, seconds=round(time.monotonic() - began, 1), checks=(Check.refused("cluster", "client", error),)
        )
    report = _parsed("".join(said))
    if report is None:
        refused = ClusterError(f"the job ended without a report: {ended.told}\n  do: its log: {''.join(said)[-1000:]}")
        checks.append(Check.refused("cluster", "head", refused))
    else:
        checks += report.checks
    seconds = round(time.monotonic() - began, 1)
    return Report(healthy=all(check.ok for check in checks), seconds=seconds, checks=tuple(checks))


def _same_ray(theirs: str) -> Check:
    ours = version("ray")
    remedy = "" if ours == theirs else f"install ray=={theirs} here"
    return Check(name="versions", where="client", ok=not remedy, found=f"Ray {ours} here, {theirs} there", remedy=remedy)


def _without_address(words: list[str]) -> list[str]:
    at = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--address")
    return words[:at] + words[at + (1 if "=" in words[at] else 2) :]


def _parsed(text: str) -> Report | None:
    """The report among what a command said."""
    begin, end = text.find("{\n"), text.rfind("\n}")
    with suppress(DataError):
        return Report.from_bytes(text[begin : end + 2].encode(), where="report") if begin >= 0 else None
    return None


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
