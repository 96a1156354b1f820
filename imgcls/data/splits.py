"""Which samples a recipe trains on, validates on and is tested on: a pure function of recipe and manifest."""

from dataclasses import dataclass

import numpy as np

from imgcls.data.order import Ids, stratified_cut
from imgcls.errors import RecipeError
from imgcls.recipe import BasicCNN, Recipe
from imgcls.records import Manifest


@dataclass(frozen=True, slots=True)
class Splits:
    """Sample ids, that is rows of the cache, ascending; no two share one."""

    train: Ids
    val: Ids
    test: Ids
    unused: int = 0
    """Training samples that the recipe's `train_fraction` leaves out."""


def split_ids(recipe: Recipe, manifest: Manifest) -> Splits:
    """The packed splits; validation is cut from train where the set brings none; then the recipe's fraction of train.

    Raises RecipeError where too little is left to train on.
    """
    labels = np.array([label for shard in manifest.shards for label in shard.labels], dtype=np.int64)
    packed = np.repeat([shard.split for shard in manifest.shards], [shard.num_samples for shard in manifest.shards])
    train, val, test = (np.flatnonzero(packed == split) for split in ("train", "val", "test"))
    if not len(val):
        kept, cut = stratified_cut(labels[train], fraction=recipe.validation.fraction, seed=recipe.validation.seed)
        train, val = train[kept], train[cut]
        if not len(val):
            raise RecipeError(
                f"recipe {recipe.name}: {recipe.dataset} has one training sample a class, {len(train):,} in all: "
                "no validation part can be cut\n  do: add images and pack again"
            )
    whole = len(train)
    if recipe.train_fraction < 1:
        used, _ = stratified_cut(labels[train], fraction=1 - recipe.train_fraction, seed=recipe.validation.seed + 1)
        train = train[used]
    if len(train) < recipe.global_batch_size:
        flags = ["--set train_fraction=1.0"] * (recipe.train_fraction < 1)
        half = 1 << max(1, whole.bit_length() - 2)  # the power of two that is at most half of them, and two at least
        flags += [f"--set global_batch_size={half}"] * (whole < recipe.global_batch_size)
        part = f"train_fraction {recipe.train_fraction} leaves {len(train):,} of {recipe.dataset}'s"
        owner = part if recipe.train_fraction < 1 else f"{recipe.dataset} has"
        raise RecipeError(
            f"recipe {recipe.name}: {owner} {whole:,} training samples, fewer than a global batch of "
            f"{recipe.global_batch_size}\n  do: {' '.join(flags)}"
        )
    return Splits(train, val, test, whole - len(train))


def fraction_note(recipe: Recipe, splits: Splits) -> str | None:
    """A note for users of a recipe that trains on a part of the training samples; None if it trains on all."""
    part = f"{len(splits.train):,} of {len(splits.train) + splits.unused:,}"
    note = f"{recipe.name} trains on {recipe.train_fraction:.0%} of {recipe.dataset}'s training part ({part})"
    return f"{note}; --set train_fraction=1.0 takes all" if splits.unused else None


def check_parts(recipe: Recipe, num_train: int, *, world_size: int) -> None:
    """Every rank's smallest part can be normalized by a batch norm: two samples or more.

    Under elastic numerics every worker has the same number of virtual ranks. Raises RecipeError.
    """
    elastic = recipe.numerics == "elastic"
    if elastic and recipe.virtual_ranks % world_size:
        fitting = " or ".join(str(1 << i) for i in range(recipe.virtual_ranks.bit_length()))
        raise RecipeError(
            f"recipe {recipe.name}: {recipe.virtual_ranks} virtual ranks cannot be shared alike by {world_size} workers\n"
            f"  do: --num-workers {fitting}"
        )
    num_ranks, ranks = (recipe.virtual_ranks, "virtual ranks") if elastic else (world_size, "workers")
    last_batch = num_train % recipe.global_batch_size if recipe.last_batch == "keep" else 0
    smallest_batch = last_batch or recipe.global_batch_size
    needed = 1 if isinstance(recipe.model, BasicCNN) else 2
    if smallest_batch // num_ranks < needed:
        raise RecipeError(
            f"recipe {recipe.name}: a global batch of {smallest_batch} leaves {smallest_batch // num_ranks} samples to "
            f"each of {num_ranks} {ranks}; {recipe.model.kind} needs {needed}\n"
            f"  do: fewer {ranks}, a larger --set global_batch_size=, or --set last_batch=drop"
        )
