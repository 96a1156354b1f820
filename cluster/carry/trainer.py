"""Ray Train with fewer processes: each imports Ray again, one after another, before a run's first step.

Train's controller runs in the trial's own process. There is no manager of Ray's datasets, no coordinator of requests to an
autoscaler (the workers' pending placement group is one), and no cleaner, which asks Ray's dashboard every second: a
placement group has its run's name, and whoever needs its place removes it. A worker alone has no actor at which to wait for
others. These are Train's own seams in Ray 2.60, `ray/train/v2/api/data_parallel_trainer.py` and
`ray/train/v2/_internal/execution`, none of them public.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import ray.train
import ray.tune
from ray.exceptions import RayError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import DefaultPlacementGroupHandle, WorkerGroup, state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util import get_placement_group, placement_group, placement_group_table, remove_placement_group

from imgcls.errors import ClusterError
from imgcls.records import Placement, RunOptions

NODES_S = 2 * 3600.0


class LeanTrainer(DataParallelTrainer):
    """Raises `ray.train.TrainingFailedError` where its workers fail too often, as Train's own does."""

    def __init__(self, work: Callable[[], Any], placement: Placement, options: RunOptions, **config: Any) -> None:
        """work: what each worker does. config: fields of `ray.train.RunConfig`."""
        resources = {"CPU": placement.cpus_per_worker, "GPU": placement.gpus_per_worker}
        scaling = ray.train.ScalingConfig(
            num_workers=placement.num_workers, use_gpu=placement.gpus_per_worker > 0, resources_per_worker=resources
        )
        logging = ray.train.LoggingConfig(log_level="INFO" if options.verbose else "CRITICAL")
        run = ray.train.RunConfig(logging_config=logging, **config)
        backend = _backend_config(placement, int(options.hang_timeout_s))
        super().__init__(work, backend_config=backend, scaling_config=scaling, run_config=run)

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


class TrialTrainer(LeanTrainer):
    """Inside a trial of Ray Tune; its workers die with the trial's process."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = _Fixed(self.scaling_config)
        controller = _Controller(**arguments)
        if self.scaling_config.num_workers == 1:  # as in each run of this process
            actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda **_: _NOBODY))
            worker_group.SynchronizationActor = actor  # pyright: ignore
            state._shutdown_sync_actor = lambda sync_actor: None
        asyncio.run(controller.run())
        return controller.get_result()


class Report(ray.train.UserCallback):
    """What rank 0 reports goes to Tune."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        ray.tune.report(metrics[0])


def _backend_config(placement: Placement, timeout_s: int) -> BackendConfig:
    """How the workers find each other; a worker alone needs no process group, and its trial no torch."""
    if placement.num_workers == 1:
        return _Alone()
    from ray.train.torch import TorchConfig

    # NCCL refuses two ranks on one GPU; gloo does not.
    return TorchConfig(backend="gloo" if 0 < placement.gpus_per_worker < 1 else None, timeout_s=timeout_s)


def remove_workers(run: str) -> None:
    """Of a run of this job whose trial is gone: Ray keeps their placement group until the whole job ends."""
    with suppress(ValueError, RayError):  # there is none; or Ray is on its way out
        remove_placement_group(get_placement_group(run))


def waits_for_nodes(run: str) -> bool:
    """Whether the workers of this run have no place in the cluster yet."""
    with suppress(ValueError, RayError):  # its trial has not asked for one yet
        return placement_group_table(get_placement_group(run)).get("state") in ("PENDING", "RESCHEDULING")
    return False


class _Devices(Backend):
    share_cuda_visible_devices = True  # also where Ray is told to leave CUDA_VISIBLE_DEVICES alone


class _Alone(BackendConfig):
    backend_cls = _Devices  # pyright: ignore


class _Fixed(FixedScalingPolicy):
    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class _Workers(WorkerGroup):
    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        run = str(self._train_run_context.run_config.name)
        remove_workers(run)
        group = placement_group(
            [worker_group_context.resources_per_worker] * worker_group_context.num_workers,
            strategy=worker_group_context.placement_strategy,
            name=run,
            bundle_label_selector=worker_group_context.label_selector,
        )
        return _Awaited(group)


class _Awaited(DefaultPlacementGroupHandle):
    def wait(self, timeout_seconds: float = 30) -> bool:
        """Returns when all workers have a place: a cloud may need longer for a node than Train waits for one.

        False where somebody has removed the group. Raises ClusterError after `NODES_S`: a run that waits keeps the nodes of
        the cluster up.
        """
        until = time.monotonic() + NODES_S
        while not super().wait(timeout_seconds):
            if placement_group_table(self.placement_group).get("state", "REMOVED") == "REMOVED":
                return False
            if time.monotonic() > until:
                raise ClusterError(f"no nodes for its workers in {NODES_S / 3600:g} h; `ray status` on the head may say why")
        return True


class _Controller(TrainController):
    worker_group_cls = _Workers


def _here(answer: Callable[..., Any]) -> Any:
    """A method of an actor that is none: answered where it is called."""
    return SimpleNamespace(remote=lambda *arguments, **named: ray.put(answer(*arguments, **named)))


_NOBODY = SimpleNamespace(broadcast_from_rank_zero=_here(lambda data, **_: data), set_required_ranks=_here(lambda _: True))
"""For a worker alone, in place of the actor at which workers wait for each other."""
