"""The LightningDataModule: joins cache, order and augmentation. One batch is one gather; no loader worker processes.

The training loader keeps no position: at each epoch it asks the trainer where it is and yields from there.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from imgcls.data import order
from imgcls.data.augment import NUM_UNIFORMS, augmented_inputs
from imgcls.data.cache import Cache
from imgcls.data.order import Ids
from imgcls.data.splits import Splits
from imgcls.recipe import Augment, Recipe

EVALUATION_BATCH = 256
_NO_UNIFORMS = np.empty((0, NUM_UNIFORMS), dtype=np.float32)


class Batch(NamedTuple):
    """A rank's part of a global batch. Gathered as pixels, turned into inputs on the device."""

    ids: Ids
    """Sample ids, int64, (b,). They stay on the host."""
    images: Tensor
    """uint8, (b, h, w, c) as gathered; then the network's inputs, (b, c, px, px)."""
    labels: Tensor
    """int64, (b,)."""
    uniforms: Tensor
    """[0, 1), (b, NUM_UNIFORMS); empty where nothing is drawn."""
    global_size: int
    """Samples in the global batch, over all ranks."""
    counted: int
    """The first so many rows count; the others fill an evaluation batch up to its shape."""


class ImageData(pl.LightningDataModule):
    """Training, validation and test batches of one run on one rank."""

    def __init__(self, recipe: Recipe, cache: Cache, splits: Splits, *, seed: int, rank: int, world_size: int) -> None:
        super().__init__()
        self.recipe, self.cache, self.splits = recipe, cache, splits
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def train_dataloader(self) -> "Batches":
        return Batches(len(self.planned_batches(epoch=0)), self._training_batches)

    def val_dataloader(self) -> "Batches":
        return self._evaluation_batches(self.splits.val)

    def test_dataloader(self) -> "Batches":
        return self._evaluation_batches(self.splits.test)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Any:
        if device.type == "cuda":  # from other memory a copy waits until the device has done all that came before it
            images, labels, uniforms = (tensor.pin_memory() for tensor in (batch.images, batch.labels, batch.uniforms))
            batch = batch._replace(images=images, labels=labels, uniforms=uniforms)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        assert self.trainer is not None
        augment = self.recipe.augment if self.trainer.training else Augment()
        return batch._replace(images=augmented_inputs(batch.images, batch.uniforms, augment, self.recipe.input))

    def planned_batches(self, epoch: int) -> list[Ids]:
        """The sample ids of every step of an epoch, over all ranks."""
        size, keep_last = self.recipe.global_batch_size, self.recipe.last_batch == "keep"
        return order.global_batches(self.splits.train, seed=self.seed, epoch=epoch, size=size, keep_last=keep_last)

    def _training_batches(self) -> Iterator[Batch]:
        assert self.trainer is not None
        epoch = self.trainer.current_epoch
        batches = self.planned_batches(epoch)
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        for batch in batches[done if done < len(batches) else 0 :]:
            ids = order.rank_part(batch, rank=self.rank, world_size=self.world_size)
            drawn = _NO_UNIFORMS if self.recipe.augment == Augment() else order.uniforms(self.seed, epoch, ids, NUM_UNIFORMS)
            yield self._batch(ids, drawn, len(batch), len(ids))

    def _evaluation_batches(self, ids: Ids) -> "Batches":
        size = min(EVALUATION_BATCH, max(1, len(ids)))
        batches = order.evaluation_batches(len(ids), rank=self.rank, world_size=self.world_size, size=size)
        return Batches(
            len(batches), lambda: (self._batch(ids[rows], _NO_UNIFORMS, len(rows), counted) for rows, counted in batches)
        )

    def _batch(self, ids: Ids, uniforms: np.ndarray, global_size: int, counted: int) -> Batch:
        arrays = map(torch.from_numpy, (self.cache.images[ids], self.cache.labels[ids], uniforms))
        return Batch(ids, *arrays, global_size=global_size, counted=counted)


class Batches:
    """A loader. Lightning asks loaders for their state when it resumes in mid-epoch; ours have none."""

    def __init__(self, num_batches: int, batches: Callable[[], Iterator[Batch]]) -> None:
        self.num_batches, self.batches = num_batches, batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass
