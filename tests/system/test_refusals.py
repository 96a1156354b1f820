"""What is wrong is said in a few lines, without a traceback, before anything starts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import GOES_ON
from tests.conftest import ROOT, Command, image_folder

NO_RAY = {"RAY_ADDRESS": ""}


def refused(run: Command, name: str, *arguments: str | Path, code: int, says: str, env: dict[str, str] | None = None):
    began = time.monotonic()
    done = run(name, *arguments, env=NO_RAY | (env or {}))
    assert done.returncode == code, done.stderr
    assert says in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 30  # the bar is 10 s on an idle machine
    return done


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("resnet50",), "there is no recipe resnet50 in the catalogue quick; there are: basic-cnn, resnet18"),
        (("scratch", "--catalogue", "fast"), "there is no catalogue fast"),
        (("scratch", "--set", "optimizer.rate=1"), "unknown field optimizer.rate; known here: kind, lr, weight_decay"),
        (("scratch", "--set", "lr"), "write --set FIELD=VALUE"),
        (("scratch", "--prices", "prices.yaml"), "--prices and --cluster say what --dry-run counts on"),
        ((), "give one RECIPE"),
        (("scratch", "--num-workers", "8", "--set", "global_batch_size=16"), "can never run"),
        (("scratch", "--num-workers", "0"), "--num-workers 0: should be greater than or equal to 1"),
        (("scratch", "--id", "../x"), "a plain name"),
        (("scratch", "--id", "a::b"), "a plain name"),
        (("scratch", "--seed", "-1"), "--seed -1: should be greater than or equal to 0"),
        (("scratch", "--set", "global_batch_size=100000"), "--set global_batch_size="),
        (("scratch", "--set", "global_batch_size=2", "--num-workers", "2"), "resnet18 needs 2"),
        (("scratch", "--recipe", "none.toml"), "give one or the other"),
        (("scratch", "--cpus-per-worker", "0", "--set", "global_batch_size=16"), "a worker without a CPU and a GPU"),
        (("scratch", "--set", "optimizer.lr=Infinity"), "finite number"),
        (("scratch", "--set", "dataset=../x"), "dataset:"),
        (("basic-cnn", "--set", "input.px=4"), "input.px is 4, 8 is the least"),
        (("--recipe", "none.toml"), "none.toml cannot be read"),
    ],
)
def test_a_wrong_command_ends_with_2(enter_command: Command, packed: Path, arguments: tuple[str, ...], says: str):
    refused(enter_command, "train", *arguments, "--data", packed, code=2, says=says)


def test_an_unknown_flag_ends_with_2(run_command: Command):
    refused(run_command, "train", "scratch", "--colour", "red", code=2, says="--colour")


def test_a_flag_of_another_subcommand_ends_with_2(enter_command: Command):
    refused(enter_command, "bench", "record", "quick", "--kills", "9", code=2, says="--kills")


def test_data_without_a_manifest_are_named_with_the_remedy(run_command: Command, tmp_path: Path):
    says = "python -m jobs.pack cifar10"
    refused(run_command, "train", "scratch", "--data", tmp_path / "none", code=3, says=says)


@pytest.mark.parametrize("harm", ["missing", "altered", "manifest"])
def test_damaged_data_are_named(enter_command: Command, packed: Path, tmp_path: Path, harm: str):
    copy = shutil.copytree(packed / "cifar10", tmp_path / "data" / "cifar10")
    shard = copy / "train-00000.tar"
    if harm == "missing":
        shard.unlink()
    elif harm == "altered":
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    else:
        (copy / "manifest.json").write_text(json.dumps({"format": 1}))
    says = "manifest.json was altered" if harm == "manifest" else "train-00000.tar"
    refused(enter_command, "train", "scratch", "--data", tmp_path / "data", code=3, says=says)


def test_an_unknown_field_of_a_recipe_file_is_answered_with_the_known(enter_command: Command, packed: Path, tmp_path: Path):
    (tmp_path / "mine.toml").write_text('name = "mine"\ncolour = "red"\n')
    says = "unknown field colour; known here: name, dataset, input"
    refused(enter_command, "train", "--recipe", tmp_path / "mine.toml", "--data", packed, code=2, says=says)


def test_storage_that_cannot_be_written_is_named(enter_command: Command, packed: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    places = ("--data", packed, "--storage", tmp_path / "file")
    small = ("--set", "global_batch_size=16")
    refused(enter_command, "train", "scratch", *places, *small, code=3, says="cannot be written")


@pytest.mark.parametrize("flag", ["--data", "--storage"])
def test_a_scheme_that_is_not_ours_is_named(enter_command: Command, packed: Path, flag: str):
    places = {"--data": str(packed)} | {flag: "ftp://nowhere.invalid/x"}
    words = [word for pair in places.items() for word in pair]
    refused(enter_command, "train", "scratch", *words, code=3, says="ftp://nowhere.invalid/x is not a place")


@pytest.mark.parametrize("modules", [0, 40, 400])
def test_ctrl_c_while_modules_are_imported_is_said_in_a_line(modules: int, tmp_path: Path):
    command = [sys.executable, "-X", "importtime", "-m", "jobs.suite", "--dry-run"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.endswith("| jobs\n"))
        for _ in range(modules):
            process.stderr.readline()
        process.send_signal(signal.SIGINT)
        told = [line for line in process.stderr if not line.startswith("import time:")]
        process.wait(30)
    assert (process.returncode, "".join(told).split()) == (130, GOES_ON.split())


@pytest.mark.parametrize("kind", ["one class", "broken", "empty split", "missing", "nothing"])
def test_what_cannot_be_packed_is_named(enter_command: Command, tmp_path: Path, kind: str):
    pets = tmp_path / "pets"
    if kind == "one class":
        image_folder(pets, ("cat",))
    elif kind == "broken":
        (image_folder(pets) / "cat" / "torn é.jpg").write_bytes(b"torn")
    elif kind == "empty split":
        (image_folder(pets, splits=("train",)) / "test").mkdir()
    elif kind == "nothing":
        pets.mkdir()
    says = {
        "one class": "has one class, cat",
        "broken": "cat/torn é.jpg",
        "empty split": "the split test is empty",
        "missing": "there is no such folder, tar or zip",
        "nothing": "holds no images",
    }[kind]
    refused(enter_command, "pack", "pets", "--source", pets, "--to", tmp_path / "packed", code=3, says=says)


def test_a_dataset_without_a_source_is_answered_with_the_remedies(enter_command: Command):
    done = refused(enter_command, "pack", "pets", code=3, says="no source for pets", env={"IMGCLS_SOURCES": ""})
    for remedy in ("--source PATH", "data/sources/", "IMGCLS_SOURCES", "--source synthetic"):
        assert remedy in done.stderr


@pytest.mark.slow
def test_verify_names_the_damaged_set_and_passes_the_whole_one(enter_command: Command, packed: Path, tmp_path: Path):
    copy = shutil.copytree(packed, tmp_path / "data")
    whole = enter_command("pack", "--verify", copy)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("whole") == 2
    shard = copy / "cifar10" / "test-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    refused(enter_command, "pack", "--verify", copy, code=3, says="cifar10/test-00000.tar: SHA-256 is")


def test_a_cluster_that_does_not_answer_is_named(run_command: Command, packed: Path, tmp_path: Path):
    small = ("--set", "global_batch_size=16", "--set", "train_fraction=1.0")
    for address, says in (("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1"), ("head", "HOST:PORT")):
        done = run_command("train", "scratch", *small, "--data", packed, env={"RAY_ADDRESS": address})
        assert done.returncode == 3, done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "quick" / "suite.json").exists()  # nothing was begun


def test_a_suite_or_checkpoint_that_is_not_there_is_named(enter_command: Command, tmp_path: Path):
    os.makedirs(tmp_path / "runs" / "mine")
    refused(enter_command, "report", "quick", "--storage", tmp_path / "runs", code=3, says="name one of what is there: mine")
    refused(enter_command, "evaluate", tmp_path / "none", code=3, says="there is no such run")
    refused(enter_command, "predict", tmp_path / "none", "a.png", code=3, says="there is no such run")
    refused(enter_command, "predict", tmp_path / "none", code=2, says="name an IMAGE")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(enter_command, "predict", tmp_path / "empty.pt", "a.png", code=3, says="is no checkpoint of this system")
    refused(enter_command, "evaluate", tmp_path / "none", "--num-workers", "0", code=3, says="there is no such run")


def test_no_data_and_no_network_is_refused_by_pack_and_said(enter_command: Command, tmp_path: Path):
    # A proxy that does not answer stands for a network that is not there.
    nowhere = {"https_proxy": "http://127.0.0.1:9", "IMGCLS_SOURCES": ""}
    says = "cifar-10-python.tar.gz cannot be fetched"
    refused(enter_command, "pack", "cifar10", "--to", tmp_path / "packed", code=3, says=says, env=nowhere)
