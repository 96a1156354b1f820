"""Send a command to a cluster as a job, and follow it to its end."""

import json
import sys
from functools import partial
from typing import Annotated

import tyro

from cluster.send.staging import prepare
from cluster.send.submission import Jobs, connected
from jobs._door import DONE, INTERRUPTED, enter
from jobs._terminal import Lines, stderr

Address = Annotated[str, tyro.conf.arg(metavar="URL")]
JobId = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ID")]


def run(
    words: tuple[str, ...],
    /,
    address: Address,
    job_id: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None,
    env: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE"), tyro.conf.UseAppendAction] = (),
    no_wait: bool = False,
    driver_resource: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    python: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None,
    dry_run: bool = False,
) -> int:
    """Send a command to a cluster: run --address URL -- suite --data s3://... --storage s3://...

    Args:
        address: URL of the cluster's dashboard, as http://127.0.0.1:8265.
        job_id: Name of the job; made up unless said.
        env: A variable of the job's environment, seen by all who see the dashboard; secrets are refused.
        no_wait: Leave when it is submitted; else the log is followed to the job's end, whose exit code is this command's.
        driver_resource: Run the command on a node with this resource, in place of the head.
        python: The cluster's interpreter; that of its own workers unless said.
        dry_run: Print what would be asked of the cluster; nothing is sent.
    """
    job, lines = prepare(words, id=job_id, env=env, driver_resource=driver_resource), Lines()
    if dry_run:
        lines.say(json.dumps(job.request(python or "python") | {"files": len(job.files), "bytes": job.num_bytes}, indent=1))
        return DONE
    with connected(address) as jobs:
        jobs.submit(job, python=python)
        lines.say(f"{job.id}: submitted, {job.num_bytes:,} bytes\n{_ways_back(job.id, address)}")
        return DONE if no_wait else _follow(jobs, job.id, address)


def follow(job_id: JobId, address: Address) -> int:
    """Follow a job to its end, and exit with its code.

    Args:
        job_id: Name of the job.
        address: URL of the cluster's dashboard.
    """
    with connected(address) as jobs:
        return _follow(jobs, job_id, address)


def status(job_id: JobId, address: Address) -> int:
    """Say whether a job waits, runs or has ended.

    Args:
        job_id: Name of the job.
        address: URL of the cluster's dashboard.
    """
    with connected(address) as jobs:
        info = jobs.known(job_id)
    Lines().say(f"{job_id}: {str(info.status).lower()}; {info.message}")
    return DONE


def stop(job_id: JobId, address: Address) -> int:
    """Stop a job.

    Args:
        job_id: Name of the job.
        address: URL of the cluster's dashboard.
    """
    with connected(address) as jobs:
        jobs.stop(job_id)
    Lines().say(f"{job_id}: asked to stop; the same command goes on where it stopped")
    return DONE


def _follow(jobs: Jobs, job_id: str, address: str) -> int:
    try:
        code, message = jobs.follow(job_id, partial(print, end="", flush=True), stderr)
    except KeyboardInterrupt:
        stderr(f"\ndetached: {job_id} goes on\n{_ways_back(job_id, address)}")
        return INTERRUPTED
    stderr(message)
    return code


def _ways_back(job_id: str, address: str) -> str:
    here = "python -m jobs.submit"
    return f"  follow it: {here} follow {job_id} --address {address}\n  stop it:   {here} stop {job_id} --address {address}"


if __name__ == "__main__":
    runs = [word for word in sys.argv[1:] if word != "--verbose"][:1] == ["run"]
    at = sys.argv.index("--") if runs and "--" in sys.argv else len(sys.argv)
    command, sys.argv[at:] = tuple(sys.argv[at + 1 :]), []  # what follows `--` is another command's
    enter({"run": partial(run, command), "follow": follow, "status": status, "stop": stop})
