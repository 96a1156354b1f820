"""The LightningModule: loss, totals and optimizer around a network. Called by `fit` and `evaluate`."""

from typing import Any, assert_never

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgcls.data.batches import Batch
from imgcls.data.order import hash64
from imgcls.errors import ImgclsError
from imgcls.recipe import Adam, AdamW, Recipe
from imgcls.records import Scores
from imgcls.training.ledger import Entry, Ledger
from imgcls.training.schedule import lr_factor
from imgcls.training.totals import Totals


class Classifier(pl.LightningModule):
    """One recipe's network in training or evaluation, as one rank of `world_size`."""

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        *,
        num_classes: int,
        total_steps: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        self.recipe, self.total_steps = recipe, total_steps
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.train_totals, self.val_totals, self.test_totals = (Totals(num_classes) for _ in range(3))
        self.ledger = Ledger()
        self.seen: Entry | None = None
        """The ledger of the last whole epoch."""
        self.scores: dict[str, Scores] = {}
        """Of the last whole pass over each split."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # Dropout is a function of (seed, step, rank): nothing to save, nothing to restore.
        torch.manual_seed(int(hash64(self.seed, self.global_step, self.rank)[0] >> 1))
        logits = self.network(batch.images)
        smoothing = self.recipe.label_smoothing
        summed = F.cross_entropy(logits.float(), batch.labels, reduction="sum", label_smoothing=smoothing)
        if not torch.isfinite(summed):
            raise ImgclsError(
                f"the loss of {self.recipe.name} is not finite in epoch {self.current_epoch}, step {self.global_step}, "
                f"samples {batch.ids[:8].tolist()}..\n  do: a lower --set optimizer.lr="
            )
        self.train_totals.update(logits.detach(), batch.labels)
        self.ledger.update(batch.ids, batch_idx)
        # DDP takes the mean over ranks; parts may differ in size. So weighted, it is the mean over the global batch.
        return summed * (self.world_size / batch.global_size)

    def on_train_epoch_end(self) -> None:
        self._take("train", self.train_totals)
        self.seen = self.ledger.compute()
        self.ledger.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(self.val_totals, batch)

    def on_validation_epoch_end(self) -> None:
        self._take("val", self.val_totals)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(self.test_totals, batch)

    def on_test_epoch_end(self) -> None:
        self._take("test", self.test_totals)

    def _evaluate(self, totals: Totals, batch: Batch) -> None:
        logits = self.network(batch.images)
        totals.update(logits[: batch.counted], batch.labels[: batch.counted])

    def _take(self, split: str, totals: Totals) -> Scores:
        scores = totals.compute()
        totals.reset()
        self.scores[split] = scores
        return scores

    def configure_optimizers(self) -> Any:
        optimizer, parameters = self.recipe.optimizer, self.parameters()
        # Fused: one kernel for all parameters; the same arithmetic on CPU and CUDA.
        built: torch.optim.Optimizer
        match optimizer:
            case Adam(lr=lr):
                built = torch.optim.Adam(parameters, lr=lr, fused=True)
            case AdamW(lr=lr, weight_decay=weight_decay):
                built = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
            case _:
                assert_never(optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(built, self._lr_factor)
        return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_at(self, step: int) -> float:
        """The learning rate at which this step is taken."""
        return self.recipe.optimizer.lr * self._lr_factor(step)

    def _lr_factor(self, step: int) -> float:
        return lr_factor(self.recipe.schedule, step=step, total_steps=self.total_steps)
