"""Workers, CPUs and GPUs of a run, and whether they will ever fit. Pure, but for the two that ask this machine or Ray."""

import math
import os
from collections.abc import Sequence
from typing import Any

from cluster.session import names_cluster
from imgcls.errors import PlacementError
from imgcls.records import Placement

Node = dict[str, float]
"""What a node has: {"CPU": 8.0, "GPU": 1.0}."""


def local_node() -> Node:
    """What local Ray will have. The processes of this machine's other users are not counted."""
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def cluster_nodes() -> list[Node]:
    """What the connected cluster's nodes have, busy or not."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [{"CPU": r.get("CPU", 0.0), "GPU": r.get("GPU", 0.0)} for r in alive]


def choose(
    nodes: Sequence[Node], *, num_workers: int, cpus_per_worker: float | None, gpus_per_worker: float | None
) -> Placement:
    """The placement asked for; a GPU a worker where there are any, one CPU a worker unless said. Checked to fit."""
    if num_workers < 1:
        raise PlacementError(f"--num-workers {num_workers}: one or more")
    for flag, value in (("--cpus-per-worker", cpus_per_worker), ("--gpus-per-worker", gpus_per_worker)):
        if value is not None and (value < 0 or not math.isfinite(value)):
            raise PlacementError(f"{flag} {value}: zero or more")
    has_gpus = any(node["GPU"] for node in nodes)
    placement = Placement(
        num_workers=num_workers,
        cpus_per_worker=1.0 if cpus_per_worker is None else cpus_per_worker,
        gpus_per_worker=float(has_gpus) if gpus_per_worker is None else gpus_per_worker,
    )
    if not placement.cpus_per_worker and not placement.gpus_per_worker:
        raise PlacementError("a worker without a CPU and a GPU\n  do: a larger --cpus-per-worker or --gpus-per-worker")
    if how_many_fit(nodes, placement) == 0:
        where = "this cluster" if names_cluster() else "this machine"
        has = "; ".join(f"{n['CPU']:g} CPUs and {n['GPU']:g} GPUs" for n in nodes)
        raise PlacementError(
            f"{num_workers} workers with {placement.cpus_per_worker:g} CPUs and {placement.gpus_per_worker:g} GPUs each can "
            f"never run: {where} has {has}\n  do: fewer --num-workers, or a smaller --cpus-per-worker or --gpus-per-worker"
        )
    return placement


def how_many_fit(nodes: Sequence[Node], placement: Placement) -> int:
    """Runs that can have all their workers at the same time."""
    return sum(_workers_on(node, placement) for node in nodes) // placement.num_workers


def _workers_on(node: Node, placement: Placement) -> int:
    wanted = {"CPU": placement.cpus_per_worker, "GPU": placement.gpus_per_worker}
    rooms = [math.floor(node[kind] / amount + 1e-9) for kind, amount in wanted.items() if amount]
    return min(rooms, default=64)


def scaling_config(placement: Placement) -> Any:
    """The placement in Ray Train's words."""
    from ray.train import ScalingConfig

    wanted = {"CPU": placement.cpus_per_worker, "GPU": placement.gpus_per_worker}
    return ScalingConfig(
        num_workers=placement.num_workers,
        use_gpu=placement.gpus_per_worker > 0,
        resources_per_worker={kind: amount for kind, amount in wanted.items() if amount},
    )
