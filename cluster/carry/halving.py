"""Which trials of a search are stopped early: Ray Tune's ASHA, told of each run's epochs by the run's own name.

Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, the variant that stops.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from cluster.carry.searcher import NotKept
from imgcls.search import Search

REDUCTION = 3
"""A rung is a power of it, in epochs: of the trials that have come there, one that is in the best third goes on."""


class Halving(NotKept, FIFOScheduler):
    """The histories of the runs say what earlier commands have seen, and what was not reported to this one."""

    def __init__(
        self,
        search: Search,
        runs: Iterable[str],
        *,
        history_of: Callable[[str], Sequence[Mapping[str, float]]],
        stop: Callable[[str, str], None],
    ) -> None:
        """runs: those that are over come first. stop: puts on record that a run is over, and why."""
        super().__init__()
        self.search, self.history_of, self.stop = search, history_of, stop
        self.epochs = search.recipe.length.epochs
        self.asha = ASHAScheduler(
            time_attr="epoch", metric=search.metric, mode=search.mode, max_t=self.epochs, reduction_factor=REDUCTION
        )
        self.known = dict[str, int]()
        """Of each run its last epoch that was judged."""
        self.reasons = dict[str, str]()
        """Why a run is to be stopped."""
        for run in runs:
            self._judge_history(run, self.epochs)

    def _judge_history(self, run: str, up_to: int) -> None:
        for row in self.history_of(run):
            if self.known.get(run, 0) < row["epoch"] <= up_to:
                self._judge(run, int(row["epoch"]), row[self.search.metric])

    def _judge(self, run: str, epoch: int, value: float) -> None:
        """By its newest epoch the run is to be stopped, or goes on."""
        named: Any = SimpleNamespace(trial_id=run)
        if run not in self.known:
            self.asha.on_trial_add(None, named)  # pyright: ignore[reportArgumentType]
        self.known[run] = epoch
        row = {"epoch": epoch, self.search.metric: value}
        self.reasons.pop(run, None)
        if epoch < self.epochs and self.asha.on_trial_result(None, named, row) == TrialScheduler.STOP:  # pyright: ignore[reportArgumentType]
            best = f"the best {1 / REDUCTION:.0%} of those that have come so far"
            reached = f"after epoch {epoch} of {self.epochs}: {self.search.metric} {value:.4f}"
            self.reasons[run] = f"{reached} is not in {best}"

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        run, epoch, value = trial.config["run"], result.get("row/epoch"), result.get(f"row/{self.search.metric}")
        if epoch is not None and value is not None and epoch > self.known.get(run, 0):
            if epoch > self.known.get(run, 0) + 1:  # its worker died before it could report
                self._judge_history(run, epoch - 1)
            self._judge(run, epoch, value)
        if run not in self.reasons:
            return TrialScheduler.CONTINUE
        self.stop(run, self.reasons[run])
        return TrialScheduler.STOP
