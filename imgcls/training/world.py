"""What a rank needs from outside, and Lightning's trainer made of it."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from imgcls.records import Placement
from imgcls.training.progress import Progress


class Heartbeat(pl.Callback):
    """Since when this rank has been busy with a batch, or has waited: for whoever watches it from another thread."""

    def __init__(self) -> None:
        self.step = 0
        self.state: tuple[bool, float] | None = None
        """(whether it waits, since when, by `time.monotonic`); None outside of training and evaluation."""

    def _beat(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.step, self.state = trainer.global_step, (False, time.monotonic())

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = _beat

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank waits for other ranks, for its device, or for storage."""
        waited = self.state is not None and self.state[0]
        self._turn(waits=True)
        try:
            yield
        finally:
            self._turn(waits=waited)

    def _turn(self, *, waits: bool) -> None:
        if self.state is not None:
            self.state = (waits, time.monotonic())

    # DDP waits for other ranks at the end of the backward pass.
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self._turn(waits=trainer.world_size > 1)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._turn(waits=False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.state = None


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Who this rank is, and where it reports."""

    rank: int = 0
    size: int = 1
    accelerator: str = "cpu"
    strategy: Any = "auto"
    """Lightning's; whoever launches several ranks hands in one that knows them."""
    plugins: tuple[Any, ...] = ()
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    report: Callable[[Progress], None] = lambda progress: None
    """Called by every rank, equally often."""
    broadcast: Callable[[Any], Any] = lambda value: value
    """Rank 0's value on every rank."""
    leaving: Callable[[], bool] = lambda: False
    """Whether this rank's node is about to be taken away. Asked in every step: it may not wait for anybody."""
    lost: Callable[[], bool] = lambda: False
    """Whether somebody else carries this run out by now. Asked as often, and as quick."""
    crashed: Callable[[str, int, str], None] = lambda error, step, trace: None
    """Told of an error of this rank's own that another try may not meet, the step at which it was, and its traceback."""
    placement: Placement | None = None
    attempt: int = 1
    """How often the run has been begun."""
    command: str | None = None
    """Whose run this is: its runs check a node's cache once."""
    started_s: float = field(default_factory=time.time)
    """When the run was asked for, seconds since 1970: what came before `fit` counts as the phase `start`."""

    def gather(self, value: Any) -> list[Any]:
        """Of all ranks, in their order. Every rank calls it."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values


def lost_a_rank(error: Exception) -> bool:
    """A collective failed since another rank has gone: a consequence, and no error of this rank's own."""
    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError)
    says = ("gloo", "Application timeout caused pair closure")  # the second is gloo's too, without its name
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(one in str(error) for one in says))


def make_trainer(
    world: World, *, precision: str, plugins: Sequence[Any] = (), callbacks: Sequence[pl.Callback] = (), max_epochs: int = 1
) -> pl.Trainer:
    """Silent and deterministic, without Lightning's own loggers, checkpoints and samplers: ours stand in their place."""
    # Without it Lightning's launcher gives every rank a number of threads of its own choice, and with it other last bits.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    trainer = pl.Trainer(
        accelerator=world.accelerator,
        devices=1 if world.strategy == "auto" else "auto",
        strategy=world.strategy,
        plugins=[*world.plugins, *plugins],
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=max_epochs,
        callbacks=[world.heartbeat, *callbacks],
        deterministic=True,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),  # else Lightning adds its own
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    # Else all ranks wait for rank 0 at each batch, to hear of a SIGTERM that no process of ours hands to Lightning.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer
