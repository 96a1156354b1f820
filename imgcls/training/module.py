"""The LightningModule: loss, totals and optimizer around a network. Called by `fit` and `evaluate`."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from imgcls.data.batches import Batch
from imgcls.data.order import hash64
from imgcls.errors import TrainingError
from imgcls.recipe import Recipe
from imgcls.records import PREDICTED, Scores
from imgcls.training.elastic import virtual_parts, virtual_step
from imgcls.training.flags import StepFlags
from imgcls.training.gradients import make_repeatable, share_buffers
from imgcls.training.ledger import Entry, Ledger
from imgcls.training.schedule import lr_factor
from imgcls.training.totals import Predictions, Totals
from imgcls.training.weights import weights_sha256
from imgcls.training.world import World

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Classifier(pl.LightningModule):
    """One recipe's network in training or evaluation, as one rank of `world`."""

    def __init__(
        self, network: nn.Module, recipe: Recipe, *, num_classes: int, world: World, total_steps: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        self.network = network
        self.average = deepcopy(network).requires_grad_(False) if recipe.averaging else None
        self.recipe, self.total_steps = recipe, total_steps
        self.lr_factor = partial(lr_factor, recipe.schedule, total_steps=total_steps)
        """Of the recipe's learning rate, by the step that is taken."""
        self.seed, self.world, self.rank, self.world_size = seed, world, world.rank, world.size
        self.flags = StepFlags(world)
        self.automatic_optimization = recipe.numerics != "elastic"
        self.train_totals, self.val_totals, self.test_totals = (Totals(num_classes) for _ in range(3))
        self.predictions = Predictions()
        self.ledger = Ledger()
        self._counted: dict[str, Metric] = {"ledger": self.ledger, "train": self.train_totals}
        self.seen: Entry | None = None
        """The ledger of the last whole epoch."""
        self.scores: dict[str, Scores] = {}
        """Of the last whole pass over each split."""
        self.predicted = np.empty(0, list(PREDICTED))
        """Of the last whole pass over the test split."""

    @property
    def evaluated(self) -> nn.Module:
        """What is validated, tested and kept."""
        return self.network if self.average is None else self.average

    @torch.no_grad()
    def _update_average(self, *_: Any) -> None:
        """Of weights and running statistics, from those after the first step on. `global_step` does not count it yet.

        torch's AveragedModel reads a counter from the device in every step.
        """
        is_first, newest_weights = self.global_step == 0, self.network.state_dict()
        for average, newest in zip(self.evaluated.state_dict().values(), newest_weights.values(), strict=True):
            if is_first or not average.is_floating_point():
                average.copy_(newest)
            else:
                average.lerp_(newest, 1 - self.recipe.averaging)

    def on_train_start(self) -> None:
        if isinstance(self.trainer.model, DistributedDataParallel):
            make_repeatable(self.trainer.model)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.ledger.update(batch.ids, batch_idx)
        if not self.automatic_optimization:
            self._elastic_step(batch)
            return None
        loss, finite = self._forward(batch, slice(None), self.rank)
        self._share(finite, batch)
        return loss  # gradients are added over ranks: to those of the mean over the global batch

    def on_after_backward(self) -> None:
        if self.world_size > 1:
            with self.world.heartbeat.waiting():
                share_buffers(self.network)

    def _forward(self, batch: Batch, rows: slice, rank: int) -> tuple[Tensor, Tensor]:
        """(these rows' share of the global batch's mean loss, whether it is finite)."""
        # Dropout is a function of (seed, step, rank): nothing to save, nothing to restore.
        torch.manual_seed(int(hash64(self.seed, self.global_step, rank)[0] >> 1))
        logits, labels = self.network(batch.images[rows]), batch.labels[rows]
        summed = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=self.recipe.label_smoothing)
        self.train_totals.update(logits.detach(), labels)
        return summed / batch.global_size, torch.isfinite(summed.detach())

    def _elastic_step(self, batch: Batch) -> None:
        """As the automatic step, but for the way in which gradients are added; see `training.elastic`."""
        virtual_ranks = self.recipe.virtual_ranks
        parts = virtual_parts(batch.global_size, rank=self.rank, world_size=self.world_size, virtual_ranks=virtual_ranks)

        def gather(mine: Tensor, finite: Tensor) -> Sequence[Tensor]:
            self._share(finite, batch)
            if self.world_size == 1:
                return [mine]
            everyones = [torch.empty_like(mine) for _ in range(self.world_size)]
            with self.world.heartbeat.waiting():
                torch.distributed.all_gather(everyones, mine)
            return everyones

        forward, num_steps = partial(self._forward, batch), self.global_step + 1
        virtual_step(self.network, forward, parts, virtual_ranks=virtual_ranks, gather=gather, num_steps=num_steps)
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    def _share(self, finite: Tensor, batch: Batch) -> None:
        self.flags.share(finite, batch.ids, epoch=self.current_epoch + 1, step=self.global_step)

    # The part of an epoch that lies behind a checkpoint in its middle, over all ranks: it goes on from rank 0's sums.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.flags.read()
        checkpoint["epoch_so_far"] = {name: _summed(metric) for name, metric in self._counted.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.rank == 0:
            for name, metric in self._counted.items():
                for state, value in checkpoint["epoch_so_far"][name].items():
                    setattr(metric, state, value)

    def _check_alike(self) -> None:
        """Under elastic numerics no rank hands its weights to another: unlike hardware would let them drift apart."""
        mine = weights_sha256(self.network.state_dict())
        with self.world.heartbeat.waiting():
            everyones = self.world.gather(mine)
        if len(set(everyones)) > 1:
            fault = f"workers hold other weights after epoch {self.current_epoch + 1}: their hardware computes differently"
            raise TrainingError(f"{fault}\n  do: nodes of one kind, or --set numerics=ddp")

    def on_train_epoch_end(self) -> None:
        if not self.automatic_optimization:
            self._check_alike()
        self.scores["train"] = self._take(self.train_totals)
        self.seen = self._take(self.ledger)

    def on_validation_start(self) -> None:
        self.flags.read()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(self.val_totals, batch)

    def on_validation_epoch_end(self) -> None:
        self.scores["val"] = self._take(self.val_totals)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self._evaluate(self.test_totals, batch)
        self.predictions.update(batch.ids[: batch.counted], logits, batch.labels[: batch.counted])

    def on_test_epoch_end(self) -> None:
        self.scores["test"] = self._take(self.test_totals)
        self.predicted = self._take(self.predictions)

    def _evaluate(self, totals: Totals, batch: Batch) -> Tensor:
        logits = self.evaluated(batch.images)[: batch.counted]
        totals.update(logits, batch.labels[: batch.counted])
        return logits

    def _take(self, metric: Metric) -> Any:
        """What it has come to over all ranks; it begins anew. Every rank calls it."""
        with self.world.heartbeat.waiting():
            value = metric.compute()
        metric.reset()
        return value

    def configure_optimizers(self) -> Any:
        settings = asdict(self.recipe.optimizer)  # its fields have torch's names
        kind = OPTIMIZERS[settings.pop("kind")]
        # Fused: one kernel for all parameters; the same arithmetic on CPU and CUDA.
        built = kind(self.network.parameters(), **settings, fused=True)
        if self.average is not None:
            built.register_step_post_hook(self._update_average)
        return {"optimizer": built, "lr_scheduler": {"scheduler": LambdaLR(built, self.lr_factor), "interval": "step"}}


def _summed(metric: Metric) -> dict[str, Tensor]:
    """The metric's states over all ranks. Every rank calls it."""
    with metric.sync_context():
        return {name: state.clone().cpu() for name, state in metric.metric_state.items() if isinstance(state, Tensor)}
