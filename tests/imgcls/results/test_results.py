import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from imgcls.catalogue import quick
from imgcls.recipe import derive
from imgcls.records import Example, RunConfig, RunResult, Scores, SuiteResults
from imgcls.results.compare import HEADER, answers, table_row
from imgcls.results.page import render
from imgcls.results.statistics import accuracy_interval, difference_interval, paired_interval, seeds_interval

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
HISTORY = b"""epoch,step,lr,samples,ledger,train/loss,train/accuracy,val/samples,val/loss,val/accuracy
1,10,0.1,80,00ff,2.0,0.3,10,1.9,0.4
2,20,0.1,80,00fe,1.5,0.4,10,1.6,0.5
"""


def config(recipe, seed: int = 0) -> RunConfig:
    return RunConfig(catalogue="quick", recipe=recipe, seed=seed, data_digest="c" * 64, init=None)


def result(recipe, accuracy: float, *, seed: int = 0, n: int = 1000, **fields) -> RunResult:
    right = round(accuracy * n)
    scores = Scores(num_samples=n, loss=1.0, accuracy=right / n, confusion=((right, 0), (n - right, 0)))
    return RunResult.of(
        config(recipe, seed), status="finished",
        class_names=("<cat> & co", "dog"), epochs=2, steps=20, best_epoch=2, num_train=80, val=scores, test=scores,
        examples=(Example(label=0, prediction=1, probability=0.7, png_base64=PIXEL),), seconds={"fit": 12.0},
        images_per_s=100.0, checkpoint="checkpoints/step-00000020", weights_sha256="a" * 64, best_weights_sha256="b" * 64,
        num_parameters=10, versions={"torch": "2"}, hardware={"cpu": "x"}, commit="abc", **fields,
    )  # fmt: skip


def suite(*runs: RunResult, synthetic: bool = False) -> SuiteResults:
    return SuiteResults(
        id="quick", catalogue="quick", synthetic=synthetic, runs=runs, seconds=1.0, command="python -m jobs.suite"
    )


def five(**fields) -> list[RunResult]:
    accuracies = (0.55, 0.65, 0.50, 0.52, 0.60)
    return [result(recipe, accuracy, **fields) for recipe, accuracy in zip(quick.SUITE, accuracies, strict=True)]


def test_wilsons_interval_is_the_textbooks():
    found = accuracy_interval(81, 263)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_the_published_standard_error_fits():
    found = accuracy_interval(2355, 3925)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(0.0078, abs=2e-4)


def test_newcombes_interval_is_his_own_example():
    found = difference_interval((56, 70), (48, 80))
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


def test_seeds_have_students_interval():
    found = seeds_interval([0.1, 0.2, 0.3])
    assert found.center == pytest.approx(0.2)
    assert found.high - found.center == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert paired_interval([0.2, 0.4], [0.1, 0.2]).center == pytest.approx(0.15)


def test_the_three_questions_are_answered_with_their_intervals():
    found = answers(suite(*five()))
    assert [one.verdict for one in found] == ["resnet18 is better", "not decided by these runs", "finetuned is better"]
    assert "+10.0 points" in found[0].detail
    assert "They also differ in optimizer, length" in found[0].detail
    assert "differ" not in found[2].detail


def test_several_seeds_are_compared_in_pairs():
    runs = [result(r, a + 0.01 * s, seed=s) for r, a in ((quick.SCRATCH, 0.5), (quick.FINETUNED, 0.55)) for s in range(3)]
    assert "3 seeds" in answers(suite(*runs))[2].detail


def test_what_is_not_finished_is_not_answered():
    found = answers(suite(*five()[:1]))
    assert found[0].verdict == "not answered"
    assert "resnet18 is not finished" in found[0].detail


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


def test_a_rows_command_makes_its_recipe_again():
    changed = derive(quick.SCRATCH, {"optimizer.lr": 0.01, "dataset": "my photos"})
    page = render(suite(result(changed, 0.5, seed=3)), {})
    command = (
        "python -m jobs.train scratch --catalogue quick --seed 3 --set &#39;dataset=my photos&#39; --set optimizer.lr=0.01"
    )
    assert f"git checkout abc &amp;&amp; {command}" in page


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
