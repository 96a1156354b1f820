"""Beside Ray on a cloud's VM: drains this node when the cloud takes it back, and renews a file while the cluster has a job.

    python -m cluster.provide.keeper aws|gcp --instance ID --file FILE

Comes in: the notice of the cloud's metadata service, and the head's tables of jobs. Goes out: a drain, and the age of the
file, by which a shell loop outside the container shuts the VM down (infra/ray/). Whoever does not answer is asked again.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

METADATA = "http://169.254.169.254"
"""Of AWS and of GCP."""
POLL_S = 3
TIMEOUT_S = 5
GCP_NOTICE_S = 30
INTERNAL = "_ray_internal_"
"""Ray's own drivers, as the dashboard, have such namespaces; the records of submitted jobs have such keys."""
ALIVE = 0
"""`GcsNodeInfo.ALIVE` in Ray's gcs.proto."""

_direct = build_opener(ProxyHandler({}))  # the environment's proxy has another metadata service


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with _direct.open(Request(url, headers=headers, method=method), timeout=TIMEOUT_S) as answer:
        return answer.read(4096).decode()


def aws_deadline(metadata: str) -> float | None:
    """Seconds since the epoch at which this spot instance is taken back; None without a notice."""
    token = _ask(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        notice = _ask(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
    return datetime.fromisoformat(json.loads(notice)["time"]).timestamp()


def gcp_deadline(metadata: str) -> float | None:
    """As `aws_deadline`; Google's notice names no time."""
    taken = _ask(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return time.time() + GCP_NOTICE_S if taken.strip() == "TRUE" else None


CLOUDS: dict[str, Callable[[str], float | None]] = {"aws": aws_deadline, "gcp": gcp_deadline}


def head() -> Any:
    """A client of the head's GCS; new for each question, since the head may have been started again."""
    from ray import _raylet
    from ray._private.services import canonicalize_bootstrap_address_or_die

    return cast(Any, _raylet).GcsClient(address=canonicalize_bootstrap_address_or_die("auto"))


def drain(instance: str, deadline: float) -> None:
    """Ray places nothing more on the nodes of this instance, and their runs know the deadline."""
    from ray.core.generated import autoscaler_pb2

    preemption = cast(Any, autoscaler_pb2).DRAIN_NODE_REASON_PREEMPTION
    gcs = head()
    nodes = gcs.get_all_node_info(timeout=TIMEOUT_S).values()
    # Ray's autoscaler v1 gives no name: none of these nodes is known to be ours.
    ours = [node.node_id.hex() for node in nodes if instance and node.instance_id == instance and node.state == ALIVE]
    if not ours:
        raise LookupError(f"no node of the instance {instance!r} is alive")
    for node in ours:
        why = "the cloud takes this VM back"
        accepted, problem = gcs.drain_node(node, preemption, why, int(deadline * 1000), timeout=TIMEOUT_S)
        if not accepted:
            raise ValueError(f"Ray does not drain {node}: {problem}")
    say(f"{instance} is taken back at {datetime.fromtimestamp(deadline)}; drained: {ours}")


def has_job() -> bool:
    """Whether a driver is connected, or a submitted job waits or runs: not each of these connects to Ray."""
    from ray._private.ray_constants import KV_NAMESPACE_JOB
    from ray.job_submission import JobStatus

    gcs = head()
    options = {"skip_submission_job_info_field": True, "skip_is_running_tasks_field": True, "timeout": TIMEOUT_S}
    drivers = gcs.get_all_job_info(**options).values()
    if any(not driver.is_dead and not driver.config.ray_namespace.startswith(INTERNAL) for driver in drivers):
        return True
    keys = gcs.internal_kv_keys(f"{INTERNAL}job_info_".encode(), KV_NAMESPACE_JOB, timeout=TIMEOUT_S)
    records = gcs.internal_kv_multi_get(keys, KV_NAMESPACE_JOB, timeout=TIMEOUT_S)
    alive = {node.node_id.hex() for node in gcs.get_all_node_info(timeout=TIMEOUT_S).values() if node.state == ALIVE}
    open_jobs = [job for job in map(json.loads, records.values()) if not JobStatus(job["status"]).is_terminal()]
    # Nobody closes the record of a job whose node has died.
    return any(job["driver_node_id"] is None or job["driver_node_id"] in alive for job in open_jobs)


@lru_cache(maxsize=100)
def say(text: str) -> None:
    """Prints a text the first time only."""
    print(f"{datetime.now():%F %T} {text}", flush=True)


@contextmanager
def outlived(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        say(f"{what}: {type(error).__name__}: {error}")


def keep(cloud: str, instance: str, metadata: str, file: Path) -> None:
    """Does not return."""
    deadline, drained = None, False
    while True:
        with outlived("the metadata service"):
            deadline = deadline or CLOUDS[cloud](metadata)
        if deadline is not None and not drained:
            with outlived("the drain"):
                drain(instance, deadline)
                drained = True
        with outlived("the jobs"):
            if has_job():
                file.touch()
        time.sleep(POLL_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m cluster.provide.keeper")
    parser.add_argument("cloud", choices=CLOUDS)
    parser.add_argument("--instance", required=True, help="Ray's name for this VM, RAY_CLOUD_INSTANCE_ID")
    parser.add_argument("--file", type=Path, required=True, help="renewed while the cluster has a job")
    parser.add_argument("--metadata", default=METADATA, help="URL of the metadata service")
    keep(**vars(parser.parse_args()))
