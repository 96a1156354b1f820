import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.send.staging import LIMIT_BYTES, PACKAGES, prepare
from imgcls.errors import RecipeError
from tests.conftest import ROOT

PLACES = ("--data", "s3://bucket/packed", "--storage", "s3://bucket/runs")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "there is no command"),
        (("bench", "readme"), "bench cannot be a job"),
        (("suite",), "without --data and --storage"),
        (("suite", "--data", "s3://a"), "without --storage"),
        (("suite", *PLACES[:2], "--storage", "runs"), "--storage runs is relative"),
        (("train", "scratch", *PLACES[:2], "--storage=../runs"), "--storage ../runs is relative"),
        (("train", "scratch", *PLACES, "--init_from", "runs/x"), "--init-from runs/x is relative"),
        (("pack", "pets", "--source", "pets", "--to", "s3://a"), "--source pets is relative"),
        (("evaluate", "runs/quick/scratch-seed0", "--data", "s3://a"), "CHECKPOINT runs/quick/scratch-seed0 is relative"),
        (("evaluate", "s3://runs/quick/scratch-seed0"), "evaluate without --data"),
        (("suite", *PLACES, "--recipe", "none.toml"), "there is no such file"),
        (("suite", "--data", "s3://key:word@host/a", *PLACES[2:]), "holds a secret"),
    ],
)
def test_a_command_that_could_not_work_there_is_refused_here(words: tuple[str, ...], says: str):
    with pytest.raises(RecipeError, match=says):
        prepare(words)


@pytest.mark.parametrize(
    "given",
    [
        "AWS_SECRET_ACCESS_KEY=x",
        "AWS_ACCESS_KEY_ID=x",
        "HF_TOKEN=x",
        "DB_PASSWORD=x",
        "MY_KEY=x",
        "ANYTHING=AKIAABCDEFGHIJKLMNOP",
        "URL=https://me:word@host",
        "PEM=-----BEGIN PRIVATE KEY-----",
        "COPIED=the-value-of-a-secret",
    ],
)
def test_what_looks_like_a_secret_is_refused_without_being_told(given: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_TOKEN", "the-value-of-a-secret")
    with pytest.raises(RecipeError, match="looks like a secret") as refused:
        prepare(("suite", *PLACES), env=[given])
    assert given.partition("=")[2] == "x" or given.partition("=")[2] not in str(refused.value)


@pytest.mark.parametrize("given", ["NCCL_DEBUG=WARN", "AWS_ENDPOINT_URL=http://10.0.0.1:8333", "KEYBOARD=us"])
def test_other_variables_go_with_the_job(given: str):
    name, _, value = given.partition("=")
    assert prepare(("suite", *PLACES), env=[given]).env[name] == value


def test_files_that_the_command_names_come_along_under_other_names(tmp_path: Path):
    mine, yours = tmp_path / "mine.toml", tmp_path / "other" / "mine.toml"
    yours.parent.mkdir()
    for file in (mine, yours):
        file.write_text(f"name = '{file.parent.name}'")
    job = prepare(("suite", *PLACES, "--recipe", str(mine), f"--recipe={yours}"))
    staged = tmp_path / "staged"
    job.stage(staged)
    first, second = job.words[-2], job.words[-1].removeprefix("--recipe=")
    assert first != second
    assert (staged / first).read_text() == mine.read_text()
    assert (staged / second).read_text() == yours.read_text()


def test_a_file_that_is_too_large_is_named_before_anything_is_sent(tmp_path: Path):
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * LIMIT_BYTES)
    with pytest.raises(RecipeError, match=r"the largest: given/0-large.toml \(2,000,000 bytes\)"):
        prepare(("suite", *PLACES, "--recipe", str(large)))


def test_ids_are_never_the_same():
    assert prepare(("suite", *PLACES)).id != prepare(("suite", *PLACES)).id


def test_a_checkout_full_of_other_things_is_staged_without_them(tmp_path: Path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    for large in (".venv/lib/torch.so", ".git/objects/pack", "data/packed/train.tar", "jobs/weights.pt"):
        (tmp_path / large).parent.mkdir(parents=True, exist_ok=True)
        with (tmp_path / large).open("wb") as file:
            file.truncate(2 << 30)  # a hole: takes no room
    seen = (
        "import sys, time; from pathlib import Path; from cluster.send.staging import prepare; "
        "job = prepare(('report', 'quick', '--storage', 's3://a')); job.stage(Path(sys.argv[1])); print(job.num_bytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", seen, str(tmp_path / "staged")],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    staged = {str(file.relative_to(tmp_path / "staged")) for file in (tmp_path / "staged").rglob("*") if file.is_file()}
    assert {
        "jobs/suite.py",
        "imgcls/results/page/suite.html",
        "imgcls/results/page/figures.mplstyle",
        "requirements.txt",
    } <= staged
    assert not any(one.startswith((".venv", ".git", "data")) or one.endswith(".pt") for one in staged)
    assert int(done.stdout) < LIMIT_BYTES
    help_there = [sys.executable, "-m", "jobs.suite", "--help"]  # the packages are whole
    subprocess.run(help_there, cwd=tmp_path / "staged", env={"PATH": "/usr/bin:/bin"}, check=True, capture_output=True)
