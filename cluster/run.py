"""One run under Ray Train: `trial` in Tune's process on the head, `train_worker` on every worker.

Nothing here imports torch or Lightning at module level: Tune and Train unpickle these functions in processes that
need neither.
"""

import logging
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cluster import attempts
from cluster.attempts import Ending
from cluster.decide import Begins, End, GoOn, Leave, State, Stop, decide
from cluster.lease import RENEW_S, holder_of, when_answered
from cluster.placement import scaling_config
from cluster.session import set_train_environment
from imgcls import records, storage
from imgcls.errors import ImgclsError, LeaseError, NumericsError, StorageError, TrainingError
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

    def fail(self, reason: str) -> None:
        """The run is over, failed; unless it is over already, or another command's."""
        if not isinstance(self.at_begin(), Leave):
            record_failure(self.config, self.run_url, reason)


def told(commit: str | None) -> dict[str, str]:
    """What a worker cannot find out by itself, as environment variables."""
    return {
        "IMGCLS_COMMIT": commit or "unknown",
        **{name: value for name, value in os.environ.items() if name == "IMGCLS_CACHE"},
    }


def trial(chosen: dict[str, str], assignments: dict[str, str]) -> None:
    """Carries the chosen run out; what it came to lies in the run's folder, a failure too.

    Whatever else is raised, and a death of this process, is for Tune to try again.
    """
    from ray.train import TrainingFailedError

    text = assignments[chosen["run"]]
    given = Assignment.model_validate_json(text)
    set_train_environment(hang_timeout_s=given.hang_timeout_s)
    known, outages = 0, 0
    while True:
        try:
            return _train(given, {"assignment": text, "started_s": time.time()})
        except TrainingFailedError as error:
            action, before = when_answered(given.at_begin), when_answered(lambda: attempts.look(given.run_url)).attempts
            if isinstance(action, GoOn) and len(before) > known and before[-1].end is End.PREEMPTED:
                known = len(before)
                continue  # Train counted what the other ranks made of it
            rank, cause = cause_of(error)
            if isinstance(action, GoOn) and isinstance(cause, StorageError) and outages < given.max_failures:
                outages += 1
                continue  # Train counted attempts that had no storage to begin with
            last = str(cause).strip().splitlines()[-1:]
            reason = action.reason if isinstance(action, Stop) else ": ".join([f"rank {rank}", type(cause).__name__, *last])
            return given.fail(reason)


def _train(given: Assignment, loop_config: dict[str, Any]) -> None:
    import ray.train

    from cluster.trainer import Report, TrialTrainer, backend_config

    with storage.temporary_folder("train") as folder:
        TrialTrainer(
            train_worker,
            train_loop_config=loop_config,
            backend_config=backend_config(given.placement, timeout_s=int(given.hang_timeout_s)),
            scaling_config=scaling_config(given.placement),
            run_config=ray.train.RunConfig(
                name=given.config.name,
                # Nothing but metrics goes through Train; checkpoints have their own store.
                storage_path=folder,
                callbacks=[Report()],
                # Train counts preemptions apart, without a bound. Workers may fail to start ten times, each after a minute.
                failure_config=ray.train.FailureConfig(max_failures=given.max_failures, controller_failure_limit=10),
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

    watch = _Watch(
        given,
        rank,
        preempted=lambda: ended(end="preempted"),
        hung=lambda error, step, trace: ended(end="crashed", error=error, step=step, trace=trace),
    )
    world = world_of(
        given.placement,
        elastic=given.config.recipe.numerics == "elastic",
        asked_by=given.command,
        started_s=loop_config["started_s"],
        crashed=lambda error, step, trace: ended(end="crashed", error=error, step=step, trace=trace if rank else ""),
        leaving=lambda: watch.leaving,
        lost=lambda: watch.lost,
        heartbeat=watch.heartbeat,
    )
    try:
        with watch:
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
    except LeaseError:  # on every rank
        return
    except TrainingError as error:  # on every rank
        if rank == 0:
            given.fail(str(error))
    except StorageError:  # it may have passed: `decide` counts
        raise
    except ImgclsError as error:
        given.fail(str(error))
        if world.size > 1:  # the other ranks wait in a collective: only a restart ends them
            raise


def _begin(given: Assignment) -> int | None:
    """The attempt's number on every rank, where there is anything to do."""
    from ray.train.collective import broadcast_from_rank_zero

    if _rank() != 0:
        return broadcast_from_rank_zero(None)
    number, action = None, given.at_begin()
    if isinstance(action, Stop):
        given.fail(action.reason)
    elif isinstance(action, GoOn):
        number = attempts.begin(given.run_url, command=given.command, host=socket.gethostname(), pid=os.getpid())
    return broadcast_from_rank_zero(number)


def _rank() -> int:
    import ray.train

    return ray.train.get_context().get_world_rank()


class _Watch(threading.Thread):
    """Looks beside the training: is a node being drained, is the run still this command's, does the training move.

    Where Train's watcher puts its notice it is read: `ray.train.get_preemption_info` asks every rank, and would wait for
    one that is gone.
    """

    def __init__(
        self, given: Assignment, rank: int, *, preempted: Callable[[], None], hung: Callable[[str, int, str], None]
    ) -> None:
        from ray.train.v2._internal.execution.context import get_train_context

        from imgcls.training.world import Heartbeat

        super().__init__(name="watch", daemon=True)
        self.given, self.rank, self.preempted, self.hung = given, rank, preempted, hung
        self.heartbeat, self.watched = Heartbeat(), threading.get_ident()
        self.notice = get_train_context().preemption_context
        self.leaving = self.lost = False
        self._stop_watching = threading.Event()

    def run(self) -> None:
        while not self._stop_watching.wait(0.5):
            if not self.leaving and self.notice.preemption_info is not None:
                self.leaving = True
                with suppress(ImgclsError), storage.within(RENEW_S):
                    self.preempted()
            if self.rank == 0 and time.monotonic() - self._looked_s > RENEW_S:
                self._looked_s = time.monotonic()
                with suppress(ImgclsError), storage.within(RENEW_S):
                    self.lost = holder_of(self.given.run_url) != self.given.command
            # The rank that hangs is named before those that wait for it give up.
            waits, since_s = self.heartbeat.state or (False, math.inf)
            # What is waited for has limits of its own; where it has none, as a disk that hangs, this one holds.
            limit_s = (3 if waits else 0.9) * self.given.hang_timeout_s
            if time.monotonic() - since_s > limit_s:
                self._end_hung(f"hung: {'waited' if waits else 'busy with one batch'} for {limit_s:g} s")

    def _end_hung(self, error: str) -> None:
        """Ends this process, for Train to begin again."""
        trace = "".join(traceback.format_stack(sys._current_frames()[self.watched]))
        telling = threading.Thread(target=self.hung, args=(error, self.heartbeat.step, trace), daemon=True)
        telling.start()
        telling.join(10)  # storage may be what hangs
        os._exit(1)

    def __enter__(self) -> None:
        self._looked_s = time.monotonic()
        self.start()

    def __exit__(self, *error: object) -> None:
        self._stop_watching.set()
        self.join()


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
    told = [*log.decode(errors="replace").splitlines(), *attempts.last_trace(run_url).splitlines()]
    tail = tuple(told[-LOG_TAIL_LINES:])
    storage.create_bytes(url, records.sealed(RunResult.of(config, status="failed", error=reason, log_tail=tail)))


def cause_of(error: Exception) -> tuple[int, Exception]:
    """(rank, what it raised) of the first rank that failed, out of Train's own error; rank 0 where Train names none."""
    return min((getattr(error, "worker_failures", None) or {0: error}).items())
