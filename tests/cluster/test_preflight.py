"""Facts that are wrong are found, named and answered with what to do; storage's faults by a real S3 server."""

from pathlib import Path
from typing import Any

import pytest

from cluster.look.preflight import Check, judge, marked, remedy_for, sees
from cluster.look.probes import AllReduce, NodeFacts, Place, Worker, between_ranks, look_at
from jobs.doctor import mismatch
from sandbox.s3.server import READER, Server
from tests.conftest import reached_by

VERSIONS = {"ray": "2.60.0", "python": "3.11.7", "torch": "2.14.1", "commit": "abc"}
CLIENT = NodeFacts(
    node="",
    where="client",
    versions=VERSIONS,
    platform="Linux",
    cpus=8,
    threads={"OMP_NUM_THREADS": "8"},
    cache="/cache",
    cache_free=10**11,
    cache_error="",
    session_free=0.5,
    shm_bytes=8 << 30,
    open_files=65536,
    auth_mode="token",
    dashboard_status=401,
    num_ports=4,
    closed=(),
    gpus=(),
    places=(Place(name="storage", found="s3://runs"),),
)


def node(name: str = "one", **changed: Any) -> NodeFacts:
    return CLIENT.model_copy(update={"node": name, "where": f"worker {name}", **changed})


def reduced(*, address: str = "10.0.0.2", backend: str = "gloo", interfaces: tuple[str, ...] = ("eth0",), **changed: Any):
    first = Worker(node="two", address="10.0.0.1", port=1, cuda_build=True, num_gpus=1)
    here = first.model_copy(update={"node": "one", "address": address, **changed})
    return AllReduce(backend=backend, num_workers=2, workers=(first, here), seconds=0.1, interfaces=interfaces)


def faults(nodes: list[NodeFacts], all_reduce: AllReduce | None = None, client: NodeFacts = CLIENT) -> list[Check]:
    return [check for check in judge(client, nodes, all_reduce) if not check.ok]


def test_a_healthy_cluster_has_no_fault():
    gpus = {"gpus": ("NVIDIA H100, 580.1",), "num_ray_gpus": 1.0}
    assert not faults([node("two", **gpus), node("one", **gpus, clock_ahead_s=1.5)], reduced(backend="nccl"))
    assert not faults([node()], reduced(address="10.0.0.1", interfaces=("lo",)))  # workers of one machine


@pytest.mark.parametrize(
    ("changed", "name", "says"),
    [
        ({"versions": VERSIONS | {"ray": "2.59.0"}}, "versions", "same image"),
        ({"versions": VERSIONS | {"python": "3.12.1"}}, "versions", "same image"),
        ({"versions": VERSIONS | {"torch": "2.13.0"}}, "versions", "same image"),
        ({"versions": VERSIONS | {"commit": "abd"}}, "versions", "same commit"),
        ({"threads": {"OMP_NUM_THREADS": "96"}}, "threads", "at most 8"),
        ({"cache_free": 10**8}, "cache", "IMGCLS_CACHE"),
        ({"cache_error": "the cache has 1 MB of room, 9 MB are needed"}, "cache", "IMGCLS_CACHE"),
        ({"session_free": 0.04}, "disk", "--temp-dir"),
        ({"shm_bytes": 64 << 20}, "shared memory", "--shm-size"),
        ({"open_files": 1024}, "open files", "ulimit -n"),
        ({"dashboard_status": 200}, "auth", "get-auth-token --generate"),
        ({"closed": ("worker two 10.0.0.2:8076",)}, "ports", "security group"),
        ({"clock_ahead_s": -2.5}, "clock", "chrony"),
        ({"places": (Place(name="data", found="s3://data", error="s3://data: Access Denied"),)}, "data", "s3:ListBucket"),
        ({"num_ray_gpus": 1.0}, "GPUs", "--gpus all"),
    ],
)
def test_a_fault_of_a_node_is_named_with_the_node_and_what_to_do(changed: dict[str, Any], name: str, says: str):
    found = faults([node("two"), node(**changed)], reduced())
    assert [(check.name, check.where) for check in found] == [(name, "worker one")]
    assert says in found[0].remedy


@pytest.mark.parametrize(
    ("all_reduce", "name", "says"),
    [
        (reduced(interfaces=("lo",)), "all-reduce", "GLOO_SOCKET_IFNAME"),
        (reduced().model_copy(update={"error": "rank 1: no answer within 30 s"}), "all-reduce", "security group"),
        (reduced(cuda_build=False), "GPUs", "CUDA build"),
        (reduced(backend="nccl", num_gpus=0), "GPUs", "driver"),
    ],
)
def test_a_fault_of_the_workers_is_named(all_reduce: AllReduce, name: str, says: str):
    found = faults([node(gpus=("NVIDIA L4, 580.1",), num_ray_gpus=1.0)], all_reduce)
    assert [check.name for check in found] == [name]
    assert says in found[0].remedy


def test_the_interface_is_that_of_connections_between_ranks_and_not_of_rays_own():
    one, other, agent, own = ("10.0.0.1", 5000), ("10.0.0.2", 41000), ("127.0.0.1", 8000), ("127.0.0.1", 42000)
    assert between_ranks([{("eth0", one, other), ("lo", own, agent)}, {("ens5", other, one)}]) == ("ens5", "eth0")
    assert between_ranks([{("lo", own, agent)}, {("lo", agent, own)}]) == ("lo",)
    assert between_ranks([{("lo", own, agent), ("lo", agent, own)}, set()]) == ()  # with itself


def test_both_versions_are_named_where_ray_refuses_this_process():
    started = "was started with:\n    Ray: {}\n    Python: 3.11.7\n"
    found = mismatch(f"Version mismatch: The cluster {started.format('2.59.0')}This process {started.format('2.60.0')}")
    assert not found.ok
    assert found.found == "the cluster has Ray 2.59.0, Python 3.11.7, here is Ray 2.60.0, Python 3.11.7"


@pytest.mark.parametrize(
    ("name", "url", "changed", "says"),
    [
        ("data", "s3://data", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "the endpoint is wrong, down or closed"),
        ("data", "s3://data", {"AWS_ACCESS_KEY_ID": "nobody"}, "the store knows no such key"),
        ("data", "s3://data", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret does not belong to the key"),
        ("storage", "s3://nobucket", {}, "make the bucket"),
        ("storage", "s3://runs", {"AWS_ACCESS_KEY_ID": READER[0], "AWS_SECRET_ACCESS_KEY": READER[1]}, "the cred"),
        ("storage", "s3://runs", {}, ""),
    ],
)
def test_what_is_wrong_with_storage_is_told_apart(s3: Server, name: str, url: str, changed: dict[str, str], says: str):
    environment = s3.env() | changed
    with reached_by(environment):
        found = look_at(name, url)
    assert remedy_for(found.error).startswith(says)
    assert bool(found.error) == bool(says)
    assert found.found == f"{url} at {environment['AWS_ENDPOINT_URL']}, credentials: env"
    assert environment["AWS_SECRET_ACCESS_KEY"] not in found.model_dump_json()


@pytest.mark.parametrize("place", [".", "file", "not yet/there"])
def test_a_folder_is_known_by_a_mark_that_goes_away(tmp_path: Path, place: str):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    with marked(tmp_path / "here" / place) as (folder, names):
        assert folder == str(tmp_path / "here")
        assert sees(folder, names)
        assert not sees(str(tmp_path / "there"), names)
        assert not sees(str(tmp_path / "nowhere"), names)
    assert [one.name for one in (tmp_path / "here").iterdir()] == ["file"]
