"""A checkpoint, any split, any world -> exact scores."""

from dataclasses import replace

from imgcls import storage
from imgcls.data.batches import ImageData
from imgcls.data.cache import Cache, open_cache
from imgcls.data.shards import read_manifest
from imgcls.data.sources import CUT_NOTE
from imgcls.data.splits import Splits, split_ids
from imgcls.errors import DataError
from imgcls.records import Manifest, Scores, Split
from imgcls.training.fit import check_counted
from imgcls.training.module import Classifier
from imgcls.training.predict import load_network
from imgcls.training.weights import Model
from imgcls.training.world import World, make_trainer


def evaluate(source: Model, *, data_url: str, split: Split, world: World) -> Scores:
    """Each sample of the split counted once. Every rank returns the same scores."""
    return evaluated(source, data_url=data_url, split=split, world=world).scores["test"]


def evaluated(source: Model, *, data_url: str, split: Split, world: World) -> Classifier:
    """With scores and predictions of the split, as of a test."""
    cache, splits = opened(source, data_url=data_url, split=split, command=world.command)
    recipe, splits_as_test = source.recipe, replace(splits, test=getattr(splits, split))
    module = Classifier(load_network(source), recipe, num_classes=len(source.class_names), world=world)
    data = ImageData(recipe, cache, splits_as_test, seed=0, rank=world.rank, world_size=world.size)
    make_trainer(world, precision=recipe.precision).test(module, datamodule=data, verbose=False)
    check_counted(module.scores["test"], len(splits_as_test.test))
    return module


def opened(source: Model, *, data_url: str, split: Split, command: str | None = None) -> tuple[Cache, Splits]:
    """The set that the model is evaluated on, decoded. Raises DataError as `manifest_for`."""
    manifest, into = manifest_for(source, data_url=data_url, split=split), source.recipe.input
    set_url = storage.join(data_url, source.recipe.dataset)
    cache = open_cache(set_url, manifest, px=into.stored_px, channels=into.channels, command=command)
    return cache, split_ids(source.recipe, manifest)


def manifest_for(source: Model, *, data_url: str, split: Split) -> Manifest:
    """Of the set that the model is evaluated on. Raises DataError where it does not fit."""
    set_url, names = storage.join(data_url, source.recipe.dataset), source.class_names
    manifest = read_manifest(set_url)
    do = "\n  do: name the data that it was trained on with --data"
    if names != manifest.class_names:
        raise DataError(f"{source.url} knows {_shortly(names)}; {set_url} has {_shortly(manifest.class_names)}{do}")
    remedy = do if (cut := CUT_NOTE in manifest.notes) else f"{do}, or --split test"
    if manifest.digest != source.data_digest and (cut or split != "test"):
        raise DataError(
            f"{set_url} has digest {manifest.digest[:12]}, {source.url} was trained on {source.data_digest[:12]}: "
            f"its {split} split may hold other images, and some that the model was trained on{remedy}"
        )
    return manifest


def _shortly(names: tuple[str, ...]) -> str:
    return f"{len(names)} classes ({', '.join(names[:5])}{', ..' if len(names) > 5 else ''})"
