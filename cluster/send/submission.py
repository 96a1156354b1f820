"""Jobs of a cluster over HTTP: submitted, followed to their end, stopped. No Ray process runs here.

Comes in: a `staging.Job`. Goes out: its log, as it is written there, and how it ended. Called by `jobs.submit`.
"""

import logging
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests
from pydantic import ValidationError

from cluster import session
from cluster.send.staging import Job
from imgcls.errors import ClusterError, PlacementError, RecipeError, first_line

CONNECT_S, ANSWER_S = 5.0, 30.0
"""For a request: until someone takes it, and until it is answered."""
LOST_LOG_S = 60.0
"""The log of a job that is over is given up after so long: its node may be gone."""
LOOK_S, LOG_PER_S = 1.0, 500_000
"""A job is looked at so often. Its log comes as a whole each time: a long one less often, to take so many characters/s."""
INTERRUPTED, NEVER_BEGAN = 130, 3


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`. Made by `connected`."""

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                return super()._do_request(method, endpoint, timeout=(CONNECT_S, ANSWER_S), **options)

        self.address = address
        with _named(address):
            self.client = Client(address)
        self.ray_version = str(self.client._server_ray_version)
        for handler in logging.getLogger("ray").handlers:  # some loggers below it have a level of their own
            handler.setLevel(logging.ERROR)

    def submit(self, job: Job, *, python: str | None = None) -> None:
        """The cluster has taken it. python: the interpreter there; that of its own workers unless said.

        Raises RecipeError where it had a job of this id before, PlacementError where no node has the resource asked for.
        """
        if self.info(job.id) is not None:
            raise RecipeError(f"--job-id {job.id}: the cluster has seen a job of this id\n  do: another, or none")
        if job.driver_resource is not None:
            self._check_resource(job.driver_resource)
        request = job.request(python or self.python())
        with tempfile.TemporaryDirectory() as folder, _named(self.address):
            job.stage(Path(folder))
            request["runtime_env"]["working_dir"] = folder
            self.client.submit_job(**request)

    def python(self) -> str:
        """The interpreter by which the head runs its own workers: the one that has the packages. Else the PATH's."""
        # The dashboard promises none of this.
        with suppress(requests.RequestException, LookupError, TypeError, StopIteration):
            nodes = self.client._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
            head = next(node["raylet"]["nodeId"] for node in nodes if node["raylet"]["isHeadNode"])
            words = self.client._do_request("GET", f"/nodes/{head}").json()["data"]["detail"]["cmdline"]
            flag = "--python_worker_command="
            return next(word.removeprefix(flag).split()[0] for word in words if word.startswith(flag))
        return "python"

    def _check_resource(self, name: str) -> None:
        with _named(self.address):
            found = self.client._do_request("GET", "/api/v0/nodes?detail=1").json()["data"]["result"]["result"]
        there = {kind for node in found if node["state"] == "ALIVE" for kind in node["resources_total"]}
        if name not in there:
            named = ", ".join(sorted(kind for kind in there if not kind.startswith("node:")))
            raise PlacementError(
                f"--driver-resource {name}: no node has it; there are: {named}\n  do: one of these, or none"
            )

    def info(self, job_id: str) -> Any | None:
        """Ray's own record of the job; None where it has none."""
        with _named(self.address):
            try:
                return self.client.get_job_info(job_id)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return None
                raise

    def known(self, job_id: str) -> Any:
        found = self.info(job_id)
        if found is None:
            raise RecipeError(f"the cluster at {self.address} has no job {job_id}")
        return found

    def stop(self, job_id: str) -> None:
        self.known(job_id)
        with _named(self.address):
            self.client.stop_job(job_id)

    def follow(
        self, job_id: str, write: Callable[[str], None], say: Callable[[str], None], *, give_up_s: float = math.inf
    ) -> tuple[int, str]:
        """Writes the job's log as it grows, each character once, until the job is over; whatever the connection does.

        Returns `ended`. Raises ClusterError where there is no connection for `give_up_s`.
        """
        info = self.known(job_id)
        written, lost_s, over_s = 0, None, None
        while True:
            try:
                found = self.info(job_id)  # before the log, which is whole where the job was over
                if found is None:
                    return NEVER_BEGAN, f"{job_id}: the cluster has lost it; the same command goes on where it stopped"
                info = found
                if over_s is None and info.status.is_terminal():
                    over_s = time.monotonic()
                with _named(self.address):
                    log = self.client.get_job_logs(job_id)
            except (ClusterError, OSError, RuntimeError) as error:
                reason = first_line(error)
                if over_s is not None and time.monotonic() - over_s > LOST_LOG_S:
                    say(f"the rest of the log cannot be read: {reason}")
                    return ended(job_id, info)
                if lost_s is not None and time.monotonic() - lost_s > give_up_s:
                    raise ClusterError(f"no connection to {self.address}: {reason}\n  do: look at the tunnel") from None
                if lost_s is None:
                    lost_s = time.monotonic()
                    if over_s is None:
                        say(f"no connection to {self.address} ({reason}); the job goes on: tried again")
                    else:
                        say(f"the job is over, its log does not come ({reason}): tried again")
                time.sleep(LOOK_S)
                continue
            if lost_s is not None:
                say(f"connected again after {time.monotonic() - lost_s:.0f} s")
                lost_s = None
            write(log[written:])
            written = max(written, len(log))
            if info.status.is_terminal():
                return ended(job_id, info)
            time.sleep(LOOK_S + len(log) / LOG_PER_S)


def ended(job_id: str, info: Any) -> tuple[int, str]:
    """The exit code of the command of a job that is over, and what to say of it, from Ray's record."""
    status, code = str(info.status), info.driver_exit_code
    if status == "SUCCEEDED":
        return 0, f"{job_id}: succeeded"
    if status == "STOPPED":
        return INTERRUPTED, f"{job_id}: was stopped; the same command goes on where it stopped"
    if code is None:
        return NEVER_BEGAN, f"{job_id}: its command never began or was lost: {info.message}"
    number = -code if code < 0 else code - 128
    if code < 0 or number in set(signal.Signals):
        return 128 + number, f"{job_id}: was killed by signal {number} ({signal.Signals(number).name})"
    hint = "; the cluster's head has no such interpreter: `jobs.submit run --python PATH` names one" if code == 127 else ""
    return code, f"{job_id}: failed, its command ended with exit code {code}{hint}"


@contextmanager
def connected(address: str) -> Iterator[Jobs]:
    """Raises ClusterError where nobody answers at the dashboard's URL, or the token is missing or wrong."""
    if not address.startswith(("http://", "https://")):
        raise RecipeError(f"--address {address}: the URL of the cluster's dashboard, as http://127.0.0.1:8265")
    address = address.rstrip("/")
    with _named(address):
        answer = requests.get(f"{address}/api/authentication_mode", timeout=(CONNECT_S, ANSWER_S))
        mode = answer.json()["authentication_mode"]
    with session.client(mode):
        yield Jobs(address)


@contextmanager
def _named(address: str) -> Iterator[None]:
    """What goes wrong between here and the dashboard is said in our words, as is that another program answers."""
    try:
        yield
    except (requests.JSONDecodeError, KeyError, TypeError, ValidationError):  # it is no JSON, or has other fields
        raise ClusterError(
            f"what answers at {address} is no Ray dashboard, or one of another version\n"
            "  do: look at the address and the tunnel: the dashboard's port is 8265 unless said"
        ) from None
    except (requests.RequestException, ConnectionError) as error:
        reason = first_line(error).rstrip("')\"").rpartition(": ")[2]
        raise ClusterError(
            f"no Ray dashboard answers at {address}: {reason}\n"
            "  do: look at the address and the tunnel, as `ssh -L 8265:localhost:8265 HEAD`"
        ) from None
    except Exception as error:
        from ray.exceptions import AuthenticationError  # not earlier: `session.client` comes before Ray

        if isinstance(error, AuthenticationError):
            raise ClusterError(
                f"the cluster at {address} wants its token, and has not got it, or another\n"
                "  do: give it by RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; `ray get-auth-token` on the head prints it"
            ) from None
        if isinstance(error, RuntimeError):  # an answer that is no success
            raise ClusterError(f"the dashboard at {address} refuses: {first_line(error)}") from None
        raise
