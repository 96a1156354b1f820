"""A run in one process, without Ray: what it leaves, and that a killed one ends with the same bits."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imgcls import records, storage
from imgcls.catalogue import CATALOGUES, quick
from imgcls.data import cache, shards
from imgcls.data.batches import ImageData
from imgcls.data.shards import read_manifest
from imgcls.data.sources import CUT_NOTE
from imgcls.data.splits import split_ids
from imgcls.data.synthetic import synthetic_source
from imgcls.errors import CheckpointError, DataError, ImgclsError
from imgcls.recipe import Adam, Augment, BasicCNN, Input, Length, Recipe, derive
from imgcls.records import InitSource, RunConfig, RunOptions, RunResult
from imgcls.runs import CheckpointFacts, RunFolder
from imgcls.training import fit as fitting
from imgcls.training import recorder
from imgcls.training.checkpoints import CheckpointStore
from imgcls.training.evaluate import evaluate
from imgcls.training.fit import fit
from imgcls.training.flags import StepFlags
from imgcls.training.module import Classifier
from imgcls.training.predict import Predictor
from imgcls.training.progress import Progress
from imgcls.training.recorder import Recorder
from imgcls.training.totals import Totals
from imgcls.training.weights import find_model, load_model, read_checkpoint
from imgcls.training.world import Heartbeat, World

SMALL = replace(
    quick.REGULARIZED,
    name="small",
    model=BasicCNN(dropout=0.3),
    input=Input(px=16, channels=3, stored_px=16),
    augment=Augment(flip=True, rotate_degrees=10, brightness=0.2),
    length=Length(epochs=3),
    global_batch_size=32,
    train_fraction=1.0,
)


def config_of(recipe: Recipe, packed: Path, *, seed: int = 0, init: InitSource | None = None) -> RunConfig:
    digest = read_manifest(str(packed / recipe.dataset)).digest
    return RunConfig(catalogue="quick", recipe=recipe, seed=seed, data_digest=digest, init=init, synthetic=True)


def run(recipe: Recipe, packed: Path, to: Path, **options) -> RunResult:
    return fit(config_of(recipe, packed, **options), data_url=str(packed), run_url=str(to), world=World())


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "history.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def small(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("runs") / "small-seed0"
    return folder, run(SMALL, packed, folder)


def test_a_run_leaves_its_records(small: tuple[Path, RunResult]):
    folder, result = small
    names = {path.name.rstrip("0123456789.") for path in folder.iterdir()}
    assert names == {
        "history.csv", "timing.csv", "log.txt", "checkpoints", "model.pt", "predictions.npy", "result.json",
        "events.out.tfevents",
    }  # fmt: skip
    assert records.read(RunResult, str(folder / "result.json")) == result
    assert (result.status, result.epochs, result.steps, result.synthetic) == ("finished", 3, 24, True)
    assert result.test is not None
    assert result.test.num_samples == sum(map(sum, result.test.confusion)) == 60
    assert [row["samples"] for row in rows(folder)] == ["256"] * 3
    assert result.examples
    assert {"start", "cache", "train", "validate", "checkpoint", "test", "fit"} <= result.seconds.keys()


def test_what_was_predicted_of_each_test_sample_is_kept_and_adds_up_to_the_scores(small, packed: Path):
    folder, result = small
    data = RunFolder(str(folder)).predictions(result)
    assert data is not None
    table = np.load(io.BytesIO(data))
    ids = split_ids(SMALL, read_manifest(str(packed / "cifar10"))).test
    assert table["sample"].tolist() == ids.tolist()
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (table["label"], table["prediction"]), 1)
    assert result.test is not None
    assert confusion.tolist() == [list(row) for row in result.test.confusion]
    wrong = np.sort(table["probability"][table["label"] != table["prediction"]])[::-1]
    shown = [one.probability for one in result.examples if one.label != one.prediction]
    assert shown == wrong[: len(shown)].tolist()
    (folder / "predictions.npy").rename(folder / "moved")
    assert RunFolder(str(folder)).predictions(result) is None
    (folder / "moved").rename(folder / "predictions.npy")


def events_in(data: bytes) -> list[tuple[str, int, float]]:
    from tensorboardX.proto import event_pb2

    values, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])  # pyright: ignore[reportAttributeAccessIssue]
        values += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        at += 16 + size
    return values


def test_tensorboard_reads_the_events(small: tuple[Path, RunResult]):
    (file,) = small[0].glob("events.out.tfevents.*")
    losses = [(step, value) for tag, step, value in events_in(file.read_bytes()) if tag == "val/loss"]
    assert losses == [(int(r["step"]), pytest.approx(float(r["val/loss"]), rel=1e-6)) for r in rows(small[0])]


def test_a_running_tensorboard_sees_each_epoch_as_it_comes(packed: Path, tmp_path: Path):
    """It keeps the file open and reads on: a file in its place would show it nothing new."""
    opened: list = []
    steps: list[list[int]] = []

    def look(progress: Progress) -> None:
        if progress.row:
            if not opened:
                opened.append(next(tmp_path.glob("events.out.tfevents.*")).open("rb"))
            steps.append([step for tag, step, _ in events_in(opened[0].read()) if tag == "lr"])

    config = config_of(SMALL, packed)
    fit(config, data_url=str(packed), run_url=str(tmp_path), world=World(report=look))
    opened[0].close()
    assert steps == [[8], [16], [24]]


def test_the_same_request_gives_the_same_bits_and_another_seed_others(small, packed: Path, tmp_path: Path):
    again, other = run(SMALL, packed, tmp_path / "a"), run(SMALL, packed, tmp_path / "b", seed=1)
    assert again.weights_sha256 == small[1].weights_sha256
    assert (tmp_path / "a" / "history.csv").read_bytes() == (small[0] / "history.csv").read_bytes()
    assert other.weights_sha256 != again.weights_sha256


class KilledError(Exception):
    pass


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("moment", ["before the commit", "after the commit"])
def test_a_run_killed_at_an_epochs_end_goes_on_to_the_same_bits(
    small, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, moment: str
):
    commit = Recorder._commit

    def dies(self: Recorder, trainer, **options) -> None:
        dying = len(self.history.rows) == epoch
        if dying and moment == "before the commit":
            raise KilledError
        commit(self, trainer, **options)
        if dying:
            raise KilledError

    monkeypatch.setattr(Recorder, "_commit", dies)
    with pytest.raises(KilledError):
        run(SMALL, packed, tmp_path)
    assert "KilledError" in (tmp_path / "log.txt").read_text()
    monkeypatch.setattr(Recorder, "_commit", commit)
    result = run(SMALL, packed, tmp_path)
    assert result.weights_sha256 == small[1].weights_sha256
    assert result.best_weights_sha256 == small[1].best_weights_sha256
    assert result.test == small[1].test
    assert (tmp_path / "history.csv").read_bytes() == (small[0] / "history.csv").read_bytes()
    timing = list(csv.DictReader((tmp_path / "timing.csv").read_text().splitlines()))
    assert [row["epoch"] for row in timing] == ["1", "2", "3"]
    seconds = sum(float(row["train_s"]) for row in timing)
    assert result.images_per_s == pytest.approx(3 * 256 / seconds, rel=0.02)
    assert result.seconds["fit"] > result.seconds["train"] == pytest.approx(seconds, abs=0.01)


def test_a_half_written_checkpoint_is_never_read(small, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = CheckpointStore.save_checkpoint

    def cut(self, checkpoint, path, storage_options=None) -> None:
        save(self, checkpoint, path, storage_options)
        if storage_options is not None and storage_options.epoch == 2:
            storage.delete(storage.join(str(path), "committed.json"))
            Path(path, "checkpoint.ckpt").write_bytes(b"half")
            raise KilledError

    monkeypatch.setattr(CheckpointStore, "save_checkpoint", cut)
    with pytest.raises(KilledError):
        run(SMALL, packed, tmp_path)
    monkeypatch.setattr(CheckpointStore, "save_checkpoint", save)
    assert run(SMALL, packed, tmp_path).weights_sha256 == small[1].weights_sha256


def test_the_best_and_the_last_two_are_kept_and_the_best_has_the_lowest_loss(small: tuple[Path, RunResult]):
    store = CheckpointStore(str(small[0] / "checkpoints"))
    losses = {int(row["step"]): float(row["val/loss"]) for row in rows(small[0])}
    last = store.committed()[-1]
    assert last.best_step == min(losses, key=lambda step: losses[step])
    assert last.step == max(losses)
    assert {one.step for one in store.committed()} == {last.best_step, *sorted(losses)[-2:]}


def facts(step: int, best_step: int | None = None) -> CheckpointFacts:
    return CheckpointFacts(step=step, epoch=0, best_step=best_step, finished=False, run_digest="x", numerics={})


def test_best_last_two_the_one_in_use_and_recent_ones_are_kept_as_far_as_the_budget_goes(tmp_path: Path):
    def kept(options: RunOptions, in_use: int | None = None) -> list[int]:
        store = CheckpointStore(str(tmp_path / str(len(list(tmp_path.iterdir())))))
        for step in range(1, 9):
            store.save_checkpoint({"about": "x"}, store.place(step), facts(step, 2 if step >= 2 else None))
        size = store.prune(options, in_use=in_use)
        assert size == sum(one.num_bytes for one in store.committed())
        return [one.step for one in store.committed()]

    store = CheckpointStore(str(tmp_path / "a new best"))
    for step, best in ((2, 2), (4, 2), (6, 2), (8, 8)):
        store.save_checkpoint({"about": "x"}, store.place(step), facts(step, best))
    store.prune(RunOptions())
    assert [one.step for one in store.committed()] == [2, 6, 8]  # 6 could not be gone on from without 2
    Path(store.place(8), "checkpoint.ckpt").write_bytes(b"")
    whole = store.newest_whole()
    assert whole is not None
    assert whole.step == 6
    assert kept(RunOptions()) == [2, 7, 8]
    assert kept(RunOptions(checkpoint_keep=2)) == [2, 5, 6, 7, 8]
    assert kept(RunOptions(), in_use=3) == [2, 3, 7, 8]
    store = CheckpointStore(str(tmp_path / "size"))
    store.save_checkpoint({"about": "x"}, store.place(1), facts(1))
    size = store.prune(RunOptions())
    assert kept(RunOptions(checkpoint_keep=4, checkpoint_budget_mb=4e-6 * size)) == [2, 6, 7, 8]
    assert kept(RunOptions(checkpoint_keep=4, checkpoint_budget_mb=1e-6)) == [2, 7, 8]


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def interrupted(small, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended in its third epoch, at step 20: checkpoints at steps 8 (the best) or 16, 18 and 20."""
    folder = tmp_path_factory.mktemp("interrupted") / "small-seed0"
    step, config = Classifier.training_step, config_of(SMALL, packed)

    def dies(self, batch, batch_idx):
        if self.global_step == 20:
            raise KilledError
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "training_step", dies)
        with pytest.raises(KilledError):
            fit(
                config,
                data_url=str(packed),
                run_url=str(folder),
                world=World(),
                options=RunOptions(checkpoint_every_n_steps=2),
            )
    assert [one.step for one in CheckpointStore(str(folder / "checkpoints")).committed()] == [16, 18, 20]
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["checkpoint.ckpt", "committed.json"])
@pytest.mark.parametrize(("damaged", "goes_on_from"), [((20,), 18), ((18,), 20), ((18, 20), 16), ((16,), None)])
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole_and_says_so(
    small, interrupted: Path, packed: Path, tmp_path: Path, damage: str, file: str, damaged: tuple, goes_on_from: int | None
):
    """16 is the best epoch's: without it no later one can end with the same model.pt, and the run begins anew."""
    folder = Path(shutil.copytree(interrupted, tmp_path / "small-seed0"))
    for step in damaged:
        DAMAGES[damage](folder / "checkpoints" / f"step-{step:08d}" / file)
    before = len((folder / "log.txt").read_text().splitlines())
    result = run(SMALL, packed, folder)
    log = "\n".join((folder / "log.txt").read_text().splitlines()[before:])
    assert (f"step {goes_on_from}" in log) if goes_on_from else ("goes on after" not in log)
    if goes_on_from != 20 or file == "committed.json":
        assert f"step-{damaged[-1]:08d}" in log
    assert result.weights_sha256 == small[1].weights_sha256
    assert (result.best_weights_sha256, result.test) == (small[1].best_weights_sha256, small[1].test)
    assert (folder / "history.csv").read_bytes() == (small[0] / "history.csv").read_bytes()


def test_what_a_kill_left_half_written_is_cleaned_away(tmp_path: Path):
    store = CheckpointStore(str(tmp_path))
    store.save_checkpoint({"about": "x"}, store.place(1), facts(1))
    storage.write_bytes(storage.join(store.place(2), "checkpoint.ckpt"), b"half")
    store.clean()
    assert storage.folders(str(tmp_path)) == ["step-00000001"]


def test_checkpoints_in_mid_epoch_change_no_bit_and_a_budget_that_is_too_small_is_told(small, packed: Path, tmp_path: Path):
    options = RunOptions(checkpoint_every_n_steps=3, checkpoint_keep=2, checkpoint_budget_mb=1e-5)
    config = config_of(SMALL, packed)
    result = fit(config, data_url=str(packed), run_url=str(tmp_path), world=World(), options=options)
    assert result.weights_sha256 == small[1].weights_sha256
    assert (tmp_path / "history.csv").read_bytes() == (small[0] / "history.csv").read_bytes()
    log = (tmp_path / "log.txt").read_text()
    assert log.count("over the budget of 10") == 1


@pytest.mark.parametrize(("attempt", "commits"), [(1, [8, 16, 24]), (10**18, [*range(2, 25, 2)])])
def test_a_run_that_fails_often_makes_checkpoints_in_mid_epoch_by_itself_and_they_change_no_bit(
    small, packed: Path, tmp_path: Path, attempt: int, commits: list[int], monkeypatch: pytest.MonkeyPatch
):
    """As often as it can: asked for in one step, known to all ranks in the next."""
    made, save = [], CheckpointStore.save_checkpoint

    def noted(self, checkpoint, path, storage_options):
        made.append(storage_options.step)
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(CheckpointStore, "save_checkpoint", noted)
    monkeypatch.setattr(recorder, "CALM_S", 1e9)
    result = fit(config_of(SMALL, packed), data_url=str(packed), run_url=str(tmp_path), world=World(attempt=attempt))
    assert made == commits
    assert result.weights_sha256 == small[1].weights_sha256


@pytest.mark.parametrize("model", ["basic-cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_a_run_in_bf16_ends_with_the_same_bits_each_time(packed: Path, tmp_path: Path, model: str):
    changes = {"precision": "bf16", "model": {"kind": model, "dropout": 0.3}, "input.px": 17, "length.epochs": 1}
    recipe = derive(SMALL, changes)
    assert len({run(recipe, packed, tmp_path / str(i)).weights_sha256 for i in range(3)}) == 1


@pytest.mark.parametrize("model", ["basic-cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_the_average_of_the_weights_is_what_is_kept_and_tested_and_outlives_a_kill_in_mid_epoch(
    small, packed: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
):
    kind = {"kind": model, "dropout": 0.3}
    recipe, weights_then = derive(SMALL, {"averaging": 0.5, "model": kind}), list[dict[str, torch.Tensor]]()
    step = Classifier.optimizer_step

    def noted(self, *arguments, **named) -> None:
        step(self, *arguments, **named)
        weights_then.append({name: one.clone() for name, one in self.network.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "optimizer_step", noted)
        whole = run(recipe, packed, tmp_path / "whole")
    if model == "basic-cnn":
        assert whole.weights_sha256 == small[1].weights_sha256, "the weights themselves go their way"
    average = weights_then[0]
    for weights in weights_then[1 : 8 * (whole.best_epoch or 0)]:
        average = {name: 0.5 * one + 0.5 * weights[name] for name, one in average.items()}
    kept = load_model(str(tmp_path / "whole" / "model.pt")).weights
    counters = {name for name in kept if name.endswith("num_batches_tracked")}
    assert all(torch.allclose(kept[name], average[name], atol=1e-5) for name in kept.keys() - counters)
    assert all(kept[name] == 8 * (whole.best_epoch or 0) for name in counters)
    assert whole.best_weights_sha256 != small[1].best_weights_sha256
    assert evaluate(find_model(str(tmp_path / "whole")), data_url=str(packed), split="test", world=World()) == whole.test

    training_step, folder = Classifier.training_step, tmp_path / "killed"

    def dies(self, batch, batch_idx):
        if self.global_step == 11:
            raise KilledError
        return training_step(self, batch, batch_idx)

    options = RunOptions(checkpoint_every_n_steps=2)
    monkeypatch.setattr(Classifier, "training_step", dies)
    with pytest.raises(KilledError):
        fit(config_of(recipe, packed), data_url=str(packed), run_url=str(folder), world=World(), options=options)
    monkeypatch.setattr(Classifier, "training_step", training_step)
    again = run(recipe, packed, folder)
    assert (again.weights_sha256, again.best_weights_sha256) == (whole.weights_sha256, whole.best_weights_sha256)
    assert (again.test, again.val) == (whole.test, whole.val)


def test_a_run_that_goes_on_knows_what_its_checkpoints_cost_before(packed: Path, tmp_path: Path):
    config, options, world = config_of(SMALL, packed), RunOptions(checkpoint_every_n_steps=2, checkpoint_keep=9), World()

    def costs(step: int) -> list[float]:
        state = torch.load(tmp_path / "checkpoints" / f"step-{step:08d}" / "checkpoint.ckpt")["callbacks"]
        return next(of for name, of in state.items() if name.startswith("Recorder"))["checkpoint_costs_s"]

    fit(config, data_url=str(packed), run_url=str(tmp_path), world=world, options=options)
    for step in (24, 22):
        CheckpointStore(str(tmp_path / "checkpoints")).remove_checkpoint(str(tmp_path / "checkpoints" / f"step-{step:08d}"))
    (tmp_path / "result.json").unlink()
    before = costs(20)
    fit(config, data_url=str(packed), run_url=str(tmp_path), world=world, options=options)
    assert len(before) == 2
    assert (costs(22), costs(24)[0]) == (before, before[1])


def test_a_run_that_is_not_to_be_tested_leaves_the_test_set_alone(
    small, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, folder = config_of(SMALL, packed), tmp_path / "small-seed0"
    monkeypatch.setattr(ImageData, "test_dataloader", None)
    result = fit(config, data_url=str(packed), run_url=str(folder), world=World(), tested=False)
    assert (result.test, result.examples, result.predictions_sha256) == (None, (), None)
    assert (result.weights_sha256, result.best_weights_sha256, result.val) == (
        small[1].weights_sha256,
        small[1].best_weights_sha256,
        small[1].val,
    )
    assert not (folder / "predictions.npy").exists()
    assert "tested" not in (folder / "log.txt").read_text()


def test_a_node_that_is_about_to_be_taken_away_brings_a_checkpoint_at_once(small, packed: Path, tmp_path: Path):
    asked = iter(range(100))

    def leaving() -> bool:
        if next(asked) < 4:
            return False
        seen.append([one.step for one in CheckpointStore(str(tmp_path / "checkpoints")).committed()])
        return True

    seen: list = []
    world = World(leaving=leaving)
    result = fit(config_of(SMALL, packed), data_url=str(packed), run_url=str(tmp_path), world=world)
    assert seen[:2] == [[], []]  # told in the fifth step, read in the sixth
    assert seen[2:4] == [[6], [6]]  # once
    assert result.weights_sha256 == small[1].weights_sha256


def test_a_rank_is_busy_in_its_own_step_and_waits_in_collectives_commits_and_reports(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whoever watches it ends a rank that is busy for too long, and none that waits for another, whatever it waits in."""
    heartbeat, busy = Heartbeat(), dict[str, set[bool]]()

    def note(what: str) -> None:
        if heartbeat.state is not None:  # else between training and test: nobody watches there
            busy.setdefault(what, set()).add(not heartbeat.state[0])

    def noting(what: str, function):
        def noted(*arguments, **named):
            note(what)
            return function(*arguments, **named)

        return noted

    monkeypatch.setattr(Classifier, "_forward", noting("step", Classifier._forward))
    monkeypatch.setattr(StepFlags, "_of_any_rank", noting("collective", StepFlags._of_any_rank))
    monkeypatch.setattr(Totals, "compute", noting("sum", Totals.compute))
    monkeypatch.setattr(CheckpointStore, "save_checkpoint", noting("commit", CheckpointStore.save_checkpoint))
    world = World(heartbeat=heartbeat, report=lambda progress: note(f"report {bool(progress.row)}"))
    options = RunOptions(checkpoint_every_n_steps=3)
    recipe = replace(SMALL, length=Length(epochs=1))
    fit(config_of(recipe, packed), data_url=str(packed), run_url=str(tmp_path), world=world, options=options)
    assert busy == {"step": {True}} | {what: {False} for what in busy if what != "step"}
    assert {"collective", "sum", "commit", "report True"} <= busy.keys()


def test_an_altered_checkpoint_is_refused(small, tmp_path: Path):
    place = Path(CheckpointStore(str(small[0] / "checkpoints")).place(24))
    copy = tmp_path / "step-00000024"
    copy.mkdir()
    (copy / "committed.json").write_bytes((place / "committed.json").read_bytes())
    data = bytearray((place / "checkpoint.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "checkpoint.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checkpoint\.ckpt: SHA-256 is"):
        read_checkpoint(str(copy))


def test_checkpoints_of_another_request_are_refused(packed: Path, tmp_path: Path):
    run(replace(SMALL, length=Length(epochs=1)), packed, tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(CheckpointError, match="another request"):
        run(derive(SMALL, {"optimizer.lr": 0.5}), packed, tmp_path)


def test_early_stopping_waits_for_its_patience_and_stays_where_it_was_when_the_run_goes_on(packed: Path, tmp_path: Path):
    hopeless = replace(SMALL, optimizer=Adam(lr=0.05), length=Length(epochs=30, patience=2), schedule=quick.SCRATCH.schedule)
    result = run(hopeless, packed, tmp_path)
    losses = [float(row["val/loss"]) for row in rows(tmp_path)]
    assert result.best_epoch is not None
    assert result.epochs == min(30, result.best_epoch + 2) == len(losses)
    assert losses.index(min(losses)) + 1 == result.best_epoch
    (tmp_path / "result.json").unlink()  # killed between its last checkpoint and its result
    again = run(hopeless, packed, tmp_path)
    digests = ("weights_sha256", "best_weights_sha256", "history_sha256", "predictions_sha256", "test")
    assert [getattr(again, name) for name in digests] == [getattr(result, name) for name in digests]


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_samples(packed: Path, tmp_path: Path):
    with pytest.raises(ImgclsError, match=r"not finite in epoch 1, step \d+, samples \[\d+"):
        run(derive(SMALL, {"optimizer.lr": 1e30}), packed, tmp_path)


def test_weights_that_diverge_in_evaluation_alone_stop_the_run(packed: Path, tmp_path: Path, monkeypatch):
    def diverged(self, totals, batch) -> None:
        totals.update(torch.full((len(batch.labels), 10), torch.nan), batch.labels)

    monkeypatch.setattr(Classifier, "_evaluate", diverged)
    with pytest.raises(ImgclsError, match="losses are not finite: the weights have diverged"):
        run(SMALL, packed, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_evaluation_on_other_data_than_it_was_trained_on_is_refused_but_for_the_test_set(
    small, packed: Path, tmp_path: Path
):
    shards.pack(synthetic_source("cifar10", 400), str(tmp_path / "cifar10"), name="cifar10")
    found = find_model(str(small[0]))
    assert evaluate(found, data_url=str(tmp_path), split="test", world=World()).num_samples == 80
    with pytest.raises(DataError, match="its val split may hold other images"):
        evaluate(found, data_url=str(tmp_path), split="val", world=World())


def test_a_test_set_that_was_cut_from_other_images_than_the_models_is_refused(small, tmp_path: Path):
    source = replace(synthetic_source("cifar10", 100), notes=(CUT_NOTE,))
    shards.pack(source, str(tmp_path / "cifar10"), name="cifar10")
    with pytest.raises(DataError, match="its test split may hold other images") as refused:
        evaluate(find_model(str(small[0])), data_url=str(tmp_path), split="test", world=World())
    assert "or --split test" not in str(refused.value)


def test_of_the_workers_of_an_evaluation_one_checks_a_nodes_cache(small, packed: Path, monkeypatch: pytest.MonkeyPatch):
    whole, checked = cache._is_whole, []
    monkeypatch.setattr(cache, "_is_whole", lambda folder, say: checked.append(folder) or whole(folder, say))
    for _ in range(2):
        evaluate(find_model(str(small[0])), data_url=str(packed), split="test", world=World(command="an evaluation"))
    assert len(checked) == 1


def test_data_that_were_packed_again_are_refused(packed: Path, tmp_path: Path):
    config = config_of(SMALL, packed).model_copy(update={"data_digest": "0" * 64})
    with pytest.raises(DataError, match="packed again"):
        fit(config, data_url=str(packed), run_url=str(tmp_path), world=World())


def test_a_last_partial_batch_is_kept_where_the_recipe_says_so(packed: Path, tmp_path: Path):
    result = run(replace(SMALL, last_batch="keep", length=Length(epochs=1)), packed, tmp_path)
    assert (rows(tmp_path)[0]["samples"], result.steps) == ("270", 9)


def test_model_pt_loads_with_weights_only_and_carries_its_lineage(small: tuple[Path, RunResult]):
    content = torch.load(small[0] / "model.pt", weights_only=True)
    about = json.loads(content["about"])
    assert about["class_names"] == list(small[1].class_names)
    assert about["preprocessing"]["px"] == 16
    model = load_model(str(small[0] / "model.pt"))
    assert model.weights_sha256 == small[1].best_weights_sha256
    assert [(seen.entry.dataset, len(seen.pixels)) for seen in model.lineage] == [("cifar10", 360)]


def test_an_altered_model_pt_is_refused(small, tmp_path: Path):
    content = torch.load(small[0] / "model.pt", weights_only=True)
    next(iter(content["weights"].values())).view(-1)[0] += 1
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="was altered"):
        load_model(str(tmp_path / "model.pt"))
    (tmp_path / "model.pt").write_bytes((small[0] / "model.pt").read_bytes())
    other = small[1].model_copy(update={"model_sha256": "0" * 64})
    records.write(other, str(tmp_path / "result.json"))
    with pytest.raises(CheckpointError, match=r"the result\.json beside it says 000000"):
        load_model(str(tmp_path / "model.pt"))
    (tmp_path / "model.pt").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="no checkpoint of this system, or damaged"):
        load_model(str(tmp_path / "model.pt"))


@pytest.mark.parametrize("name", ["", "model.pt", "checkpoints/best"])
def test_a_run_a_checkpoint_and_a_model_pt_score_the_same(small, packed: Path, name: str):
    place = str(small[0] / name)
    if name.endswith("best"):
        place = str(small[0] / str(small[1].checkpoint))
    found = find_model(place)
    assert evaluate(found, data_url=str(packed), split="test", world=World()) == small[1].test
    assert evaluate(found, data_url=str(packed), split="val", world=World()) == small[1].val


def test_what_is_no_checkpoint_is_named(small, tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is no such run"):
        find_model(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="without a model"):
        find_model(str(tmp_path))


def test_predictions_are_the_evaluations(small, packed: Path):
    found = find_model(str(small[0]))
    predictor, manifest = Predictor(found), read_manifest(str(packed / "cifar10"))
    shard = next(one for one in manifest.shards if one.split == "test")
    data = shards.fetch_shard(str(packed / "cifar10"), shard)
    images = list(shards.read_samples(shard, data))
    tops = predictor.top([predictor.pixels(content) for content, _ in images], 5)
    right = sum(top[0][0] == manifest.class_names[label] for top, (_, label) in zip(tops, images, strict=True))
    assert small[1].test is not None
    assert right / len(images) == small[1].test.accuracy
    assert all(sum(p for _, p in top) <= 1.0001 and top == sorted(top, key=lambda x: -x[1]) for top in tops)


@pytest.mark.slow
def test_a_fine_tuned_run_starts_from_its_source_and_remembers_it(packed: Path, tmp_path: Path):
    tiny = {"length.epochs": 1, "train_fraction": 1.0, "global_batch_size": 64}
    run(derive(quick.RESNET18, tiny), packed, tmp_path / "resnet18-seed0")
    init = InitSource(run="resnet18-seed0", identity="x")
    result = run(derive(quick.FINETUNED, tiny), packed, tmp_path / "finetuned-seed0", init=init)
    assert [(entry.dataset, entry.run) for entry in result.lineage] == [
        ("imagenette", "resnet18-seed0"),
        ("cifar10", "finetuned-seed0"),
    ]
    with pytest.raises(CheckpointError, match="has other weights than when"):
        run(
            derive(quick.FINETUNED, tiny),
            packed,
            tmp_path / "other",
            init=InitSource(run=str(tmp_path / "resnet18-seed0"), identity="x"),
        )
    place = tmp_path / "finetuned-seed0" / str(result.checkpoint)
    back = InitSource(run=str(place), identity=str(result.best_weights_sha256))
    with pytest.raises(CheckpointError, match="its lineage saw imagenette"):
        run(replace(derive(quick.FINETUNED, tiny), dataset="imagenette"), packed, tmp_path / "back", init=back)


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUES)
def test_every_catalogued_recipe_takes_a_step(name: str, packed: Path, tmp_path: Path):
    for recipe in CATALOGUES[name]:
        if recipe.name.startswith("finetuned"):
            continue  # `scratch`, but for its start
        px = min(recipe.input.px, 64)
        tiny = {"length.epochs": 1, "global_batch_size": 32, "train_fraction": 0.15, "input.px": px, "input.stored_px": 32}
        assert run(derive(recipe, tiny), packed, tmp_path / recipe.name).steps == 1


def test_counting_other_than_the_split_is_our_own_mistake(small):
    with pytest.raises(AssertionError, match="60 samples were counted, the split has 61"):
        fitting.check_counted(small[1].test, 61)
