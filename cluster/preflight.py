"""What would go wrong, before it costs anything: every node of a cluster is asked for facts, and the facts are judged.

Comes in: an `Asked`. Goes out: `Check`s, for `jobs.doctor`. `probes` collects, `judge` is pure. Beside them
`check_seen_by_nodes`, which suites and evaluations call before they hand a folder to other nodes.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import placement as placements
from cluster import session
from cluster.probes import (
    AUTH_MODE,
    REDUCE_BYTES,
    REDUCE_S,
    AllReduce,
    Asked,
    Facts,
    begun_worker,
    facts_of_node,
    places_of,
    reduce,
)
from imgcls import storage
from imgcls.errors import ClusterError, ImgclsError, PlacementError, StorageError
from imgcls.records import Record
from imgcls.remedies import remedy_for

NODE_S, SEEN_S, CLOCK_S = 10.0, 30.0, 2.0
FREE_BYTES, OPEN_FILES = 10**9, 4096
RAY_FREE = 0.05  # with less of its disk free Ray takes no work
INTERFACE = (
    "GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME for GPUs) on every node: the interface by which they reach each other, not lo; "
    "a security group that is open within itself"
)
ANSWER = "look at that node: its raylet, its load, and whether this code is there, as in the other nodes' image"


class Check(Record):
    name: str
    where: str
    ok: bool
    found: str
    remedy: str = ""

    @classmethod
    def refused(cls, name: str, where: str, error: Exception, remedy: str = "") -> "Check":
        found, _, its_remedy = str(error).partition("\n  do: ")
        return cls(name=name, where=where, ok=False, found=found, remedy=remedy or its_remedy)


Row = tuple[str, str, bool, str]
"""Name, what was found, whether that is a fault, and then what to do."""


def judge(client: Facts, nodes: Sequence[Facts], reduced: AllReduce | None) -> list[Check]:
    expected = {**client.versions, "torch": nodes[0].versions.get("torch", "") if nodes else ""}
    rows = [("client", row) for row in _of_process(client, client.versions)]
    for node in nodes:
        found = *_of_process(node, expected), *_of_machine(node), *_of_gpus(node, reduced)
        rows += [(node.where, row) for row in found]
    rows += [("workers", _of_all_reduce(reduced))] if reduced else []
    return [
        Check(name=name, where=where, ok=not fault, found=found, remedy=remedy if fault else "")
        for where, (name, found, fault, remedy) in rows
    ]


def _of_process(facts: Facts, expected: Mapping[str, str]) -> Iterator[Row]:
    mine = {name: facts.versions[name] for name in ("ray", "python", "torch", "commit") if name in facts.versions}
    others = [f"{name} {expected[name]}" for name, own in mine.items() if expected.get(name, own) != own]
    found = ", ".join([*map(" ".join, mine.items()), facts.platform])
    found += f"; elsewhere {', '.join(others)}" if others else ""
    yield "versions", found, bool(others), "the same image for client and nodes, and the same commit"
    status = facts.dashboard_status
    found = f"{AUTH_MODE}={facts.auth_mode}" + (f", the dashboard answers {status} without a token" if status else "")
    remedy = f"who reaches it runs code as you: {AUTH_MODE}=token on all nodes, and `ray get-auth-token --generate`'s token"
    yield "auth", found, status == 200, remedy
    found = f"closed to {facts.where}: {', '.join(facts.closed)}" if facts.closed else f"{facts.num_ports} open"
    yield "ports", found, bool(facts.closed), "let all nodes reach each other at all ports: security group, network policy"
    for place in facts.places:
        found = f"{place.error.splitlines()[0]}; {place.found}" if place.error else place.found
        yield place.name, found, bool(place.error), remedy_for(place.error)


def _of_machine(facts: Facts) -> Iterator[Row]:
    many = [f"{name}={value}" for name, value in facts.threads.items() if value.isdigit() and int(value) > facts.cpus]
    found = f"{facts.cpus} CPUs, {' '.join(map('='.join, facts.threads.items())) or 'as torch chooses'}"
    yield "threads", found, bool(many), f"at most {facts.cpus} on this node in place of {', '.join(many)}"
    found = facts.cache_error or f"{facts.cache_free / 1e9:,.1f} GB free at {facts.cache}"
    little = bool(facts.cache_error) or facts.cache_free < FREE_BYTES
    yield "cache", found, little, "make room, or name another place with IMGCLS_CACHE"
    found = f"{facts.session_free:.0%} free where Ray's own files are"
    full = facts.session_free < RAY_FREE
    yield "disk", found, full, "make room, or `ray start --temp-dir`: Ray takes no work on a full disk"
    small = facts.shm_bytes < session.OBJECT_STORE_BYTES
    remedy = "docker run --shm-size=1g; in a pod an emptyDir with `medium: Memory` at /dev/shm"
    yield "shared memory", f"{facts.shm_bytes / 1e6:,.0f} MB at /dev/shm", small, remedy
    yield "open files", f"{facts.open_files:,}", facts.open_files < OPEN_FILES, "ulimit -n 65536 before `ray start`"
    ahead = facts.clock_ahead_s
    found = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the client's" if ahead else "as the client's"
    yield "clock", found, abs(ahead) > CLOCK_S, "chrony, or another NTP client: signatures, tokens and TLS need the time"


def _of_gpus(facts: Facts, reduced: AllReduce | None) -> Iterator[Row]:
    workers = [worker for worker in reduced.workers if worker.node == facts.node] if reduced else []
    found, remedy = f"{', '.join(facts.gpus) or 'nvidia-smi finds none'}; Ray counts {facts.num_ray_gpus:g}", ""
    if not facts.gpus:
        remedy = "start the container with --gpus all, and look at the driver"
    elif any(not worker.cuda_build for worker in workers):
        found, remedy = f"{found}; torch is built for CPUs", "torch's CUDA build in the nodes' image"
    elif reduced and reduced.backend == "nccl" and any(not worker.num_gpus for worker in workers):
        found, remedy = f"{found}; torch sees none", "a driver that is new enough for torch's CUDA"
    if facts.gpus or facts.num_ray_gpus:
        yield "GPUs", found, bool(remedy), remedy


def _of_all_reduce(reduced: AllReduce) -> Row:
    found = f"{reduced.num_workers} workers, {reduced.backend}: "
    if reduced.error:
        begun = len(reduced.workers) == reduced.num_workers
        remedy = INTERFACE if begun else ANSWER
        return "all-reduce", found + reduced.error, True, remedy
    size_mb = REDUCE_BYTES / 1e6
    found += f"{size_mb:.0f} MB in {reduced.seconds * 1e3:,.0f} ms, {size_mb / reduced.seconds:,.0f} MB/s"
    apart = len({worker.address for worker in reduced.workers}) > 1
    fault = apart and any(name.startswith("lo") for name in reduced.interfaces)
    return "all-reduce", f"{found}, by {', '.join(reduced.interfaces) or 'shared memory'}", fault, INTERFACE


def examine(asked: Asked) -> list[Check]:
    """The checks of the connected cluster, whose nodes are asked at the same time."""
    nodes = _nodes()
    with ThreadPoolExecutor(1) as beside:
        reducing = beside.submit(_all_reduced, asked, nodes)
        actors = {node: _on(node) for node in nodes}
        warm, silent = _answers({node: actor.do.remote(time.time) for node, actor in actors.items()}, NODE_S)
        clocks = {node: _clock_ahead_s(actors[node]) for node in warm}
        calls = {node: actors[node].do.remote(facts_of_node, _asked_of(node, asked, nodes)) for node in warm}
        client = facts_of_node(_asked_of(None, asked, nodes))
        found, late = _answers(calls, NODE_S)
        facts = [
            one.model_copy(
                update={"num_ray_gpus": nodes[node]["Resources"].get("GPU", 0.0), "clock_ahead_s": clocks[node]}
            )
            for node, one in found.items()
        ]  # fmt: skip
        checks = [Check.refused("answer", nodes[node]["where"], error, ANSWER) for node, error in (silent | late).items()]
        return [*judge(client, facts, reducing.result()), *checks, *([] if checks else _of_cluster(asked))]


def _of_cluster(asked: Asked) -> Iterator[Check]:
    """Whether the workers fit, and whether places that are folders are the same on all nodes."""
    try:
        nodes = placements.cluster_nodes(placements.autoscaling_config())
        workers = asked.num_workers if asked.num_workers is not None else 1
        placements.choose(nodes, num_workers=workers, cpus_per_worker=None, gpus_per_worker=asked.gpus_per_worker)
        yield Check(name="placement", where="cluster", ok=True, found=placements.what_there_is(nodes))
    except PlacementError as error:
        yield Check.refused("placement", "cluster", error)
    try:
        check_seen_by_nodes([url for _, url in places_of(asked)])
    except ImgclsError as error:
        yield Check.refused("places", "cluster", error)


def _nodes() -> dict[str, dict[str, Any]]:
    """Ray's entry of each node that is alive, by its id, with `where`: type and address."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    named = zip(alive, placements.cluster_nodes(None), strict=False)
    return {node["NodeID"]: node | {"where": f"{kind.type} {node['NodeManagerAddress']}"} for node, kind in named}


def _asked_of(node: str | None, asked: Asked, nodes: Mapping[str, Any]) -> Asked:
    """With the ports that this node needs; None is the client. A dashboard on the loopback interface is its head's alone."""
    import ray
    from ray._private.worker import get_dashboard_url

    context, dashboard = ray.get_runtime_context(), get_dashboard_url() or ""
    entry = nodes[node or context.get_node_id()]
    reached = placements.HEAD in entry["Resources"] or not dashboard.startswith(("127.", "localhost"))
    found = {"GCS": context.gcs_address, **({"dashboard": dashboard} if dashboard and reached else {})}
    for other in nodes.values() if node else ():
        if other is not entry:
            for name in ("NodeManagerPort", "ObjectManagerPort"):
                found[f"{name} of {other['where']}"] = f"{other['NodeManagerAddress']}:{other[name]}"
    ports = {name: (at.rpartition(":")[0], int(at.rpartition(":")[2])) for name, at in found.items()}
    named = {"node": node, "where": entry["where"]} if node else {}
    return asked.model_copy(update={**named, "ports": ports, "dashboard": found.get("dashboard", "")})


class _Actor:
    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def _on(node: str | None, num_gpus: float = 0) -> Any:
    """A process on this node; None: on any that has so many GPUs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node, soft=False) if node else "SPREAD"
    return ray.remote(_Actor).options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=where).remote()


def _answers(calls: Mapping[Any, Any], timeout_s: float) -> tuple[dict[Any, Any], dict[Any, ClusterError]]:
    """What came back within so many seconds, and why the rest did not."""
    import ray
    from ray.exceptions import GetTimeoutError

    found, silent = {}, {}
    until = time.monotonic() + timeout_s
    for key, call in calls.items():
        try:
            found[key] = ray.get(call, timeout=max(0, until - time.monotonic()))
        except GetTimeoutError:
            silent[key] = ClusterError(f"no answer within {timeout_s:.0f} s")
        except Exception as error:
            silent[key] = ClusterError(str(error).strip().splitlines()[-1])
    return found, silent


def _clock_ahead_s(actor: Any) -> float:
    began = time.time()
    found, _ = _answers({"now": actor.do.remote(time.time)}, NODE_S)
    there, ended = found.get("now", began), time.time()
    return there - min(max(there, began), ended)


def _all_reduced(asked: Asked, nodes: Mapping[str, Any]) -> AllReduce | None:
    """On GPUs only where enough of them are free: nothing here makes an autoscaler start a node."""
    import ray

    cpus = sum(node["Resources"].get("CPU", 0) for node in nodes.values())
    at_least = max(2, len(nodes))
    count = at_least if asked.num_workers is None else min(asked.num_workers, max(at_least, int(cpus)))
    each = asked.gpus_per_worker or 0
    on_gpus = each >= 1 and ray.available_resources().get("GPU", 0) >= count * each
    ids = list(nodes)
    if count < 2:
        return None
    actors = [_on(None, each) if on_gpus else _on(ids[rank % len(ids)]) for rank in range(count)]
    there, silent = _answers({rank: actor.do.remote(begun_worker) for rank, actor in enumerate(actors)}, REDUCE_S)
    workers = tuple(there.values())
    reduced = AllReduce(backend="nccl" if on_gpus else "gloo", num_workers=count, workers=workers)
    if not silent:
        calls = {rank: actor.do.remote(reduce, rank, reduced) for rank, actor in enumerate(actors)}
        there, silent = _answers(calls, REDUCE_S)
    if silent:
        rank = min(silent)
        where = "" if on_gpus else f" on {nodes[ids[rank % len(ids)]]['where']}"
        return reduced.model_copy(update={"error": f"rank {rank}{where}: {silent[rank]}"})
    names = {name for _, some in there.values() for name in some}
    seconds = max(seconds for seconds, _ in there.values())
    return reduced.model_copy(update={"seconds": seconds, "interfaces": tuple(sorted(names))})


def check_seen_by_nodes(urls: Sequence[str]) -> None:
    """Each folder or file is the same on all nodes of the connected cluster. Raises StorageError, naming one where not."""
    import ray

    others = {node: entry for node, entry in _nodes().items() if node != ray.get_runtime_context().get_node_id()}
    local = [Path(url.removeprefix("file://")) for url in urls if storage.is_local(url)]
    if not others or not local:
        return
    actors = {node: _on(node) for node in others}
    for path in local:
        with marked(path) as (folder, names):
            seen, silent = _answers({node: actor.do.remote(sees, folder, names) for node, actor in actors.items()}, SEEN_S)
        for node, error in silent.items():
            raise ClusterError(f"{others[node]['where']} cannot say whether it sees {path}: {error}\n  do: {ANSWER}")
        for node in (node for node, sees in seen.items() if not sees):
            raise StorageError(
                f"{path} is not the same place on {others[node]['where']} as here\n"
                "  do: a file system that all nodes share, at the same path, or s3://"
            )


@contextmanager
def marked(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder at the place, or nearest to it, and names in it: a new one's, or where none can be made, all."""
    folder = next(one for one in (path, *path.parents) if os.path.isdir(one))
    probe = folder / f".seen-{secrets.token_hex(8)}"
    try:
        probe.touch()
        names = [probe.name]
    except OSError:
        names = os.listdir(folder)
    try:
        yield str(folder), names
    finally:
        with suppress(OSError):
            probe.unlink()


def sees(folder: str, names: list[str]) -> bool:
    return os.path.isdir(folder) and all(os.path.lexists(os.path.join(folder, name)) for name in names)
