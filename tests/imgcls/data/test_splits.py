from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imgcls.catalogue import quick
from imgcls.data import shards
from imgcls.data.sources import open_source
from imgcls.data.splits import check_parts, fraction_note, split_ids
from imgcls.errors import RecipeError
from imgcls.recipe import Cut
from tests.conftest import image_folder

SMALL = replace(quick.SCRATCH, global_batch_size=16, train_fraction=1.0)


def test_validation_is_cut_from_train_and_nothing_is_in_two_splits(packed: Path):
    manifest = shards.read_manifest(str(packed / "cifar10"))
    splits = split_ids(SMALL, manifest)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (270, 30, 60)
    assert len(np.unique(np.concatenate([splits.train, splits.val, splits.test]))) == 360


def test_another_fraction_or_seed_is_another_cut_without_packing_again(packed: Path):
    manifest = shards.read_manifest(str(packed / "cifar10"))
    fifth = split_ids(replace(SMALL, validation=Cut(fraction=0.2)), manifest)
    other = split_ids(replace(SMALL, validation=Cut(fraction=0.2, seed=1)), manifest)
    assert len(fifth.val) == len(other.val) == 60
    assert fifth.val.tolist() != other.val.tolist()


def test_a_packed_val_replaces_the_cut(tmp_path: Path):
    source = open_source(image_folder(tmp_path / "pets", splits=("train", "val", "test"), count=20))
    splits = split_ids(SMALL, shards.pack(source, str(tmp_path / "packed"), name="pets"))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (40, 40, 40)


def test_a_fraction_of_train_leaves_validation_and_test_whole(packed: Path):
    manifest = shards.read_manifest(str(packed / "cifar10"))
    part, whole = split_ids(replace(SMALL, train_fraction=0.3), manifest), split_ids(SMALL, manifest)
    assert set(part.train.tolist()) < set(whole.train.tolist())
    assert len(part.train) == 80
    assert part.val.tolist() == whole.val.tolist()


def test_too_little_to_train_on_is_refused_with_the_flag(packed: Path):
    manifest = shards.read_manifest(str(packed / "cifar10"))
    with pytest.raises(
        RecipeError, match=r"scratch: cifar10 has 270 training samples, fewer than .*\n  do: --set global_batch_size=128$"
    ):
        split_ids(replace(SMALL, global_batch_size=512), manifest)


def test_where_the_fraction_makes_it_too_little_the_fraction_is_named(packed: Path):
    manifest = shards.read_manifest(str(packed / "cifar10"))
    of = "cifar10's 270 training samples"
    with pytest.raises(
        RecipeError,
        match=rf"train_fraction 0\.2 leaves 50 of {of}, fewer than a global batch of 128\n  do: --set train_fraction=1\.0$",
    ):
        split_ids(replace(SMALL, global_batch_size=128, train_fraction=0.2), manifest)
    both = r"do: --set train_fraction=1\.0 --set global_batch_size=128$"
    with pytest.raises(RecipeError, match=both):
        split_ids(replace(SMALL, global_batch_size=512, train_fraction=0.2), manifest)
    split_ids(replace(SMALL, global_batch_size=128), manifest)


def test_who_trains_on_a_part_is_told_so(packed: Path):
    manifest = shards.read_manifest(str(packed / "cifar10"))
    part = replace(SMALL, train_fraction=0.2)
    assert fraction_note(part, split_ids(part, manifest)) == (
        "scratch trains on 20% of cifar10's training part (50 of 270); --set train_fraction=1.0 takes all"
    )
    assert fraction_note(SMALL, split_ids(SMALL, manifest)) is None


def test_a_validation_part_that_would_be_empty_is_refused_before_training(packed: Path):
    manifest = shards.read_manifest(str(packed / "cifar10"))
    shard = manifest.shards[0]
    firsts = tuple(shard.labels.index(label) for label in range(10))
    small = shard.model_copy(update={"labels": tuple(range(10)), "paths": tuple(shard.paths[i] for i in firsts)})
    one_each = manifest.model_copy(update={"shards": (small, *manifest.shards[1:])})
    with pytest.raises(RecipeError, match="one training sample a class, 10 in all: no validation part can be cut"):
        split_ids(replace(SMALL, global_batch_size=2), one_each)


@pytest.mark.parametrize(("world_size", "fits"), [(1, True), (8, True), (9, False)])
def test_a_part_too_small_for_a_batch_norm_is_refused(world_size: int, fits: bool):
    if fits:
        check_parts(SMALL, 270, world_size=world_size)
    else:
        with pytest.raises(RecipeError, match="leaves 1 samples"):
            check_parts(SMALL, 270, world_size=world_size)


def test_a_kept_last_batch_counts_too():
    with pytest.raises(RecipeError, match="a global batch of 1 "):
        check_parts(replace(SMALL, last_batch="keep"), 257, world_size=1)
