"""Which samples a recipe trains on, validates on and is tested on: a pure function of recipe and manifest."""

from dataclasses import dataclass

import numpy as np

from imgcls.data.order import Ids, stratified_cut
from imgcls.errors import RecipeError
from imgcls.recipe import BasicCNN, Recipe
from imgcls.records import Manifest, Split


@dataclass(frozen=True, slots=True)
class Splits:
    """Sample ids, that is rows of the cache, ascending; no two share one."""

    train: Ids
    val: Ids
    test: Ids


def split_ids(recipe: Recipe, manifest: Manifest) -> Splits:
    """The packed splits; validation is cut from train where the set brings none; then the recipe's fraction of train.

    Raises RecipeError where too little is left to train on.
    """
    train, val, test = (_rows(manifest, split) for split in ("train", "val", "test"))
    labels = np.array([label for shard in manifest.shards for label in shard.labels], dtype=np.int64)
    if not len(val):
        kept, cut = stratified_cut(labels[train], fraction=recipe.validation.fraction, seed=recipe.validation.seed)
        train, val = train[kept], train[cut]
    if recipe.train_fraction < 1:
        used, _ = stratified_cut(labels[train], fraction=1 - recipe.train_fraction, seed=recipe.validation.seed + 1)
        train = train[used]
    if len(train) < recipe.global_batch_size:
        raise RecipeError(
            f"recipe {recipe.name}: {len(train):,} of the {len(labels):,} samples of {recipe.dataset} are to be trained on, "
            f"less than a global batch of {recipe.global_batch_size}\n"
            f"  do: --set global_batch_size={_power_of_two_below(len(train))}"
        )
    return Splits(train, val, test)


def check_parts(recipe: Recipe, num_train: int, *, world_size: int) -> None:
    """Every rank's smallest part can be normalized by a batch norm: two samples or more. Raises RecipeError."""
    check_world(recipe, world_size=world_size)
    ranks = "virtual ranks" if recipe.numerics == "elastic" else "workers"
    num_ranks = recipe.virtual_ranks if recipe.numerics == "elastic" else world_size
    smallest_batch = recipe.global_batch_size
    if recipe.last_batch == "keep" and num_train % recipe.global_batch_size:
        smallest_batch = num_train % recipe.global_batch_size
    needed = 1 if isinstance(recipe.model, BasicCNN) else 2
    if smallest_batch // num_ranks < needed:
        raise RecipeError(
            f"recipe {recipe.name}: a global batch of {smallest_batch} leaves {smallest_batch // num_ranks} samples to "
            f"each of {num_ranks} {ranks}; {recipe.model.kind} needs {needed}\n"
            f"  do: fewer {ranks}, a larger --set global_batch_size=, or --set last_batch=drop"
        )


def check_world(recipe: Recipe, *, world_size: int) -> None:
    """Elastic numerics: every worker has the same number of virtual ranks. Raises RecipeError, naming the worlds that do."""
    if recipe.numerics == "elastic" and recipe.virtual_ranks % world_size:
        fitting = " or ".join(str(1 << i) for i in range(recipe.virtual_ranks.bit_length()))
        raise RecipeError(
            f"recipe {recipe.name}: {recipe.virtual_ranks} virtual ranks cannot be shared alike by {world_size} workers\n"
            f"  do: --num-workers {fitting}"
        )


def _rows(manifest: Manifest, split: Split) -> Ids:
    rows, start = [np.empty(0, dtype=np.int64)], 0
    for shard in manifest.shards:
        if shard.split == split:
            rows.append(np.arange(start, start + shard.num_samples))
        start += shard.num_samples
    return np.concatenate(rows)


def _power_of_two_below(n: int) -> int:
    return max(2, 1 << (n // 2).bit_length() - 1) if n >= 2 else 2
