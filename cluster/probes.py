"""What runs on a node, or in a worker, for `cluster.preflight`: facts are collected, and judged elsewhere.

Comes in: an `Asked`, or an `AllReduce` to be. Goes out: `Facts`, of a node; seconds and interfaces, of a worker.
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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from imgcls import storage
from imgcls.cpus import usable_cpus
from imgcls.disk import nearest
from imgcls.errors import DataError, StorageError
from imgcls.records import Manifest, Record

PLACE_S, CONNECT_S, REDUCE_S = 6.0, 2.0, 15.0
REDUCE_BYTES = 25_000_000
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
AUTH_MODE = "RAY_AUTH_MODE"


class Asked(Record):
    """What a node is to look at."""

    data: str | None = None
    storage: str | None = None
    num_workers: int | None = None
    gpus_per_worker: float | None = None
    node: str = ""
    where: str = "client"
    ports: Mapping[str, tuple[str, int]] = {}
    """That have to be open to it: whose -> (host, port)."""
    dashboard: str = ""
    """HOST:PORT, where it is to be reached."""


class Place(Record):
    name: str
    found: str
    error: str = ""


class Facts(Record):
    node: str
    where: str
    versions: Mapping[str, str]
    platform: str
    cpus: int
    threads: Mapping[str, str]
    cache: str
    cache_free: int
    cache_error: str
    session_free: float
    """A part of the disk that Ray's own files are on."""
    shm_bytes: int
    open_files: int
    auth_mode: str
    dashboard_status: int | None
    """The HTTP status that the dashboard returns for a request without a token."""
    num_ports: int
    closed: tuple[str, ...]
    gpus: tuple[str, ...]
    """As nvidia-smi names them."""
    places: tuple[Place, ...]
    num_ray_gpus: float = 0.0
    clock_ahead_s: float = 0.0
    """Outside the interval between question and answer."""


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


def facts_of_node(asked: Asked) -> Facts:
    """What this process and its machine have, and whom they reach."""
    from ray._private import worker

    from imgcls.data.cache import check_room
    from imgcls.training.environment import commit, versions

    own, cache, cache_error, wanted = dict(os.environ), storage.cache_root(), "", []
    with ThreadPoolExecutor(16) as pool:  # they wait at the same time
        places = pool.map(lambda place: look_at(*place), places_of(asked))
        closed = pool.map(_if_closed, asked.ports, asked.ports.values())
        status, gpus = pool.submit(_status_without_token, asked.dashboard), pool.submit(_gpus_of_machine)
        with suppress(StorageError, DataError):  # which the place itself says
            wanted = _wanted(asked.data) if asked.data else []
        try:
            storage.check_places(writes=[str(cache)])
            check_room(wanted)
        except StorageError as error:
            cache_error = str(error).splitlines()[0]
    ray_disk = _disk(Path(worker._global_node.get_session_dir_path() if worker._global_node else "/tmp/ray"))
    return Facts(
        node=asked.node,
        where=asked.where,
        versions=versions() | ({"commit": found} if (found := commit()) else {}),
        platform=platform.platform(terse=True),
        cpus=usable_cpus(),
        threads={name: own[name] for name in THREADS if name in own},
        cache=str(cache),
        cache_free=_disk(cache).free,
        cache_error=cache_error,
        session_free=ray_disk.free / ray_disk.total,
        shm_bytes=_disk(Path("/dev/shm")).total,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0] & 0x7FFFFFFF,  # infinity is -1
        auth_mode=own.get(AUTH_MODE, "unset"),
        dashboard_status=status.result(),
        num_ports=len(asked.ports),
        closed=tuple(filter(None, closed)),
        gpus=gpus.result(),
        places=tuple(places),
    )


def places_of(asked: Asked) -> list[tuple[str, str]]:
    return [(name, url) for name, url in (("data", asked.data), ("storage", asked.storage)) if url]


def _wanted(data: str) -> list[tuple[str, Manifest, int, int]]:
    """What runs of the catalogue `quick` keep in a node's cache; of a set that it does not know, as of imagenette."""
    from imgcls.catalogue import suite_of
    from imgcls.data.shards import manifest_url, read_manifest

    inputs = {recipe.dataset: recipe.input for recipe in suite_of("quick")}
    with storage.within(PLACE_S, request_s=storage.PREFLIGHT_REQUEST_S):
        sets = {name: storage.join(data, name) for name in storage.folders(data)}
        sets = {name: read_manifest(url) for name, url in sets.items() if storage.exists(manifest_url(url))}
    into = {name: inputs.get(name, inputs["imagenette"]) for name in sets}
    return [(storage.join(data, name), sets[name], into[name].stored_px, into[name].channels) for name in sets]


def look_at(name: str, url: str) -> Place:
    """Whether this process can read the place `data`, or write to the place `storage`, and by what credentials."""
    found, error, own = url, "", dict(os.environ)
    if url.startswith(("s3:", "s3a:")):
        from botocore.session import Session

        credentials = Session().get_credentials()
        endpoint = own.get("AWS_ENDPOINT_URL_S3") or own.get("AWS_ENDPOINT_URL") or "AWS"
        found += f" at {re.sub('//.*@', '//', endpoint)}, credentials: {credentials.method if credentials else 'none'}"
    try:
        with storage.within(PLACE_S):
            storage.check_places(**{"reads" if name == "data" else "writes": [url]})
            found += f", {len(_wanted(url))} packed sets" if name == "data" else ""
    except (StorageError, DataError) as refused:
        error = str(refused)
    return Place(name=name, found=found, error=error)


def _if_closed(name: str, port: tuple[str, int]) -> str:
    with suppress(OSError), socket.create_connection(port, timeout=CONNECT_S):
        return ""
    return f"{name} ({port[0]}:{port[1]})"


def _status_without_token(dashboard: str) -> int | None:
    with suppress(OSError):
        connection = HTTPConnection(dashboard, timeout=CONNECT_S)
        connection.request("GET", "/api/version")
        return connection.getresponse().status
    return None


def _gpus_of_machine() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return tuple(subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines())
    return ()


def _disk(path: Path) -> Any:
    return shutil.disk_usage(nearest(path))


def begun_worker() -> Worker:
    import ray
    import torch.distributed

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return Worker(
        node=ray.get_runtime_context().get_node_id(),
        address=ray.util.get_node_ip_address(),
        port=port,
        cuda_build=torch.version.cuda is not None,
        num_gpus=torch.cuda.device_count(),
    )


def reduce(rank: int, reduced: AllReduce) -> tuple[float, set[str]]:
    """Seconds, the median of three, and the interfaces that the connections took."""
    import psutil  # pyright: ignore
    import torch
    import torch.distributed as dist

    first, before = reduced.workers[0], _connections()
    store, limit = f"tcp://{first.address}:{first.port}", timedelta(seconds=REDUCE_S)
    dist.init_process_group(
        reduced.backend, init_method=store, rank=rank, world_size=len(reduced.workers), timeout=limit
    )  # fmt: skip
    tensor = torch.ones(REDUCE_BYTES // 4, device="cuda" if reduced.backend == "nccl" else "cpu")
    took = []
    for _ in range(4):  # the first warms up
        began = time.monotonic()
        dist.all_reduce(tensor)
        tensor[0].item()  # waits for a GPU
        took.append(time.monotonic() - began)
    new = [own[0] for own, other in _connections() - before if first.port not in (own[1], other[1])]
    named = {one.address: name for name, some in psutil.net_if_addrs().items() for one in some}
    return statistics.median(took[1:]), {str(named.get(address.removeprefix("::ffff:"), address)) for address in new}


def _connections() -> set[Any]:
    import psutil  # pyright: ignore

    some = psutil.Process().net_connections("tcp")
    return {(tuple(one.laddr), tuple(one.raddr)) for one in some if one.status == "ESTABLISHED"}
