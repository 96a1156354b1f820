import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

A_RUN_WHOSE_TRIAL_IS_GONE = """
import time
from cluster.session import session

def free(cpus):
    until = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) != cpus and time.monotonic() < until:
        time.sleep(0.1)
    return ray.available_resources().get("CPU", 0) == cpus

with session(verbose=False):
    import ray
    from ray.util.placement_group import placement_group
    from cluster.carry.trainer import remove_workers

    class Trial:
        def start(self):
            ray.get(placement_group([{"CPU": 1}], name="run").ready())

    before = ray.available_resources()["CPU"]
    trial = ray.remote(num_cpus=0)(Trial).remote()
    ray.get(trial.start.remote())
    ray.kill(trial)
    time.sleep(2)
    print("held", free(before - 1))
    remove_workers("run")
    print("free", free(before))
    remove_workers("run")
"""


def test_the_cpus_of_a_run_whose_trial_is_gone_are_free_when_they_are_asked_for(ray_cluster: dict[str, str]):
    """Ray itself keeps them until the whole job ends."""
    done = subprocess.run(
        [sys.executable, "-c", A_RUN_WHOSE_TRIAL_IS_GONE],
        cwd=ROOT, env={**os.environ, **ray_cluster}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["held True", "free True"], done.stdout + done.stderr
