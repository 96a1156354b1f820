"""The LightningDataModule: joins cache, order and augmentation. One batch is one gather; no loader worker processes.

The training loader keeps no position: at each epoch it asks the trainer where it is and yields from there.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from imgcls.data import order
from imgcls.data.augment import NUM_UNIFORMS, augmented_inputs, inputs
from imgcls.data.cache import Cache
from imgcls.data.order import Ids
from imgcls.data.splits import Splits
from imgcls.recipe import Recipe

EVALUATION_BATCH = 256
Wait = Callable[[], AbstractContextManager[None]]


class Batch(NamedTuple):
    """A rank's part of a global batch. Gathered as pixels, turned into inputs on the device."""

    ids: Tensor
    """Sample ids, int64, (b,)."""
    images: Tensor
    """uint8, (b, h, w, c) as gathered; then the network's inputs, (b, c, px, px)."""
    labels: Tensor
    """int64, (b,)."""
    uniforms: Tensor
    """[0, 1), (b, NUM_UNIFORMS); empty in evaluation."""
    global_size: int
    """Samples in the global batch, over all ranks."""
    counted: int
    """The first so many rows count; the others fill an evaluation batch up to its shape."""


class ImageData(pl.LightningDataModule):
    """Training, validation and test batches of one run on one rank."""

    def __init__(
        self,
        recipe: Recipe,
        cache: Cache,
        splits: Splits,
        *,
        seed: int,
        rank: int,
        world_size: int,
        waiting: Wait = nullcontext,
    ) -> None:
        """waiting: a context in which this process waits for its device."""
        super().__init__()
        self.recipe, self.cache, self.splits = recipe, cache, splits
        self.seed, self.rank, self.world_size, self.waiting = seed, rank, world_size, waiting

    def train_dataloader(self) -> "TrainBatches":
        return TrainBatches(self)

    def val_dataloader(self) -> "EvaluationBatches":
        return EvaluationBatches(self, self.splits.val)

    def test_dataloader(self) -> "EvaluationBatches":
        return EvaluationBatches(self, self.splits.test)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Any:
        with self.waiting():  # a copy to a GPU comes after all that it has to do, other ranks' gradients among it
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        assert self.trainer is not None
        into = self.recipe.input
        if self.trainer.training:
            return batch._replace(images=augmented_inputs(batch.images, batch.uniforms, self.recipe.augment, into))
        return batch._replace(images=inputs(batch.images, into))

    def planned_batches(self, epoch: int) -> list[Ids]:
        """The sample ids of every step of an epoch, over all ranks."""
        recipe = self.recipe
        return order.global_batches(
            self.splits.train,
            seed=self.seed,
            epoch=epoch,
            size=recipe.global_batch_size,
            keep_last=recipe.last_batch == "keep",
        )

    def gather(self, ids: Ids, *, uniforms: np.ndarray, global_size: int, counted: int) -> Batch:
        return Batch(
            ids=torch.from_numpy(ids),
            images=torch.from_numpy(self.cache.images[ids]),
            labels=torch.from_numpy(self.cache.labels[ids]),
            uniforms=torch.from_numpy(uniforms),
            global_size=global_size,
            counted=counted,
        )


class _Stateless:
    """Lightning asks loaders for their state when it resumes in mid-epoch; ours have none."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class TrainBatches(_Stateless):
    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __len__(self) -> int:
        recipe = self.data.recipe
        keep_last = recipe.last_batch == "keep"
        return order.num_steps(len(self.data.splits.train), size=recipe.global_batch_size, keep_last=keep_last)

    def __iter__(self) -> Iterator[Batch]:
        data = self.data
        assert data.trainer is not None
        epoch, batches = data.trainer.current_epoch, data.planned_batches(data.trainer.current_epoch)
        done = data.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        start = done if done < len(self) else 0
        for batch in batches[start:]:
            ids = order.rank_part(batch, rank=data.rank, world_size=data.world_size)
            uniforms = order.uniforms(data.seed, epoch, ids, NUM_UNIFORMS)
            yield data.gather(ids, uniforms=uniforms, global_size=len(batch), counted=len(ids))


class EvaluationBatches(_Stateless):
    def __init__(self, data: ImageData, ids: Ids) -> None:
        self.data, self.ids = data, ids
        self._batches = order.evaluation_batches(
            len(ids), rank=data.rank, world_size=data.world_size, size=min(EVALUATION_BATCH, max(1, len(ids)))
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        none = np.empty((0, NUM_UNIFORMS), dtype=np.float32)
        for rows, counted in self._batches:
            yield self.data.gather(self.ids[rows], uniforms=none, global_size=len(rows), counted=counted)
