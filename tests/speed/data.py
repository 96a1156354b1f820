"""`bench speed data`: images/s from shards or files to a batch of inputs, ours beside loaders that a user would take.

In each turn every loader has a process of its own, which makes one pass from nothing (the first epoch), and one more (a
later epoch).
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgcls.catalogue import paper
from imgcls.data.batches import ImageData
from imgcls.data.cache import Cache, open_cache
from imgcls.data.shards import read_manifest
from imgcls.data.splits import Splits
from imgcls.errors import DataError
from imgcls.recipe import Augment, Recipe
from tests.proof.records import Timed
from tests.speed.peers import ALWAYS, NUM_WORKERS, OPTIONAL, Contender, Epoch
from tests.speed.prepared import PEERS, Prepared, check_peers, num_prepared, prepare, prepare_peers
from tests.speed.turns import Turns

NUM_TEST = 200
"""Our sets hold a test part; no loader reads it."""
LEAST_S = 1.0
"""Later epochs are repeated until so much time has gone: a pass of ours is too short for a clock."""
FLIP = replace(paper.BASIC_CNN, augment=Augment(flip=True))
SETS: tuple[tuple[str, Recipe, int], ...] = (
    ("Imagenette 64 px gray", paper.BASIC_CNN, 8_000),
    ("Imagenette 64 px gray, flip", FLIP, 8_000),
    ("CIFAR-10, augmentation of `regularized`", paper.REGULARIZED, 4_000),
)
"""With the number of training images: as many shards for each of webdataset's two workers."""
NOTES = (
    "Files of the system are in memory for all of them. The sets of litdata and mosaicml-streaming were written before, "
    "which is not counted; `arrays` are decoded and resized there.",
    "Peers have two loader workers each; imgcls and the copy (the limit) one thread, unless a name says otherwise. In its "
    "first epoch imgcls decodes by a process for each CPU.",
    "First epoch: from making the loader to the end of the first pass, libraries imported; imgcls fetches, checks, decodes "
    "and caches in it.",
)
FIRST, LATER = "first epoch", "later epochs"


def _cache_of(prepared: Prepared) -> Cache:
    into, url = prepared.recipe.input, prepared.set_url
    return open_cache(url, read_manifest(url), px=into.stored_px, channels=into.channels)


def _open_ours(prepared: Prepared) -> Epoch:
    """Fetched, checked, decoded, cached; then as the training loop asks for batches."""
    cache, recipe = _cache_of(prepared), replace(prepared.recipe, last_batch="keep")
    few = np.arange(1)
    splits = Splits(np.arange(num_prepared(prepared)), few, few)
    data = ImageData(recipe, cache, splits, seed=0, rank=0, world_size=1)

    def epoch(number: int) -> Iterator[Tensor]:
        progress = SimpleNamespace(current=SimpleNamespace(completed=0))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        trainer: Any = SimpleNamespace(training=True, current_epoch=number, fit_loop=loop)
        data.trainer = trainer
        for batch in data.train_dataloader():
            yield data.on_after_batch_transfer(data.transfer_batch_to_device(batch, torch.device("cpu"), 0), 0).images

    return epoch


def _open_copy(prepared: Prepared) -> Epoch:
    """The same pixels in memory, gathered in another order and turned into inputs, in place: nothing else."""
    images, into = torch.from_numpy(np.array(_cache_of(prepared).images)), prepared.recipe.input
    size, scale = prepared.recipe.global_batch_size, 1 / (255 * into.std)
    pixels = torch.empty((size, *images.shape[1:]), dtype=torch.uint8)
    values = torch.empty(pixels.shape)

    def epoch(number: int) -> Iterator[Tensor]:
        order = torch.randperm(num_prepared(prepared), generator=torch.Generator().manual_seed(number))
        for ids in order.split(size):
            some = torch.index_select(images, 0, ids, out=pixels[: len(ids)])
            yield values[: len(ids)].copy_(some).mul_(scale).sub_(into.mean / into.std).permute(0, 3, 1, 2)

    return epoch


OURS = (
    Contender("memory copy and conversion", "limit", _open_copy),
    Contender("imgcls, two threads", "ours", _open_ours, threads=NUM_WORKERS),
    Contender("imgcls", "ours", _open_ours),
)
"""By one thread, which is what a run of `quick` has on two cores; ours by as many as peers have workers, too."""


def measure_data(
    data_url: str, repeats: int, say: Callable[[str], None], *, most: int = 10_000, optional: bool = True
) -> list[Timed]:
    """most: training images a set. optional: with the peers that may be missing. Raises DataError where they are."""
    contenders = (*ALWAYS, *(OPTIONAL if optional else ()), *OURS)
    if optional:
        check_peers()
    for module in ("webdataset", *(PEERS if optional else ())):  # before processes are forked: each has them then
        import_module(module)
    turns = Turns(say)
    for title, recipe, num_images in SETS:
        with tempfile.TemporaryDirectory(prefix="speed") as folder:
            prepared = prepare(recipe, data_url, Path(folder), num_train=min(most, num_images), num_test=NUM_TEST)
            if optional:
                prepare_peers(prepared)
            for _ in range(repeats):
                for one in contenders:
                    first, later = passes(one, prepared)
                    if one.kind != "limit" and recipe == SETS[0][1]:
                        turns.add(f"{title}, {FIRST}", one.name, one.kind, "images/s", first)
                    turns.add(f"{title}, {LATER}", one.name, one.kind, "images/s", later)
    return turns.items()


def passes(one: Contender, prepared: Prepared) -> tuple[float, float]:
    """Images/s of the first pass, with all that comes before it, and of later ones; in a process of its own."""
    context = get_context("fork")  # the parent has imported everything, and computes nothing
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(one, prepared, there))
    process.start()
    there.close()
    try:
        (first, first_s), (later, later_s) = here.recv()
    except EOFError:
        raise DataError(f"the loader {one.name} died\n  do: look at its traceback above") from None
    finally:
        process.join()
    whole = num_prepared(prepared)
    if first != whole or later % whole:
        raise DataError(f"{one.name} gave {first} and {later} images, the set has {whole}: no figure to record")
    return first / first_s, later / later_s


def _serve(one: Contender, prepared: Prepared, pipe: Connection) -> None:
    torch.set_num_threads(one.threads)
    with tempfile.TemporaryDirectory(prefix="speed-cache") as cache:
        os.environ["IMGCLS_CACHE"] = cache
        began = time.perf_counter()
        epoch = one.open(prepared)
        first, first_s = sum(len(images) for images in epoch(0)), time.perf_counter() - began
        later, number, began = 0, 1, time.perf_counter()
        while number == 1 or time.perf_counter() - began < LEAST_S:
            later += sum(len(images) for images in epoch(number))
            number += 1
        pipe.send(((first, first_s), (later, time.perf_counter() - began)))
