"""What runs on a node, or in a worker, for `cluster.look.preflight`: facts are collected here, and judged there.

Comes in: `Questions`, or an `AllReduce` to be carried out. Goes out: `NodeFacts`; seconds and interfaces of a worker.
"""

import os
import platform
import re
import resource
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import requests

from imgcls import storage
from imgcls.cpus import usable_cpus
from imgcls.disk import nearest
from imgcls.errors import DataError, StorageError, first_line
from imgcls.records import Manifest, Record
from imgcls.training.environment import commit, versions

PLACE_S, CONNECT_S, REDUCE_S = 6.0, 2.0, 30.0
REDUCE_BYTES = 25_000_000
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
AUTH_MODE = "RAY_AUTH_MODE"


class Questions(Record):
    """What a person asks."""

    places: dict[str, str]
    """`data`, `storage` or both -> a folder or a URL."""
    num_workers: int | None = None
    gpus_per_worker: float | None = None


class Place(Record):
    name: str
    found: str
    error: str = ""


class NodeFacts(Record):
    versions: Mapping[str, str]
    platform: str
    cpus: int
    threads: Mapping[str, str]
    cache: str
    cache_free: int
    cache_error: str
    session_free: float
    """Part of the disk with Ray's own files."""
    shm_bytes: int
    open_files: int
    auth_mode: str
    dashboard_status: int | None
    """HTTP status of the dashboard without a token."""
    num_ports: int
    closed: tuple[str, ...]
    gpus: tuple[str, ...]
    """As nvidia-smi names them."""
    places: tuple[Place, ...]
    # Of a node these are said by who asks it.
    node: str = ""
    where: str = "client"
    num_ray_gpus: float = 0.0
    clock_ahead_s: float = 0.0
    """Of the client's clock, beyond what the time between question and answer explains."""


class Worker(Record):
    node: str
    address: str
    port: int
    """Free, for rank 0 to listen at."""
    cuda_build: bool
    num_gpus: int


class AllReduce(Record):
    backend: str
    num_workers: int
    workers: tuple[Worker, ...] = ()
    seconds: float = 0.0
    interfaces: tuple[str, ...] = ()
    error: str = ""


def facts_of_node(questions: Questions, ports: Mapping[str, str]) -> NodeFacts:
    """What this process and its machine have, and whom they reach.

    ports: name -> HOST:PORT to reach; `dashboard` among them is asked for its status too.
    """
    from ray._private import worker

    from imgcls.data.cache import check_room

    env, cache, cache_error, sets = dict(os.environ), storage.cache_root(), "", list[Any]()
    with ThreadPoolExecutor(16) as pool:  # what has to wait waits at the same time
        places = pool.map(look_at, questions.places, questions.places.values())
        closed = pool.map(_if_closed, ports, ports.values())
        status, gpus = pool.submit(_status_without_token, ports.get("dashboard", "")), pool.submit(_gpus_of_machine)
        with suppress(StorageError, DataError):  # `look_at` reports it
            sets = _sets_to_cache(questions.places["data"]) if "data" in questions.places else []
        try:
            storage.check_places(writes=[str(cache)])
            check_room(sets)
        except StorageError as error:
            cache_error = first_line(error)
    ray_disk = _disk(Path(worker._global_node.get_session_dir_path() if worker._global_node else "/tmp/ray"))
    return NodeFacts(
        versions=versions() | ({"commit": own_commit} if (own_commit := commit()) else {}),
        platform=platform.platform(terse=True),
        cpus=usable_cpus(),
        threads={name: env[name] for name in THREADS if name in env},
        cache=str(cache),
        cache_free=_disk(cache).free,
        cache_error=cache_error,
        session_free=ray_disk.free / ray_disk.total,
        shm_bytes=_disk(Path("/dev/shm")).total,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0] & 0x7FFFFFFF,  # infinity is -1
        auth_mode=env.get(AUTH_MODE, "unset"),
        dashboard_status=status.result(),
        num_ports=len(ports),
        closed=tuple(filter(None, closed)),
        gpus=gpus.result(),
        places=tuple(places),
    )


def _sets_to_cache(data: str) -> list[tuple[str, Manifest, int, int]]:
    """The packed sets, for `check_room`, at the size of the catalogue `quick`; one that it lacks as imagenette."""
    from imgcls.catalogue import suite_of
    from imgcls.data.shards import manifest_url, read_manifest

    inputs, sets = {recipe.dataset: recipe.input for recipe in suite_of("quick")}, []
    with storage.within(PLACE_S, request_s=storage.PREFLIGHT_REQUEST_S):
        for name in storage.folders(data):
            set_url, size = storage.join(data, name), inputs.get(name, inputs["imagenette"])
            if storage.exists(manifest_url(set_url)):
                sets.append((set_url, read_manifest(set_url), size.stored_px, size.channels))
    return sets


def look_at(name: str, url: str) -> Place:
    """Whether this process can read the place `data`, or write to the place `storage`, and by what credentials."""
    found, error, env = url, "", dict(os.environ)
    if url.startswith(("s3:", "s3a:")):
        from botocore.session import Session

        credentials = Session().get_credentials()
        endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or "AWS"
        found += f" at {re.sub('//.*@', '//', endpoint)}, credentials: {credentials.method if credentials else 'none'}"
    try:
        with storage.within(PLACE_S):
            storage.check_places(reads=[url], writes=[url] if name == "storage" else [])
            found += f", {len(_sets_to_cache(url))} packed sets" if name == "data" else ""
    except (StorageError, DataError) as refused:
        error = str(refused)
    return Place(name=name, found=found, error=error)


def _if_closed(name: str, address: str) -> str:
    """The port's name and address if nothing answers there, else empty."""
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=CONNECT_S):
        return ""
    return f"{name} ({address})"


def _status_without_token(dashboard: str) -> int | None:
    with suppress(OSError), requests.Session() as bare:  # requests' own errors are of this kind
        bare.trust_env = False  # no proxy, and nothing out of .netrc
        return bare.get(f"http://{dashboard}/api/version", timeout=CONNECT_S, allow_redirects=False).status_code
    return None


def _gpus_of_machine() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return tuple(subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines())
    return ()


def _disk(path: Path) -> Any:
    return shutil.disk_usage(nearest(path))


def describe_worker() -> Worker:
    """This process, which is to be a rank of the all-reduce."""
    import ray
    import torch
    from ray._common.network_utils import find_free_port

    return Worker(
        node=ray.get_runtime_context().get_node_id(),
        address=ray.util.get_node_ip_address(),
        port=find_free_port(),
        cuda_build=torch.version.cuda is not None,
        num_gpus=torch.cuda.device_count(),
    )


Socket = tuple[str, int]
"""Address and port."""


def all_reduce(rank: int, reduced: AllReduce) -> tuple[float, set[tuple[str, Socket, Socket]]]:
    """Seconds, the median of three, and the process's new connections: interface, own end, other end."""
    import psutil  # pyright: ignore
    import torch
    import torch.distributed as dist

    first, before = reduced.workers[0], _connections()
    store, limit = f"tcp://{first.address}:{first.port}", timedelta(seconds=REDUCE_S)
    dist.init_process_group(reduced.backend, init_method=store, rank=rank, world_size=len(reduced.workers), timeout=limit)
    tensor = torch.ones(REDUCE_BYTES // 4, device="cuda" if reduced.backend == "nccl" else "cpu")
    seconds = []
    for _ in range(4):  # the first warms up
        began = time.monotonic()
        dist.all_reduce(tensor)
        tensor[0].item()  # waits for a GPU
        seconds.append(time.monotonic() - began)
    made = [(own, other) for own, other in _connections() - before if first.port not in (own[1], other[1])]
    names = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
    return statistics.median(seconds[1:]), {(str(names.get(own[0], own[0])), own, other) for own, other in made}


def between_ranks(made: Sequence[set[tuple[str, Socket, Socket]]]) -> tuple[str, ...]:
    """Interfaces of the connections of one rank with another: Ray makes others, on the loopback too."""
    ranks = {(own, other): rank for rank, some in enumerate(made) for _, own, other in some}
    names = {name for rank, some in enumerate(made) for name, own, other in some if ranks.get((other, own), rank) != rank}
    return tuple(sorted(names))


def _connections() -> set[tuple[Socket, Socket]]:
    """Both ends of each TCP connection of this process: own, other."""
    import psutil  # pyright: ignore

    def end(address: Any) -> Socket:
        return address.ip.removeprefix("::ffff:"), address.port

    connections = psutil.Process().net_connections("tcp")
    return {(end(entry.laddr), end(entry.raddr)) for entry in connections if entry.status == "ESTABLISHED"}
