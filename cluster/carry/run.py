"""One run under Ray Train: `trial` in Tune's process on the head, `train_worker` on every worker.

Nothing here imports torch or Lightning at module level: Tune and Train unpickle these functions in processes that
need neither.
"""

import logging
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from cluster.carry.decide import GoOn, Leave, Stop, verdict
from cluster.carry.lease import repeated, when_answered
from cluster.session import set_train_environment
from imgcls import storage
from imgcls.errors import ImgclsError, LeaseError, NumericsError, StorageError, TrainingError
from imgcls.records import Placement, Record, RunConfig, RunOptions
from imgcls.runs import End, Ending, RunFolder, RunState
from imgcls.training.progress import Progress

if TYPE_CHECKING:
    from imgcls.training.world import World

BACKSTOP = 20
"""Restarts by Train beside those that `decide.verdict` counts: deaths of workers before an attempt is on record."""


class Assignment(Record):
    """What a trial is to do."""

    command: str
    """Who asks: the holder of the run's lease."""
    config: RunConfig
    data_url: str
    run_url: str
    placement: Placement
    options: RunOptions
    tested: bool
    environment: dict[str, str]
    """Of the workers: what they cannot find out by themselves."""

    def __reduce__(self) -> Any:
        """It travels as JSON: a pickle fills the fields of another version of our code by their places, without a word."""
        return type(self).model_validate_json, (self.model_dump_json(),)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.run_url)

    def verdict(self, state: RunState) -> GoOn | Leave | Stop:
        """Whether the run goes on, from what is committed of it alone."""
        return verdict(state, command=self.command, max_failures=self.options.max_failures)

    def fail(self, reason: str) -> None:
        """The run is over, failed; unless it is over already, or another command's."""
        if not isinstance(self.verdict(self.run.state()), Leave):
            self.run.fail(self.config, reason)


def trial(chosen: dict[str, str], assignments: dict[str, Assignment]) -> None:
    """Carries the chosen run out; what it came to lies in the run's folder, a failure too.

    Whatever else is raised, and a death of this process, is for Tune to try again.
    """
    from ray.train import TrainingFailedError

    given = assignments[chosen["run"]]
    set_train_environment(hang_timeout_s=given.options.hang_timeout_s)
    num_attempts: int | None = 0
    while num_attempts is not None:
        try:
            _train(given)
            num_attempts = None
        except TrainingFailedError as error:
            num_attempts = after_giving_up(given, error, num_attempts)


def after_giving_up(given: Assignment, error: Exception, num_attempts: int) -> int | None:
    """Train has given up the workers. The attempts so far where the run is begun anew; None where it has failed for good.

    num_attempts: when Train was last begun.
    """
    state = when_answered(given.run.state)
    action = given.verdict(state)
    if isinstance(action, GoOn) and len(state.attempts) > num_attempts and state.attempts[-1].end is End.PREEMPTED:
        return len(state.attempts)  # Train counted what the other ranks made of it
    rank, cause = cause_of(error)
    last = str(cause).strip().splitlines()[-1:]
    given.fail(action.reason if isinstance(action, Stop) else ": ".join([f"rank {rank}", type(cause).__name__, *last]))
    return None


def _train(given: Assignment) -> None:
    from ray.train import FailureConfig

    from cluster.carry.trainer import Report, TrialTrainer

    options = given.options
    with storage.temporary_folder("train") as folder:
        TrialTrainer(
            partial(train_worker, given, started_s=time.time()),
            given.placement,
            options,
            name=given.config.name,
            # Nothing but metrics goes through Train; checkpoints have their own store.
            storage_path=folder,
            callbacks=[Report()],
            # Train counts preemptions apart, without a bound.
            failure_config=FailureConfig(max_failures=options.max_failures + BACKSTOP, controller_failure_limit=10),
            worker_runtime_env={"env_vars": given.environment},
        ).fit()


def train_worker(given: Assignment, *, started_s: float) -> None:
    """One rank of one run, in one attempt. A stop is recorded and returned: what is raised, Train tries again."""
    from ray.train import get_context

    silence_libraries(given.options.verbose)
    rank = get_context().get_world_rank()
    if (begun := _begin(given, rank)) is None:
        return
    attempt, tries = begun
    report(Progress(phase="workers import"), tries=tries)
    from cluster.carry.watch import Watch
    from imgcls.training.fit import fit

    end = partial(given.run.end, attempt, rank=rank)
    watch = Watch(given, rank, end)
    world = world_of(
        given.placement,
        elastic=given.config.recipe.numerics == "elastic",
        command=given.command,
        report=partial(report, tries=tries),
        attempt=attempt,
        started_s=started_s,
        # Rank 0's trace is in the log.
        crashed=lambda error, step, trace: end(Ending(end=End.CRASHED, error=error, step=step, trace=trace if rank else "")),
        leaving=lambda: watch.leaving,
        lost=lambda: watch.lost,
        heartbeat=watch.heartbeat,
    )
    try:
        with repeated(watch.look, every_s=0.5):
            places = {"data_url": given.data_url, "run_url": given.run_url}
            fit(given.config, **places, world=world, options=given.options, tested=given.tested)
    except NumericsError as error:  # on every rank
        end(Ending(end=End.REFUSED, error=str(error)))
    except LeaseError:  # on every rank
        return
    except TrainingError as error:  # on every rank
        if rank == 0:
            given.fail(str(error))
    except StorageError:  # it may have passed: `verdict` counts
        raise
    except ImgclsError as error:
        given.fail(str(error))
        if world.size > 1:  # the other ranks wait in a collective: only a restart ends them
            raise


def _begin(given: Assignment, rank: int) -> tuple[int, int] | None:
    """On every rank, where there is anything to do: the attempt's number, and how often this command has begun the run."""
    from ray.train.collective import broadcast_from_rank_zero

    if rank != 0:
        return broadcast_from_rank_zero(None)
    begun, state = None, given.run.state()
    action = given.verdict(state)
    if isinstance(action, Stop):
        given.fail(action.reason)
    elif isinstance(action, GoOn):
        begun = given.run.begin(given.command), 1 + sum(attempt.command == given.command for attempt in state.attempts)
    return broadcast_from_rank_zero(begun)


def world_of(placement: Placement, *, elastic: bool = False, **options: Any) -> "World":
    """This worker as a rank, with threads as its CPUs; two ranks or more are DDP. Called inside a Train worker."""
    import ray.train
    import torch

    from imgcls.training.elastic import leave_gradients_alone
    from imgcls.training.world import World

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, int(placement.cpus_per_worker)))
    if size > 1:
        from ray.train.collective import broadcast_from_rank_zero
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

        strategy = RayDDPStrategy()
        if elastic:
            leave_gradients_alone(strategy)
        options |= {"strategy": strategy, "plugins": (RayLightningEnvironment(),), "broadcast": broadcast_from_rank_zero}
    accelerator = "gpu" if placement.gpus_per_worker else "cpu"
    return World(rank=rank, size=size, accelerator=accelerator, placement=placement, **options)


def report(progress: Progress, *, tries: int) -> None:
    """Every rank calls it equally often: Train's report is a barrier. tries: how often this command has begun the run."""
    import ray.train

    ray.train.report(asdict(progress) | {"tries": tries})


def silence_libraries(verbose: bool) -> None:
    """Lightning's and torch's chatter is off in this process, unless `verbose`."""
    if verbose:
        return
    import warnings

    import lightning.pytorch  # noqa: F401 - it sets a level of its own

    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def cause_of(error: Exception) -> tuple[int, Exception]:
    """(rank, what it raised) of the first rank that failed, out of Train's own error; rank 0 where Train names none."""
    return min((getattr(error, "worker_failures", None) or {0: error}).items())
