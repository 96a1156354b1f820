import html
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, sync_playwright

from imgcls.catalogue import quick, transfer
from imgcls.errors import DataError
from imgcls.recipe import derive
from imgcls.records import PREDICTED, InitSource, Placement, PredictedSample, RunConfig, RunResult, Scores, SuiteResults
from imgcls.results.compare import (
    HEADER,
    Answer,
    answers,
    beside,
    command_of_best,
    most_confused,
    read_predictions,
    table_row,
)
from imgcls.results.page import render, render_search
from imgcls.search import Search, space_of
from tests.conftest import ROOT
from tests.proof.measurement import Measurement, measure
from tests.proof.records import answers_table, table_of

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
HISTORY = b"""epoch,step,lr,samples,ledger,train/loss,train/accuracy,val/samples,val/loss,val/accuracy
1,10,0.1,80,00ff,2.0,0.3,10,1.9,0.4
2,20,0.1,80,00fe,1.5,0.4,10,1.6,0.5
"""


def config(recipe, seed: int = 0, *, init: InitSource | None = None, synthetic: bool = False) -> RunConfig:
    return RunConfig(catalogue="quick", recipe=recipe, seed=seed, data_digest="c" * 64, init=init, synthetic=synthetic)


def result(recipe, accuracy: float, *, seed: int = 0, n: int = 1000, **fields) -> RunResult:
    right = round(accuracy * n)
    scores = Scores(num_samples=n, loss=1.0, accuracy=right / n, confusion=((right, 0), (n - right, 0)))
    request = {name: fields.pop(name) for name in ("init", "synthetic") if name in fields}
    return RunResult.of(
        config(recipe, seed, **request), status="finished",
        class_names=("<cat> & co", "dog"), epochs=2, steps=20, best_epoch=2, num_train=80, val=scores, test=scores,
        examples=(PredictedSample(label=0, prediction=1, probability=0.7, png_base64=PIXEL),), seconds={"fit": 12.0},
        images_per_s=100.0, checkpoint="checkpoints/step-00000020", weights_sha256="a" * 64, best_weights_sha256="b" * 64,
        num_parameters=10, versions={"torch": "2"}, hardware={"cpu": "x", "cpus": "2", "vectors": "AVX2"},
        commit="abc", **fields,
    )  # fmt: skip


def suite(*runs: RunResult, synthetic: bool = False) -> SuiteResults:
    return SuiteResults(
        id="quick", catalogue="quick", url="runs/quick", data="data/packed", synthetic=synthetic, runs=runs, seconds=1.0,
        command="python -m jobs.suite",
    )  # fmt: skip


def five(**fields) -> list[RunResult]:
    accuracies = (0.55, 0.65, 0.50, 0.52, 0.60)
    return [result(recipe, accuracy, **fields) for recipe, accuracy in zip(quick.SUITE, accuracies, strict=True)]


def predictions(*runs: RunResult, alike: bool = False) -> dict[str, bytes]:
    """As many right as the result says: on images that are hard for each run by itself, or of one recipe for all alike."""
    files = {}
    for run in runs:
        if run.test is not None:
            count, chance = run.test.num_samples, np.random.default_rng(run.seed * (not alike) + 100 * len(run.recipe.name))
            table, file = np.zeros(count, list(PREDICTED)), io.BytesIO()
            table["sample"], table["probability"] = np.arange(count), 0.75
            table["prediction"] = chance.permutation(count) >= round(run.test.accuracy * count)
            np.save(file, table)
            files[run.name] = file.getvalue()
    return files


def page_of(*runs: RunResult, synthetic: bool = False) -> str:
    return render(suite(*runs, synthetic=synthetic), {one.name: HISTORY for one in runs}, predictions(*runs), {})


def answers_of(*runs: RunResult) -> list[Answer]:
    return answers(suite(*runs), read_predictions(predictions(*runs)))


def test_seeds_that_agree_do_not_make_a_test_set_larger():
    """Two points on 3,925 images are within what other images would change, if all seeds are right on the same ones."""
    runs = [
        result(recipe, mean, seed=seed, n=3925)
        for recipe, mean in ((quick.SCRATCH, 0.62), (quick.FINETUNED, 0.64))
        for seed in range(3)
    ]
    assert answers_of(*runs)[0].verdict == "finetuned is better"
    (answer,) = answers(suite(*runs), read_predictions(predictions(*runs, alike=True)))
    assert answer.verdict == "not distinguishable by these runs"
    assert "the test set's sampling and the spread of 3 seeds" in answer.detail


def test_only_runs_on_the_same_images_are_compared():
    one, other = result(quick.SCRATCH, 0.5), result(quick.FINETUNED, 0.6)
    elsewhere = other.model_copy(update={"data_digest": "d" * 64})
    (answer,) = answers_of(one, elsewhere)
    assert (answer.verdict, "not tested on the same images" in answer.detail) == ("not answered", True)


def test_a_seed_that_kept_no_predictions_is_left_out_of_what_needs_them():
    runs = [result(r, a, seed=seed) for r, a in ((quick.SCRATCH, 0.5), (quick.FINETUNED, 0.6)) for seed in range(3)]
    kept = {name: data for name, data in predictions(*runs).items() if not name.endswith("seed0")}
    (answer,) = answers(suite(*runs), read_predictions(kept))
    assert "the spread of 2 seeds" in answer.detail
    page = render(suite(*runs), {}, kept, {})
    assert page.count("mean 0.5000") == 2
    assert ">scratch-seed0</text>" in page
    assert answers(suite(*runs), {})[0].verdict == "not answered"


def test_the_time_of_a_source_is_charged_to_what_starts_from_it():
    source = result(quick.RESNET18, 0.6).model_copy(update={"seconds": {"fit": 300.0}})
    init = InitSource(run=source.name, identity=source.digest)
    tuned, plain = result(quick.FINETUNED, 0.6, init=init), result(quick.SCRATCH, 0.5)
    (answer,) = answers_of(source, tuned, plain)
    assert "Minutes from start to end: finetuned 5.2, of which its source took 5.0; scratch 0.2." in answer.detail
    (answer,) = answers_of(tuned, plain)
    assert "finetuned 0.2 (without a source that is not here)" in answer.detail


@pytest.mark.slow
def test_transfer_is_asked_for_at_each_number_of_labels_and_has_a_figure():
    labels = {0.01: 450, 0.1: 4500, 1.0: 45000}
    runs = [
        result(arm, 0.3 + 0.1 * i + 0.2 * (arm.init.kind == "from-run")).model_copy(
            update={"num_train": labels[arm.train_fraction]}
        )
        for i, arm in enumerate(transfer.SUITE[1:])
    ]
    assert [answer.question for answer in answers_of(*runs)] == [
        f"Does transfer help, with {count} labels?" for count in ("450", "4,500", "45,000")
    ]
    page = page_of(*runs)
    assert "test accuracy against the number of labels" in page
    assert "mathdefault" not in page
    assert "test accuracy against the number of labels" not in page_of(*five())


def test_the_seeds_of_a_recipe_share_a_section():
    page = page_of(*(result(quick.SCRATCH, 0.5, seed=seed) for seed in range(3)))
    assert page.count("<h2>") == 3
    assert "<h2>scratch, 3 seeds</h2>" in page


def test_two_suites_are_compared_recipe_by_recipe_on_the_same_images():
    ours = suite(*(result(quick.SCRATCH, 0.5, seed=seed) for seed in range(3)), result(quick.FINETUNED, 0.6))
    other = derive(quick.SCRATCH, {"optimizer.lr": 0.01})
    theirs = suite(*(result(other, 0.6, seed=seed) for seed in range(3))).model_copy(update={"id": "other"})
    tables = [read_predictions(predictions(*results.runs)) for results in (ours, theirs)]
    header, scratch, finetuned = beside(ours, tables[0], theirs, tables[1])
    assert header[3:5] == ("quick", "other")
    assert scratch[:6] == ("scratch", "3", "1,000", "0.5000", "0.6000", "+0.1000")
    assert scratch[-1] == "other is better"
    assert finetuned[-1].startswith("not compared: no seed of it is finished in both")
    last = suite(result(quick.SCRATCH, 0.5, seed=9))
    apart = beside(ours, tables[0], last, read_predictions(predictions(*last.runs)))
    assert apart[1][-1].startswith("not compared: no seed of it is finished in both")
    same = beside(ours, tables[0], ours, tables[0])
    assert [row[-1] for row in same[1:]] == ["not distinguishable by these runs"] * 2


def search_page(*, synthetic: bool = False) -> str:
    search = Search(recipe=quick.BASIC_CNN, space=space_of(quick.BASIC_CNN), num_trials=4)
    trials = search.trials()
    finished = [result(trial, 0.5 + i / 10).model_copy(update={"test": None}) for i, trial in enumerate(trials[:2])]
    stopped = RunResult.of(config(trials[2]), status="stopped", error="after epoch 1 of 2: <low>")
    open_one = RunResult.of(config(trials[3]), status="open", error="not finished yet")
    results = suite(*finished, stopped, open_one, synthetic=synthetic).model_copy(update={"search": search})
    values = {finished[0].name: b"0.5", finished[1].name: b"0.6", stopped.name: b"0.7"}
    timing = b"epoch,train_s,validate_s,images_per_s,ended_at\n1,10,1,8,1000.0\n2,10,1,8,1011.0\n"
    histories = {name: HISTORY.replace(b"1.6,0.5", b"1.6," + value) for name, value in values.items()}
    return render_search(results, histories, dict.fromkeys(values, timing))


def test_the_page_of_a_search_names_the_best_trial_and_how_many_were_tried():
    page = html.unescape(search_page())
    assert "basic-cnn-001-seed0: val/accuracy 0.6000" in page, "a trial that was stopped is not the best"
    (row,) = re.findall(r'<td class="name">basic-cnn-001-seed0</td>.*?</tr>', page)
    assert ">0.6000<" in row
    assert "3 of 4 trials have begun. 2 finished, 1 stopped, 1 open." in page
    assert "python -m jobs.train --recipe runs/quick/recipe.json --data data/packed" in page
    assert page.count('class="suite-row"') == 4
    assert page.count("<svg") == 3
    assert "SYNTHETIC" not in page
    assert search_page(synthetic=True).count("SYNTHETIC") > 4


def test_a_search_without_a_trial_that_has_begun_has_a_page():
    search = Search(recipe=quick.BASIC_CNN, space=space_of(quick.BASIC_CNN), num_trials=1)
    waiting = RunResult.of(config(search.trials()[0]), status="open", error="not finished yet")
    results = suite(waiting).model_copy(update={"search": search})
    assert "1 open" in render_search(results, {}, {})
    assert "1 open" in render_search(results, {waiting.name: HISTORY}, {}), "killed before its seconds were written"


def test_runs_of_one_name_and_other_settings_are_not_seeds_of_each_other():
    other = derive(quick.SCRATCH, {"optimizer.lr": 0.01})
    runs = [result(quick.SCRATCH, 0.5), result(other, 0.6, seed=1), result(quick.FINETUNED, 0.7)]
    assert answers_of(*runs)[0].detail == "runs of scratch differ in their settings or data"
    page = page_of(*runs)
    assert "mean " not in page
    same = [run.model_copy(update={"recipe": quick.SCRATCH}) for run in runs[:2]]
    assert "mean 0.5500" in page_of(*same)
    elsewhere = same[1].model_copy(update={"data_digest": "d" * 64})
    assert "mean " not in page_of(same[0], elsewhere)


def test_the_three_questions_are_answered_with_their_intervals():
    found = answers_of(*five())
    assert [one.verdict for one in found] == [
        "resnet18 is better, by one seed",
        "not distinguishable by these runs",
        "finetuned is better, by one seed",
    ]
    assert "+10.0 points" in found[0].detail
    assert "They also differ in optimizer, length" in found[0].detail
    assert "They also differ" not in found[2].detail


def test_several_seeds_are_compared_in_pairs():
    runs = [result(r, a + 0.01 * s, seed=s) for r, a in ((quick.SCRATCH, 0.5), (quick.FINETUNED, 0.55)) for s in range(3)]
    assert "3 seeds" in answers_of(*runs)[0].detail
    assert answers_of(*runs)[0].verdict == "finetuned is better"


def test_the_command_of_a_searchs_best_trial_says_what_decides_its_bits():
    placed = Placement(num_workers=2, cpus_per_worker=0.5, gpus_per_worker=0.0)
    best = result(quick.BASIC_CNN, 0.5, seed=2**32 - 1, placement=placed)
    search = Search(recipe=quick.BASIC_CNN, space=space_of(quick.BASIC_CNN), num_trials=1)
    flags = "--seed 4294967295 --num-workers 2 --cpus-per-worker 0.5"
    assert command_of_best(suite(best).model_copy(update={"search": search})).endswith(flags)


def test_what_is_not_finished_is_not_answered():
    waiting = RunResult.of(config(quick.RESNET18), status="open", error="not finished yet")
    found = answers_of(five()[0], waiting)
    assert [one.verdict for one in found] == ["not answered"]
    assert "resnet18 is not finished" in found[0].detail
    assert answers_of(five()[0]) == []  # what was not asked for is no question


def test_the_table_has_a_row_a_run_with_the_published_figure_beside():
    row = dict(zip(HEADER, table_row(five()[0]), strict=True))
    assert (row["run"], row["test accuracy"], row["test n"], row["published"]) == (
        "basic-cnn-seed0",
        "0.5500",
        "1,000",
        "0.6308",
    )
    blocked = dict(zip(HEADER, table_row(BLOCKED), strict=True))
    assert (blocked["status"], blocked["test accuracy"]) == ("blocked", "")


def commands(*runs: RunResult) -> list[str]:
    page = html.unescape(page_of(*runs))
    return re.findall(r"<td><code>(git checkout .*?|python -m .*?)</code>", page)


def test_a_rows_command_makes_its_recipe_again():
    changed = derive(quick.SCRATCH, {"optimizer.lr": 0.01, "dataset": "my photos"})
    command = "python -m jobs.train scratch --catalogue quick --id again --data data/packed --seed 3"
    assert commands(result(changed, 0.5, seed=3)) == [
        f"git checkout abc && {command} --set 'dataset=my photos' --set optimizer.lr=0.01"
    ]


@pytest.mark.parametrize(
    ("placement", "gpu", "flags"),
    [
        ((1, 1.0, 0.0), None, ""),
        ((1, 1.0, 1.0), "a GPU", ""),
        ((2, 2.0, 0.2), "a GPU", " --num-workers 2 --cpus-per-worker 2 --gpus-per-worker 0.2"),
        ((1, 0.5, 0.0), "a GPU", " --cpus-per-worker 0.5 --gpus-per-worker 0"),
    ],
)
def test_a_rows_command_says_what_decides_its_bits(placement: tuple[int, float, float], gpu: str | None, flags: str):
    placed = Placement(num_workers=placement[0], cpus_per_worker=placement[1], gpus_per_worker=placement[2])
    run = result(quick.SCRATCH, 0.5, placement=placed)
    command = "git checkout abc && python -m jobs.train scratch --catalogue quick --id again --data data/packed"
    assert commands(run.model_copy(update={"hardware": run.hardware | ({"gpu": gpu} if gpu else {})})) == [command + flags]


def test_a_fine_tuned_rows_command_makes_its_source_first():
    source = result(quick.RESNET18, 0.6)
    init = InitSource(run=source.name, identity=source.digest)
    again = commands(source, result(quick.FINETUNED, 0.5, init=init))[1]
    one, two = (
        f"python -m jobs.train {name} --catalogue quick --id again --data data/packed" for name in ("resnet18", "finetuned")
    )
    assert again == f"git checkout abc && {one} && {two}"


def test_the_command_of_a_recipe_from_a_file_and_of_changed_code_claims_nothing_that_is_not_so():
    mine = result(replace(quick.SCRATCH, name="mine"), 0.5).model_copy(update={"commit": "abc+changes"})
    assert commands(mine) == [
        "python -m jobs.train --recipe runs/quick/mine-seed0/config.json --catalogue quick --id again --data data/packed"
    ]


def test_a_published_figure_stands_beside_its_own_data_set_alone():
    photos, drawn = result(derive(quick.SCRATCH, {"dataset": "photos"}), 0.5), result(quick.SCRATCH, 0.5, synthetic=True)
    assert table_row(photos)[-1] == table_row(drawn)[-1] == ""


def test_a_record_holds_the_catalogue_at_one_commit_or_is_refused(tmp_path: Path):
    runs = five()
    record = measure(suite(*runs), {})
    assert [one.name for one in record.runs] == [one.name for one in runs]
    assert not any(one.examples for one in record.runs)
    (tmp_path / record.file_name).write_bytes(record.to_bytes())
    table = table_of("suite-quick", tmp_path)
    assert "| basic-cnn-seed0 | finished | 0.5500 |" in table
    assert "| scratch | unmeasured |" in table_of("suite-paper", tmp_path)
    for changes, message in (
        ({"recipe": derive(quick.BASIC_CNN, {"dataset": "photos"})}, "differ from the catalogue"),
        ({"commit": "abc+changes"}, "a figure needs one commit"),
        ({"hardware": {"cpu": "y"}}, "several kinds of hardware"),
    ):
        with pytest.raises(DataError, match=message):
            measure(suite(runs[0].model_copy(update=changes), *runs[1:]), {})
    with pytest.raises(DataError, match="SYNTHETIC"):
        measure(suite(*runs, synthetic=True), {})
    with pytest.raises(DataError, match="nothing to record"):
        measure(suite(FAILED), {})


FAILED = RunResult.of(config(quick.SCRATCH, 1), status="failed", error="it <broke>")
BLOCKED = RunResult.of(config(quick.FINETUNED, 1), status="blocked", error="its source resnet18-seed1 failed")


def test_the_page_is_one_file_and_names_what_failed():
    runs = five()
    page = page_of(*runs, FAILED, BLOCKED)
    assert "it &lt;broke&gt;" in page
    assert "its source resnet18-seed1 failed" in page
    assert "&lt;cat&gt; &amp; co" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\((?!#)""", page)
    assert "SYNTHETIC" not in page


def test_a_page_names_no_command_where_none_has_ended():
    runs = five()
    begun = suite(*runs).model_copy(update={"command": "", "seconds": 0.0})
    assert "This page: <code>python -m jobs.suite" in page_of(*runs)
    assert "This page:" not in render(begun, {one.name: HISTORY for one in runs}, predictions(*runs), {})


def test_a_synthetic_page_says_so_in_title_heading_and_table():
    page = page_of(*five(synthetic=True), synthetic=True)
    assert "<title>SYNTHETIC" in page
    assert "<h1>SYNTHETIC" in page
    assert "<th>SYNTHETIC" in page


def test_class_names_are_drawn_as_they_are_written():
    names = ("$5_to_$10", "a$b", "\\frac$x^$")
    scores = Scores(num_samples=3, loss=1.0, accuracy=0.0, confusion=((0, 1, 0), (0, 0, 1), (1, 0, 0)))
    run = result(quick.SCRATCH, 0.5).model_copy(update={"class_names": names, "test": scores})
    page = page_of(run)
    for name in names:
        assert re.search(rf"<text[^>]*>{re.escape(name)}</text>", page)


def test_the_most_frequent_mistakes_are_named_the_worst_first():
    matrix = ((5, 3, 0), (0, 9, 1), (4, 0, 0))
    scores = Scores(num_samples=22, loss=1.0, accuracy=14 / 22, confusion=matrix)
    run = result(quick.SCRATCH, 0.5).model_copy(update={"class_names": ("a", "b", "<c>"), "test": scores})
    assert run.test is not None
    assert most_confused(np.array(run.test.confusion), run.class_names) == [
        ("<c>", "a", 4, 4),
        ("a", "b", 3, 8),
        ("b", "<c>", 1, 10),
    ]
    assert "<td>&lt;c&gt;</td><td>a</td>" in page_of(run)


MANY_CLASSES = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from tests.imgcls.results.test_results import Scores, page_of, quick, result
count = 1000
matrix = tuple(tuple(40 if i == j else (i * j) % 2 for j in range(count)) for i in range(count))
scores = Scores(num_samples=10, loss=1.0, accuracy=0.5, confusion=matrix)
names = tuple(f"class {i}" for i in range(count))
run = result(quick.SCRATCH, 0.5).model_copy(update={"test": scores, "class_names": names})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
page = page_of(run)
print(len(page), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_the_page_of_a_thousand_classes_takes_little_memory():
    done = subprocess.run([sys.executable, "-c", MANY_CLASSES], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    num_bytes, kilobytes = map(int, done.stdout.split())
    assert num_bytes < 5e6
    assert kilobytes < 300e3


def test_the_page_is_drawn_whatever_the_locale():
    words = "from tests.imgcls.results.test_results import *; page_of(five()[0])"
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, cwd=ROOT, env=ascii_only, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as started, started.chromium.launch(executable_path=found, args=["--no-sandbox"]) as browser:
        yield browser


LIGHT: dict[str, Any] = {"media": "screen", "color_scheme": "light"}
DARK: dict[str, Any] = {"media": "screen", "color_scheme": "dark"}
# The last one is A4 without its margins.
SCREENS: tuple[tuple[int, dict[str, Any]], ...] = (
    *((width, scheme) for width in (390, 1440) for scheme in (LIGHT, DARK)),
    (718, {"media": "print"}),
)


@pytest.mark.parametrize("what", ["seeds", *(pytest.param(one, marks=pytest.mark.slow) for one in ("five", "search"))])
def test_a_browser_shows_each_row_on_screen_and_paper_and_all_can_read_it(browser: Browser, tmp_path: Path, what: str):
    from axe_playwright_python.sync_playwright import Axe  # cannot be imported where the locale knows ASCII only

    runs = {"five": five(), "seeds": [one for seed in range(3) for one in five(seed=seed)]}
    (tmp_path / "report.html").write_text(page_of(*runs[what]) if what in runs else search_page())
    said = list[str]()
    with browser.new_context(offline=True) as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(error.message))
        page.goto((tmp_path / "report.html").as_uri())
        assert page.locator(".suite-row").count() == (len(runs[what]) if what in runs else 4)
        assert page.locator("svg:not([role=img][aria-label]), img:not([alt])").count() == 0
        for width, emulated in SCREENS:
            page.emulate_media(**emulated)
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{width} px, {emulated}"
            if (width, emulated) in ((390, DARK), (1440, LIGHT)):
                found = Axe().run(page)
                assert found.violations_count == 0, found.generate_report()
    assert said == []


def test_a_table_of_numerics_compares_runs_that_followed_each_other(tmp_path: Path):
    def one(numerics: str, num_workers: int, rate: float):
        placement = Placement(num_workers=num_workers, cpus_per_worker=1, gpus_per_worker=0)
        made = result(derive(quick.RESNET18, {"numerics": numerics}), 0.5)
        return made.model_copy(update={"placement": placement, "images_per_s": rate})

    rates = [("ddp", 100.0), ("elastic", 80.0), ("ddp", 50.0), ("elastic", 45.0), ("ddp", 100.0), ("elastic", 70.0)]
    runs = tuple(one(numerics, 2, rate) for numerics, rate in rates)
    record = Measurement(subject="numerics", claim="x", command="y", date="2026-01-01", seconds=1.0, runs=runs)
    (tmp_path / record.file_name).write_bytes(record.to_bytes())
    assert "| 2 | 100 | 70 | 0.80 | 3 |" in table_of("numerics", tmp_path)


def test_a_record_of_several_seeds_has_a_row_a_recipe_and_the_answers_in_words(tmp_path: Path):
    arms = ((quick.SCRATCH, 0.5), (quick.FINETUNED, 0.6))
    runs = [result(recipe, 0.01 * seed + accuracy, seed=seed) for recipe, accuracy in arms for seed in range(3)]
    took = {run.name: 60.0 for run in runs}
    record = measure(suite(*runs).model_copy(update={"took": took}), read_predictions(predictions(*runs)))
    (tmp_path / record.file_name).write_bytes(record.to_bytes())
    older = measure(suite(result(quick.BASIC_CNN, 0.4), result(quick.SCRATCH, 0.4)), {}).model_copy(
        update={"date": "2020-01-01"}
    )
    (tmp_path / older.file_name).write_bytes(older.to_bytes())
    table = table_of("suite-quick", tmp_path)
    assert "| scratch, 3 seeds | finished | 0.5100 |" in table
    assert "| basic-cnn-seed0 | finished | 0.4000 |" in table
    assert "| resnet18 | unmeasured |" in table
    assert "scratch-seed0" not in table
    assert table.count("[Record](docs/measurements/suite-quick_") == 2
    assert table.count(": 0.0 min without packing") == table.count("several commands, one after another") == 1
    said = answers_table(tmp_path, catalogue="quick")
    assert said.startswith("- **Does transfer help?** finetuned is better. finetuned minus scratch: +10.0 points")
    assert "![" not in said
    (tmp_path / record.file_name).with_suffix(".svg").write_text("<svg/>")
    assert "](measurements/suite-quick_2cpu-avx2_" in answers_table(tmp_path, catalogue="quick")
    assert answers_table(tmp_path, catalogue="paper") == "Unmeasured."


def test_a_record_of_a_search_has_its_trials_the_stopped_ones_too_and_is_told_from_a_suites(tmp_path: Path):
    search = Search(recipe=quick.BASIC_CNN, space=space_of(quick.BASIC_CNN), num_trials=3)
    first, second, third = search.trials()
    stopped = RunResult.of(config(third), status="stopped", error="after epoch 1 of 2: <low>")
    found = suite(stopped, result(first, 0.5), result(second, 0.6)).model_copy(update={"search": search})
    record = measure(found, {})
    (tmp_path / record.file_name).write_bytes(record.to_bytes())
    assert record.file_name.startswith("search-basic-cnn_2cpu-avx2_")
    rows = [row.strip("| ").split(" | ") for row in table_of("search-basic-cnn", tmp_path).splitlines()[2:5]]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("basic-cnn-001-seed0", "0.6000", "finished"),
        ("basic-cnn-000-seed0", "0.5000", "finished"),
        ("basic-cnn-002-seed0", "", "after epoch 1 of 2: <low>"),
    ]
    assert f"optimizer.lr {second.optimizer.lr}" in rows[0][5]
    with pytest.raises(DataError, match="differ from the catalogue or the trials"):
        measure(found.model_copy(update={"runs": (result(quick.SCRATCH, 0.5), *found.runs)}), {})
    waiting = RunResult.of(config(third), status="open")
    with pytest.raises(DataError, match="trials that are not over"):
        measure(found.model_copy(update={"runs": (*found.runs[1:], waiting)}), {})
