"""Results -> one self-contained HTML page: template, style and figures lie beside this file."""

import csv
import io
import json
import shlex
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from imgcls.catalogue import CATALOGUES
from imgcls.catalogue.published import PUBLISHED
from imgcls.recipe import changes_between
from imgcls.records import RunResult, SuiteResults
from imgcls.results.compare import answers, finished, interval_of
from imgcls.results.page import figures


def render(results: SuiteResults, histories: dict[str, bytes]) -> str:
    """histories: each run's history.csv, by run."""
    here = files("imgcls.results.page")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "right": lambda examples: [one for one in examples if one.label == one.prediction],
        "wrong": lambda examples: [one for one in examples if one.label != one.prediction],
    }
    template = environment.from_string((here / "template.html").read_text())
    curves = {name: _rows(data) for name, data in histories.items()}
    done = results.finished
    return template.render(
        results=results,
        style=(here / "style.css").read_text(),
        answers=answers(results),
        published=PUBLISHED,
        intervals={name: interval_of(list(runs.values())) for name, runs in _by_recipe(results).items()},
        accuracy_figure=figures.accuracies(_by_recipe(results), PUBLISHED) if done else "",
        curves={one.name: figures.curves(curves[one.name]) for one in done if one.name in curves},
        confusions={one.name: figures.confusion(one) for one in done},
        done=done,
        problems=[run for run in results.runs if run.status != "finished"],
        commands={one.name: _command(results.id, one) for one in done},
    )


def _by_recipe(results: SuiteResults) -> dict[str, dict[int, RunResult]]:
    names = dict.fromkeys(run.recipe.name for run in results.runs)
    return {name: runs for name in names if (runs := finished(results, name))}


def _rows(data: bytes) -> list[dict[str, float]]:
    rows = csv.DictReader(io.StringIO(data.decode()))
    return [{name: float(value) for name, value in row.items() if name != "ledger"} for row in rows]


def _command(suite: str, result: RunResult) -> str:
    """What gives this row again, at its commit, from the same packed data; `suite` is the folder of its suite."""
    words = ["python", "-m", "jobs.train", result.recipe.name, "--catalogue", result.catalogue]
    words += ["--seed", str(result.seed)] if result.seed else []
    base = next((one for one in CATALOGUES[result.catalogue] if one.name == result.recipe.name), None)
    if base is None:
        words[3:4] = ["--recipe", f"{suite}/{result.name}/config.json"]
    else:
        for path, value in changes_between(base, result.recipe).items():
            words += ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]
    if result.init is not None and "/" in result.init.run:
        words += ["--init-from", result.init.run]
    if result.placement is not None and result.placement.num_workers > 1:
        words += ["--num-workers", str(result.placement.num_workers)]
    at = f"git checkout {result.commit.removesuffix('+changes')} && " if result.commit and result.commit != "unknown" else ""
    return at + shlex.join(words)
