"""What one device does without Ray, as a JSON object on stdout: a process of its own, started by `bench gpu`.

`checks`: a collective of one rank, and augmentation beside the CPU's. `speed CATALOGUE RECIPE SECONDS [FIELD=VALUE...]`:
images/s of a recipe's training, of its data path, and of a loop written by hand for comparison.
"""

import contextlib
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

from cluster.carry.run import silence_libraries
from imgcls.catalogue import recipe_of
from imgcls.data import order
from imgcls.data.augment import NUM_UNIFORMS, augmented_inputs
from imgcls.models.build import build_model
from imgcls.recipe import Augment, Input, Recipe, derive, parse_changes
from jobs._training_rates import NUM_CLASSES, training_rates

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NO_CUDA = "skipped: no CUDA device"
WARM_UP = 3
Figures = dict[str, float | str]


def checks() -> Figures:
    backend, ones = "nccl" if CUDA else "gloo", torch.ones(1000, device=DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        distributed.all_reduce(ones)
        distributed.destroy_process_group()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    numbers = torch.from_numpy(order.uniforms(0, 1, np.arange(8), NUM_UNIFORMS))
    augment = Augment(flip=True, rotate_degrees=10, crop_min_area=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
    into = Input(px=64, channels=3, stored_px=32)
    here, there = (augmented_inputs(images.to(on), numbers.to(on), augment, into).cpu() for on in ("cpu", DEVICE))
    return {
        f"all-reduce of 1,000 ones by {backend}": float(ones.sum()),
        "augmentation differs from the CPU's by at most": float((here - there).abs().max()),
    }


def speed(recipe: Recipe, seconds: float) -> Figures:
    """In about `seconds`, by one thread. Printed before the CUDA graph too: what fails there may end the process."""
    torch.set_num_threads(1)
    each_s = seconds / 5
    train, evaluate = training_rates(recipe, accelerator="gpu" if CUDA else "cpu", threads=1, seconds=each_s)
    found: Figures = {
        "trained without Ray, images/s": round(train, 1),
        "evaluated without Ray, images/s": round(evaluate, 1),
    }
    found |= _host_syncs(recipe, each_s) if CUDA else {"host syncs a step": NO_CUDA}
    found["data path with augmentation alone, images/s"] = _rate(_data_path(recipe), recipe, each_s)
    # As Lightning has set it, for our own loop; not before it, since cuBLAS keeps what its first call found.
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    found["by hand, images/s"] = _rate(_by_hand(recipe), recipe, each_s)
    print(json.dumps(found), flush=True)
    graph = _rate(_by_hand(recipe, graph=True), recipe, each_s) if CUDA else NO_CUDA
    return found | {"by hand in a CUDA graph, images/s": graph}


def _rate(step: Callable[[], object], recipe: Recipe, seconds: float) -> float:
    """Images/s of `step`, which takes a global batch, after a few that do not count."""

    def now() -> float:
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(WARM_UP):
        step()
    count, began = 0, now()
    while count == 0 or time.perf_counter() - began < seconds:
        step()
        count += 1
    return round(count * recipe.global_batch_size / (now() - began), 1)


def _noise(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Stored pixels and labels of 16 batches."""
    count, px = 16 * recipe.global_batch_size, recipe.input.stored_px
    return torch.randint(256, (count, px, px, recipe.input.channels), dtype=torch.uint8), torch.arange(count) % NUM_CLASSES


def _data_path(recipe: Recipe) -> Callable[[], object]:
    """From pixels in memory to inputs on the device, as our training loop goes."""
    images, rng = _noise(recipe)[0].numpy(), np.random.default_rng(0)

    def step() -> None:
        ids = rng.integers(len(images), size=recipe.global_batch_size)
        numbers = torch.from_numpy(order.uniforms(0, 1, ids, NUM_UNIFORMS)).to(DEVICE)
        augmented_inputs(torch.from_numpy(images[ids]).to(DEVICE), numbers, recipe.augment, recipe.input)

    return step


def _by_hand(recipe: Recipe, *, graph: bool = False) -> Callable[[], object]:
    """Images on the device, bf16 on CUDA, channels last, fused Adam; no plan, no ledger, no counting."""
    network = build_model(recipe, num_classes=NUM_CLASSES, seed=0).to(DEVICE)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True, capturable=CUDA)
    images, labels = (one.to(DEVICE) for one in _noise(recipe))

    def batch() -> tuple[Tensor, Tensor]:
        ids = torch.randint(len(images), (recipe.global_batch_size,), device=DEVICE)
        numbers = torch.rand(len(ids), NUM_UNIFORMS, device=DEVICE)
        return augmented_inputs(images[ids], numbers, recipe.augment, recipe.input), labels[ids]

    x, y = batch()

    def compute() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()

    run = _captured(compute) if graph else compute

    def step() -> None:
        for kept, new in zip((x, y), batch(), strict=True):
            kept.copy_(new)
        run()

    return step


def _captured(compute: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph.replay


def _host_syncs(recipe: Recipe, seconds: float) -> Figures:
    """How often a step of our loop waits for the device, and where."""
    marks: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hook = register_optimizer_step_post_hook(lambda *_: marks.append(len(caught)))
        torch.cuda.set_sync_debug_mode("warn")
        training_rates(recipe, accelerator="gpu", threads=1, seconds=seconds)
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
    between = [one for one in caught[marks[0] : marks[-1]] if "synchronizing" in str(one.message)]
    where, steps = Counter(f"{one.filename.rpartition('/')[2]}:{one.lineno}" for one in between), len(marks) - 1
    told = ", ".join(f"{place} {count / steps:.1f}" for place, count in where.most_common(8))
    return {"host syncs a step": round(len(between) / steps, 2), "host syncs at": told}


if __name__ == "__main__":
    silence_libraries(False)
    what, *words = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # Lightning leaves a checkpoint where it runs
        if what == "speed":
            catalogue, name, seconds, *changes = words
            print(json.dumps(speed(derive(recipe_of(catalogue, name), parse_changes(tuple(changes))), float(seconds))))
        else:
            print(json.dumps(checks()))
