"""Runs in processes of their own, with plain Lightning and without Ray: of several ranks, or killed at a step."""

import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgcls import records
from imgcls.catalogue import quick
from imgcls.data.shards import read_manifest
from imgcls.recipe import Augment, BasicCNN, Input, Length, OneCycle, Recipe
from imgcls.records import RunConfig, RunOptions, RunResult

if TYPE_CHECKING:
    from imgcls.training.world import World

TWELVE = replace(
    quick.REGULARIZED,
    name="twelve",
    model=BasicCNN(dropout=0.3),
    input=Input(px=16, channels=3, stored_px=16),
    augment=Augment(flip=True, rotate_degrees=10, crop_min_area=0.7, brightness=0.2),
    schedule=OneCycle(),
    length=Length(epochs=3, patience=2),
    global_batch_size=64,
    train_fraction=1.0,
)
"""Twelve steps over three epochs of 270 synthetic images."""
MOMENTS = ("in the step", "before the commit", "after the commit")

_processes = get_context("forkserver")
# Children are forked from a process that has imported the heavy part once.
_processes.set_forkserver_preload(["imgcls.training.fit", "torch._dynamo", "tests.proof.alone"])


def config_of(recipe: Recipe, packed: Path) -> RunConfig:
    digest = read_manifest(str(packed / recipe.dataset)).digest
    return RunConfig(catalogue="quick", recipe=recipe, seed=0, data_digest=digest, init=None, synthetic=True)


def together(target: Callable[..., None], world_size: int, *arguments: Any) -> list[int]:
    """Calls `target(rank, world_size, meeting, *arguments)` in a process for each rank; returns their exit codes."""
    with tempfile.TemporaryDirectory() as meeting:
        ranks = [
            _processes.Process(target=target, args=(rank, world_size, f"{meeting}/store", *arguments))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(500)
        late = [rank for rank in ranks if rank.is_alive()]
        for rank in late:
            rank.kill()
    assert not late, f"{len(late)} of {world_size} ranks did not end within 500 s"
    return [int(rank.exitcode or 0) for rank in ranks]


def run_alone(
    recipe: Recipe,
    packed: Path,
    to: Path,
    *,
    world_size: int = 1,
    every: int | None = None,
    dies: tuple[int, str] | None = None,
    accept: bool = False,
    ddps_own_sum: bool = False,
    attempt: int = 1,
) -> list[int]:
    """Runs `recipe`, each rank in a process of its own; returns their exit codes.

    dies: (step, moment) of their SIGKILL. attempt: how often the run has been begun, by its own account. ddps_own_sum:
    gradients are added by DDP's own all-reduce, which is no product's.
    """
    return together(_rank, world_size, recipe.to_json(), str(packed), str(to), every, dies, accept, ddps_own_sum, attempt)


def result_in(folder: Path) -> RunResult:
    return records.read(RunResult, str(folder / "result.json"))


def _rank(
    rank: int,
    world_size: int,
    meeting: str,
    recipe: dict,
    packed: str,
    to: str,
    every: int | None,
    dies: tuple[int, str] | None,
    accept: bool,
    ddps_own_sum: bool,
    attempt: int,
) -> None:
    import torch

    from imgcls.recipe import recipe_from_json
    from imgcls.training.fit import fit

    torch.set_num_threads(1)
    if dies is not None:
        _die_at(*dies)
    if ddps_own_sum:
        from imgcls.training import module

        module.make_repeatable = module.share_buffers = lambda _: None
    config = config_of(recipe_from_json(recipe, where="test"), Path(packed))
    fit(
        config,
        data_url=packed,
        run_url=to,
        world=replace(world_of(rank, world_size, meeting, elastic=config.recipe.numerics == "elastic"), attempt=attempt),
        options=RunOptions(checkpoint_every_n_steps=every, accept_different_numerics=accept),
    )


def world_of(rank: int, world_size: int, meeting: str, *, elastic: bool = False) -> "World":
    """One of several ranks on this machine, over gloo, as a launcher would hand it in."""
    import torch
    import torch.distributed as dist
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from imgcls.training.elastic import leave_gradients_alone
    from imgcls.training.world import World

    if world_size == 1:
        return World()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)

    class Launched(LightningEnvironment):
        def __init__(self) -> None:
            super().__init__()
            self._global_rank, self._world_size = rank, world_size

        @property
        def creates_processes_externally(self) -> bool:
            return True

        def local_rank(self) -> int:
            return rank

        def set_world_size(self, size: int) -> None:
            pass

        def set_global_rank(self, rank: int) -> None:
            pass

    class OnCPU(DDPStrategy):
        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu")

    def broadcast(value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    strategy = OnCPU(process_group_backend="gloo")
    if elastic:
        leave_gradients_alone(strategy)
    return World(rank=rank, size=world_size, strategy=strategy, plugins=(Launched(),), broadcast=broadcast)


def _die_at(step: int, moment: str) -> None:
    """This process is killed in training step `step` (from 1) of the run."""
    from imgcls.training.module import Classifier
    from imgcls.training.recorder import Recorder

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "in the step":
        forward = Classifier._forward

        def dying(self, batch, rows, rank):
            if self.global_step == step - 1:
                kill()
            return forward(self, batch, rows, rank)

        Classifier._forward = dying
        return
    commit = Recorder._commit

    def dies_at_the_commit(self: Recorder, trainer, *, at_once: bool = False) -> None:
        if trainer.global_step == step and moment == "before the commit":
            kill()
        commit(self, trainer, at_once=at_once)
        if trainer.global_step == step and moment == "after the commit":
            kill()

    Recorder._commit = dies_at_the_commit
