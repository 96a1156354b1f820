"""Results -> one self-contained HTML page: template, style and figures lie beside this file."""

import csv
import io
import json
import shlex
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from imgcls.catalogue import CATALOGUES
from imgcls.recipe import changes_between
from imgcls.records import RunResult, SuiteResults
from imgcls.results.compare import answers, groups, interval_of, most_confused, published_beside
from imgcls.results.page import figures


def render(results: SuiteResults, histories: dict[str, bytes]) -> str:
    """histories: each run's history.csv, by run."""
    here = files("imgcls.results.page")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "right": lambda examples: [one for one in examples if one.label == one.prediction],
        "wrong": lambda examples: [one for one in examples if one.label != one.prediction],
    }
    template = environment.from_string((here / "template.html").read_text(encoding="utf-8"))
    curves = {name: _rows(data) for name, data in histories.items()}
    done = results.finished
    published = {run.recipe.name: found for run in results.runs if (found := published_beside(run))}
    return template.render(
        results=results,
        style=(here / "style.css").read_text(encoding="utf-8"),
        answers=answers(results),
        published=published,
        intervals={run.name: interval_of(group) for group in groups(results) for run in group.values()},
        accuracy_figure=figures.accuracies(groups(results), published) if done else "",
        curves={one.name: figures.curves(curves[one.name]) for one in done if one.name in curves},
        confusions={one.name: figures.confusion(one) for one in done},
        confused={one.name: most_confused(one) for one in done},
        done=done,
        problems=[run for run in results.runs if run.status != "finished"],
        commands={one.name: _command(results, one) for one in done},
    )


def _rows(data: bytes) -> list[dict[str, float]]:
    rows = csv.DictReader(io.StringIO(data.decode()))
    return [{name: float(value) for name, value in row.items() if name != "ledger"} for row in rows]


def _command(results: SuiteResults, run: RunResult) -> str:
    """What makes this row again under the id `again`, at its commit, from the same packed data; its source's row first."""
    words = [
        "python",
        "-m",
        "jobs.train",
        run.recipe.name,
        "--catalogue",
        run.catalogue,
        "--id",
        "again",
        "--data",
        results.data,
    ]
    words += ["--seed", str(run.seed)] if run.seed else []
    base = next((one for one in CATALOGUES[run.catalogue] if one.name == run.recipe.name), None)
    if base is None:
        words[3:4] = ["--recipe", f"{results.url}/{run.name}/config.json"]
    else:
        for path, value in changes_between(base, run.recipe).items():
            words += ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]
    source = next((one for one in results.finished if run.init is not None and one.name == run.init.run), None)
    if run.init is not None and source is None:
        words += ["--init-from", run.init.run]
    if run.placement is not None and run.placement.num_workers > 1:
        words += ["--num-workers", str(run.placement.num_workers)]
    if source is not None:
        return f"{_command(results, source)} && {shlex.join(words)}"
    clean = run.commit and run.commit != "unknown" and not run.commit.endswith("+changes")
    return f"git checkout {run.commit} && {shlex.join(words)}" if clean else shlex.join(words)
