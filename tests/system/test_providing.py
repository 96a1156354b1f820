"""What nodes have of our code, beside a real Ray: the fallback in its autoscaler, and a job's own code before the nodes'."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_in
from tests.infra.try_image import DOCKERFILE, in_image
from tests.system.autoscaled import autoscaled, node_type, workers_of
from tests.system.heads import Head, serving

pytestmark = pytest.mark.slow
SPOT = {"InstanceMarketOptions": {"MarketType": "spot"}}
IN_RAY = """
import ray
ray.init(logging_level="ERROR")
print(ray.get(ray.remote(num_cpus=1)(lambda: {}).remote()))
"""


def test_where_spot_is_refused_an_on_demand_node_comes_within_two_updates_and_the_task_ends():
    types = {
        "spot": node_type(1, 2, node_config=SPOT, labels={"capacity": "spot"}, priority=20),
        "ondemand": node_type(1, 2, labels={"capacity": "on-demand"}, priority=0),
    }
    with autoscaled(types, max_workers=2, idle_s=60, provider="tests.system.refusing.NoSpotButOnDemand") as head:
        done = subprocess.run(
            [sys.executable, "-c", IN_RAY.format("'on a node'")],
            env=os.environ | head.joining,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stdout.split("\n")[-2] == "on a node"
        (worker,) = workers_of(head).values()
        assert worker["labels"]["capacity"] == "spot", "what was asked for"
        said = Path(head.folder, "session_latest/logs/monitor.log").read_text()
        asked = re.findall(r"Launching 1 nodes of type (\w+)", said)
        assert asked in (["spot"], ["spot"] * 2)
        assert re.search(r"WARNING.*no spot capacity, 1 on-demand node.*\(InsufficientInstanceCapacity\)", said)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Its Python path has what the container image has of our code, and no more."""
    node = tmp_path_factory.mktemp("node")
    for path, file in in_image(DOCKERFILE.read_text(), "/opt/node/").items():
        (node / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, node / path)
    with serving(RAY_CLOUD_INSTANCE_ID="i-head", PYTHONPATH=str(node)) as one:
        yield one


def test_a_job_finds_its_own_code_before_the_nodes(head: Head, tmp_path: Path):
    """By its working folder, as `jobs.submit` sends it; by its current folder, as in the image of a RayJob."""
    done = run_in(tmp_path, "submit", "run", "--address", head.url, "--", "doctor", env=head.env)
    assert re.search(r"versions +\S.* ok ", done.stdout), done.stdout + done.stderr  # asked by our code on each node
    task = "__import__('cluster.placement').__file__"
    head.begin("in-its-folder", f"cd {ROOT} && {shlex.join([sys.executable, '-c', IN_RAY.format(task)])}")
    head.wait_for("in-its-folder", "SUCCEEDED")
    assert f"{ROOT}/cluster/__init__.py" in json.loads(head.get("/api/jobs/in-its-folder/logs"))["logs"]
