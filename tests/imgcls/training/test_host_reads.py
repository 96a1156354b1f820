"""No step waits for the device: its host reads nothing that the step has itself computed.

On a CPU nobody waits, so every operation is watched: what it computes belongs to the step at hand, and a read of it on
the host would be a wait on a GPU; so would what is asked about values before a result has its shape, and a tensor made
of Python's numbers, which is copied from memory that is not pinned.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imgcls.catalogue import recipe_of
from imgcls.data.batches import ImageData
from imgcls.data.cache import Cache
from imgcls.data.splits import Splits
from imgcls.models.build import build_model
from imgcls.recipe import Augment, Recipe
from imgcls.training.module import Classifier
from imgcls.training.world import World, make_trainer

EVERYTHING = Augment(flip=True, rotate_degrees=10, crop_min_area=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
COPIES = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
ASKS = {
    f"aten::{name}"
    for name in ("nonzero", "bincount", "masked_select", "equal", "_unique2", "unique_dim", "repeat_interleave")
}  # fmt: skip


class Watched(pl.Callback):
    """Counts what would wait, by step of training; 0 is before the first, or in evaluation."""

    def __init__(self) -> None:
        self.step = 0
        self.waits = Counter[tuple[int, str]]()
        self.computed_in: dict[int, tuple[int, Any]] = {}
        """Storage -> (step, itself: so that no other one gets its place)."""

    def _begin(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.step = trainer.global_step + 1

    def _end(self, *_: Any, **__: Any) -> None:
        self.step = 0

    on_train_batch_start, on_validation_start = _begin, _end

    def computed(self, name: str, arguments: Any, results: Any) -> None:
        # A mask in place of an index is looked through for what it chooses.
        by_mask = name.startswith("aten::index") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool for one in tree_leaves(arguments[1:2])
        )
        if name in ASKS or by_mask or (name == "aten::_local_scalar_dense" and self.is_of_this_step(arguments[0])):
            self.waits[self.step, name] += 1
        for one in tree_leaves(results):
            if isinstance(one, Tensor) and name != "aten::lift_fresh":  # which is the host's memory
                storage = one.untyped_storage()
                self.computed_in[storage._cdata] = (self.step, storage)

    def is_of_this_step(self, tensor: Tensor) -> bool:
        return self.computed_in.get(tensor.untyped_storage()._cdata, (-1, None))[0] == self.step


class Operations(TorchDispatchMode):
    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.watched.computed(func._schema.name, args, results)
        return results


class Calls(TorchFunctionMode):
    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        comes_here = func is Tensor.to and "cpu" in map(str, (*args[1:], *named.values())) and not named.get("non_blocking")
        if func in COPIES or ((func in READS or comes_here) and self.watched.is_of_this_step(args[0])):
            self.watched.waits[self.watched.step, func.__name__] += 1
        return func(*args, **named)


def waits_of(recipe: Recipe, *callbacks: pl.Callback) -> Counter[tuple[int, str]]:
    """Of five steps and an evaluation, the first step left out."""
    rng, px, size = np.random.default_rng(0), recipe.input.stored_px, recipe.global_batch_size
    images = rng.integers(0, 256, (5 * size + 8, px, px, recipe.input.channels), dtype=np.uint8)
    parts = Splits(np.arange(5 * size), np.arange(5 * size, len(images)), np.arange(8))
    data = ImageData(recipe, Cache(images, rng.integers(0, 10, len(images))), parts, seed=0, rank=0, world_size=1)
    world, watched = World(), Watched()
    network = build_model(recipe, num_classes=10, seed=0)
    module = Classifier(network, recipe, num_classes=10, world=world, total_steps=5)
    trainer = make_trainer(world, precision=recipe.precision, callbacks=[watched, *callbacks])
    with Operations(watched), Calls(watched):
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == 5
    return Counter({(step, name): count for (step, name), count in watched.waits.items() if step > 1})


def small(name: str, **changes: Any) -> Recipe:
    return replace(recipe_of("quick", name), global_batch_size=8, **changes)


@pytest.mark.parametrize(
    "recipe",
    [
        small("scratch"),
        small("regularized", augment=EVERYTHING, label_smoothing=0.1),
        small("basic-cnn", averaging=0.9),
        pytest.param(small("regularized", numerics="elastic", averaging=0.9), marks=pytest.mark.slow),
    ],
    ids=lambda recipe: f"{recipe.name}-{recipe.numerics}",
)
def test_a_step_reads_nothing_that_it_has_computed(recipe: Recipe):
    assert not waits_of(recipe)


def test_a_step_that_does_is_noticed():
    class Curious(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert float(outputs["loss"]) > 0
            assert outputs["loss"].view(1).tolist()
            batch.labels.new_tensor([1])
            assert len(batch.images[batch.images.amax((1, 2, 3)) > 0])
            outputs["loss"].to("cpu")

    found = waits_of(small("basic-cnn"), Curious())
    names = ("aten::_local_scalar_dense", "tolist", "new_tensor", "aten::index", "to")
    assert found == {(step, name): 1 for step in (2, 3, 4, 5) for name in names}
