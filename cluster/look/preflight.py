"""What would go wrong, before it costs anything: every node of a cluster is asked for facts, and the facts are judged.

Comes in: `Questions`. Goes out: `Check`s, for `jobs.doctor`. `probes` collects, `judge` is pure. Beside them
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
from cluster.look import probes
from cluster.look.probes import AUTH_MODE, AllReduce, NodeFacts, Questions
from imgcls import storage
from imgcls.errors import ClusterError, ImgclsError, StorageError, first_line
from imgcls.records import Record, RunOptions
from imgcls.remedies import remedy_for

NODE_S, CLOCK_S = 60.0, 2.0
"""NODE_S: on a node with work its processes need long to begin. A node that answers is not waited for."""
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
    def refused(cls, name: str, where: str, error: ImgclsError) -> "Check":
        found, _, remedy = str(error).partition("\n  do: ")
        return cls(name=name, where=where, ok=False, found=found, remedy=remedy)


Row = tuple[str, str, bool, str]
"""A check's name, what was found, whether that is a fault, and what to do about it."""


def judge(client: NodeFacts, nodes: Sequence[NodeFacts], reduced: AllReduce | None) -> list[Check]:
    expected = {**client.versions, "torch": nodes[0].versions.get("torch", "") if nodes else ""}
    rows = [("client", row) for row in _of_process(client, client.versions)]
    for node in nodes:
        node_rows = *_of_process(node, expected), *_of_machine(node), *_of_gpus(node, reduced)
        rows += [(node.where, row) for row in node_rows]
    rows += [("workers", _of_all_reduce(reduced))] if reduced else []
    return [
        Check(name=name, where=where, ok=not fault, found=found, remedy=remedy if fault else "")
        for where, (name, found, fault, remedy) in rows
    ]


def _of_process(facts: NodeFacts, expected: Mapping[str, str]) -> Iterator[Row]:
    own = {name: facts.versions[name] for name in ("ray", "python", "torch", "commit") if name in facts.versions}
    others = [f"{name} {expected[name]}" for name in own if expected.get(name, own[name]) != own[name]]
    found = ", ".join([*map(" ".join, own.items()), facts.platform])
    found += f"; elsewhere {', '.join(others)}" if others else ""
    yield "versions", found, bool(others), "the same image for client and nodes, and the same commit"
    status = facts.dashboard_status
    found = f"{AUTH_MODE}={facts.auth_mode}" + (f", the dashboard answers {status} without a token" if status else "")
    remedy = f"who reaches it runs code as you: {AUTH_MODE}=token on all nodes, and `ray get-auth-token --generate`'s token"
    yield "auth", found, status == 200, remedy
    found = f"closed to {facts.where}: {', '.join(facts.closed)}" if facts.closed else f"{facts.num_ports} open"
    yield "ports", found, bool(facts.closed), "let all nodes reach each other at all ports: security group, network policy"
    for place in facts.places:
        found = f"{first_line(place.error)}; {place.found}" if place.error else place.found
        yield place.name, found, bool(place.error), remedy_for(place.error)


def _of_machine(facts: NodeFacts) -> Iterator[Row]:
    many = [f"{name}={value}" for name, value in facts.threads.items() if value.isdigit() and int(value) > facts.cpus]
    found = f"{facts.cpus} CPUs, {' '.join(map('='.join, facts.threads.items())) or 'as torch chooses'}"
    yield "threads", found, bool(many), f"at most {facts.cpus} on this node in place of {', '.join(many)}"
    found = facts.cache_error or f"{facts.cache_free / 1e9:,.1f} GB free at {facts.cache}"
    little = bool(facts.cache_error) or facts.cache_free < FREE_BYTES
    yield "cache", found, little, "make room, or name another place with IMGCLS_CACHE"
    full, remedy = facts.session_free < RAY_FREE, "make room, or `ray start --temp-dir`: Ray takes no work on a full disk"
    yield "disk", f"{facts.session_free:.0%} free where Ray's own files are", full, remedy
    small = facts.shm_bytes < session.OBJECT_STORE_BYTES
    remedy = "docker run --shm-size=1g; in a pod an emptyDir with `medium: Memory` at /dev/shm"
    yield "shared memory", f"{facts.shm_bytes / 1e6:,.0f} MB at /dev/shm", small, remedy
    yield "open files", f"{facts.open_files:,}", facts.open_files < OPEN_FILES, "ulimit -n 65536 before `ray start`"
    ahead = facts.clock_ahead_s
    found = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the client's" if ahead else "as the client's"
    yield "clock", found, abs(ahead) > CLOCK_S, "chrony, or another NTP client: signatures, tokens and TLS need the time"


def _of_gpus(facts: NodeFacts, reduced: AllReduce | None) -> Iterator[Row]:
    if not facts.gpus and not facts.num_ray_gpus:
        return
    workers = [worker for worker in reduced.workers if worker.node == facts.node] if reduced else []
    found, remedy = f"{', '.join(facts.gpus) or 'nvidia-smi finds none'}; Ray counts {facts.num_ray_gpus:g}", ""
    if not facts.gpus:
        remedy = "start the container with --gpus all, and look at the driver"
    elif any(not worker.cuda_build for worker in workers):
        found, remedy = f"{found}; torch is built for CPUs", "torch's CUDA build in the nodes' image"
    elif reduced and reduced.backend == "nccl" and any(not worker.num_gpus for worker in workers):
        found, remedy = f"{found}; torch sees none", "a driver that is new enough for torch's CUDA"
    yield "GPUs", found, bool(remedy), remedy


def _of_all_reduce(reduced: AllReduce) -> Row:
    found = f"{reduced.num_workers} workers, {reduced.backend}: "
    if reduced.error:
        all_began = len(reduced.workers) == reduced.num_workers
        return "all-reduce", found + reduced.error, True, INTERFACE if all_began else ANSWER
    size_mb = probes.REDUCE_BYTES / 1e6
    found += f"{size_mb:.0f} MB in {reduced.seconds * 1e3:,.0f} ms, {size_mb / reduced.seconds:,.0f} MB/s"
    apart = len({worker.address for worker in reduced.workers}) > 1
    fault = apart and any(name.startswith("lo") for name in reduced.interfaces)
    unseen = "an interface that was not seen" if apart else "shared memory"
    return "all-reduce", f"{found}, by {', '.join(reduced.interfaces) or unseen}", fault, INTERFACE


def examine(questions: Questions) -> list[Check]:
    """The checks of the connected cluster, whose nodes are asked at the same time."""
    nodes = _nodes()
    with ThreadPoolExecutor(1) as pool:
        reducing = pool.submit(_all_reduced, questions, nodes)
        actors = {node: _on(node) for node in nodes}
        warm, silent = _answers({node: actor.do.remote(time.time) for node, actor in actors.items()}, NODE_S)
        calls = {node: actors[node].do.remote(probes.facts_of_node, questions, _ports_of(node, nodes)) for node in warm}
        client = probes.facts_of_node(questions, _ports_of(None, nodes))
        answers, late = _answers(calls, NODE_S)
        facts = []
        for node, answer in answers.items():
            where, gpus = nodes[node]["where"], nodes[node]["Resources"].get("GPU", 0.0)
            seen = {"node": node, "where": where, "num_ray_gpus": gpus, "clock_ahead_s": _clock_ahead_s(actors[node])}
            facts.append(answer.model_copy(update=seen))
        checks = judge(client, facts, reducing.result())
    for node, reason in (silent | late).items():
        checks.append(Check(name="answer", where=nodes[node]["where"], ok=False, found=reason, remedy=ANSWER))
    return checks if silent or late else [*checks, *_of_cluster(questions)]


def _of_cluster(questions: Questions) -> Iterator[Check]:
    """Whether the workers fit, and whether places that are folders are the same on all nodes."""
    try:
        nodes = placements.cluster_nodes(placements.autoscaling_config())
        workers = questions.num_workers if questions.num_workers is not None else 1
        placements.choose(nodes, RunOptions(num_workers=workers, gpus_per_worker=questions.gpus_per_worker))
        yield Check(name="placement", where="cluster", ok=True, found=placements.what_there_is(nodes))
    except ImgclsError as error:
        yield Check.refused("placement", "cluster", error)
    try:
        check_seen_by_nodes([*questions.places.values()])
    except ImgclsError as error:
        yield Check.refused("places", "cluster", error)


def _nodes() -> dict[str, dict[str, Any]]:
    """Ray's entry of each node that is alive, by its id, with `where`: type and address."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    pairs = zip(alive, placements.cluster_nodes(None), strict=False)
    return {node["NodeID"]: node | {"where": f"{kind.type} {node['NodeManagerAddress']}"} for node, kind in pairs}


def _ports_of(node: str | None, nodes: Mapping[str, Any]) -> dict[str, str]:
    """Those that this node has to reach; None is the client. Only the head reaches a dashboard on its loopback."""
    import ray
    from ray._private.worker import get_dashboard_url

    context, dashboard = ray.get_runtime_context(), get_dashboard_url() or ""
    entry = nodes[node or context.get_node_id()]
    ports = {"GCS": context.gcs_address}
    if dashboard and (placements.HEAD in entry["Resources"] or not dashboard.startswith(("127.", "localhost"))):
        ports["dashboard"] = dashboard
    for other in nodes.values() if node else ():
        if other is not entry:
            for name in ("NodeManagerPort", "ObjectManagerPort"):
                ports[f"{name} of {other['where']}"] = f"{other['NodeManagerAddress']}:{other[name]}"
    return ports


class _Actor:
    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def _on(node: str | None, num_gpus: float = 0) -> Any:
    """A process on this node; None: on any that has so many GPUs free."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node, soft=False) if node else "SPREAD"
    return ray.remote(_Actor).options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=where).remote()


def _answers(calls: Mapping[Any, Any], timeout_s: float) -> tuple[dict[Any, Any], dict[Any, str]]:
    """What came back within so many seconds, and why the rest did not."""
    import ray
    from ray.exceptions import GetTimeoutError

    answers, silent = {}, {}
    until = time.monotonic() + timeout_s
    for key, call in calls.items():
        try:
            answers[key] = ray.get(call, timeout=max(0, until - time.monotonic()))
        except GetTimeoutError:
            silent[key] = f"no answer within {timeout_s:.0f} s"
        except Exception as error:
            silent[key] = str(error).strip().splitlines()[-1]
    return answers, silent


def _clock_ahead_s(actor: Any) -> float:
    """How far the actor's clock is outside the time between question and answer; 0 if it does not answer."""
    began = time.time()
    answers, _ = _answers({"now": actor.do.remote(time.time)}, NODE_S)
    answer, ended = answers.get("now", began), time.time()
    return answer - min(max(answer, began), ended)


def _all_reduced(questions: Questions, nodes: Mapping[str, Any]) -> AllReduce | None:
    """On GPUs only if enough of them are free: nothing here makes an autoscaler start a node. None for a single worker."""
    import ray

    at_least = max(2, len(nodes))
    wanted = at_least if questions.num_workers is None else questions.num_workers
    count = min(wanted, max(at_least, int(ray.cluster_resources().get("CPU", 0))))
    if count < 2:
        return None
    gpus, ids = questions.gpus_per_worker or 0, list(nodes)
    on_gpus = gpus >= 1 and ray.available_resources().get("GPU", 0) >= count * gpus
    actors = {rank: _on(None, gpus) if on_gpus else _on(ids[rank % len(ids)]) for rank in range(count)}
    workers, silent = _answers({rank: actor.do.remote(probes.describe_worker) for rank, actor in actors.items()}, NODE_S)
    reduced = AllReduce(backend="nccl" if on_gpus else "gloo", num_workers=count, workers=tuple(workers.values()))
    answers = {}
    if not silent:
        calls = {rank: actor.do.remote(probes.all_reduce, rank, reduced) for rank, actor in actors.items()}
        answers, silent = _answers(calls, probes.REDUCE_S)
    if silent:
        rank = min(silent)
        where = "" if on_gpus else f" on {nodes[ids[rank % len(ids)]]['where']}"
        return reduced.model_copy(update={"error": f"rank {rank}{where}: {silent[rank]}"})
    seconds, made = zip(*answers.values(), strict=True)
    return reduced.model_copy(update={"seconds": max(seconds), "interfaces": probes.between_ranks(made)})


def check_seen_by_nodes(urls: Sequence[str]) -> None:
    """Each folder or file is the same on all nodes of the connected cluster. Raises StorageError for one that is not."""
    import ray

    others = {node: entry for node, entry in _nodes().items() if node != ray.get_runtime_context().get_node_id()}
    local = [Path(url.removeprefix("file://")) for url in urls if storage.is_local(url)]
    if not others or not local:
        return
    actors = {node: _on(node) for node in others}
    for path in local:
        with marked(path) as (folder, names):
            answers, silent = _answers({node: on.do.remote(sees, folder, names) for node, on in actors.items()}, NODE_S)
        for node, reason in silent.items():
            raise ClusterError(f"{others[node]['where']} cannot say whether it sees {path}: {reason}\n  do: {ANSWER}")
        for node, is_same in answers.items():
            if not is_same:
                raise StorageError(
                    f"{path} is not the same place on {others[node]['where']} as here\n"
                    "  do: a file system that all nodes share, at the same path, or s3://"
                )


@contextmanager
def marked(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder at the path, or nearest to it, and names in it: of a new file, or of all if none can be made."""
    folder = next(parent for parent in (path, *path.parents) if os.path.isdir(parent))
    probe = folder / f".seen-{secrets.token_hex(8)}"
    with suppress(OSError):
        probe.touch()
    try:
        yield str(folder), [probe.name] if os.path.exists(probe) else os.listdir(folder)
    finally:
        with suppress(OSError):
            probe.unlink()


def sees(folder: str, names: list[str]) -> bool:
    return os.path.isdir(folder) and all(os.path.lexists(os.path.join(folder, name)) for name in names)
