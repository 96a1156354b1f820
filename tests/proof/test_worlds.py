"""Several ranks over gloo, without Ray: what does not depend on their number, and what does not under elastic numerics."""

import signal
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from imgcls.catalogue import quick
from imgcls.data.batches import ImageData
from imgcls.data.cache import Cache
from imgcls.data.splits import Splits, check_parts
from imgcls.errors import RecipeError
from imgcls.recipe import Augment, Length, ResNet18, derive
from imgcls.records import Scores, Split
from tests.proof.alone import TWELVE, result_in, run_alone, together, world_of

pytestmark = pytest.mark.timeout(600)
ELASTIC = replace(TWELVE, name="elastic", model=ResNet18(dropout=0.2), numerics="elastic", averaging=0.9)


@pytest.fixture(scope="module")
def elastic(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    assert run_alone(ELASTIC, packed, folder) == [0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [4, 2])
def test_elastic_numerics_give_the_same_bits_at_any_number_of_workers(
    world_size: int, elastic: Path, packed: Path, tmp_path: Path, proved, full: bool
):
    if world_size == 2 and not full:
        pytest.skip("make proof")
    assert run_alone(ELASTIC, packed, tmp_path, world_size=world_size) == [0] * world_size
    assert_same(tmp_path, elastic)
    proved("elastic numerics, without Ray", f"{world_size} workers as 1")


@pytest.mark.slow
def test_an_elastic_run_begins_with_four_goes_on_with_one_and_ends_with_two(
    elastic: Path, packed: Path, tmp_path: Path, proved
):
    killed = -signal.SIGKILL
    assert run_alone(ELASTIC, packed, tmp_path, world_size=4, every=1, dies=(3, "in the step")) == [killed] * 4
    assert run_alone(ELASTIC, packed, tmp_path, world_size=1, every=1, dies=(7, "after the commit")) == [killed]
    assert run_alone(ELASTIC, packed, tmp_path, world_size=2, every=1) == [0, 0]
    assert_same(tmp_path, elastic)
    proved("elastic numerics, without Ray", "4, then 1, then 2 workers, killed in mid-epoch")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ddp_ranks_killed_in_mid_epoch_end_with_the_bits_of_those_that_were_not(
    world_size: int, full: bool, packed: Path, tmp_path: Path, proved
):
    """From three ranks on it matters in which order gradients are added: addition commutes, but does not associate.

    The killed run fails so often, by its own account, that rank 0 asks for a checkpoint whenever it can.
    """
    if world_size != 3 and not full:
        pytest.skip("make proof")
    recipe = replace(TWELVE, averaging=0.9, model=ResNet18(dropout=0.2) if full else TWELVE.model)
    done, often = [0] * world_size, 10**12
    killed, dies = [-signal.SIGKILL] * world_size, (7, "in the step")
    assert run_alone(recipe, packed, tmp_path / "a", world_size=world_size, attempt=often, dies=dies) == killed
    assert run_alone(recipe, packed, tmp_path / "a", world_size=world_size, every=1) == done
    assert "goes on after epoch 1, step 6" in (tmp_path / "a" / "log.txt").read_text()
    assert run_alone(recipe, packed, tmp_path / "b", world_size=world_size) == done
    assert_same(tmp_path / "a", tmp_path / "b")
    proved("DDP ranks killed in mid-epoch, without Ray", f"{world_size} ranks")


def test_adding_gradients_in_rank_order_costs_little_beside_ddps_own_sum(
    only_in_full: None, packed: Path, tmp_path: Path, proved
):
    recipe = replace(quick.RESNET18, train_fraction=1.0, global_batch_size=64, length=Length(epochs=5))
    rates: dict[bool, list[float]] = {False: [], True: []}
    for number, ddps_own_sum in product(range(5), (False, True)):
        to = tmp_path / f"{number}-{ddps_own_sum}"
        assert run_alone(recipe, packed, to, world_size=2, ddps_own_sum=ddps_own_sum) == [0, 0]
        rates[ddps_own_sum].append(result_in(to).images_per_s or 0.0)
    ratio = median(mine / theirs for mine, theirs in zip(rates[False], rates[True], strict=True))
    assert ratio > 0.8
    proved(
        "gradients added in rank order beside DDP's own sum, two ranks",
        f"resnet18, images/s {rates[False]} beside {rates[True]}: {ratio:.2f} (median of pairs)",
        n=5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "val", "train"])
def test_a_checkpoint_is_evaluated_alike_at_one_two_and_three_ranks(
    split: str, elastic: Path, packed: Path, tmp_path: Path, proved
):
    for world_size in (1, 2, 3):
        to = tmp_path / str(world_size)
        assert together(_evaluate, world_size, str(elastic), str(packed), split, str(to)) == [0] * world_size
    one, two, three = ((tmp_path / str(world_size)).read_bytes() for world_size in (1, 2, 3))
    assert one == two == three  # n, loss, accuracy, confusion
    assert Scores.from_bytes(one, where="one").num_samples == {"test": 60, "val": 30, "train": 270}[split]
    proved("one checkpoint evaluated at 1, 2 and 3 ranks", split)


def _evaluate(rank: int, world_size: int, meeting: str, run: str, packed: str, split: Split, to: str) -> None:
    from imgcls.training.evaluate import evaluate
    from imgcls.training.weights import find_model

    torch.set_num_threads(1)
    scores = evaluate(find_model(run), data_url=packed, split=split, world=world_of(rank, world_size, meeting))
    if rank == 0:
        Path(to).write_bytes(scores.to_bytes())


@dataclass
class Trainer:
    """What a loader asks of Lightning's: where it is."""

    current_epoch: int
    training: bool = True

    def __post_init__(self) -> None:
        self.fit_loop = self.epoch_loop = self.batch_progress = self.current = self
        self.completed = 0


@pytest.mark.parametrize("last_batch", ["drop", "keep"])
@pytest.mark.parametrize("epoch", [0, 5])
def test_training_batches_hold_the_same_samples_augmented_alike_at_any_number_of_ranks(last_batch: str, epoch: int, proved):
    augment = Augment(flip=True, rotate_degrees=15, crop_min_area=0.6, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
    recipe = derive(replace(TWELVE, augment=augment), {"global_batch_size": 8, "last_batch": last_batch})
    images = np.random.default_rng(0).integers(0, 256, (103, 16, 16, 3), dtype=np.uint8)
    cache, none = Cache(images, np.arange(103) % 10), np.empty(0, dtype=np.int64)

    def epoch_of(world_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, inputs) of each global batch."""
        parts = []
        for rank in range(world_size):
            data = ImageData(recipe, cache, Splits(np.arange(103), none, none), seed=3, rank=rank, world_size=world_size)
            data.trainer = Trainer(epoch)  # pyright: ignore[reportAttributeAccessIssue]
            parts.append([data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()])
        assert len({len(steps) for steps in parts}) == 1, "every rank takes the same steps"
        together = []
        for step in zip(*parts, strict=True):
            sizes = [len(batch.ids) for batch in step]
            assert max(sizes) - min(sizes) <= 1
            ids, inputs = np.concatenate([batch.ids for batch in step]), torch.cat([batch.images for batch in step])
            together.append((ids, inputs.numpy()))
        return together

    one = epoch_of(1)
    seen = np.concatenate([ids for ids, _ in one])
    assert len(set(seen.tolist())) == len(seen) == (96 if last_batch == "drop" else 103)
    for world_size in (2, 3):
        for (ids, inputs), (same_ids, same_inputs) in zip(one, epoch_of(world_size), strict=True):
            assert ids.tolist() == same_ids.tolist()
            assert inputs.tobytes() == same_inputs.tobytes()
    proved("103 samples in batches of 8: the same ids and inputs at 1, 2 and 3 ranks", f"{last_batch}, epoch {epoch}")


def test_a_world_that_does_not_divide_the_virtual_ranks_is_refused_with_those_that_do():
    with pytest.raises(RecipeError, match=r"(?s)4 virtual ranks cannot be shared alike by 3 workers.*1 or 2 or 4"):
        check_parts(ELASTIC, 270, world_size=3)
    with pytest.raises(RecipeError, match="a power of two"):
        derive(ELASTIC, {"virtual_ranks": 3})


def test_other_numerics_are_refused_and_named_until_they_are_accepted(packed: Path, tmp_path: Path):
    killed = -signal.SIGKILL
    assert run_alone(TWELVE, packed, tmp_path, every=1, dies=(5, "after the commit")) == [killed]
    assert run_alone(TWELVE, packed, tmp_path, world_size=2) == [1, 1]
    log = (tmp_path / "log.txt").read_text()
    assert "stopped at step 5 under other numerics: workers: 1 / 2 (then / now)" in log
    assert not (tmp_path / "result.json").exists()
    assert run_alone(TWELVE, packed, tmp_path, world_size=2, accept=True, every=1, dies=(9, "in the step")) == [killed] * 2
    assert run_alone(TWELVE, packed, tmp_path, world_size=2) == [0, 0]  # as it was last
    assert result_in(tmp_path).numerics_changes == ("workers: 1 / 2",)


def assert_same(one: Path, other: Path) -> None:
    a, b = result_in(one), result_in(other)
    assert a.weights_sha256 == b.weights_sha256
    assert a.best_weights_sha256 == b.best_weights_sha256
    assert (a.test, a.predictions_sha256) == (b.test, b.predictions_sha256)
    assert (one / "history.csv").read_bytes() == (other / "history.csv").read_bytes()
