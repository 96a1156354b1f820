"""How fast this machine trains, evaluates and decodes: measured in seconds, on pixels of noise, by the real loop.

Comes in: a recipe. Goes out: images/s. Called by `jobs.bench calibrate` in processes side by side, as runs are.
"""

import time
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch._dynamo  # the first optimizer of a process would: part of its imports

from imgcls.data.batches import ImageData
from imgcls.data.cache import Cache
from imgcls.data.images import decode, stored_pixels
from imgcls.data.shards import fetch_shard, read_samples
from imgcls.data.splits import Splits
from imgcls.models.build import build_model
from imgcls.recipe import Length, Recipe
from imgcls.records import Manifest
from imgcls.training.module import Classifier
from imgcls.training.world import World, make_trainer

NUM_CLASSES = 10
EVALUATED = 256


class _Clock(pl.Callback):
    """Ends the training after `seconds`, the first step and at least one more."""

    def __init__(self, seconds: float) -> None:
        self.until = time.perf_counter() + seconds
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) > 1 and self.ends[-1] > self.until:
            trainer.should_stop = True


def training_rates(recipe: Recipe, *, accelerator: str, threads: int, seconds: float) -> tuple[float, float]:
    """(images/s of training, of evaluation) of one worker with so many threads, in about `seconds`."""
    clock = _Clock(0.7 * seconds)
    torch.set_num_threads(threads)
    recipe = replace(recipe, length=Length(epochs=1), last_batch="drop")
    rng, px, count = np.random.default_rng(0), recipe.input.stored_px, recipe.global_batch_size * 16
    images = rng.integers(0, 256, (count, px, px, recipe.input.channels), dtype=np.uint8)
    # As many steps as may be wanted, on as many images as memory likes.
    train = np.tile(np.arange(count), 64)
    few = np.arange(min(EVALUATED, count))
    cache = Cache(images, rng.integers(0, NUM_CLASSES, count))
    data = ImageData(recipe, cache, Splits(train, few, few), seed=0, rank=0, world_size=1)
    network = build_model(recipe, num_classes=NUM_CLASSES, seed=0)
    world, total_steps = World(accelerator=accelerator), len(train) // recipe.global_batch_size
    module = Classifier(network, recipe, num_classes=NUM_CLASSES, world=world, total_steps=total_steps)
    make_trainer(world, precision=recipe.precision, callbacks=[clock]).fit(module, datamodule=data)
    step_s = float(np.median(np.diff(clock.ends)))
    began = time.perf_counter()
    make_trainer(world, precision=recipe.precision).test(module, datamodule=data, verbose=False)
    return recipe.global_batch_size / step_s, len(few) / (time.perf_counter() - began)


def decoding_rate(set_url: str, manifest: Manifest, *, px: int, channels: int, seconds: float) -> float:
    """Images/s of one process, on the set's first shard."""
    shard = manifest.shards[0]
    data, count, began = fetch_shard(set_url, shard), 0, time.perf_counter()
    for image, _ in read_samples(shard, data):
        stored_pixels(decode(image), px=px, channels=channels)
        count += 1
        if time.perf_counter() - began > seconds:
            break
    return count / (time.perf_counter() - began)
