"""One run under Ray Train: `trial` in Tune's process on the head, `train_worker` on every worker.

Nothing here imports torch or Lightning at module level: Tune and Train unpickle these functions in processes that
need neither.
"""

import logging
import os
import tempfile
import time
from typing import TYPE_CHECKING, Any

from cluster.placement import scaling_config
from cluster.session import COLLECTIVE_TIMEOUT_S
from imgcls import storage
from imgcls.errors import ImgclsError
from imgcls.records import Placement, Record, RunConfig, RunResult

if TYPE_CHECKING:
    from imgcls.training.world import World

LOG_TAIL_LINES = 20


class Assignment(Record):
    """What a trial is told: plain values, so that it travels as JSON."""

    config: RunConfig
    data_url: str
    run_url: str
    placement: Placement
    max_failures: int
    verbose: bool
    environment: dict[str, str]
    """Of the workers; see `told`."""


def told(commit: str | None) -> dict[str, str]:
    """What a worker cannot find out by itself, as environment variables."""
    return {
        "IMGCLS_COMMIT": commit or "unknown",
        **{name: value for name, value in os.environ.items() if name == "IMGCLS_CACHE"},
    }


def trial(chosen: dict[str, str], assignments: dict[str, str]) -> None:
    """Carries the chosen run out; what it came to lies in the run's folder, a failure too.

    Whatever else is raised, as a controller that died, is for Tune to try again.
    """
    from ray.train import TrainingFailedError

    text = assignments[chosen["run"]]
    given = Assignment.model_validate_json(text)
    try:
        _train(given, {"assignment": text, "started_s": time.time()})
    except TrainingFailedError as error:
        rank, cause = cause_of(error)
        last = str(cause).strip().splitlines()[-1:]
        record_failure(given.config, given.run_url, ": ".join([f"rank {rank}", type(cause).__name__, *last]))


def _train(given: Assignment, loop_config: dict[str, Any]) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    with tempfile.TemporaryDirectory() as folder:
        TorchTrainer(
            train_worker,
            train_loop_config=loop_config,
            # NCCL refuses two ranks on one GPU; gloo does not.
            torch_config=TorchConfig(
                backend="gloo" if 0 < given.placement.gpus_per_worker < 1 else None, timeout_s=COLLECTIVE_TIMEOUT_S
            ),
            scaling_config=scaling_config(given.placement),
            run_config=ray.train.RunConfig(
                name=given.config.name,
                # Nothing but metrics goes through Train; checkpoints have their own store.
                storage_path=folder,
                callbacks=[TuneReportCallback()],
                failure_config=ray.train.FailureConfig(max_failures=given.max_failures),
                logging_config=ray.train.LoggingConfig(log_level="INFO" if given.verbose else "CRITICAL"),
                worker_runtime_env={"env_vars": given.environment},
            ),
        ).fit()


def train_worker(loop_config: dict[str, Any]) -> None:
    """One rank of one run. Whatever is the user's to mend is recorded as the run's failure and not tried again."""
    given = Assignment.model_validate_json(loop_config["assignment"])
    if storage.exists(storage.join(given.run_url, "result.json")):
        return
    quiet(given.verbose)
    from imgcls.training.fit import fit

    world = world_of(given.placement, started_s=loop_config["started_s"])
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
        from ray.train.collective import broadcast_from_rank_zero
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

        options |= {"strategy": RayDDPStrategy(), "plugins": (RayLightningEnvironment(),), "agree": broadcast_from_rank_zero}
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
    tail = tuple(log.decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])
    storage.write_bytes(url, RunResult.of(config, status="failed", error=reason, log_tail=tail).to_bytes())


def cause_of(error: Exception) -> tuple[int, Exception]:
    """(rank, what it raised) of the first rank that failed, out of Train's own error; rank 0 where Train names none."""
    return min((getattr(error, "worker_failures", None) or {0: error}).items())
