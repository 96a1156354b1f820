"""Whole commands on synthetic images, under one local Ray for all of them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from imgcls.runs import RunFolder
from tests.conftest import ROOT, Command, image, image_folder, run_in
from tests.processes import begun_at, descendants, title_of, until
from tests.proof.commands import EIGHTY_STEPS, train

if TYPE_CHECKING:
    from sandbox.s3.server import Server


class Five(NamedTuple):
    command: tuple[str, ...]
    folder: Path
    done: subprocess.CompletedProcess[str]
    env: dict[str, str]


TINY = (
    *("--set", "length.epochs=1", "--set", "train_fraction=1.0", "--set", "global_batch_size=32"),
    *("--set", "input.px=32", "--set", "input.stored_px=32"),
)


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def five(s3: "Server", in_bucket: str, storage: Path) -> Five:
    """The suite of five, run once for all tests that look at it: on data in a bucket, all its workers killed once."""
    command = ("suite", "--data", in_bucket, "--storage", str(storage), "--id", "five", *TINY)
    # A Ray of its own, since secrets do not travel to one that is joined.
    env, folder = s3.env() | {"RAY_ADDRESS": ""}, storage / "five"
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run_in, storage, *command, "--checkpoint-every-n-steps", "2", env=env)
        markers = (folder / "resnet18-seed0" / "checkpoints").glob
        until(lambda: running.done() or any(markers("*/committed.json")), 200, "the first checkpoint")
        for pid in descendants(os.getpid()):
            if title_of(pid).startswith("ray::RayTrainWorker"):
                os.kill(pid, signal.SIGKILL)
        done = running.result()
    assert done.returncode == 0, done.stdout + done.stderr
    return Five(command, folder, done, env)


def results_of(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())["runs"]}


def ledger_of(run: Path) -> list[tuple[str, str]]:
    return [(row["samples"], row["ledger"]) for row in csv.DictReader((run / "history.csv").read_text().splitlines())]


def test_the_suite_of_five_on_s3_outlives_its_workers_runs_to_its_page_and_is_not_run_twice(
    run_command: Command, five: Five, storage: Path
):
    command, _, done, env = five
    rows = results_of(five.folder)
    assert list(rows) == [f"{name}-seed0" for name in ("basic-cnn", "resnet18", "regularized", "scratch", "finetuned")]
    assert {row["status"] for row in rows.values()} == {"finished"}
    assert {row["test"]["num_samples"] for row in rows.values()} == {60}
    assert [entry["dataset"] for entry in rows["finetuned-seed0"]["lineage"]] == ["imagenette", "cifar10"]
    assert all(line.startswith("SYNTHETIC ") for line in done.stdout.splitlines())
    assert "<title>SYNTHETIC" in (five.folder / "report.html").read_text()
    assert done.stdout.index("resnet18-seed0: finished") < done.stdout.index("finetuned-seed0: started")
    assert done.stderr == ""
    assert len(list((five.folder / "resnet18-seed0" / "attempts").iterdir())) == 2

    before = {path: path.stat().st_mtime_ns for path in five.folder.glob("*/*")}
    began = time.monotonic()
    again = run_command(*command, env=env | {"RAY_ADDRESS": "127.0.0.1:1"})  # it would fail if it asked Ray
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - began < 30
    assert {path: path.stat().st_mtime_ns for path in five.folder.glob("*/*")} == before
    results = json.loads((five.folder / "results.json").read_text())
    assert results["seconds"] > 5  # of the command that did the work
    assert "took" in done.stdout
    assert "took" not in again.stdout

    other = run_command(*command, "--set", "optimizer.lr=0.5", env=env)
    assert other.returncode == 3
    assert "is a run of another request" in other.stderr
    assert "optimizer.lr: 0.001 / 0.5" in other.stderr

    report = run_command("report", "five", "--storage", storage)
    assert report.returncode == 0, report.stderr
    assert "finetuned-seed0" in report.stdout
    compared = run_command("report", "five", "five", "--storage", storage)
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.count("not distinguishable") == 5
    assert "holds no suite" in run_command("report", "five", "six", "--storage", storage).stderr


@pytest.mark.slow
def test_a_suites_runs_are_logged_to_mlflow_too(run_command: Command, five: Five, storage: Path, tmp_path: Path):
    words, env = ("--storage", storage, "--mlflow", (tmp_path / "mlruns").as_uri()), {"MLFLOW_ALLOW_FILE_STORE": "true"}
    for _ in range(2):
        done = run_command("report", "five", *words, env=env)
        assert done.returncode == 0, done.stderr
    points = [file.read_text().splitlines() for file in tmp_path.glob("mlruns/*/*/metrics/*/accuracy")]
    assert list(map(len, points)) == [1] * 15  # five runs of an epoch: in training, validation and test
    assert "leave OTHER out" in run_command("report", "five", "five", *words, env=env).stderr


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_alike_at_one_and_two_workers_and_predicts(
    run_command: Command, packed: Path, five: Five, storage: Path, ray_cluster: dict[str, str], tmp_path: Path
):
    run = five.folder / "basic-cnn-seed0"
    alone = run_command("evaluate", run, "--data", packed, "--json")
    shared = run_command("evaluate", run, "--data", packed, "--json", "--num-workers", "2", env=ray_cluster)
    assert alone.returncode == shared.returncode == 0, alone.stderr + shared.stderr
    assert alone.stderr == "", "a library speaks"
    assert json.loads(alone.stdout) == json.loads(shared.stdout)
    assert json.loads(alone.stdout)["scores"] == results_of(five.folder)["basic-cnn-seed0"]["test"]

    photos, pipes = tmp_path / "photos", tmp_path / "pipes"
    for folder in (photos, pipes):
        folder.mkdir()
    for number in range(70):
        image(number).save(photos / f"{number:02d}.png")
    (photos / "torn.png").write_bytes(b"torn")
    (photos / "notes.txt").write_bytes(b"no image")
    os.mkfifo(pipes / "x.png")
    done = run_command("predict", run, photos, pipes, photos / "00.png", "--json")
    assert done.returncode == 1
    assert "torn.png cannot be used: no image of a known format" in done.stderr
    assert f"{pipes} cannot be used: {pipes / 'x.png'} is a device or pipe" in done.stderr
    first, *others, bad, pipe, again = map(json.loads, done.stdout.splitlines())
    assert len(others) == 69
    assert "error" in pipe
    assert (len(first["top"]), first["synthetic"]) == (5, True)
    assert "error" in bad
    assert [top["class"] for top in again["top"]] == [top["class"] for top in first["top"]]


@pytest.mark.slow
def test_the_workers_of_a_local_ray_have_begun_before_their_trial_and_none_is_left_over(packed: Path, tmp_path: Path):
    """An idle process that the workers did not take would wait for a minute."""
    running = train(tmp_path, packed, "--num-workers", "2")
    running.wait_for_step(1)
    workers, trials = running.pids("ray::RayTrainWorker"), running.pids("ray::ImplicitFunc")
    assert (len(workers), len(trials), running.pids("ray::IDLE")) == (2, 1, [])
    assert min(map(begun_at, workers)) < begun_at(trials[0])
    running.wait()


@pytest.mark.slow
def test_workers_run_the_commands_own_code_whichever_checkout_is_installed(packed: Path, tmp_path: Path):
    for room in ("jobs", "cluster", "imgcls"):
        shutil.copytree(ROOT / room, tmp_path / room)
    other = "def fit(*_, **__):\n    raise TrainingError('cannot train here')\n"
    with (tmp_path / "imgcls/training/fit.py").open("a") as file:
        file.write(f"\nfrom imgcls.errors import TrainingError\n{other}")
    command = [sys.executable, "-m", "jobs.train", "scratch", "--data", str(packed), *TINY]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"RAY_ADDRESS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot train here" in done.stdout + done.stderr


# Takes 512 MiB more, ten times a second, until it is killed: what runs beside it may give memory back meanwhile.
HOLD = "import time; held = [(time.sleep(0.1), b'1' * (1 << 29)) for _ in range({blocks})]; time.sleep(300)"


@pytest.mark.slow
def test_a_run_that_ray_ends_for_lack_of_memory_is_begun_again(packed: Path, tmp_path: Path):
    """Ray then ends the trial too, which Tune by itself takes for a fault of its own."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    memory = {words[0]: int(words[1]) << 10 for words in lines}
    total, available = memory["MemTotal:"], memory["MemAvailable:"]
    if available < 8 << 30:
        pytest.skip("needs 8 GiB of free memory")
    limit = 1 - max(available / 2, available - (8 << 30)) / total
    env = {"RAY_memory_usage_threshold": f"{limit:.3f}", "RAY_memory_monitor_refresh_ms": "200"}
    running = train(tmp_path, packed, *EIGHTY_STEPS, env=env)
    running.wait_for_step(4)
    hold = HOLD.format(blocks=(available - (2 << 30)) >> 29)
    with subprocess.Popen([sys.executable, "-c", hold]) as holding:
        try:
            until(lambda: "running low on memory" in running.said.read_text(), 120, "Ray to end workers")
        finally:
            holding.kill()
    said = running.wait()
    assert "do: fewer runs at once" in said
    assert "Traceback" not in said
    assert len(RunFolder(str(running.run)).attempts()) > 1


@pytest.mark.slow
def test_two_workers_see_the_same_samples_in_every_step_as_one(
    run_command: Command, packed: Path, five: Five, storage: Path, ray_cluster: dict[str, str]
):
    done = run_command(
        "train", "basic-cnn", "--num-workers", "2", "--id", "w2", "--data", packed, "--storage", storage, *TINY,
        env=ray_cluster,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    two, one = storage / "w2" / "basic-cnn-seed0", five.folder / "basic-cnn-seed0"
    assert ledger_of(two) == ledger_of(one)
    result = json.loads((two / "result.json").read_text())
    assert result["placement"]["num_workers"] == 2
    assert result["test"]["num_samples"] == 60


@pytest.mark.slow
def test_a_run_that_starts_from_a_named_checkpoint_is_the_one_that_waited_for_it(
    run_command: Command, packed: Path, five: Five, ray_cluster: dict[str, str]
):
    source = json.loads((five.folder / "resnet18-seed0" / "result.json").read_text())
    checkpoint = five.folder / "resnet18-seed0" / source["checkpoint"]
    places = ("--data", packed, "--storage", five.folder.parent, "--id", "named")
    done = run_command("train", "finetuned", "--init-from", checkpoint, *places, *TINY, env=ray_cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    named = results_of(five.folder.parent / "named")["finetuned-seed0"]
    assert named["weights_sha256"] == results_of(five.folder)["finetuned-seed0"]["weights_sha256"]


@pytest.mark.slow
def test_without_data_and_network_the_suite_says_so_and_takes_procedural_images(
    run_command: Command, tmp_path: Path, ray_cluster: dict[str, str]
):
    # A proxy that does not answer stands for a network that is not there.
    nowhere = ray_cluster | {"https_proxy": "http://127.0.0.1:9", "IMGCLS_SOURCES": ""}
    command = ("suite", "--pack", "--recipes", "scratch", "--set", "length.epochs=1", "--id", "mine")
    done = run_command(*command, env=nowhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no data: https://" in done.stdout
    assert all(line.startswith("SYNTHETIC ") for line in done.stdout.splitlines())
    assert list(results_of(tmp_path / "runs" / "mine-synthetic")) == ["scratch-seed0"]
    assert all(
        line.startswith("SYNTHETIC")
        for line in (tmp_path / "runs/mine-synthetic/scratch-seed0/log.txt").read_text().splitlines()
    )


@pytest.mark.parametrize("kind", ["damaged", "mistyped"])
def test_data_that_are_there_and_cannot_be_used_are_an_error_not_a_reason_to_draw_others(
    run_command: Command, tmp_path: Path, kind: str
):
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "cifar10.tar").write_bytes(b"no tar")
    named = tmp_path / ("sources" if kind == "damaged" else "sauces")
    done = run_command("suite", "--pack", "--recipes", "scratch", env={"IMGCLS_SOURCES": str(named), "RAY_ADDRESS": ""})
    assert done.returncode == 3
    assert ("is damaged, or no archive that can be read" if kind == "damaged" else "is no folder") in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_a_failed_source_fails_its_dependent_a_damaged_record_its_run_and_the_others_go_on(
    run_command: Command, packed: Path, storage: Path, ray_cluster: dict[str, str]
):
    from dataclasses import replace

    from imgcls.catalogue import quick
    from imgcls.recipe import derive

    small = {"length.epochs": 1, "global_batch_size": 32, "train_fraction": 1.0}
    recipes = [
        derive(quick.BASIC_CNN, small),
        replace(derive(quick.RESNET18, small | {"optimizer.lr": 1e30, "length.epochs": 3})),
        derive(quick.FINETUNED, small),
        derive(quick.SCRATCH, small),
    ]
    damaged = storage / "failing" / "scratch-seed0" / "attempts" / "00001" / "began.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{}")
    flags: list[str | Path] = []
    for recipe in recipes:
        path = storage / f"{recipe.name}.toml"
        path.write_text(as_toml(recipe.to_json()))
        flags += ["--recipe", path]
    command = ("suite", *flags, "--data", packed, "--storage", storage, "--id", "failing")
    done = run_command(*command, env=ray_cluster)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = results_of(storage / "failing")
    assert {name: row["status"] for name, row in rows.items()} == {
        "basic-cnn-seed0": "finished",
        "resnet18-seed0": "failed",
        "scratch-seed0": "failed",
        "finetuned-seed0": "blocked",
    }
    assert "began.json was altered, or is no record" in rows["scratch-seed0"]["error"]
    assert "not finite" in rows["resnet18-seed0"]["error"]
    assert rows["resnet18-seed0"]["log_tail"]
    assert rows["finetuned-seed0"]["error"] == "its source resnet18-seed0 failed"
    assert "resnet18-seed0 failed: " in done.stdout
    again = run_command(*command, env={"RAY_ADDRESS": "127.0.0.1:1"})
    assert again.returncode == 1  # stays failed, asks no Ray
    assert "resnet18-seed0: failed before; --retry-failed tries it again" in again.stdout


def as_toml(value: dict, prefix: str = "") -> str:
    plain = {k: v for k, v in value.items() if not isinstance(v, dict) and v is not None}
    lines = [f"{k} = {json.dumps(v)}" for k, v in plain.items()]
    for name, below in value.items():
        if isinstance(below, dict):
            lines += [f"[{prefix}{name}]", as_toml(below, f"{prefix}{name}.")]
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_own_images_are_packed_trained_and_evaluated(run_command: Command, tmp_path: Path, ray_cluster: dict[str, str]):
    photos = image_folder(tmp_path / "my photos", ("Käse brot", "a.b c", "日本"), count=40)
    for i, kind in enumerate(("JPEG", "WEBP", "BMP")):
        image(900 + i).save(photos / "日本" / f"odd name.{i}.{'JPG' if kind == 'JPEG' else kind.lower()}", kind)
    packed = run_command("pack", "photos", "--source", photos)
    assert packed.returncode == 0, packed.stderr
    assert "20% of every class was cut as the test set" in packed.stdout
    small = ("--set", "dataset=photos", "--set", "global_batch_size=16", "--set", "length.epochs=1", "--id", "photos")
    trained = run_command("train", "basic-cnn", *small, env=ray_cluster)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    run = tmp_path / "runs" / "photos" / "basic-cnn-seed0"
    result = json.loads((run / "result.json").read_text())
    assert result["class_names"] == ["Käse brot", "a.b c", "日本"]
    evaluated = run_command("evaluate", run, "--json")
    assert json.loads(evaluated.stdout)["scores"] == result["test"]
    assert run_command("predict", run, photos / "日本" / "0.png").returncode == 0
