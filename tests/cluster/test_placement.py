import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from cluster import session
from cluster.placement import Node, addable_nodes, choose, find_autoscaling_config, how_many_fit, local_node
from imgcls.cpus import usable_cpus
from imgcls.errors import PlacementError, RecipeError
from imgcls.records import Placement, RunOptions
from tests.processes import until

TWO_CORES = Node(2, 0)
GPU_NODE = Node(8, 1)


def chosen(nodes, workers=1, cpus=None, gpus=None):
    return choose(nodes, RunOptions(num_workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus))


def test_a_worker_has_a_gpu_where_there_are_any():
    assert chosen([TWO_CORES]).gpus_per_worker == 0
    assert chosen([TWO_CORES, GPU_NODE]).gpus_per_worker == 1
    assert chosen([GPU_NODE], gpus=0).gpus_per_worker == 0


@pytest.mark.parametrize(("workers", "cpus", "gpus"), [(3, None, None), (1, 3, None), (1, None, 1), (1, 0, 0)])
def test_what_can_never_run_is_refused_with_what_there_is(workers, cpus, gpus):
    with pytest.raises(PlacementError):
        chosen([TWO_CORES], workers, cpus, gpus)


@pytest.mark.parametrize(("workers", "cpus", "gpus"), [(0, None, None), (1, -1, None), (1, None, math.nan)])
def test_numbers_out_of_their_range_are_refused_by_the_name_of_their_flag(workers, cpus, gpus):
    with pytest.raises(RecipeError, match=r"--(num-workers 0|cpus-per-worker -1|gpus-per-worker nan): should be "):
        chosen([TWO_CORES], workers, cpus, gpus)


def test_the_refusal_names_both_sides():
    with pytest.raises(
        PlacementError,
        match=r"64 workers with 1 CPUs and 0 GPUs each can never run: .* 1 this machine \(2 CPUs and 0 GPUs\)",
    ):
        chosen([TWO_CORES], 64)


@pytest.mark.parametrize(
    ("nodes", "placement", "expected"),
    [
        ([TWO_CORES], Placement(num_workers=1, cpus_per_worker=1, gpus_per_worker=0), 2),
        ([TWO_CORES], Placement(num_workers=4, cpus_per_worker=0.5, gpus_per_worker=0), 1),
        ([TWO_CORES, TWO_CORES], Placement(num_workers=3, cpus_per_worker=1, gpus_per_worker=0), 1),
        ([GPU_NODE] * 5, Placement(num_workers=1, cpus_per_worker=1, gpus_per_worker=1), 5),
        ([Node(3, 0)] * 2, Placement(num_workers=1, cpus_per_worker=2, gpus_per_worker=0), 2),
    ],
)
def test_workers_are_counted_node_by_node(nodes, placement, expected):
    assert how_many_fit(nodes, placement) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/of/the/host\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 4),
        (
            {
                "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/m/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/m/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
    ],
)
def test_the_cpus_of_a_container_are_those_of_its_quota(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == expected


def test_a_process_that_is_bound_to_one_cpu_has_one_and_so_has_its_local_ray(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    with session._environment({}):
        assert (local_node().cpus, session._local_options()["num_cpus"]) == (1, 1)


AUTOSCALED = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}},
        "spot": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 4},
        "big": {"resources": {"CPU": 64}, "max_workers": 2},
    },
}


def test_nodes_that_can_be_added_count_within_both_limits():
    there = [Node(0, 0, "head"), Node(4, 1, "spot")]
    types = [node.type for node in addable_nodes(there, AUTOSCALED)]
    assert types.count("spot") == 3
    assert types.count("big") == 2
    assert addable_nodes([*there, *[Node(4, 1, "spot")] * 4], AUTOSCALED) == []
    assert addable_nodes(there, None) == []


def test_a_refusal_names_the_types_that_are_there_and_that_can_be_added():
    there = [Node(0, 0, "head")]
    nodes = there + addable_nodes(there, AUTOSCALED)
    assert chosen(nodes, gpus=1).gpus_per_worker == 1
    with pytest.raises(PlacementError, match=r"1 head \(0 CPUs and 0 GPUs\), and can add 4 spot \(4 CPUs and 1 GPUs\), 2 b"):
        chosen(nodes, gpus=2)


def test_the_autoscaling_configuration_is_that_of_this_cluster(tmp_path: Path):
    """Read where Ray's own monitor has it, on its command line; another cluster's on the machine is another's."""
    processes = []
    for port in (6001, 6002):
        config = tmp_path / f"{port}.yaml"
        config.write_text(json.dumps(AUTOSCALED | {"max_workers": port}))
        words = (f"--gcs-address=127.0.0.1:{port}", f"--autoscaling-config={config}")
        processes.append(subprocess.Popen([sys.executable, "-c", "input()", *words], stdin=subprocess.PIPE))
    try:
        for port in (6001, 6002):
            there = partial(find_autoscaling_config, f"127.0.0.1:{port}")
            until(lambda there=there: there() is not None, 60, "the command line of a process that begins")
        found = find_autoscaling_config("127.0.0.1:6002")
        assert found == AUTOSCALED | {"max_workers": 6002}
        assert find_autoscaling_config("127.0.0.1:6003") is None
    finally:
        for process in processes:
            process.communicate(b"\n")
