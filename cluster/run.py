"""One run under Ray Train: `trial` in Tune's process on the head, `train_worker` on every worker.

Nothing here imports torch or Lightning at module level: Tune and Train unpickle these functions in processes that
need neither.
"""

import logging
import os
import tempfile
import time
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from cluster.placement import scaling_config
from cluster.session import COLLECTIVE_TIMEOUT_S
from imgcls import records, storage
from imgcls.errors import ImgclsError
from imgcls.records import Placement, RunConfig, RunResult

if TYPE_CHECKING:
    from imgcls.training.world import World

LOG_TAIL_LINES = 20


class Order(BaseModel):
    """What a trial is told. Plain values, so that Tune can keep it."""

    model_config = ConfigDict(frozen=True)

    config: RunConfig
    data_url: str
    run_url: str
    placement: Placement
    max_failures: int
    verbose: bool
    environment: dict[str, str]
    started_s: float


def trial(order: dict[str, Any]) -> None:
    """Carries one run out; what it came to lies in the run's folder, a failure too.

    Whatever else is raised, as a controller that died, is for Tune to try again.
    """
    from ray.train import TrainingFailedError

    given = Order.model_validate_json(order["order"])
    try:
        _train(given)
    except TrainingFailedError as error:
        record_failure(given.config, given.run_url, _reason(error))


def _train(order: Order) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    with tempfile.TemporaryDirectory() as folder:
        TorchTrainer(
            train_worker,
            train_loop_config={"order": order.model_dump_json()},
            torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
            scaling_config=scaling_config(order.placement),
            run_config=ray.train.RunConfig(
                name=order.config.name,
                # Nothing but metrics goes through Train; checkpoints have their own store.
                storage_path=folder,
                callbacks=[TuneReportCallback()],
                failure_config=ray.train.FailureConfig(max_failures=order.max_failures),
                logging_config=ray.train.LoggingConfig(log_level="INFO" if order.verbose else "CRITICAL"),
                worker_runtime_env={"env_vars": order.environment},
            ),
        ).fit()


def train_worker(order: dict[str, Any]) -> None:
    """One rank of one run. Whatever is the user's to mend is recorded as the run's failure and not tried again."""

    given = Order.model_validate_json(order["order"])
    if records.read_if_there(RunResult, storage.join(given.run_url, "result.json")) is not None:
        return
    quiet(given.verbose)
    from imgcls.training.fit import fit

    world = world_of(given.placement, started_s=given.started_s)
    try:
        fit(given.config, data_url=given.data_url, run_url=given.run_url, world=world)
    except ImgclsError as error:
        record_failure(given.config, given.run_url, str(error))
        if world.size > 1:  # the other ranks wait in a collective: only a restart ends them
            raise


def world_of(placement: Placement, **options: Any) -> "World":
    """This worker as a rank, with threads as its CPUs; two ranks or more are DDP. Called inside a Train worker."""
    import ray.train
    import torch

    from imgcls.training.world import World

    context = ray.train.get_context()
    torch.set_num_threads(max(1, int(placement.cpus_per_worker)))
    if context.get_world_size() > 1:
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

        options |= {"strategy": RayDDPStrategy(), "plugins": (RayLightningEnvironment(),)}
    return World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        accelerator="gpu" if placement.gpus_per_worker else "cpu",
        report=report,
        placement=placement,
        **options,
    )


def report(progress: Any) -> None:
    """Every rank calls it equally often: Train's report is a barrier."""
    from dataclasses import asdict

    import ray.train

    ray.train.report(asdict(progress))


def quiet(verbose: bool) -> None:
    """Lightning's and torch's chatter is off in this process, unless `verbose`."""
    if verbose:
        return
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def record_failure(config: RunConfig, run_url: str, reason: str) -> None:
    """The run is over, failed: its result says why, with the last lines of its log. An earlier result stays."""
    url = storage.join(run_url, "result.json")
    if storage.exists(url):
        return
    log = storage.read_bytes_if_there(storage.join(run_url, "log.txt")) or b""
    result = RunResult(
        name=config.name,
        catalogue=config.catalogue,
        recipe=config.recipe,
        seed=config.seed,
        digest=config.digest(),
        status="failed",
        error=reason,
        log_tail=tuple(log.decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]),
        data_digest=config.data_digest,
    )
    storage.write_bytes(url, result.to_bytes())


def _reason(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return f"{type(error).__name__}: {error}"
    rank, cause = min(failures.items())
    return f"rank {rank}: {type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else cause}"


def make_order(
    config: RunConfig,
    *,
    data_url: str,
    run_url: str,
    placement: Placement,
    max_failures: int,
    verbose: bool,
    commit: str | None,
) -> Order:
    told = {"IMGCLS_COMMIT": commit or "unknown"}
    if cache := os.environ.get("IMGCLS_CACHE"):
        told["IMGCLS_CACHE"] = cache
    return Order(
        config=config,
        data_url=data_url,
        run_url=run_url,
        placement=placement,
        max_failures=max_failures,
        verbose=verbose,
        environment=told,
        started_s=time.time(),
    )
