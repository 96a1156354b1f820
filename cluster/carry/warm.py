"""Workers of a local Ray that have begun, and imported what training needs, when their run's trial asks for them.

An actor takes an idle process of its job whose runtime environment is the same to the byte; with any other environment the
process is not used, and a new one begins. The seams are Ray's own in 2.60, none public: the raylet's `PrestartWorkers`, the
variable that Ray sets for a `worker_process_setup_hook`, and the environment that a trial of Tune hands on to its workers.
"""

import json
import os
import site
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

KEPT_S = 60
"""Seconds for which an idle process is kept."""


def environment() -> dict[str, str]:
    """Of workers that import while they begin: the hook, where it finds our code, and what a trial of Tune adds.

    The code is this process's own: another checkout may be the one that is installed.
    """
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    root, before = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")
    path = before if root in site.getsitepackages() else os.pathsep.join(filter(None, [root, before]))
    hook = f"{__name__}.{import_training.__name__}"
    return {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: hook, "PYTHONPATH": path, "PL_DISABLE_FORK": "1"}


def import_training() -> None:
    """The longest imports of a worker, and of its first optimizer."""
    with suppress(Exception):  # `train_worker` imports again, and what fails there is on record
        for name in ("torch._dynamo", "cluster.carry.watch", "imgcls.training.fit"):
            import_module(name)


def prestart(count: int, worker_environment: dict[str, str]) -> None:
    """So many workers begin on the one node of a local Ray. worker_environment: as the trial gives it to Train."""
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
    from ray.runtime_env import RuntimeEnvConfig
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    messages: Any = node_manager_pb2  # made as it is imported
    request = messages.PrestartWorkersRequest(
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()), keep_alive_duration_secs=KEPT_S, num_workers=count
    )
    variables = {"env_vars": get_env_vars_to_propagate() | worker_environment}
    request.runtime_env_info.serialized_runtime_env = json.dumps(variables, sort_keys=True, separators=(",", ":"))
    request.runtime_env_info.runtime_env_config.CopyFrom(RuntimeEnvConfig.default_config().build_proto_runtime_env_config())
    node = ray.nodes()[0]
    channel: Any = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    with suppress(grpc.RpcError), channel:  # where it fails, workers begin when they are asked for
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)
