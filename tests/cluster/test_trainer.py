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

    before = ray.cluster_resources()["CPU"]
    assert free(before)
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


A_RUN_OF_ONE_WORKER = """
from cluster.session import session
from imgcls import storage
from imgcls.records import Placement, RunOptions

def work():
    import os
    import ray.train
    from ray.train.collective import barrier, broadcast_from_rank_zero
    barrier()
    assert broadcast_from_rank_zero("word") == "word"
    ray.train.report({})
    import psutil
    command = next(one for one in psutil.Process().parents() if "-c" in one.cmdline())
    return [" ".join(one.cmdline()).strip() for one in command.children(recursive=True)]

class Trial:
    def run(self, folder):
        from cluster.carry.trainer import TrialTrainer
        placement = Placement(num_workers=1, cpus_per_worker=1, gpus_per_worker=0)
        return TrialTrainer(work, placement, RunOptions(), name="run", storage_path=folder).fit().return_value

with session(verbose=False), storage.temporary_folder("test") as folder:
    import ray, ray.train
    trial = ray.remote(num_cpus=0)(Trial).remote()
    for words in ray.get(trial.run.remote(folder)):
        print(words.split()[0].split("/")[-1].removesuffix(".poll_status"))
"""


def test_a_run_of_one_worker_has_no_more_processes_than_it_needs():
    """Ray would start nine more, each of which imports Ray and then polls: see decision 21."""
    done = subprocess.run(
        [sys.executable, "-c", A_RUN_OF_ONE_WORKER],
        cwd=ROOT, env=local_ray(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    ours = {"sh", "cat"}  # in place of an agent, and to end the other one with Ray
    needed = {"gcs_server", "raylet", "ray::RuntimeEnvAgent", "ray::Trial.run", "ray::RayTrainWorker"} | ours
    assert set(done.stdout.splitlines()) == needed, done.stdout + done.stderr


A_RUN_THAT_WAITS = """
import time
from cluster.session import session
from imgcls import storage
from imgcls.records import Placement, RunOptions

class Trial:
    def run(self, folder):
        from cluster.carry.trainer import TrialTrainer
        placement = Placement(num_workers=1, cpus_per_worker=1, gpus_per_worker=0)
        limit = ray.train.FailureConfig(controller_failure_limit=0)
        options = {"name": "late", "storage_path": folder, "failure_config": limit}
        return TrialTrainer(lambda: "done", placement, RunOptions(), **options).fit().return_value

with session(verbose=False), storage.temporary_folder("test") as folder:
    import ray, ray.train
    from ray.util.placement_group import placement_group, remove_placement_group
    from cluster.carry.trainer import waits_for_nodes

    others = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    ray.get(others.ready())
    print(waits_for_nodes("late"))
    limit = {"env_vars": {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "0.2"}}
    done = ray.remote(num_cpus=0, runtime_env=limit)(Trial).remote().run.remote(folder)
    until = time.monotonic() + 60
    while not waits_for_nodes("late") and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(2)
    print(waits_for_nodes("late"))
    remove_placement_group(others)
    print(ray.get(done, timeout=90), waits_for_nodes("late"))
"""


def test_workers_whose_place_is_taken_wait_for_it_longer_than_train_would(ray_cluster: dict[str, str]):
    done = subprocess.run(
        [sys.executable, "-c", A_RUN_THAT_WAITS],
        cwd=ROOT, env={**os.environ, **ray_cluster}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["False", "True", "done False"], done.stdout + done.stderr


def local_ray() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
