"""What a user would take in place of our data path: loaders of torchvision, webdataset, litdata and mosaicml-streaming.

Each has two loader workers. Images travel as bytes; what turns them into the network's inputs is done for the whole batch
in the training process, which is the fastest way for all of them.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from imgcls.recipe import Augment, Input
from tests.speed.prepared import Prepared

NUM_WORKERS = 2
BUFFER = 1000
"""Of webdataset's shuffle, samples."""

Epoch = Callable[[int], Iterator[Tensor]]
"""The inputs of an epoch, batch by batch."""


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    kind: Literal["peer", "ours", "limit", "by hand"]
    open: Callable[[Prepared], Epoch]
    """Everything is made anew: the loader, its workers, what they hold."""
    threads: int = 1
    """Of the process that trains; loader workers have one each."""


@dataclass(frozen=True, slots=True)
class Transform:
    """An image as it is stored -> uint8 (channels, px, px), changed as the recipe says. Runs in a loader worker."""

    into: Input
    augment: Augment

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image)).convert("RGB")
        if isinstance(image, np.ndarray) and self.augment != replace(Augment(), flip=self.augment.flip):
            image = Image.fromarray(image)  # measured: turning and colouring so small an image is twice as fast in Pillow
        if isinstance(image, np.ndarray):
            return _augmented(torch.from_numpy(image.copy()).permute(2, 0, 1), self.augment, self.into)
        if min(image.size) != self.into.stored_px or image.width != image.height:
            image = v2.functional.center_crop(v2.functional.resize(image, [self.into.stored_px]), [self.into.stored_px])
        if self.into.channels == 1:
            image = image.convert("L")
        return v2.functional.pil_to_tensor(_augmented(image, self.augment, self.into))


@cache
def _steps(augment: Augment, into: Input) -> tuple[Callable[[Any], Any], ...]:
    """Made once, as a user does."""
    steps: list[Any] = [v2.RandomHorizontalFlip()] if augment.flip else []
    if augment.rotate_degrees:
        steps.append(v2.RandomRotation([-augment.rotate_degrees, augment.rotate_degrees], v2.InterpolationMode.BILINEAR))
    if augment.brightness or augment.contrast or augment.saturation or augment.hue:
        steps.append(v2.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue))
    if into.px != into.stored_px:
        steps.append(v2.Resize([into.px]))
    return tuple(steps)


def _augmented(image: Any, augment: Augment, into: Input) -> Any:
    for step in _steps(augment, into):
        image = step(image)
    return image


def finished(images: Tensor, into: Input) -> Tensor:
    """uint8 -> the network's inputs, channels last."""
    x = images.float().div_(255).sub_(into.mean).div_(into.std)
    return x.contiguous(memory_format=torch.channels_last)


def _epochs(loader: Any, into: Input, image: Callable[[Any], Tensor]) -> Epoch:
    return lambda epoch: (finished(image(batch), into) for batch in loader)


def _open_image_folder(prepared: Prepared) -> Epoch:
    from torchvision.datasets import ImageFolder

    recipe = prepared.recipe
    dataset = ImageFolder(str(prepared.images / "train"), Transform(recipe.input, recipe.augment))
    loader = DataLoader(dataset, recipe.global_batch_size, shuffle=True, num_workers=NUM_WORKERS, persistent_workers=True)
    return _epochs(loader, recipe.input, lambda batch: batch[0])


def _open_webdataset(prepared: Prepared) -> Epoch:
    import webdataset as wds

    recipe = prepared.recipe
    shards = sorted(map(str, (prepared.packed / recipe.dataset).glob("train-*.tar")))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False)  # pyright: ignore[reportAttributeAccessIssue]
        .shuffle(BUFFER)
        .to_tuple("jpg;png;webp;bmp", "cls")
        .map_tuple(Transform(recipe.input, recipe.augment), int)
        .batched(recipe.global_batch_size, collation_fn=torch.utils.data.default_collate)
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=NUM_WORKERS, persistent_workers=True)
    return _epochs(loader, recipe.input, lambda batch: batch[0])


@dataclass(frozen=True, slots=True)
class _Sample:
    """What litdata and streaming hand out -> (image, label)."""

    transform: Transform

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, int]:
        return self.transform(sample["image"]), int(sample["label"])


def _open_litdata(prepared: Prepared, form: str) -> Epoch:
    litdata, recipe = import_module("litdata"), prepared.recipe
    sample = _Sample(Transform(recipe.input, recipe.augment))
    dataset = litdata.StreamingDataset(str(prepared.of_peer("litdata", form)), shuffle=True, transform=sample)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=recipe.global_batch_size, num_workers=NUM_WORKERS, persistent_workers=True
    )
    return _epochs(loader, recipe.input, lambda batch: batch[0])


def _open_streaming(prepared: Prepared, form: str) -> Epoch:
    streaming, recipe = import_module("streaming"), prepared.recipe
    sample = _Sample(Transform(recipe.input, recipe.augment))

    class Dataset(streaming.StreamingDataset):  # its way to have a transform
        def __getitem__(self, at: Any) -> Any:
            return sample(super().__getitem__(at))

    streaming.base.util.clean_stale_shared_memory()
    dataset = Dataset(local=str(prepared.of_peer("streaming", form)), shuffle=True, batch_size=recipe.global_batch_size)
    loader = DataLoader(dataset, recipe.global_batch_size, num_workers=NUM_WORKERS, persistent_workers=True)
    return _epochs(loader, recipe.input, lambda batch: batch[0])


ALWAYS = (
    Contender("torchvision ImageFolder", "peer", _open_image_folder),
    Contender("webdataset", "peer", _open_webdataset),
)
OPTIONAL = (
    Contender("litdata, files", "peer", lambda prepared: _open_litdata(prepared, "files")),
    Contender("litdata, arrays", "peer", lambda prepared: _open_litdata(prepared, "arrays")),
    Contender("streaming, files", "peer", lambda prepared: _open_streaming(prepared, "files")),
    Contender("streaming, arrays", "peer", lambda prepared: _open_streaming(prepared, "arrays")),
)
