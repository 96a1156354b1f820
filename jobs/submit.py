"""Send a command to a cluster as a job, and follow it to its end."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import tyro

from imgcls.errors import RecipeError
from jobs._door import DONE, INTERRUPTED, enter
from jobs._terminal import Lines, stderr

if TYPE_CHECKING:
    from cluster.staging import Job


def submit(
    words: tuple[str, ...],
    /,
    address: Annotated[str, tyro.conf.arg(metavar="URL")],
    job_id: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None,
    env: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE"), tyro.conf.UseAppendAction] = (),
    no_wait: bool = False,
    driver_resource: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    python: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None,
    dry_run: bool = False,
    follow: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None,
    status: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None,
    stop: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None,
    verbose: bool = False,
) -> int:
    """Send a command to a cluster: ... --address URL -- suite --data s3://... --storage s3://...

    Args:
        address: URL of the cluster's dashboard, as http://127.0.0.1:8265.
        job_id: Name of the job; made up unless said.
        env: A variable of the job's environment, seen by all who see the dashboard; secrets are refused.
        no_wait: Leave when it is submitted; else the log is followed to the job's end, whose exit code is this command's.
        driver_resource: Run the command on a node with this resource, in place of the head.
        python: The cluster's interpreter; that of its own workers unless said.
        dry_run: Print what would be asked of the cluster; nothing is sent.
        follow: Follow this job, and exit with its code.
        status: Say what this job is at.
        stop: Stop this job.
        verbose: Tracebacks too.
    """
    from cluster.staging import prepare
    from cluster.submission import connected

    if len([one for one in (follow, status, stop, words) if one]) > 1:
        raise RecipeError("--follow, --status, --stop or a command: one of these")
    lines = Lines()
    job = None if follow or status or stop else prepare(words, id=job_id, env=env, driver_resource=driver_resource)
    if job is not None and dry_run:
        lines.say(json.dumps(job.request(python or "python") | {"files": len(job.files), "bytes": job.num_bytes}, indent=1))
        return DONE
    with connected(address) as jobs:
        if status:
            info = jobs.known(status)
            lines.say(f"{status}: {str(info.status).lower()}; {info.message}")
            return DONE
        if stop:
            jobs.stop(stop)
            lines.say(f"{stop}: asked to stop; the same command goes on where it stopped")
            return DONE
        if job is not None:
            jobs.submit(job, python=python)
            lines.say(f"{job.id}: submitted, {job.num_bytes:,} bytes")
            _say_next(lines, address, job)
            if no_wait:
                return DONE
        found = job.id if job is not None else str(follow)
        try:
            ended = jobs.follow(found, _write, stderr)
        except KeyboardInterrupt:
            stderr(f"\ndetached: {found} goes on")
            stderr(f"  follow it: python -m jobs.submit --address {address} --follow {found}")
            stderr(f"  stop it:   python -m jobs.submit --address {address} --stop {found}")
            return INTERRUPTED
    stderr(ended.told)
    return ended.code


def _say_next(lines: Lines, address: str, job: "Job") -> None:
    from cluster.staging import value_of

    here = f"python -m jobs.submit --address {address}"
    lines.say(f"  follow it: {here} --follow {job.id}")
    lines.say(f"  stop it:   {here} --stop {job.id}")
    storage = value_of("--storage", job.words)
    if storage is not None and job.words[0] in ("suite", "train"):
        suite = value_of("--id", job.words) or value_of("--catalogue", job.words) or "quick"
        lines.say(f"  its page:  python -m jobs.report {suite} --storage {storage}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    enter(submit, words=True)
