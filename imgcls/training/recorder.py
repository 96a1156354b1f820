"""What a run does at its steps and at the end of each epoch, beside training: commit, write, report. The last of
Lightning's callbacks.
"""

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from imgcls.data.batches import Batch, ImageData
from imgcls.errors import TrainingError
from imgcls.records import RunOptions
from imgcls.runs import CheckpointFacts
from imgcls.training.checkpoints import CheckpointStore
from imgcls.training.files import RunFiles, RunLog, Stopwatch, TrafficMeter
from imgcls.training.history import History
from imgcls.training.ledger import planned
from imgcls.training.module import Classifier
from imgcls.training.progress import Progress, Row
from imgcls.training.weights import Model, about

REPORTS_AN_EPOCH = 8
CALM_S = 3600.0
"""Seconds after which a run that has not failed yet is taken to fail."""
FIRST_COST_S = 1.0
"""Of a checkpoint, before one of this run was measured."""


@dataclass
class Commits:
    """The checkpoints that this attempt makes."""

    store: CheckpointStore
    options: RunOptions
    run_digest: str
    numerics: dict[str, str]
    failures: int
    """Of earlier attempts."""
    gone_on_from: int | None = None
    """The step of the checkpoint from which this attempt goes on, until it has committed one of its own."""
    costs_s: list[float] = field(default_factory=list)
    """Of the run's checkpoints, as far as this attempt knows."""
    _last_s: float = field(default_factory=time.perf_counter)
    _said_over_budget: bool = False

    def asks(self, trained_s: float) -> bool:
        """Whether rank 0 asks for one now, where no number of steps is given.

        The interval by which checkpoints, and what a failure loses without them, cost the least in sum, to first order:
        J. W. Young, CACM 17 (1974), 530.
        """
        between_failures_s = (CALM_S + trained_s) / (1 + self.failures)
        # Two: to a bucket, a checkpoint that comes too soon waits for the upload of the one before.
        cost_s = max(self.costs_s[-2:], default=FIRST_COST_S)
        is_due = time.perf_counter() - self._last_s > math.sqrt(2 * cost_s * between_failures_s)
        return is_due and self.options.checkpoint_every_n_steps is None

    def commit(self, trainer: pl.Trainer, history: History, *, at_once: bool) -> None:
        """Everything up to this step is in the store, or on its way there; in the middle of an epoch too.

        Every rank calls it. at_once: it returns when it is there.
        """
        began_s, rows = time.perf_counter(), history.rows
        facts = CheckpointFacts(
            epoch=len(rows),
            step=trainer.global_step,
            best_step=int(history.best_row["step"]) if rows else None,
            finished=history.is_over,
            run_digest=self.run_digest,
            numerics=self.numerics,
        )
        trainer.save_checkpoint(self.store.place(facts.step), storage_options=facts)
        if facts.finished or at_once:
            self.store.wait()
        if trainer.is_global_zero:
            self._prune()
        self.gone_on_from, self._last_s = None, time.perf_counter()
        self.costs_s.append(self._last_s - began_s)

    def _prune(self) -> None:
        size, budget_mb = self.store.prune(self.options, in_use=self.gone_on_from), self.options.checkpoint_budget_mb
        if budget_mb is not None and size > budget_mb * 1e6 and not self._said_over_budget:
            self._said_over_budget = True
            budget = f"{budget_mb * 1e6:,.0f}"
            self.store.say(f"the best and the last two checkpoints take {size:,} bytes, over the budget of {budget}")


@dataclass(eq=False)
class Recorder(Checkpoint):
    """Commits each epoch after its validation, in mid-epoch as options or `Commits.asks` say, and when a node is about to
    be taken away; an epoch's last step never before its validation.
    """

    history: History
    commits: Commits
    files: RunFiles
    model: Model
    """What it is of goes into every checkpoint."""
    data: ImageData
    module: Classifier
    run_log: RunLog
    """Not `log`: Lightning gives each callback an attribute of that name."""
    clock: Stopwatch
    traffic: TrafficMeter
    numerics_changes: list[str] = field(default_factory=list)
    _earlier_s: float = 0.0
    """Of the epoch under way, in earlier attempts."""
    _began_s: float | None = None
    _trained_s: float | None = None
    """Of the epoch under way, by `time.perf_counter`; no epoch is under way where there is no beginning."""
    _said_leaving: bool = False

    def state_dict(self) -> dict[str, Any]:
        return self.history.state() | {
            "seconds": self.clock.seconds,
            "epoch_s": 0.0 if self._began_s is None else self._training_s(),
            "numerics_changes": self.numerics_changes,
            "traffic": self.traffic.amounts,
            "checkpoint_costs_s": self.commits.costs_s[-2:],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load(state_dict)
        self._earlier_s = state_dict["epoch_s"]
        self.commits.costs_s = state_dict.get("checkpoint_costs_s", [])  # checkpoints of earlier versions have none
        self.numerics_changes = [*state_dict["numerics_changes"], *self.numerics_changes]
        for phase, seconds in state_dict["seconds"].items():
            self.clock.add(phase, seconds)
        before = state_dict["traffic"] if self.files.writes else {}
        self.traffic.go_on(before, checkpoint_s=self.clock.seconds.get("checkpoint", 0.0))
        self.files.write(self.history)  # cut back to where it goes on

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(about(self.model))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning begins no epoch again in whose middle it goes on.
        self._began_s, self._trained_s = time.perf_counter(), None
        trainer.should_stop = self.history.is_over  # where it goes on from a run's last checkpoint

    on_train_epoch_start = on_train_start

    def _training_s(self) -> float:
        """Seconds of training in the epoch under way, those of earlier attempts too."""
        assert self._began_s is not None
        return self._earlier_s + (self._trained_s or time.perf_counter()) - self._began_s

    # Each hook writes and reports: while it does so this rank is not busy, but waits.
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        flags = self.module.flags
        with self.module.world.heartbeat.waiting():
            # Once: a checkpoint that was asked for in the step before is made after this one.
            may_ask = trainer.is_global_zero and not flags.asks_for_checkpoint
            flags.asks_for_checkpoint = may_ask and self.commits.asks(self.clock.seconds["fit"])
            if self.commits.gone_on_from == trainer.global_step:
                self.run_log.line(f"step {trainer.global_step} begins with samples {batch.ids[:8].tolist()}")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        steps, done = int(trainer.num_training_batches), batch_idx + 1
        every = self.commits.options.checkpoint_every_n_steps
        leaves = self.module.flags.someone_leaves and not self._said_leaving
        due = trainer.global_step % every == 0 if every else self.module.flags.checkpoint_is_due
        with self.module.world.heartbeat.waiting():
            if done < steps and (leaves or due):
                self._commit(trainer, at_once=leaves)
            if leaves:
                self._said_leaving = True
                self.run_log.line(f"a node of this run is about to be taken away, at step {trainer.global_step}")
            # By step, not by time: every rank has to report equally often.
            if done % max(10, math.ceil(steps / REPORTS_AN_EPOCH)) == 0 and done < steps:
                self.module.world.report(self._progress(trainer, self._training_s()))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":  # its steps count as training to their end
            with self.module.world.heartbeat.waiting():
                torch.cuda.synchronize()
        self._trained_s = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with self.module.world.heartbeat.waiting():
            assert self._trained_s is not None
            trained_s, validated_s = self._training_s(), time.perf_counter() - self._trained_s
            row = self._row(trainer)
            # Before the commit, which keeps them.
            seconds = {"train_s": trained_s, "validate_s": validated_s, "ended_at": time.time()}
            images_per_s = self.history.add(row, self.module.scores["val"], **seconds)
            self.clock.add("train", trained_s)
            self.clock.add("validate", validated_s)
            self._began_s, self._trained_s, self._earlier_s = None, None, 0.0
            trainer.should_stop = self.history.is_over
            self._commit(trainer)
            self.files.write(self.history)
            checkpoint_s = self.clock.seconds["checkpoint"]
            if complaint := self.traffic.complaint(epoch_s=trained_s + validated_s, checkpoint_s=checkpoint_s):
                self.run_log.line(complaint)
            self.run_log.line(" ".join(f"{name} {_short(value)}" for name, value in row.items()))
            progress = self._progress(trainer, trained_s)
            self.module.world.report(replace(progress, row=row, images_per_s=images_per_s))

    def _row(self, trainer: pl.Trainer) -> Row:
        """Raises TrainingError where what was seen is not what was planned."""
        module, plan = self.module, planned(self.data.planned_batches(trainer.current_epoch))
        train, val, seen = module.scores["train"], module.scores["val"], module.seen
        if seen != plan:
            bug = f"{seen} was seen, {plan} was planned: this is a bug, report it"
            raise TrainingError(f"epoch {trainer.current_epoch + 1}: {bug}")
        return {
            "epoch": len(self.history.rows) + 1,
            "step": trainer.global_step,
            "lr": module.recipe.optimizer.lr * module.lr_factor(trainer.global_step - 1),
            "samples": plan.samples,
            "ledger": plan.digest,
            "train/loss": train.loss,
            "train/accuracy": train.accuracy,
            "val/samples": val.num_samples,
            "val/loss": val.loss,
            "val/accuracy": val.accuracy,
        }

    def _progress(self, trainer: pl.Trainer, trained_s: float) -> Progress:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        return Progress(
            phase="train",
            epoch=trainer.current_epoch + 1,
            epochs=self.history.epochs,
            step=trainer.global_step,
            total_steps=self.module.total_steps,
            images_per_s=done * self.module.recipe.global_batch_size / max(1e-9, trained_s),
        )

    def _commit(self, trainer: pl.Trainer, *, at_once: bool = False) -> None:
        with self.clock.of("checkpoint"):
            self.commits.commit(trainer, self.history, at_once=at_once)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
