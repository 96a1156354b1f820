"""Tune's side of a suite: which run is next, by `decide`; and what Tune hears of a run, passed on to a view."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ray.tune import Callback
from ray.tune.search import Searcher

from cluster.decide import Start, Status, Wait, next_action


class View(Protocol):
    """Whoever shows a suite while it runs."""

    def already(self, run: str, status: Status) -> None:
        """It had come to this before the command began."""

    def started(self, run: str) -> None: ...

    def progress(self, run: str, progress: Mapping[str, Any]) -> None: ...

    def ended(self, run: str, status: Status) -> None: ...


class _NotKept:
    """Tune pickles what it is handed, for a restore that we never make; a view and a storage do not belong there."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class PlanSearcher(_NotKept, Searcher):
    """Suggests the next run that is ready, and nothing while none is: a waiting run is no trial and holds nothing."""

    def __init__(
        self,
        statuses: dict[str, Status],
        sources: Mapping[str, str | None],
        *,
        room: Callable[[], int],
        came_to: Callable[[str], Status],
        view: View,
    ) -> None:
        super().__init__()
        self.statuses, self.sources, self.room, self.came_to, self.view = statuses, sources, room, came_to, view
        self.runs: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        action = next_action(self.statuses, self.sources, room=self.room())
        if isinstance(action, Start):
            self.statuses[action.run], self.runs[trial_id] = Status.STARTED, action.run
            self.view.started(action.run)
            return {"run": action.run}
        return None if isinstance(action, Wait) else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        run = self.runs[trial_id]
        self.statuses[run] = self.came_to(run)
        self.view.ended(run, self.statuses[run])

    # Tune asks for these; the state of a suite is its storage, and a fresh Tuner runs what is left.
    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


class ProgressCallback(_NotKept, Callback):
    def __init__(self, view: View) -> None:
        self.view = view

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "phase" in result:
            self.view.progress(trial.config["run"], result)
