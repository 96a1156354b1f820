"""Pieces of a finished run, trained again: equal where nothing was touched, and named where something was."""

import io
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from imgcls import records, storage
from imgcls.data import shards
from imgcls.data.synthetic import synthetic_source
from imgcls.errors import CheckpointError, DataError, ImgclsError, NumericsError
from imgcls.recipe import FromRun, Length, Recipe, ResNet18, derive
from imgcls.records import Audit, InitSource, RunConfig, RunOptions, RunResult
from imgcls.runs import CheckpointFolder, RunFolder
from imgcls.training.audit import audit, differing
from imgcls.training.fit import fit
from imgcls.training.world import World
from tests.conftest import run_in
from tests.imgcls.training.test_fit import SMALL, config_of
from tests.proof.alone import TWELVE, run_alone

ALL = 100


def finished(recipe: Recipe, packed: Path, to: Path, init: InitSource | None = None) -> Path:
    """A run with a checkpoint after every fifth step and each epoch, as a command would have left it."""
    config = config_of(recipe, packed, init=init)
    folder = to / config.name
    records.write(config, str(folder / "config.json"))
    options = RunOptions(checkpoint_every_n_steps=5, checkpoint_keep=ALL)
    fit(config, data_url=str(packed), run_url=str(folder), world=World(), options=options)
    return folder


@pytest.fixture(scope="module")
def small(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 steps in three epochs."""
    return finished(SMALL, packed, tmp_path_factory.mktemp("audited"))


@pytest.fixture
def touched(small: Path, tmp_path: Path) -> Path:
    """A copy, to be altered."""
    return Path(shutil.copytree(small, tmp_path / small.name))


def audited(run: Path, packed: Path, *, num_pieces: int = ALL, seed: int = 0) -> Audit:
    return audit(RunFolder(str(run)), data_url=str(packed), num_pieces=num_pieces, seed=seed)


def test_every_piece_of_an_untouched_run_is_equal(small: Path, packed: Path):
    found = audited(small, packed)
    assert found.steps == ("0 to 5", "5 to 8", "8 to 10", "10 to 15", "15 to 16", "16 to 20", "20 to 24")
    assert found.difference == ""
    assert found.told.endswith("weights, optimizer, history and scores are equal")


def test_the_auditors_seed_draws_the_pieces(small: Path, packed: Path):
    drawn = [audited(small, packed, num_pieces=2, seed=seed).steps for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(steps) for steps in drawn] == [2, 2, 2]


def test_what_a_run_keeps_by_itself_is_enough(packed: Path, tmp_path: Path):
    config = config_of(replace(SMALL, length=Length(epochs=4)), packed)
    records.write(config, str(tmp_path / config.name / "config.json"))
    fit(config, data_url=str(packed), run_url=str(tmp_path / config.name), world=World())
    found = audited(tmp_path / config.name, packed)
    assert found.num_pieces >= 2
    assert found.steps[0].startswith("0 to ")
    assert found.difference == ""


def rewritten(run: Path, step: int, change: Callable[[dict], None]) -> None:
    """The checkpoint of this step has other content, and a marker that fits it."""
    folder = CheckpointFolder(str(run / "checkpoints" / f"step-{step:08d}"))
    content = torch.load(folder.data_url, weights_only=True)
    change(content)
    torch.save(content, file := io.BytesIO())
    marker = folder.marker()
    assert marker is not None
    storage.write_bytes(folder.data_url, file.getvalue())
    digest = storage.sha256(file.getvalue())
    folder.commit(marker.model_copy(update={"num_bytes": len(file.getvalue()), "sha256": digest}))


def one_weight(content: dict) -> None:
    bias = next(value for name, value in content["state_dict"].items() if name.endswith("bias"))
    bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))


def one_moment(content: dict) -> None:
    states = content["optimizer_states"][0]["state"].values()
    next(state["exp_avg"] for state in states if state["exp_avg"].ndim == 1)[0] += 1e-6


def one_row(content: dict) -> None:
    (recorder,) = (state for state in content["callbacks"].values() if "history" in state)
    recorder["history"][0]["val/accuracy"] += 0.01


@pytest.mark.parametrize(
    ("step", "change", "named"),
    [
        (10, one_weight, "step 10, trained again from step 8: state_dict."),
        (24, one_moment, "step 24, trained again from step 20: optimizer_states[0].state."),
        (8, one_row, "step 8, trained again from step 5: callbacks."),
    ],
)
def test_a_checkpoint_that_was_altered_with_its_marker_is_named(
    step: int, change: Callable[[dict], None], named: str, touched: Path, packed: Path
):
    rewritten(touched, step, change)
    assert audited(touched, packed).difference.startswith(named)


def a_byte_of_a_checkpoint(run: Path) -> None:
    file = run / "checkpoints/step-00000010/checkpoint.ckpt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def a_line_of_the_history(run: Path) -> None:
    file = run / "history.csv"
    file.write_text(file.read_text().replace("\n2,", "\n3,"))


def a_field_of_the_recipe(run: Path) -> None:
    config = RunFolder(str(run)).config()
    assert config is not None
    other = config.model_copy(update={"recipe": derive(config.recipe, {"optimizer.lr": 0.5})})
    records.write(other, str(run / "config.json"))


def that_field_in_both_records(run: Path) -> None:
    a_field_of_the_recipe(run)
    config, result = RunFolder(str(run)).config(), RunFolder(str(run)).result()
    assert config is not None
    assert result is not None
    again = result.model_copy(update={"recipe": config.recipe, "digest": config.digest()})
    records.write(again, str(run / "result.json"))


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (a_byte_of_a_checkpoint, "step-00000010"),
        (a_line_of_the_history, "history.csv was altered"),
        (a_field_of_the_recipe, "config.json asks for another run than result.json is of"),
        (that_field_in_both_records, "is of another request than config.json"),
    ],
)
def test_what_was_altered_is_named_before_anything_is_trained(
    alter: Callable[[Path], None], named: str, touched: Path, packed: Path
):
    alter(touched)
    with pytest.raises(ImgclsError, match=named):
        audited(touched, packed)


def test_a_figure_that_was_altered_is_named(touched: Path, packed: Path):
    result = records.read(RunResult, str(touched / "result.json"))
    assert result.test is not None
    better = result.test.model_copy(update={"accuracy": 0.99})
    records.write(result.model_copy(update={"test": better}), str(touched / "result.json"))
    assert audited(touched, packed, num_pieces=1, seed=1).difference.startswith("model.pt, tested again")
    assert "test of result.json differ" in audited(touched, packed).difference


def test_data_with_another_label_are_not_those_of_the_run(small: Path, packed: Path, tmp_path: Path):
    source = synthetic_source("cifar10", 300)
    first, *others = source.samples
    other = replace(first, label=(first.label + 1) % 10)
    shards.pack(replace(source, samples=(other, *others)), str(tmp_path / "cifar10"), name="cifar10")
    with pytest.raises(DataError, match="it was packed again"):
        audited(small, tmp_path)


def test_other_numerics_are_no_difference_but_not_comparable_here(touched: Path, packed: Path):
    for marker in (touched / "checkpoints").iterdir():
        folder = CheckpointFolder(str(marker))
        committed = folder.marker()
        assert committed is not None
        folder.commit(committed.model_copy(update={"numerics": committed.numerics | {"workers": "2"}}))
    with pytest.raises(NumericsError, match="workers: 2 / 1"):
        audited(touched, packed)


def test_a_run_that_was_moved_is_not_comparable_here(touched: Path, packed: Path):
    result = records.read(RunResult, str(touched / "result.json"))
    moved = result.model_copy(update={"numerics_changes": ("threads: 2 / 1",)})
    records.write(moved, str(touched / "result.json"))
    with pytest.raises(NumericsError, match="threads: 2 / 1"):
        audited(touched, packed)


def test_a_run_that_is_not_over_is_refused(touched: Path, packed: Path):
    (touched / "result.json").unlink()
    with pytest.raises(CheckpointError, match="is no run that is finished"):
        audited(touched, packed)


@pytest.mark.slow
def test_a_run_from_another_ones_weights_is_trained_again_from_them(packed: Path, tmp_path: Path):
    source = finished(
        replace(SMALL, name="source", model=ResNet18(), dataset="imagenette", length=Length(epochs=1)), packed, tmp_path
    )
    init = InitSource(run=source.name, identity=config_of_folder(source).digest())
    tuned = finished(
        replace(SMALL, model=ResNet18(), init=FromRun(recipe="source"), length=Length(epochs=1)), packed, tmp_path, init
    )
    assert audited(tuned, packed).difference == ""


def config_of_folder(run: Path) -> RunConfig:
    config = RunFolder(str(run)).config()
    assert config is not None
    return config


@pytest.mark.slow
def test_an_elastic_run_of_four_workers_is_audited_by_one(packed: Path, tmp_path: Path):
    recipe = replace(TWELVE, numerics="elastic")
    folder = tmp_path / f"{recipe.name}-seed0"
    records.write(config_of(recipe, packed), str(folder / "config.json"))
    assert run_alone(recipe, packed, folder, world_size=4, every=3) == [0] * 4
    assert audited(folder, packed).difference == ""


@pytest.mark.slow
def test_the_command_says_what_it_found_in_one_line_and_keeps_it_where_it_is_asked_to(touched: Path, packed: Path):
    def command(*flags: str) -> subprocess.CompletedProcess[str]:
        return run_in(touched, "audit", touched, "--data", packed, "--pieces", "1", *flags)

    done = command("--seed", "5", "--record")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("SYNTHETIC small-seed0: steps ")
    assert "1 of 7 pieces, seed 5" in line
    (kept,) = RunFolder(str(touched)).audits()
    assert kept.told in line
    for step in (5, 8, 10, 15, 16, 20, 24):
        rewritten(touched, step, one_weight)
    done = command()
    assert (done.returncode, "DIFFERS" in done.stdout) == (1, True), done.stderr
    assert command("--pieces", "0").returncode == 2


def test_contents_differ_where_a_bit_does():
    a = {"x": [torch.zeros(2), {"y": 1.0}], "seconds": 1}
    assert list(differing(a, {"x": [torch.zeros(2), {"y": 1.0}], "seconds": 2})) == []
    assert list(differing(a, {"x": [-torch.zeros(2), {"y": 1.0}]})) == ["x[0]"]
    assert list(differing(a, {"x": [torch.zeros(2), {"y": 2.0}], "z": 1})) == ["x[1].y", "z"]
