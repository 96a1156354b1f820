"""One run under Ray Train: `trial` in Tune's process on the head, `train_worker` on every worker.

Nothing here imports torch or Lightning at module level: Tune and Train unpickle these functions in processes that
need neither.
"""

import logging
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster import attempts
from cluster.attempts import Ending
from cluster.decide import Begins, GoOn, Leave, State, Stop, decide
from cluster.placement import scaling_config
from cluster.session import set_train_environment
from imgcls import storage
from imgcls.errors import ImgclsError, NumericsError, TrainingError
from imgcls.records import Keeping, Placement, Record, RunConfig, RunResult

if TYPE_CHECKING:
    from imgcls.training.world import World

LOG_TAIL_LINES = 20


class Assignment(Record):
    """What a trial is told: plain values, so that it travels as JSON."""

    command: str
    """Who asks: the holder of the run's lease."""
    config: RunConfig
    data_url: str
    run_url: str
    placement: Placement
    keeping: Keeping
    accept_different_numerics: bool
    max_failures: int
    hang_timeout_s: float
    verbose: bool
    environment: dict[str, str]
    """Of the workers; see `told`."""

    def at_begin(self) -> GoOn | Leave | Stop:
        """Whether the run goes on, from what is committed of it alone."""
        state = State(command=self.command, max_failures=self.max_failures)
        _, action = decide(state, Begins(self.config.name, attempts.look(self.run_url)))
        assert isinstance(action, GoOn | Leave | Stop)
        return action


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
    set_train_environment(hang_timeout_s=given.hang_timeout_s)
    try:
        _train(given, {"assignment": text, "started_s": time.time()})
    except TrainingFailedError as error:
        rank, cause = cause_of(error)
        last = str(cause).strip().splitlines()[-1:]
        action = given.at_begin()
        if not isinstance(action, Leave):
            reason = action.reason if isinstance(action, Stop) else ": ".join([f"rank {rank}", type(cause).__name__, *last])
            record_failure(given.config, given.run_url, reason)


def _train(given: Assignment, loop_config: dict[str, Any]) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    with storage.temporary_folder("train") as folder:
        TorchTrainer(
            train_worker,
            train_loop_config=loop_config,
            # NCCL refuses two ranks on one GPU; gloo does not.
            torch_config=TorchConfig(
                backend="gloo" if 0 < given.placement.gpus_per_worker < 1 else None, timeout_s=int(given.hang_timeout_s)
            ),
            scaling_config=scaling_config(given.placement),
            run_config=ray.train.RunConfig(
                name=given.config.name,
                # Nothing but metrics goes through Train; checkpoints have their own store.
                storage_path=folder,
                callbacks=[TuneReportCallback()],
                # Preemptions are counted apart, and not bounded.
                failure_config=ray.train.FailureConfig(max_failures=given.max_failures),
                logging_config=ray.train.LoggingConfig(log_level="INFO" if given.verbose else "CRITICAL"),
                worker_runtime_env={"env_vars": given.environment},
            ),
        ).fit()


def train_worker(loop_config: dict[str, Any]) -> None:
    """One rank of one run, in one attempt. A stop is recorded and returned: what is raised, Train tries again."""
    given = Assignment.model_validate_json(loop_config["assignment"])
    quiet(given.verbose)
    attempt = _begin(given)
    if attempt is None:
        return
    from imgcls.training.fit import fit

    rank = _rank()

    def ended(**facts: Any) -> None:
        attempts.end(given.run_url, attempt, Ending(**facts), rank=rank)

    def crashed(error: str, step: int) -> None:
        ended(end="crashed", error=error, step=step)

    world = world_of(
        given.placement,
        elastic=given.config.recipe.numerics == "elastic",
        started_s=loop_config["started_s"],
        crashed=crashed,
        leaving=_leaving(lambda: ended(end="preempted")),
    )
    try:
        fit(
            given.config,
            data_url=given.data_url,
            run_url=given.run_url,
            world=world,
            keeping=given.keeping,
            accept_different_numerics=given.accept_different_numerics,
        )
    except NumericsError as error:  # on every rank
        ended(end="refused", error=str(error))
    except TrainingError as error:  # on every rank
        if rank == 0:
            record_failure(given.config, given.run_url, str(error))
    except ImgclsError as error:
        record_failure(given.config, given.run_url, str(error))
        if world.size > 1:  # the other ranks wait in a collective: only a restart ends them
            raise


def _begin(given: Assignment) -> int | None:
    """The attempt's number on every rank, where there is anything to do."""
    from ray.train.collective import broadcast_from_rank_zero

    if _rank() != 0:
        return broadcast_from_rank_zero(None)
    number, action = None, given.at_begin()
    if isinstance(action, Stop):
        record_failure(given.config, given.run_url, action.reason)
    elif isinstance(action, GoOn):
        number = attempts.begin(given.run_url, command=given.command, host=socket.gethostname(), pid=os.getpid())
    return broadcast_from_rank_zero(number)


def _rank() -> int:
    import ray.train

    return ray.train.get_context().get_world_rank()


def _leaving(told: Callable[[], None]) -> Callable[[], bool]:
    """Whether Train's watcher has told this process that a node of the run is being drained.

    Read where the watcher puts it: `ray.train.get_preemption_info` asks every rank, and would wait for one that is gone.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    context, known = get_train_context().preemption_context, False

    def leaving() -> bool:
        nonlocal known
        if not known and context.preemption_info is not None:
            known = True
            told()
        return known

    return leaving


def world_of(placement: Placement, *, elastic: bool = False, **options: Any) -> "World":
    """This worker as a rank, with threads as its CPUs; two ranks or more are DDP. Called inside a Train worker."""
    import ray.train
    import torch

    from imgcls.training.elastic import leave_gradients_alone
    from imgcls.training.world import World

    context = ray.train.get_context()
    torch.set_num_threads(max(1, int(placement.cpus_per_worker)))
    if context.get_world_size() > 1:
        from ray.train.collective import broadcast_from_rank_zero
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

        strategy = RayDDPStrategy()
        if elastic:
            leave_gradients_alone(strategy)
        options |= {"strategy": strategy, "plugins": (RayLightningEnvironment(),), "agree": broadcast_from_rank_zero}
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
