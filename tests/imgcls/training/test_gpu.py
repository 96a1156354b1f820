"""The same run on a CUDA device: skipped with a reason where there is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imgcls.catalogue import quick
from imgcls.data.augment import NUM_UNIFORMS, augmented_inputs
from imgcls.data.order import uniforms
from imgcls.data.shards import read_manifest
from imgcls.recipe import Length
from imgcls.records import RunConfig
from imgcls.training.fit import fit
from imgcls.training.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

RECIPE = replace(quick.REGULARIZED, length=Length(epochs=1), train_fraction=1.0, global_batch_size=32)


def test_a_sample_is_augmented_on_the_device_as_on_the_cpu():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    numbers = torch.from_numpy(uniforms(0, 1, np.arange(8), NUM_UNIFORMS))
    here = augmented_inputs(images, numbers, RECIPE.augment, RECIPE.input)
    there = augmented_inputs(images.cuda(), numbers.cuda(), RECIPE.augment, RECIPE.input)
    assert torch.allclose(here, there.cpu(), atol=1e-4)


def test_the_same_request_gives_the_same_bits_on_a_device(packed: Path, tmp_path: Path):
    digest = read_manifest(str(packed / "cifar10")).digest
    config = RunConfig(catalogue="quick", recipe=RECIPE, seed=0, data_digest=digest, init=None, synthetic=True)
    results = [
        fit(config, data_url=str(packed), run_url=str(tmp_path / name), world=World(accelerator="gpu")) for name in "ab"
    ]
    assert results[0].weights_sha256 == results[1].weights_sha256
