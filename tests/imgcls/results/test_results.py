import html
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.catalogue import quick
from imgcls.errors import DataError
from imgcls.recipe import derive
from imgcls.records import InitSource, Placement, PredictedSample, RunConfig, RunResult, Scores, SuiteResults
from imgcls.results.compare import HEADER, answers, most_confused, table_row
from imgcls.results.measurement import Measurement, measure
from imgcls.results.page import render
from imgcls.results.statistics import _student, accuracy_interval, difference_interval
from tests.conftest import ROOT
from tests.proof.records import table_of

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
HISTORY = b"""epoch,step,lr,samples,ledger,train/loss,train/accuracy,val/samples,val/loss,val/accuracy
1,10,0.1,80,00ff,2.0,0.3,10,1.9,0.4
2,20,0.1,80,00fe,1.5,0.4,10,1.6,0.5
"""


QUANTILES = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445}
"""Of Student's distribution, at 0.975, by its degrees of freedom; from a printed table."""
NORMAL_QUANTILES = np.vectorize(NormalDist().inv_cdf)


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


def test_wilsons_interval_is_the_textbooks():
    found = accuracy_interval([(81, 263)])
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_the_published_standard_error_fits():
    found = accuracy_interval([(2355, 3925)])
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(0.0078, abs=2e-4)


def test_newcombes_interval_is_his_own_example():
    found = difference_interval([(56, 70)], [(48, 80)])
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


def test_on_a_test_set_without_end_seeds_have_students_interval():
    found = accuracy_interval([(right * 10**9, 10**10) for right in (1, 2, 3)])
    assert found.center == pytest.approx(0.2)
    assert found.high - found.center == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)


def seeds_of(most: int = 5):
    """(correct, counted) of one or more seeds on one test set, twice."""

    def on(count: int):
        right = st.integers(0, count)
        pairs = st.lists(st.tuples(right, right), min_size=1, max_size=most)
        return pairs.map(lambda some: ([(a, count) for a, _ in some], [(b, count) for _, b in some]))

    return st.integers(1, 20_000).flatmap(on)


def students(values: list[float]) -> float:
    """Half the width of Student's interval at 95%."""
    return stdev(values) / math.sqrt(len(values)) * QUANTILES[len(values) - 1] if len(values) > 1 else 0.0


@pytest.mark.parametrize(("freedom", "quantile"), [*QUANTILES.items(), (30, 2.042272), (1000, 1.962339)])
def test_students_quantile_is_that_of_a_printed_table(freedom: int, quantile: float):
    assert _student(freedom) == pytest.approx(quantile, abs=1e-6)


@given(seeds_of())
def test_an_interval_over_seeds_covers_what_each_of_its_parts_covers_and_nothing_impossible(both):
    tested, count = both[0], both[0][0][1]
    found, values = accuracy_interval(tested), [right / count for right, _ in tested]
    assert 0 <= found.low <= found.center + 1e-12
    assert found.center - 1e-12 <= found.high <= 1
    for end in (found.low, found.high):
        if 0 < end < 1:  # Wilson's ends are where the mean is 1.96 standard errors of the end away
            assert abs(found.center - end) >= 1.95996 * math.sqrt(end * (1 - end) / count) - 1e-9
            assert abs(found.center - end) >= students(values) - 1e-9


@given(seeds_of())
def test_a_difference_over_seeds_is_as_uncertain_as_each_of_its_parts(both):
    a, b = both
    found, count = difference_interval(a, b), a[0][1]
    assert -1 <= found.low <= found.center + 1e-12
    assert found.center - 1e-12 <= found.high <= 1
    values = [(i - j) / count for (i, _), (j, _) in zip(a, b, strict=True)]
    assert found.low <= max(-1, found.center - students(values)) + 1e-9
    assert found.high >= min(1, found.center + students(values)) - 1e-9
    i, j = (round(sum(right for right, _ in side) / len(side)) for side in both)
    one_seed = difference_interval([(i, count)], [(j, count)])
    if sum(right for right, _ in a) == i * len(a) and sum(right for right, _ in b) == j * len(b):
        assert found.low <= one_seed.low + 1e-9
        assert found.high >= one_seed.high - 1e-9


@pytest.mark.parametrize("alike", [0.0, 0.8])
@pytest.mark.parametrize("seeds_sd", [0.0, 0.02])
def test_the_interval_over_seeds_holds_the_true_mean_as_often_as_it_says(alike: float, seeds_sd: float):
    """alike: how much of what makes an image hard is the same for all seeds."""
    chance, count, true = np.random.default_rng(20261126), 400, (0.64, 0.62)
    held = []
    for _ in range(300):
        images, tested = chance.standard_normal(count), []
        for mean in true:
            ability = NORMAL_QUANTILES(mean + seeds_sd * chance.standard_normal((3, 1)))
            hardness = alike * images + math.sqrt(1 - alike**2) * chance.standard_normal((3, count))
            tested.append([(int(right), count) for right in (hardness < ability).sum(axis=1)])
        one, gap = accuracy_interval(tested[0]), difference_interval(*tested)
        held.append((one.low <= true[0] <= one.high, gap.low <= true[0] - true[1] <= gap.high))
    assert min(np.mean(held, axis=0)) >= 0.93


def test_seeds_that_agree_do_not_make_a_test_set_larger():
    """Half a point on 3,925 images is within what other images would change, whatever the number of seeds."""
    runs = [
        result(recipe, mean + 0.001 * seed, seed=seed, n=3925)
        for recipe, mean in ((quick.SCRATCH, 0.635), (quick.FINETUNED, 0.640))
        for seed in range(3)
    ]
    (answer,) = answers(suite(*runs))
    assert answer.verdict == "not decided by these runs"
    assert "the test set's sampling and the spread of 3 seeds" in answer.detail


def test_runs_of_one_name_and_other_settings_are_not_seeds_of_each_other():
    other = derive(quick.SCRATCH, {"optimizer.lr": 0.01})
    runs = [result(quick.SCRATCH, 0.5), result(other, 0.6, seed=1), result(quick.FINETUNED, 0.7)]
    assert answers(suite(*runs))[0].detail == "runs of scratch differ in their settings or data"
    page = render(suite(*runs), {})
    assert "mean " not in page
    same = [run.model_copy(update={"recipe": quick.SCRATCH}) for run in runs[:2]]
    assert "mean 0.5500" in render(suite(*same), {})
    elsewhere = same[1].model_copy(update={"data_digest": "d" * 64})
    assert "mean " not in render(suite(same[0], elsewhere), {})


def test_the_three_questions_are_answered_with_their_intervals():
    found = answers(suite(*five()))
    assert [one.verdict for one in found] == [
        "resnet18 is better, by one seed",
        "not decided by these runs",
        "finetuned is better, by one seed",
    ]
    assert "+10.0 points" in found[0].detail
    assert "They also differ in optimizer, length" in found[0].detail
    assert "differ" not in found[2].detail


def test_several_seeds_are_compared_in_pairs():
    runs = [result(r, a + 0.01 * s, seed=s) for r, a in ((quick.SCRATCH, 0.5), (quick.FINETUNED, 0.55)) for s in range(3)]
    assert "3 seeds" in answers(suite(*runs))[0].detail
    assert answers(suite(*runs))[0].verdict == "finetuned is better"


def test_what_is_not_finished_is_not_answered():
    waiting = RunResult.of(config(quick.RESNET18), status="open", error="not finished yet")
    found = answers(suite(five()[0], waiting))
    assert [one.verdict for one in found] == ["not answered"]
    assert "resnet18 is not finished" in found[0].detail
    assert answers(suite(five()[0])) == []  # what was not asked for is no question


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
    page = html.unescape(render(suite(*runs), {}))
    return re.findall(r"<td><code>(git checkout .*?|python -m .*?)</code>", page)


def test_a_rows_command_makes_its_recipe_again():
    changed = derive(quick.SCRATCH, {"optimizer.lr": 0.01, "dataset": "my photos"})
    command = "python -m jobs.train scratch --catalogue quick --id again --data data/packed --seed 3"
    assert commands(result(changed, 0.5, seed=3)) == [
        f"git checkout abc && {command} --set 'dataset=my photos' --set optimizer.lr=0.01"
    ]


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
    record = measure(suite(*runs))
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
            measure(suite(runs[0].model_copy(update=changes), *runs[1:]))
    with pytest.raises(DataError, match="SYNTHETIC"):
        measure(suite(*runs, synthetic=True))
    with pytest.raises(DataError, match="nothing to record"):
        measure(suite(FAILED))


FAILED = RunResult.of(config(quick.SCRATCH, 1), status="failed", error="it <broke>")
BLOCKED = RunResult.of(config(quick.FINETUNED, 1), status="blocked", error="its source resnet18-seed1 failed")


def test_the_page_is_one_file_and_names_what_failed():
    runs = five()
    page = render(suite(*runs, FAILED, BLOCKED), {one.name: HISTORY for one in runs})
    assert "it &lt;broke&gt;" in page
    assert "its source resnet18-seed1 failed" in page
    assert "&lt;cat&gt; &amp; co" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\((?!#)""", page)
    assert "SYNTHETIC" not in page


def test_a_synthetic_page_says_so_in_title_heading_and_table():
    page = render(suite(*five(synthetic=True), synthetic=True), {})
    assert "<title>SYNTHETIC" in page
    assert "<h1>SYNTHETIC" in page
    assert "<th>SYNTHETIC" in page


def test_class_names_are_drawn_as_they_are_written():
    names = ("$5_to_$10", "a$b", "\\frac$x^$")
    scores = Scores(num_samples=3, loss=1.0, accuracy=0.0, confusion=((0, 1, 0), (0, 0, 1), (1, 0, 0)))
    run = result(quick.SCRATCH, 0.5).model_copy(update={"class_names": names, "test": scores})
    page = render(suite(run), {})
    for name in names:
        assert re.search(rf"<text[^>]*>{re.escape(name)}</text>", page)


def test_the_most_frequent_mistakes_are_named_the_worst_first():
    matrix = ((5, 3, 0), (0, 9, 1), (4, 0, 0))
    scores = Scores(num_samples=22, loss=1.0, accuracy=14 / 22, confusion=matrix)
    run = result(quick.SCRATCH, 0.5).model_copy(update={"class_names": ("a", "b", "<c>"), "test": scores})
    assert most_confused(run) == [("<c>", "a", 4, 4), ("a", "b", 3, 8), ("b", "<c>", 1, 10)]
    assert "<td>&lt;c&gt;</td><td>a</td>" in render(suite(run), {})


MANY_CLASSES = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from tests.imgcls.results.test_results import Scores, quick, render, result, suite
count = 1000
matrix = tuple(tuple(40 if i == j else (i * j) % 2 for j in range(count)) for i in range(count))
scores = Scores(num_samples=10, loss=1.0, accuracy=0.5, confusion=matrix)
names = tuple(f"class {i}" for i in range(count))
run = result(quick.SCRATCH, 0.5).model_copy(update={"test": scores, "class_names": names})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
page = render(suite(run), {})
print(len(page), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_page_of_a_thousand_classes_takes_little_memory():
    done = subprocess.run([sys.executable, "-c", MANY_CLASSES], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    num_bytes, kilobytes = map(int, done.stdout.split())
    assert num_bytes < 5e6
    assert kilobytes < 300e3


def test_the_page_is_drawn_whatever_the_locale():
    words = "from tests.imgcls.results.test_results import *; render(suite(five()[0]), {})"
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, cwd=ROOT, env=ascii_only, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine")
    return found


SILENT = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr")


@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_five_rows_and_no_error(tmp_path: Path, width: int):
    runs = five()
    page = render(suite(*runs), {one.name: HISTORY for one in runs})
    probe = "<script>document.title = document.querySelectorAll('.suite-row').length + ' rows, overflow ' + "
    probe += "(document.documentElement.scrollWidth > window.innerWidth)</script></body>"
    (tmp_path / "report.html").write_text(page.replace("</body>", probe))
    options = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run(
        [chromium(), *SILENT, *OFFLINE, *options, (tmp_path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>5 rows, overflow false</title>" in done.stdout
    assert "CONSOLE" not in done.stderr


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
