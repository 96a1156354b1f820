"""Workers, CPUs and GPUs of a run, and whether they will ever fit.

Pure, except for `local_node`, which asks this machine, `defined_nodes`, which reads a file, and `cluster_nodes` and
`autoscaling_config`, which ask Ray, and Kubernetes where the cluster is KubeRay's.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.session import kuberay_cluster
from imgcls.cpus import usable_cpus
from imgcls.errors import PlacementError
from imgcls.records import Placement, RunOptions, check_flags
from imgcls.training.environment import gpus

HEAD = "node:__internal_head__"
"""Ray's resource that only the head has."""
HERE = "this machine"


@dataclass(frozen=True, slots=True)
class Node:
    cpus: float
    gpus: float
    type: str = HERE
    """Its name in the cluster's configuration; without one `head` or `worker`."""
    limit: int = 0
    """How many nodes an autoscaler can add, of all types together; 0: the node is there."""
    gpu: str | None = None
    """Ray's name for it, such as A10G, if Ray has one."""

    def __str__(self) -> str:
        return f"{self.type} ({self.cpus:g} CPUs and {self.gpus:g} GPUs)"


def local_node() -> Node:
    """What local Ray will have. What other processes of this machine use is not subtracted."""
    return Node(float(usable_cpus()), float(len(gpus())))


def cluster_nodes(config: dict[str, Any] | None) -> list[Node]:
    """The connected cluster's nodes, busy or not, then those that can be added. config: `autoscaling_config`."""
    import ray

    nodes = [_node_of(node["Resources"], node.get("Labels", {})) for node in ray.nodes() if node["Alive"]]
    return nodes + addable_nodes(nodes, config)


def defined_nodes(path: Path) -> list[Node]:
    """Head and workers that a cluster of this definition can have: one of Ray's launcher, a RayCluster or a RayJob.

    Raises PlacementError if the file is none of these, or its cluster cannot grow.
    """
    try:
        config = _launcher_config(yaml.safe_load(path.read_text(encoding="utf-8")))
        if config is None:
            raise ValueError("its cluster does not grow, spec.enableInTreeAutoscaling is not set")
        head = config["available_node_types"][config["head_node_type"]]
        return [_node_type("head", head), *addable_nodes([], config)]
    except (OSError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    raise PlacementError(
        f"--cluster {path} is no definition of a cluster that grows: {why}\n"
        "  do: name a file as infra/ray/aws.yaml or infra/kuberay/raycluster.yaml"
    )


def _launcher_config(definition: dict[str, Any]) -> dict[str, Any] | None:
    """What Ray's autoscaler makes of it; None for a RayCluster without one."""
    kind = definition.get("kind")
    if kind is None:
        return definition
    if kind not in ("RayCluster", "RayJob"):
        raise ValueError(f"a {kind}")
    spec = definition["spec"] if kind == "RayCluster" else definition["spec"]["rayClusterSpec"]
    if not spec.get("enableInTreeAutoscaling"):
        return None
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    names = {"name": "cluster", "namespace": "default"}
    return _derive_autoscaling_config_from_ray_cr({"metadata": names, "spec": {"workerGroupSpecs": [], **spec}})


def _node_type(name: str, kind: dict[str, Any], limit: int = 0) -> Node:
    resources = kind.get("resources", {})
    return Node(float(resources.get("CPU", 0)), float(resources.get("GPU", 0)), name, limit=limit)


def _node_of(resources: dict[str, float], labels: dict[str, str]) -> Node:
    node_type = "head" if HEAD in resources else labels.get("ray.io/node-group") or "worker"
    gpus = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    return Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0), node_type, gpu=gpus[0] if gpus else None)


def addable_nodes(there: Sequence[Node], config: dict[str, Any] | None) -> list[Node]:
    """Nodes that an autoscaler of this configuration can still add to those that are there."""
    if config is None:
        return []
    head, max_workers = config.get("head_node_type"), config.get("max_workers", 2)
    counts = Counter(node.type for node in there)
    left = int(max_workers) - sum(count for name, count in counts.items() if name not in ("head", head))
    addable: list[Node] = []
    for name, kind in config["available_node_types"].items():
        if name != head:
            most = int(kind.get("max_workers", max_workers))
            addable += [_node_type(name, kind, left)] * max(0, min(left, most - counts[name]))
    return addable


def autoscaling_config() -> dict[str, Any] | None:
    """That of the connected cluster's autoscaler; None without one. Raises PlacementError if the head does not answer."""
    import ray
    from ray.exceptions import RayError

    head = next((node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]), None)
    context = ray.get_runtime_context()
    if head == context.get_node_id():
        return find_autoscaling_config(context.gcs_address)
    on_head = ray.remote(num_cpus=0, resources={HEAD: 0.001})(find_autoscaling_config)
    try:
        return ray.get(on_head.remote(context.gcs_address), timeout=90)
    except RayError as error:
        raise PlacementError(f"the head does not say which nodes it can add: {getattr(error, 'cause', error)}") from None


def find_autoscaling_config(gcs_address: str) -> dict[str, Any] | None:
    """That of this cluster's autoscaler: Ray does not say which nodes it may add. Runs on the head.

    On VMs the autoscaler's command line names the file; on Kubernetes it is in a container of its own and reads the
    RayCluster, as we do. Raises PlacementError where Kubernetes does not answer.
    """
    if (cluster := kuberay_cluster()) is not None:
        definition = _ray_cluster(*cluster)
        return definition and _launcher_config(definition)
    flag = b"--autoscaling-config="
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:  # the process has ended
            continue
        paths = [word.removeprefix(flag) for word in words if word.startswith(flag)]
        if paths and f"--gcs-address={gcs_address}".encode() in words:
            return yaml.safe_load(Path(paths[0].decode()).expanduser().read_bytes())
    return None


def _ray_cluster(name: str, namespace: str) -> dict[str, Any] | None:
    """None where the pod may not read it: the operator gives the head this right together with an autoscaler."""
    import requests
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        return KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
    except requests.RequestException as error:
        if error.response is not None and error.response.status_code in (401, 403, 404):
            return None
        raise PlacementError(f"RayCluster {name} in namespace {namespace}: {error}\n  do: give the command again") from None


def choose(nodes: Sequence[Node], options: RunOptions) -> Placement:
    """The placement, checked to fit. Unless given, a worker has one CPU, and one GPU if any node has GPUs.

    Raises PlacementError where it can never fit, RecipeError where an option is out of its range.
    """
    check_flags(options)
    has_gpus = any(node.gpus for node in nodes)
    placement = Placement(
        num_workers=options.num_workers,
        cpus_per_worker=1.0 if options.cpus_per_worker is None else options.cpus_per_worker,
        gpus_per_worker=float(has_gpus) if options.gpus_per_worker is None else options.gpus_per_worker,
    )
    if not placement.cpus_per_worker and not placement.gpus_per_worker:
        raise PlacementError("a worker without a CPU and a GPU\n  do: a larger --cpus-per-worker or --gpus-per-worker")
    if how_many_fit(nodes, placement) == 0:
        where = "this machine" if all(node.type == HERE for node in nodes) else "this cluster"
        raise PlacementError(
            f"{options.num_workers} workers with {placement.cpus_per_worker:g} CPUs and {placement.gpus_per_worker:g} GPUs "
            f"each can never run: {where} has {what_there_is(nodes)}\n"
            "  do: fewer --num-workers, or a smaller --cpus-per-worker or --gpus-per-worker"
        )
    return placement


def what_there_is(nodes: Sequence[Node]) -> str:
    """`1 head (0 CPUs and 0 GPUs), and can add 4 spot (8 CPUs and 1 GPUs), 4 in all`"""

    def counted(group: list[Node]) -> str:
        return ", ".join(f"{count} {node}" for node, count in Counter(group).items()) or "no node"

    addable = [node for node in nodes if node.limit]
    text = counted([node for node in nodes if not node.limit])
    return f"{text}, and can add {counted(addable)}, {min(addable[0].limit, len(addable))} in all" if addable else text


def how_many_fit(nodes: Sequence[Node], placement: Placement) -> int:
    """How many runs can have all their workers at the same time."""
    there = sum(workers_on(node, placement) for node in nodes if not node.limit)
    added = sorted((workers_on(node, placement) for node in nodes if node.limit), reverse=True)
    return (there + sum(added[: max((node.limit for node in nodes), default=0)])) // placement.num_workers


def workers_on(node: Node, placement: Placement) -> int:
    """How many workers fit on the node."""
    pairs = ((node.cpus, placement.cpus_per_worker), (node.gpus, placement.gpus_per_worker))
    return min((math.floor(has / needs + 1e-9) for has, needs in pairs if needs), default=64)
