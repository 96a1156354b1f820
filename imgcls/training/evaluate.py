"""A checkpoint, any split, any world -> exact scores.

CHECKPOINT is a run's folder, a committed checkpoint's folder, or a `model.pt`; a path or a URL.
"""

from dataclasses import dataclass, replace

from imgcls import storage
from imgcls.data.batches import ImageData
from imgcls.data.cache import open_cache
from imgcls.data.shards import read_manifest
from imgcls.data.splits import split_ids
from imgcls.errors import CheckpointError, DataError, StorageError
from imgcls.records import Manifest, Scores, Split
from imgcls.training.checkpoints import network_weights, read_checkpoint
from imgcls.training.fit import check_counted
from imgcls.training.module import Classifier
from imgcls.training.predict import load_network
from imgcls.training.weights import Model, load_model, model_of
from imgcls.training.world import World, make_trainer


@dataclass(frozen=True, slots=True)
class FoundModel:
    url: str
    model: Model


def find_model(checkpoint: str) -> FoundModel:
    """The model that CHECKPOINT names. Raises CheckpointError where it names none."""
    url = checkpoint.rstrip("/")
    if storage.exists(storage.join(url, "committed.json")):
        return FoundModel(url, _from_committed(url))
    if storage.exists(storage.join(url, "model.pt")):
        url = storage.join(url, "model.pt")
    elif storage.exists(storage.join(url, "config.json")):
        raise CheckpointError(
            f"{url} is a run that has left no model.pt yet\n  do: let it finish, or name a checkpoint of it"
        )
    elif not storage.exists(url):
        raise CheckpointError(f"{checkpoint}: there is no such run, checkpoint or model.pt")
    try:
        return FoundModel(url, load_model(url))
    except StorageError:
        raise CheckpointError(f"{checkpoint} is a folder without a model.pt or a committed checkpoint") from None


def _from_committed(url: str) -> Model:
    content = read_checkpoint(url)
    return model_of(content, network_weights(content), where=url)


def evaluate(found: FoundModel, *, data_url: str, split: Split, world: World) -> Scores:
    """Each sample of the split counted once. Every rank returns the same scores."""
    model = found.model
    set_url = storage.join(data_url, model.recipe.dataset)
    manifest = read_manifest(set_url)
    _check_classes(found, manifest, set_url)
    splits = split_ids(model.recipe, manifest)
    into = model.recipe.input
    cache = open_cache(set_url, manifest, px=into.stored_px, channels=into.channels)
    num_classes = len(manifest.class_names)
    module = Classifier(load_network(model, num_classes=num_classes), model.recipe, num_classes=num_classes)
    splits_as_test = replace(splits, test=getattr(splits, split))
    data = ImageData(model.recipe, cache, splits_as_test, seed=0, rank=world.rank, world_size=world.size)
    make_trainer(world, precision=model.recipe.precision).test(module, datamodule=data, verbose=False)
    check_counted(module.scores["test"], len(splits_as_test.test))
    return module.scores["test"]


def _check_classes(found: FoundModel, manifest: Manifest, set_url: str) -> None:
    names = found.model.class_names
    if names != manifest.class_names:
        raise DataError(
            f"{found.url} knows the classes {', '.join(names[:5])}..; "
            f"{set_url} has {', '.join(manifest.class_names[:5])}..\n"
            "  do: name the data that it was trained on with --data"
        )
