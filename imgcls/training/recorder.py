"""What a run leaves while it trains: history, times, log, events, checkpoints. The last of Lightning's callbacks.

`history.csv` holds only what the recipe decides; it is part of the checkpoint and written from it, so that a resumed
run cuts it back to where it goes on. Times stand apart, in `timing.csv`.
"""

import csv
import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from imgcls import storage
from imgcls.data.batches import Batch
from imgcls.data.order import Ids
from imgcls.errors import TrainingError
from imgcls.records import Keeping, Scores
from imgcls.training.checkpoints import CheckpointStore
from imgcls.training.ledger import Entry, planned
from imgcls.training.module import Classifier
from imgcls.training.progress import Progress, Row
from imgcls.training.weights import Facts
from imgcls.training.world import World

HISTORY = (
    "epoch",
    "step",
    "lr",
    "samples",
    "ledger",
    "train/loss",
    "train/accuracy",
    "val/samples",
    "val/loss",
    "val/accuracy",
)
EVENTS = "events.out.tfevents."
SLOW_S = 5.0
TIMING = ("epoch", "train_s", "validate_s", "images_per_s")


class RunLog:
    """The run's log.txt: kept in memory, and put whole into the run's folder."""

    def __init__(self, url: str, *, writes: bool, synthetic: bool) -> None:
        self.url, self.writes, self.mark = storage.join(url, "log.txt"), writes, "SYNTHETIC " if synthetic else ""
        old = storage.read_bytes_if_there(self.url) if writes else None
        self.lines = old.decode(errors="replace").splitlines() if old else []

    def line(self, text: str) -> None:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.lines += [f"{self.mark}{stamp} {part}" for part in text.splitlines()]
        self.put()

    def put(self) -> None:
        if self.writes:
            storage.write_bytes(self.url, ("\n".join(self.lines) + "\n").encode(), durable=False)


class Stopwatch:
    """Seconds by phase, and in all under `fit`; those of earlier attempts, up to their last commit, are added."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - begin)

    def add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        return self._seconds | {"fit": self._seconds.get("fit", 0.0) + time.perf_counter() - self.began}


def _waits(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook of a Recorder writes and reports: while it does so this rank is not busy, but waits."""

    @wraps(hook)
    def waiting(self: "Recorder", *arguments: Any, **named: Any) -> None:
        with self.world.heartbeat.waiting():
            hook(self, *arguments, **named)

    return waiting


class Recorder(Checkpoint):
    """Keeps the history, decides when to stop, commits each epoch after its validation, reports progress.

    Between, it commits every `keeping.every_n_steps` and when a node is about to be taken away; an epoch's last step
    never before its validation.
    """

    REPORTS_AN_EPOCH = 8

    def __init__(
        self,
        run_url: str,
        store: CheckpointStore,
        *,
        keeping: Keeping,
        run_digest: str,
        numerics: dict[str, str],
        about: dict[str, Any],
        planned_batches: Callable[[int], list[Ids]],
        epochs: int,
        patience: int | None,
        world: World,
        log: RunLog,
        clock: Stopwatch,
        traffic_at_start: dict[str, float],
    ) -> None:
        self.run_url, self.store, self.keeping = run_url, store, keeping
        self.run_digest, self.numerics, self.about = run_digest, numerics, about
        self.planned_batches = planned_batches
        self.epochs, self.patience, self.world, self.writes = epochs, patience, world, world.rank == 0
        self.run_log, self.clock = log, clock
        self.history: list[Row] = []
        self.timing: list[Row] = []
        self.best: Scores | None = None
        self.numerics_changes: list[str] = []
        self.gone_on_from: int | None = None
        """The step of the checkpoint from which this attempt goes on, until it has committed one of its own."""
        self._epoch_s = 0.0
        """Of the epoch under way, in earlier attempts."""
        self._marks: dict[str, float] = {}
        self._told_of_leaving = self._told_of_budget = False
        self._events, self._num_events = b"", 0
        self._events_url = storage.join(run_url, f"{EVENTS}{time.time():.3f}")
        self._traffic_at_start, self._traffic_before = traffic_at_start, dict[str, float]()
        self._traffic_told, self._checkpoint_s_told = dict[str, float](), 0.0

    # What the checkpoint carries of it.
    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "timing": self.timing,
            "best": self.best.model_dump_json() if self.best else None,
            "seconds": self.clock.seconds,
            "epoch_s": self._so_far() if self._marks else 0.0,
            "numerics_changes": self.numerics_changes,
            "traffic": self.traffic,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.timing = list(state_dict["history"]), list(state_dict["timing"])
        self.best = Scores.model_validate_json(state_dict["best"]) if state_dict["best"] else None
        self._epoch_s = state_dict["epoch_s"]
        self.numerics_changes = [*state_dict["numerics_changes"], *self.numerics_changes]
        for phase, seconds in state_dict["seconds"].items():
            self.clock.add(phase, seconds)
        if self.writes:
            self._traffic_before = state_dict["traffic"]
        # Cuts the run's files back to where it goes on.
        self._write()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.about)

    def stops(self) -> bool:
        """Nothing is left to train: the epochs are done, or patience is at its end. A function of the history."""
        if len(self.history) >= self.epochs:
            return True
        losses = [float(row["val/loss"]) for row in self.history]
        return bool(losses and self.patience and len(losses) - 1 - losses.index(min(losses)) >= self.patience)

    @property
    def traffic(self) -> dict[str, float]:
        """Of this rank; of rank 0 with earlier attempts, up to their last commit."""
        now, before = asdict(storage.traffic), self._traffic_before
        return {name: now[name] - begun + before.get(name, 0) for name, begun in self._traffic_at_start.items()}

    def _tell_of_traffic(self, epoch_s: float) -> None:
        """Where requests fail, or the training waits for them: since it was last said."""
        now, told, checkpoint_s = self.traffic, self._traffic_told, self.clock.seconds.get("checkpoint", 0.0)
        requests, retries = (now[name] - told.get(name, 0) for name in ("requests", "retries"))
        waited_s = checkpoint_s - self._checkpoint_s_told
        if retries > requests / 10 or waited_s > max(SLOW_S, epoch_s / 2):
            self.run_log.line(
                f"storage is slow: {retries:.0f} of {requests:.0f} requests were made again; {waited_s:.1f} s waited"
            )
        self._traffic_told, self._checkpoint_s_told = now, checkpoint_s

    @property
    def best_row(self) -> Row:
        """The epoch of the lowest val/loss, of equals the earliest: from the history, so that every rank names the same."""
        return min(self.history, key=lambda row: float(row["val/loss"]))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning begins no epoch again in whose middle it goes on.
        self._marks = {"start": time.perf_counter()}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._marks = {"start": time.perf_counter()}

    def _so_far(self) -> float:
        """Seconds of training in the epoch under way, those of earlier attempts too."""
        return self._epoch_s + self._marks.get("trained", time.perf_counter()) - self._marks["start"]

    @_waits
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        if self.gone_on_from == trainer.global_step:
            self.run_log.line(f"step {trainer.global_step} begins with samples {batch.ids[:8].tolist()}")

    @_waits
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        steps = int(trainer.num_training_batches)
        done = batch_idx + 1
        every = self.keeping.every_n_steps
        leaves = pl_module.someone_leaves and not self._told_of_leaving
        if done < steps and (leaves or (every and trainer.global_step % every == 0)):
            with self.clock.of("checkpoint"):
                self._commit(trainer, at_once=leaves)
        if leaves:
            self._told_of_leaving = True
            self.run_log.line(f"a node of this run is about to be taken away, at step {trainer.global_step}")
        # By step, not by time: every rank has to report equally often.
        if done % max(10, math.ceil(steps / self.REPORTS_AN_EPOCH)) == 0 and done < steps:
            self.world.report(self._progress("train", trainer, pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and "trained" not in self._marks:
            self._marks["trained"] = time.perf_counter()

    @_waits
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        trained_s, validated_s = self._so_far(), time.perf_counter() - self._marks["trained"]
        self._add_row(trainer, pl_module)
        row = self.history[-1]
        timing: Row = {
            "epoch": row["epoch"],
            "train_s": round(trained_s, 3),
            "validate_s": round(validated_s, 3),
            "images_per_s": round(float(row["samples"]) / trained_s, 1),
        }
        # Before the commit, which keeps them.
        self.timing.append(timing)
        self.clock.add("train", trained_s)
        self.clock.add("validate", validated_s)
        self._marks, self._epoch_s = {}, 0.0
        if self.stops():
            trainer.should_stop = True
        with self.clock.of("checkpoint"):
            self._commit(trainer)
        self._write()
        self._tell_of_traffic(trained_s + validated_s)
        self.run_log.line(" ".join(f"{name} {_short(value)}" for name, value in row.items()))
        self.world.report(self._progress("train", trainer, pl_module, row=row, images_per_s=float(timing["images_per_s"])))

    def _add_row(self, trainer: pl.Trainer, module: Classifier) -> None:
        train, val, seen = module.scores["train"], module.scores["val"], self._checked_ledger(trainer, module)
        rate = module.lr_at(trainer.global_step - 1)
        row: Row = {
            "epoch": len(self.history) + 1,
            "step": trainer.global_step,
            "lr": rate,
            "samples": seen.samples,
            "ledger": seen.digest,
            "train/loss": train.loss,
            "train/accuracy": train.accuracy,
            "val/samples": val.num_samples,
            "val/loss": val.loss,
            "val/accuracy": val.accuracy,
        }
        if self.best is None or val.loss < self.best.loss:
            self.best = val
        self.history.append(row)

    def _checked_ledger(self, trainer: pl.Trainer, module: Classifier) -> Entry:
        """What was seen is what was planned, or the run stops."""
        plan, seen = planned(self.planned_batches(trainer.current_epoch)), module.seen
        if seen != plan:
            raise TrainingError(
                f"epoch {trainer.current_epoch}: {seen} was seen, {plan} was planned: this is a bug, report it"
            )
        return plan

    def _commit(self, trainer: pl.Trainer, *, at_once: bool = False) -> None:
        """Everything up to this step is in the store, or on its way there; in the middle of an epoch too.

        Every rank calls it. at_once: it returns when it is there.
        """
        last = self.history[-1] if self.history else None
        at_epochs_end = last is not None and last["step"] == trainer.global_step
        facts = Facts(
            epoch=len(self.history),
            step=trainer.global_step,
            best_step=int(self.best_row["step"]) if last else None,
            finished=at_epochs_end and self.stops(),
            run_digest=self.run_digest,
            numerics=self.numerics,
        )
        trainer.save_checkpoint(self.store.place(facts.step), storage_options=facts)
        if facts.finished or at_once:
            self.store.wait()
        if self.writes:
            self._prune()
        self.gone_on_from = None

    def _prune(self) -> None:
        size, budget = self.store.prune(self.keeping, in_use=self.gone_on_from), self.keeping.budget_bytes
        if budget is not None and size > budget and not self._told_of_budget:
            self._told_of_budget = True
            self.run_log.line(f"the best and the last two checkpoints take {size:,} bytes, over the budget of {budget:,}")

    def _write(self) -> None:
        if not self.writes:
            return
        storage.write_bytes(storage.join(self.run_url, "history.csv"), csv_bytes(HISTORY, self.history))
        storage.write_bytes(storage.join(self.run_url, "timing.csv"), csv_bytes(TIMING, self.timing), durable=False)
        self._write_events()

    def _write_events(self) -> None:
        """TensorBoard events of the whole history, in one file of this attempt that only grows: it can be read along."""
        from tensorboardX import SummaryWriter

        if not self._events:  # of earlier attempts: all that stays of them is in the history
            for name in storage.files(self.run_url):
                if name.startswith(EVENTS):
                    storage.delete(storage.join(self.run_url, name))
        with storage.temporary_folder("events") as folder:
            with SummaryWriter(folder) as events:
                for row in self.history[self._num_events :]:
                    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr"):
                        events.add_scalar(name, row[name], int(row["step"]))
            (file,) = Path(folder).iterdir()
            self._events += file.read_bytes()
        self._num_events = len(self.history)
        storage.extend(self._events_url, self._events)

    def _progress(self, phase: str, trainer: pl.Trainer, module: pl.LightningModule, **newest: Any) -> Progress:
        assert isinstance(module, Classifier)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        progress = Progress(
            phase=phase,
            epoch=trainer.current_epoch + 1,
            epochs=self.epochs,
            step=trainer.global_step,
            total_steps=module.total_steps,
        )
        if not newest:
            newest = {"images_per_s": done * module.recipe.global_batch_size / max(1e-9, self._so_far())}
        return replace(progress, **newest)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def csv_bytes(columns: tuple[str, ...], rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
