"""A connection to Ray: to a local one that we start and stop, or to the cluster that `RAY_ADDRESS` names.

The one place that reads or sets Ray's environment.
"""

import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from cluster.local_ray import lean
from imgcls import storage
from imgcls.cpus import usable_cpus
from imgcls.disk import nearest
from imgcls.errors import ClusterError, first_line

QUIET = {
    # Tune's own table and its loggers; the run's folder holds what it wrote itself.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # print() in a worker would appear twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # The raylet warns of the number of Train's helper processes; of a lost worker we tell ourselves.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "PYTHON worker processes have been started|A worker died or was killed",
}
NEEDED = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without it, whether a token is needed would depend on how Ray was started.
    "RAY_AUTH_MODE": "token",
    # With fewer Tune starts runs one after another.
    "TUNE_MAX_PENDING_TRIALS_PG": "8",
    # Ctrl-C raises KeyboardInterrupt here; Tune would end as if nothing were wrong.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # For the process group of a worker that hangs, before Train ends the worker.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
    # Under `uv run` Ray would start every worker with uv again.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
TRAIN = {
    # Train takes one report at each health check; every 2 s, as is its default, reports of short epochs would wait.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # A node's notice may leave 30 s.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
OBJECT_STORE_BYTES = 200 << 20
"""Small: only reports and records go through it."""
CONNECT_TIMEOUT_S = 10
LOOPBACK = "127.0.0.1"
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
SHORT = ("/tmp", "/var/tmp", "/dev/shm")
ROOM = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead")
"""The longest path of Ray's temporary folder, in bytes: its sockets lie below, and their paths have at most 107."""


def names_cluster() -> bool:
    """Whether `RAY_ADDRESS` names a cluster to join."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def kuberay_cluster() -> tuple[str, str] | None:
    """Name and namespace of the RayCluster whose pod this is, where the pod may ask Kubernetes."""
    name = os.environ.get("RAY_CLUSTER_NAME")
    return (name, POD_NAMESPACE.read_text(encoding="utf-8").strip()) if name and POD_NAMESPACE.is_file() else None


def in_job() -> bool:
    """Whether this process is the entry point of a submitted job, whose working folder goes away with it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def client(mode: str) -> AbstractContextManager[Any]:
    """Inside, Ray's job client can reach a cluster of this authentication mode. Enter it before `ray` is imported."""
    # The client would prefer these two to the address that it is given.
    return _environment(NEEDED, {"RAY_AUTH_MODE": mode, "RAY_ADDRESS": "", "RAY_API_SERVER_ADDRESS": ""})


@contextmanager
def naming(address: str | None) -> Iterator[None]:
    """Inside, this is the cluster's address in place of `RAY_ADDRESS`; None leaves it as it is.

    A cluster that wants no token can be joined without one. Before `ray` is imported, which fixes the mode.
    """
    with _environment({}, {} if address is None else {"RAY_ADDRESS": address}):
        if names_cluster() and _wants_no_token(os.environ["RAY_ADDRESS"]):
            os.environ["RAY_AUTH_MODE"] = "disabled"
        yield


def _wants_no_token(address: str) -> bool:
    """Whether the cluster's head answers a client that has none."""
    import grpc

    if address == "auto":  # the cluster that was started here last
        temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or SHORT[0]
        current = Path(temporary, "ray", "ray_current_cluster")
        address = current.read_text().strip() if current.exists() else address
    with suppress(grpc.RpcError), grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=CONNECT_TIMEOUT_S)
        return True
    return False


@contextmanager
def session(*, verbose: bool) -> Iterator[None]:
    """Ray is connected inside. What was started here is stopped at the end, whatever happens.

    Raises ClusterError where a cluster wants a token, or does not answer.
    """
    joins = names_cluster()
    with ExitStack() as stack:
        stack.enter_context(_environment(NEEDED if verbose else NEEDED | QUIET))
        if not joins:
            stack.enter_context(_room_for_ray())
            _check_loopback()
        options = {} if joins else _local_options()
        import ray
        from ray.exceptions import AuthenticationError

        if not verbose:
            logging.getLogger("ray").setLevel(logging.ERROR)
        stack.callback(ray.shutdown)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        with nullcontext() if joins else lean(verbose=verbose):
            try:
                if joins:
                    _check_answers(os.environ["RAY_ADDRESS"])
                ray.init(logging_level=logging.INFO if verbose else logging.ERROR, log_to_driver=verbose, **options)
            except AuthenticationError:
                raise ClusterError(
                    f"the Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']} wants its token, and has not got it\n"
                    "  do: give it by RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
                ) from None
            except ConnectionError as error:
                raise ClusterError(
                    f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {first_line(error)}\n"
                    "  do: start it, look at its token (RAY_AUTH_TOKEN), or unset RAY_ADDRESS to run here"
                ) from None
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own ends the process without a word
        yield


def keep_credentials_here() -> None:
    """Keeps Tune from copying AWS keys to its trials' runtime environment, which Ray logs and its dashboard shows."""
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def set_train_environment(*, hang_timeout_s: float) -> None:
    """Sets what the environment leaves open of Ray Train's settings; Train hands them on to the workers.

    hang_timeout_s: after which a worker that does not answer has ended.
    """
    # Train waits for its process group (30 s, unless we started the cluster), then for its last words (5 s).
    ending_s = float(os.environ.get("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "30")) + 6
    silence_s = max(hang_timeout_s / 2, hang_timeout_s - ending_s)
    os.environ.update({**TRAIN, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(silence_s), **os.environ})


@contextmanager
def _environment(defaults: Mapping[str, str], changes: Mapping[str, str] | None = None) -> Iterator[None]:
    """Inside, the environment has `changes`, and `defaults` for what it leaves open; afterwards it is as it was.

    At no moment is it empty, as within `patch.dict`: other threads read it.
    """
    before = dict(os.environ)
    os.environ.update({**defaults, **before, **(changes or {})})
    try:
        yield
    finally:
        os.environ.update(before)
        for name in os.environ.keys() - before:
            del os.environ[name]


def _check_answers(address: str) -> None:
    """Raises ConnectionError if nobody listens at `RAY_ADDRESS`, where Ray itself would try for minutes."""
    from ray._private.services import get_ray_address_from_environment

    address = get_ray_address_from_environment(address, None)  # where `ray.init` finds "auto"
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ClusterError(
            f"RAY_ADDRESS={address} is not HOST:PORT of a cluster's head, as 10.0.0.1:6379, or auto\n"
            "  do: that; to a dashboard's URL send the command: python -m jobs.submit run --address URL -- ..."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(f"{address}: {error}") from None


def _check_loopback() -> None:
    """Raises ClusterError without a loopback interface, where Ray would wait for itself for ever."""
    with socket.create_server((LOOPBACK, 0)) as server:
        try:
            socket.create_connection(server.getsockname(), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise ClusterError(
                f"Ray cannot start: this machine does not reach itself at {LOOPBACK}: {error}\n  do: ip link set lo up"
            ) from None


@contextmanager
def _room_for_ray() -> Iterator[None]:
    """Local Ray's own files go where Ray puts them, or, where its sockets do not fit, to a folder of `SHORT`."""
    temporary = os.environ.get("TMPDIR") or SHORT[0]
    usual = (temporary, os.environ.get("RAY_TMPDIR", temporary))  # Python makes sockets in TMPDIR, for the dashboard
    parent = next((folder for folder in SHORT if _has_room(f"{folder}/imgcls-ray.01234567")), None)
    if all(map(_has_room, usual)):
        yield
    elif parent:
        with storage.temporary_folder("ray", parent=parent) as folder:
            os.environ |= dict.fromkeys(("RAY_TMPDIR", "TMPDIR"), folder)
            yield
    else:
        raise ClusterError(
            f"Ray cannot start: none of {', '.join(sorted({*usual, *SHORT}))} can be written and has at most {ROOM} bytes, "
            "as its sockets need\n  do: set RAY_TMPDIR and TMPDIR to a short path that this user can write"
        )


def _has_room(temporary: str) -> bool:
    """Whether Ray can make its folder and its sockets in this folder."""
    short = os.path.isabs(temporary) and len(os.fsencode(temporary)) <= ROOM
    return short and os.access(nearest(Path(temporary, "ray")), os.W_OK | os.X_OK)


def _local_options() -> dict[str, Any]:
    """For a head of our own, reached by the loopback interface alone, beside any other Ray of this machine."""
    os.environ |= {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # On Linux too (the name is old) Ray then uses the loopback interface, and looks for no other address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Nobody takes this node away; and Train starts its own workers, so that prestarted ones would never be used.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        # Ray's agents see by their standard input that the raylet has ended; `local_ray` counts on it.
        "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
    }
    return {
        "address": "local",
        "num_cpus": usable_cpus(),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
