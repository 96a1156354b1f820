"""Results -> one self-contained HTML page. Templates, style and figures lie beside this file."""

import json
import shlex
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from imgcls.catalogue import CATALOGUES
from imgcls.recipe import changes_between, leaves
from imgcls.records import RunResult, SuiteResults
from imgcls.results import compare
from imgcls.results.page import figures
from imgcls.runs import SuiteFolder
from imgcls.training.history import read_csv

TEMPLATES = Environment(
    loader=PackageLoader(__name__, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


@figures.styled
def render(
    results: SuiteResults, histories: dict[str, bytes], predictions: dict[str, bytes], audits: dict[str, list[str]]
) -> str:
    """histories, predictions: of each run that has them, as `RunFolder` reads them. audits: what each found, by run."""
    tables = compare.read_predictions(predictions)
    estimated = compare.estimates(results, tables)
    published = {run.recipe.name: figure for run in results.runs if (figure := compare.published_beside(run))}
    return TEMPLATES.get_template("suite.html").render(
        results=results,
        answers=compare.answers(results, tables),
        published=published,
        intervals={run.name: estimate for runs, estimate in estimated for run in runs},
        accuracy_figure=figures.accuracies(estimated, published) if results.finished else "",
        labels_figure=figures.labels(estimated, compare.transfers(results.runs)),
        sections=[_section([*group.values()], histories, tables) for group in compare.groups(results)],
        audits=audits,
        commands={run.name: _command(results, run) for run in results.finished},
    )


def _section(runs: list[RunResult], histories: dict[str, bytes], tables: compare.Predictions) -> dict[str, Any]:
    """Of one recipe: its finished seeds together."""
    title = runs[0].name if len(runs) == 1 else f"{runs[0].recipe.name}, {len(runs)} seeds"
    rows = [read_csv(histories[run.name]) for run in runs if run.name in histories]
    predicted = [tables[run.name] for run in runs if run.name in tables]
    matrix, names = np.sum([run.test.confusion for run in runs if run.test], axis=0), runs[0].class_names
    return {
        "title": title,
        "runs": runs,
        "curves": figures.curves(rows, title) if rows else "",
        "reliability": figures.reliability(np.concatenate(predicted), title) if predicted else "",
        "confusion": figures.confusion(matrix, names, title),
        "confused": compare.most_confused(matrix, names),
    }


@figures.styled
def render_search(results: SuiteResults, histories: dict[str, bytes], timings: dict[str, bytes]) -> str:
    """Of a search. histories, timings: as CSV, of each trial that has them."""
    search, best, trials = results.search, results.best, list[dict[str, Any]]()
    assert search is not None
    for run in results.runs:
        rows = read_csv(histories.get(run.name, b""))
        kept = min(rows, key=lambda row: row["val/loss"], default=None)
        values = leaves(asdict(run.recipe))
        fields = [values.get(path) for path in sorted(search.space)]
        trial = {"run": run, "best": run is best, "value": kept and kept[search.metric], "fields": fields}
        trials.append(trial | {"rows": rows, "timing": read_csv(timings.get(run.name, b""))})
    shown = [trial for trial in trials if trial["rows"]]
    return TEMPLATES.get_template("search.html").render(
        results=results,
        command=best and compare.command_of_best(results),
        counts=Counter(run.status for run in results.runs),
        trials=trials,
        curves=figures.trials(shown, search.metric) if shown else "",
        progress=figures.best_so_far(shown, search) if shown else "",
        parallel=figures.parallel(shown, search) if shown else "",
    )


def _command(results: SuiteResults, run: RunResult) -> str:
    """The command that repeats this run under the id `again`, at its commit, on the same packed data; its source's first."""
    base = next((recipe for recipe in CATALOGUES[run.catalogue] if recipe.name == run.recipe.name), None)
    recipe = [run.recipe.name] if base else ["--recipe", SuiteFolder(results.url).run(run.name).config_url]
    words = ["python", "-m", "jobs.train", *recipe, "--catalogue", run.catalogue, "--id", "again", "--data", results.data]
    words += compare.flags_of(run)
    for path, value in changes_between(base, run.recipe).items() if base else ():
        words += ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]
    source = next((other for other in results.finished if run.init is not None and other.name == run.init.run), None)
    if source is not None:
        return f"{_command(results, source)} && {shlex.join(words)}"
    words += ["--init-from", run.init.run] if run.init else []
    clean = run.commit and run.commit != "unknown" and not run.commit.endswith("+changes")
    return f"git checkout {run.commit} && {shlex.join(words)}" if clean else shlex.join(words)
