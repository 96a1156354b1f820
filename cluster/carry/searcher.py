"""Tune's side of a suite: which run is next, by `decide`; and what Tune hears of a run, passed on to a view."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.tune import Callback
from ray.tune.search import Searcher

from cluster.carry.decide import Start, Status, SuiteState, Wait, after_loss, next_start
from cluster.carry.lease import Leases
from cluster.carry.trainer import remove_workers, waits_for_nodes
from imgcls.errors import first_line

LOOK_S, NO_ROOM_S = 5.0, 20.0


class View(Protocol):
    """Whoever shows a suite while it runs."""

    def already(self, run: str, status: Status) -> None:
        """It had come to this before the command began."""

    def connected(self) -> None:
        """Ray is up; a run that has not started waits for another one, or for room."""

    def started(self, run: str) -> None: ...

    def progress(self, run: str, progress: Mapping[str, Any]) -> None: ...

    def ended(self, run: str, status: Status) -> None: ...

    def say(self, text: str) -> None: ...


def outlive_lack_of_memory(say: Callable[[str], None]) -> None:
    """A trial that Ray ends for lack of memory counts as one that died; Tune 2.60 itself would end all runs."""

    def as_death(failed: Callable[..., None]) -> Callable[..., None]:
        def told(manager: RayActorManager, *, exception: Exception, **tracked: Any) -> None:
            if isinstance(exception, OutOfMemoryError):
                say(f"{first_line(exception)}\n  do: fewer runs at once, by a larger --cpus-per-worker")
                exception = ActorDiedError()
            failed(manager, exception=exception, **tracked)

        return told

    for name in ("_actor_start_failed", "_actor_task_failed"):
        setattr(RayActorManager, name, as_death(getattr(RayActorManager, name)))


class NotKept:
    """Tune pickles what it is handed, for a restore that we never make; a view and a storage do not belong there."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class PlanSearcher(NotKept, Searcher):
    """Suggests the next run that is ready, and nothing while none is: a waiting run is no trial and holds nothing."""

    def __init__(
        self,
        state: SuiteState,
        *,
        room: Callable[[], int],
        ended: Callable[[SuiteState, str], SuiteState],
        view: View,
        begin_workers: Callable[[int], None],
        num_begun: int,
    ) -> None:
        """ended: what the suite has come to with this run's end.

        begin_workers: of so many runs, before their trials do. num_begun: of so many runs they have begun already.
        """
        super().__init__()
        self.state, self.room, self.ended, self.view = state, room, ended, view
        self.begin_workers, self.num_begun = begin_workers, num_begun
        self.runs: dict[str, str] = {}
        self._looked_s = 0.0
        self._troubles_s: dict[str, float] = {}
        """Since when each lasts; infinity once it was said."""
        self.began_s: dict[str, float] = {}
        self.ended_s: dict[str, float] = {}
        """By run, by `time.monotonic`."""

    def suggest(self, trial_id: str) -> Any:
        self.state, action = next_start(self.state, room=self.room())
        if isinstance(action, Start):
            self.runs[trial_id] = action.run
            self.began_s[action.run] = time.monotonic()
            self.view.started(action.run)
            if len(self.began_s) > self.num_begun:
                self.begin_workers(1)
            return {"run": action.run}
        return None if isinstance(action, Wait) else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        run = self.runs[trial_id]
        remove_workers(run)
        self.ended_s[run] = time.monotonic()
        self.state = self.ended(self.state, run)
        self.view.ended(run, self.state.statuses[run])

    def say_what_lasts(self) -> None:
        """Train and Tune would wait for nodes without a word. Looks as often as it is called, at most once in `LOOK_S`."""
        now = time.monotonic()
        if now - self._looked_s < LOOK_S:
            return
        self._looked_s = now
        troubles = [] if self.room() else ["no node is there, or can be added, on which the workers fit: waiting for one"]
        for run, status in self.state.statuses.items():
            if status is Status.STARTED and waits_for_nodes(run):
                troubles.append(f"{run}: its workers wait for nodes; `ray status` on the head says what the autoscaler does")
        self._troubles_s = {text: self._troubles_s.get(text, now) for text in troubles}
        for text, since_s in self._troubles_s.items():
            if now - since_s > NO_ROOM_S:
                self.view.say(text)
                self._troubles_s[text] = math.inf

    def save(self, checkpoint_path: str) -> None:
        """Tune asks for it; the state of a suite is its storage, and a fresh Tuner runs what is left."""


class SuiteCallback(NotKept, Callback):
    """What Tune's loop tells of runs, and what is looked at whenever it turns."""

    def __init__(self, searcher: PlanSearcher, held: Leases) -> None:
        self.searcher, self.held = searcher, held

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raises StorageError where storage answers no more. A run under way that is lost ends itself: its workers look."""
        for run in tuple(self.held.lost):  # another thread adds to them
            self.searcher.state = after_loss(self.searcher.state, run)
        self.searcher.say_what_lasts()
        self.held.check_answered()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.searcher.begin_workers(1)  # those of before died with it

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "phase" in result:
            self.searcher.view.progress(trial.config["run"], result)
