"""Training as one writes it by hand: plain PyTorch on decoded images in memory; nothing is counted, checked or committed.

`python -m tests.speed.by_hand DATA THREADS rates RECIPE [FIELD=VALUE...]` prints the images/s of each epoch as JSON.
`python -m tests.speed.by_hand DATA THREADS suite [FIELD=VALUE...]` trains, validates and tests the recipes of `quick`,
one after another.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from imgcls import storage
from imgcls.catalogue import recipe_of, suite_of
from imgcls.data.augment import NUM_UNIFORMS, augmented_inputs, inputs
from imgcls.data.cache import open_cache
from imgcls.data.shards import read_manifest
from imgcls.data.splits import split_ids
from imgcls.models.build import build_model, start_from
from imgcls.recipe import Adam, AdamW, Augment, FromRun, Recipe, derive, parse_changes
from imgcls.training.schedule import lr_factor

EVALUATED = 256
"""Images at a time."""
Epochs = list[float]
"""Images/s in training."""


def train(
    recipe: Recipe, data_url: str, *, source: dict[str, Tensor] | None = None, evaluates: bool = False
) -> tuple[nn.Module, Epochs]:
    set_url = storage.join(data_url, recipe.dataset)
    manifest = read_manifest(set_url)
    cache = open_cache(set_url, manifest, px=recipe.input.stored_px, channels=recipe.input.channels)
    splits, labels = split_ids(recipe, manifest), torch.from_numpy(cache.labels)
    images = torch.from_numpy(np.array(cache.images))
    network = build_model(recipe, num_classes=len(manifest.class_names), seed=0)
    if source is not None:
        start_from(network, source, source="the network before")
    size, ids, epochs = recipe.global_batch_size, torch.from_numpy(splits.train), Epochs()
    steps = len(ids) // size
    optimizer = _optimizer(recipe, network)
    scheduler = LambdaLR(
        optimizer, lambda step: lr_factor(recipe.schedule, step=step, total_steps=steps * recipe.length.epochs)
    )
    for _ in range(recipe.length.epochs):
        began = time.perf_counter()
        network.train()
        for batch in ids[torch.randperm(len(ids))][: steps * size].split(size):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(network(_augmented(images[batch], recipe)), labels[batch])
            loss.backward()
            optimizer.step()
            scheduler.step()
        epochs.append(steps * size / (time.perf_counter() - began))
        if evaluates:
            _accuracy(network, images, labels, torch.from_numpy(splits.val), recipe)
    if evaluates:
        _accuracy(network, images, labels, torch.from_numpy(splits.test), recipe)
    return network, epochs


def _optimizer(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    match recipe.optimizer:
        case Adam(lr=lr):
            return torch.optim.Adam(network.parameters(), lr=lr, fused=True)
        case AdamW(lr=lr, weight_decay=weight_decay):
            return torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def _augmented(images: Tensor, recipe: Recipe) -> Tensor:
    augment = recipe.augment
    if augment != Augment(flip=augment.flip):  # colours and turns would be copied from there anyway
        return augmented_inputs(images, torch.rand(len(images), NUM_UNIFORMS), augment, recipe.input)
    x = inputs(images, recipe.input)
    if augment.flip:
        rows = torch.rand(len(x)) < 0.5
        x[rows] = x[rows].flip(-1)
    return x


@torch.no_grad()
def _accuracy(network: nn.Module, images: Tensor, labels: Tensor, ids: Tensor, recipe: Recipe) -> float:
    network.eval()
    right = sum(int((network(inputs(images[b], recipe.input)).argmax(1) == labels[b]).sum()) for b in ids.split(EVALUATED))
    return right / len(ids)


def train_suite(data_url: str, changes: tuple[str, ...]) -> None:
    trained: dict[str, nn.Module] = {}
    for one in suite_of("quick"):
        recipe = derive(one, parse_changes(changes))
        source = trained[recipe.init.recipe].state_dict() if isinstance(recipe.init, FromRun) else None
        trained[recipe.name], _ = train(recipe, data_url, source=source, evaluates=True)


if __name__ == "__main__":
    data, threads, what, *rest = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if what == "suite":
        train_suite(data, tuple(rest))
    else:
        chosen = derive(recipe_of("quick", rest[0]), parse_changes(tuple(rest[1:])))
        print(json.dumps(train(chosen, data)[1]))
