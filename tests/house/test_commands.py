"""Every command in the papers is one that the real command line parses, and one that a test or CI runs."""

import ast
import functools
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tyro

from imgcls import records, storage
from imgcls.catalogue import CATALOGUES
from imgcls.records import SuiteResults
from imgcls.runs import SuiteFolder
from imgcls.training import environment
from imgcls.training.evaluate import evaluate
from imgcls.training.weights import find_model
from imgcls.training.world import World
from tests.conftest import ROOT, Command, image_folder
from tests.proof.measurement import Measurement, where_of
from tests.proof.records import PublishedRecord

PAPERS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "infra/README.md", "sandbox/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
DOORS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if not path.stem.startswith("_"))

RUNS, SUBMISSION = "tests/system/test_runs.py", "tests/system/test_submission.py"
OWN = f"{RUNS}::test_own_images_are_packed_trained_and_evaluated"
ENDINGS = f"{SUBMISSION}::test_the_exit_code_is_the_entry_points"
SELF = "tests/house/test_commands.py"
RUN_BY = {
    "jobs.pack": OWN,
    "jobs.train": OWN,
    "jobs.evaluate": OWN,
    "jobs.predict": OWN,
    "jobs.audit": "tests/imgcls/training/test_audit.py",
    "jobs.search": "tests/system/test_searches.py",
    "jobs.export": "tests/imgcls/training/test_export.py",
    "jobs.suite": f"{RUNS}::test_without_data_and_network_the_suite_says_so_and_takes_procedural_images",
    "jobs.report": f"{RUNS}::test_the_suite_of_five_on_s3_outlives_its_workers_runs_to_its_page_and_is_not_run_twice",
    "jobs.doctor": "tests/system/test_doctor.py",
    "jobs.render": "tests/jobs/test_render.py",
    "jobs.submit run": f"{SUBMISSION}::test_no_secret_is_anywhere_that_others_see",
    "jobs.submit follow": ENDINGS,
    "jobs.submit status": ENDINGS,
    "jobs.submit stop": ENDINGS,
    "jobs.bench record": f"{SELF}::test_a_record_is_written_from_a_suites_results",
    "jobs.bench readme": f"{SELF}::test_the_tables_of_the_papers_are_written",
    "jobs.bench calibrate": f"{SELF}::test_this_machine_is_calibrated",
    "jobs.bench published": f"{SELF}::test_the_last_weights_are_tested_beside_the_published_figures",
    "jobs.bench numerics": f"{SELF}::test_elastic_numerics_are_measured_beside_ddp",
    "jobs.bench gpu": f"{SELF}::test_what_is_wanted_of_a_gpu_is_tried_without_one",
    "jobs.bench speed": "tests/speed/test_speed.py::test_the_command_measures_loaders_and_leaves_a_record_and_tables",
    "sandbox.s3": "tests/imgcls/test_s3.py::test_a_server_for_trying_out_keeps_what_it_was_given",
    "make test-all": ".ci/run",
}
"""The file, or the test in it, that runs a command."""
ONLY_PARSED = {
    "jobs.bench faults": "takes an hour, and wants a commit without changes; a part of `make proof`",
    "pytest": "proofs that take minutes, and want a commit without changes; a part of `make proof`",
    "pip": "installs what `bench speed data` compares with, TensorBoard, or MLflow's client",
    "make run": "its recipe is `jobs.suite --pack`, which .ci/run runs",
    "make test": "its recipe is a part of that of `make test-all`",
    "make check": "a prerequisite of `make test-all`",
    "make setup": "a prerequisite of `make test-all`",
    "make readme": "its recipe is `jobs.bench readme`",
    "make proof": "takes hours; .ci/run runs tests/proof with fewer kills",
}


def commands_of(paper: Path) -> Iterator[tuple[str, ...]]:
    """Words of the commands in the paper's code, without those of records: ("jobs.train", "resnet18", ...).

    An optional part is taken, as in `[--split val]`; N and F are a number.
    """
    text = re.sub(r"<!-- table.*?<!-- end -->", "", paper.read_text(), flags=re.DOTALL)
    fences = re.findall(r"^```(?:sh)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`((?:python -m|make) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for block in [*fences, *inline]:
        variables = {f"${name}": value for name, value in re.findall(r'^(\w+)="(.*)"$', block, flags=re.MULTILINE)}
        for line in re.findall(r"^.*python -m .*|^make .*", block, flags=re.MULTILINE):
            for variable, value in variables.items():
                line = line.replace(variable, value)
            words = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", line), comments=True)
            words = ["1" if word in ("N", "F") else word for word in words]
            if words[0] == "make":
                yield tuple(words[: words.index("&&")] if "&&" in words else words)
            else:
                words = words[words.index("python") + 2 :]
                yield tuple(words)
                name, *rest = words[words.index("--") + 1 :] if "--" in words else [""]
                if name in DOORS:  # a job's command
                    yield f"jobs.{name}", *rest


COMMANDS = sorted({command for paper in PAPERS for command in commands_of(paper)})
NAMES = sorted({" ".join(words[: 2 if words[0] in ("jobs.submit", "jobs.bench", "make") else 1]) for words in COMMANDS})


def only_parsed(command: Callable[..., Any]) -> Callable[..., int]:
    """A function with the command's flags that does nothing but look at the recipes and fields that it is given."""
    if isinstance(command, functools.partial):
        return functools.partial(only_parsed(command.func), *command.args)

    @functools.wraps(command)
    def parsed(*positional: Any, **named: Any) -> int:
        from jobs._request import Flags, chosen

        names = named.get("recipes") or next((value for value in positional if isinstance(value, str)), None)
        for flags in (value for value in (*positional, *named.values()) if isinstance(value, Flags)):
            if names != "RECIPE" and not flags.recipe:
                chosen(flags, tuple(names.split(",")) if names else None)
        return 0

    return parsed


@pytest.fixture
def parse(enter_command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Enters a door of jobs/ up to where its command would begin."""
    door = importlib.import_module("jobs._door")
    enter = door.enter

    def parse_only(command: Callable[..., int] | Mapping[str, Callable[..., int]]) -> None:
        several = isinstance(command, Mapping)
        enter({name: only_parsed(one) for name, one in command.items()} if several else only_parsed(command))

    monkeypatch.setattr(door, "enter", parse_only)
    return enter_command


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0].startswith("jobs.")], ids=" ".join)
def test_a_command_in_the_papers_is_parsed(parse: Command, words: tuple[str, ...]):
    door = words[0].removeprefix("jobs.")
    assert door in DOORS
    done = parse(door, *words[1:])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words", [("train", "resnet18", "--colour", "red"), ("suite", "--set", "colour=1"), ("submit", "follow"), ("bench", "x")]
)
def test_a_command_that_does_not_exist_is_not_parsed(parse: Command, words: tuple[str, ...]):
    assert parse(*words).returncode == 2


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0].startswith("sandbox")], ids=" ".join)
def test_a_command_of_the_sandbox_in_the_papers_is_parsed(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    cli = tyro.cli
    monkeypatch.setattr(tyro, "cli", lambda command, **options: cli(only_parsed(command), **options))
    monkeypatch.setattr(sys, "argv", [*words])
    runpy.run_module(words[0], run_name="__main__")


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "make"], ids=" ".join)
def test_a_target_in_the_papers_is_in_the_makefile(words: tuple[str, ...]):
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_command_in_the_papers_is_run_by_a_test_or_said_not_to_be(name: str):
    assert (name in RUN_BY) != (name in ONLY_PARSED), f"name in RUN_BY the test that runs {name}, or why none does"
    if name in RUN_BY:
        file, _, test = RUN_BY[name].partition("::")
        text = (ROOT / file).read_text()
        if test:
            functions = {node.name: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
            text = ast.get_source_segment(text, functions[test]) or ""
        for word in name.removeprefix("jobs.").split():
            is_word = re.compile(rf"""(^|["' ]){re.escape(word)}["'\s]""", re.MULTILINE)
            assert is_word.search(text), f"{RUN_BY[name]} does not run {name}"


def test_the_tables_of_the_papers_are_written(enter_command: Command, tmp_path: Path):
    for paper in PAPERS:
        copy = tmp_path / paper.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        tables = re.compile(r"(<!-- table [\w-]+ -->\n).*?(<!-- end -->)", re.DOTALL)
        copy.write_text(tables.sub(r"\1\2", paper.read_text()))
    assert enter_command("bench", "readme").returncode == 0
    for paper in PAPERS:
        assert (tmp_path / paper.relative_to(ROOT)).read_text() == paper.read_text(), "run `make readme`"


def record_in(root: Path, subject: str) -> Measurement:
    """The newest under this root."""
    file = sorted(root.glob(f"docs/measurements/{subject}*.json"))[-1]
    return Measurement.from_bytes(file.read_bytes(), where=str(file))


@pytest.mark.parametrize("catalogue", ["quick", "transfer"])
def test_a_record_is_written_from_a_suites_results(enter_command: Command, tmp_path: Path, catalogue: str):
    runs, folder = record_in(ROOT, "suite-quick_2cpu").runs, tmp_path / "runs" / "again"
    if catalogue == "transfer":
        arms = {arm: {"num_train": 450 * (1 + i // 2)} for i, arm in enumerate(CATALOGUES["transfer"][1:])}
        runs = tuple(
            runs[0].model_copy(update={"recipe": arm, "name": f"{arm.name}-seed0", "catalogue": "transfer", **count})
            for arm, count in arms.items()
        )
    results = SuiteResults(
        id="again", catalogue=catalogue, url=str(folder), data="data/packed", synthetic=False, runs=runs, seconds=1.0,
        command="python -m jobs.suite --id again",
    )  # fmt: skip
    folder.mkdir(parents=True)
    records.write(results, str(folder / "results.json"))
    done = enter_command("bench", "record", "again")
    assert done.returncode == 0, done.stderr
    assert record_in(tmp_path, f"suite-{catalogue}").runs == runs
    assert len(list(tmp_path.glob("docs/measurements/*.svg"))) == (catalogue == "transfer")
    refused = enter_command("bench", "published", "again")
    assert (refused.returncode, "is not of the catalogue paper" in refused.stderr) == (3, True), refused.stderr


@pytest.mark.slow
def test_the_last_weights_are_tested_beside_the_published_figures(
    run_command: Command, enter_command: Command, tmp_path: Path
):
    for name, classes in (("packed", ("cat", "dog")), ("others", ("cow", "dog"))):
        images = image_folder(tmp_path / f"images-{name}", classes, count=100)
        assert enter_command("pack", "imagenette", "--source", images, "--to", f"data/{name}").returncode == 0
    env = {"IMGCLS_COMMIT": "0123456789ab", "IMGCLS_CACHE": str(tmp_path / "cache"), "RAY_ADDRESS": ""}
    done = run_command("suite", "--catalogue", "paper", "--recipes", "basic-cnn", "--id", "paper", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_command("bench", "published", "paper", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("docs/measurements/published-paper*.json")
    (row,) = PublishedRecord.from_bytes(file.read_bytes(), where=str(file)).rows
    run = SuiteFolder(str(tmp_path / "runs" / "paper")).run("basic-cnn-seed0")
    result = run.result()
    assert result is not None
    assert (row.best_epochs, row.last_epochs) == ((result.best_epoch,), (result.epochs,))
    for estimate, step in ((row.best, ""), (row.last, f"step-{result.steps:08d}")):
        place = storage.join(run.checkpoints_url, step) if step else run.url
        scores = evaluate(find_model(place), data_url=str(tmp_path / "data" / "packed"), split="test", world=World())
        assert estimate.center == pytest.approx(scores.accuracy)
    assert run_command("bench", "published", "paper", "--data", "data/others", env=env).returncode == 3
    changed = run_command("bench", "published", "paper", env=env | {"IMGCLS_COMMIT": "0123456789ab+changes"})
    assert (changed.returncode, "a figure needs one commit" in changed.stderr) == (3, True), changed.stderr


@pytest.mark.slow
def test_this_machine_is_calibrated(run_command: Command, packed: Path, tmp_path: Path):
    shutil.copytree(packed, tmp_path / "data" / "packed")
    done = run_command("bench", "calibrate", env={"IMGCLS_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout
    assert (tmp_path / "cache" / "rates.json").exists()


@pytest.mark.skipif("not config.option.proof", reason="make proof: it trains four times")
def test_elastic_numerics_are_measured_beside_ddp(run_command: Command, tmp_path: Path):
    images = image_folder(tmp_path / "images", count=1200)  # a record is not of synthetic ones
    assert run_command("pack", "imagenette", "--source", images).returncode == 0
    env = {"IMGCLS_COMMIT": "0123456789ab", "RAY_ADDRESS": ""}
    done = run_command("bench", "numerics", "--repeats", "1", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [run.recipe.numerics for run in record_in(tmp_path, "numerics").runs] == ["ddp", "elastic"] * 2


@pytest.mark.slow
def test_what_is_wanted_of_a_gpu_is_tried_without_one(run_command: Command, packed: Path, tmp_path: Path):
    small = tmp_path / "gpu" / f"{where_of(environment.hardware())}-small"
    shutil.copytree(packed, small / "packed")
    done = run_command("bench", "gpu", "--small", "--seconds", "20", "--to", "gpu", env={"RAY_ADDRESS": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same command goes on with them" in done.stdout
    assert list(small.glob("gpu-device_*.json"))
