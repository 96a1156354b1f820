"""A head without CPUs whose nodes Ray's own autoscaler adds and takes away: processes of this machine in place of VMs."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.system.heads import Head, head_to_be, started

LOCAL = "tests.system.provider.LocalProvider"
HEAD_ID = "f" * 51 + "00000"
"""That Ray's fake provider takes for the head."""
UNUSED = (
    *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands"),
    *("setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)
"""Lists that Ray wants in a configuration whose provider is `external`."""


@contextmanager
def autoscaled(
    types: Mapping[str, Mapping[str, Any]], *, max_workers: int, idle_s: float = 10, provider: str = LOCAL, **planted: str
) -> Iterator[Head]:
    """types: by name, what Ray's configuration says of a node type; `node_type` makes one. max_workers: of all together.

    provider: `LocalProvider` or a subclass of it, by its dotted name. planted: more of the head's environment, which the
    provider has, and every node.
    """
    head = head_to_be()
    config = {
        "cluster_name": "autoscaled",
        "max_workers": max_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": provider,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "head_node_id": HEAD_ID,
            "gcs_address": head.gcs,
        },
        "auth": {"ssh_user": "nobody"},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **types,
        },
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in UNUSED},
    }
    path = Path(head.folder, "autoscaling.json")
    path.write_text(json.dumps(config))
    environment = {
        "PYTHONPATH": str(ROOT),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
    }
    with started(head, {"--num-cpus": 0, "--autoscaling-config": path}, environment | planted) as one:
        yield one


def node_type(cpus: float, most: int, **more: Any) -> dict[str, Any]:
    """more: `labels`, `priority`, `idle_timeout_s` and the like."""
    resources = {"CPU": cpus, "object_store_memory": 80 << 20}
    return {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": most, **more}


def workers_of(head: Head) -> dict[str, dict[str, Any]]:
    """The nodes that are alive, but for the head, by their id, as Ray's dashboard lists them."""
    rows = json.loads(head.get("/api/v0/nodes"))["data"]["result"]["result"]
    return {row["node_id"]: row for row in rows if row["state"] == "ALIVE" and not row["is_head_node"]}
