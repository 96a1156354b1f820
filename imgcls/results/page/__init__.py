"""Results -> one self-contained HTML page. Template, style and figures lie beside this file."""

import csv
import io
import json
import shlex
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from imgcls.catalogue import CATALOGUES
from imgcls.recipe import changes_between
from imgcls.records import RunResult, SuiteResults
from imgcls.results.compare import answers, estimates, most_confused, published_beside, read_predictions
from imgcls.results.page import figures
from imgcls.runs import SuiteFolder


def render(
    results: SuiteResults, histories: dict[str, bytes], predictions: dict[str, bytes], audits: dict[str, list[str]]
) -> str:
    """histories, predictions: of each run that has them, as `RunFolder` reads them. audits: what each found, by run."""
    here = files("imgcls.results.page")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "right": lambda examples: [example for example in examples if example.label == example.prediction],
        "wrong": lambda examples: [example for example in examples if example.label != example.prediction],
    }
    template = environment.from_string((here / "template.html").read_text(encoding="utf-8"))
    done, tables = results.finished, read_predictions(predictions)
    estimated = estimates(results, tables)
    published = {run.recipe.name: figure for run in results.runs if (figure := published_beside(run))}
    return template.render(
        results=results,
        style=(here / "style.css").read_text(encoding="utf-8"),
        answers=answers(results, tables),
        published=published,
        intervals={run.name: estimate for runs, estimate in estimated for run in runs},
        accuracy_figure=figures.accuracies(estimated, published) if done else "",
        curves={run.name: figures.curves(_rows(histories[run.name]), run.name) for run in done if run.name in histories},
        reliability={
            run.name: figures.reliability(tables[run.name], run.name) if run.name in tables else "" for run in done
        },
        confusions={run.name: figures.confusion(run) for run in done},
        confused={run.name: most_confused(run) for run in done},
        done=done,
        problems=[run for run in results.runs if run.status != "finished"],
        audits=audits,
        commands={run.name: _command(results, run) for run in done},
    )


def _rows(data: bytes) -> list[dict[str, float]]:
    rows = csv.DictReader(io.StringIO(data.decode()))
    return [{name: float(value) for name, value in row.items() if name != "ledger"} for row in rows]


def _command(results: SuiteResults, run: RunResult) -> str:
    """The command that repeats this run under the id `again`, at its commit, on the same packed data; its source's first."""
    base = next((recipe for recipe in CATALOGUES[run.catalogue] if recipe.name == run.recipe.name), None)
    recipe = [run.recipe.name] if base else ["--recipe", SuiteFolder(results.url).run(run.name).config_url]
    words = ["python", "-m", "jobs.train", *recipe, "--catalogue", run.catalogue, "--id", "again", "--data", results.data]
    words += ["--seed", str(run.seed)] if run.seed else []
    for path, value in changes_between(base, run.recipe).items() if base else ():
        words += ["--set", f"{path}={value if isinstance(value, str) else json.dumps(value)}"]
    source = next((other for other in results.finished if run.init is not None and other.name == run.init.run), None)
    if run.init is not None and source is None:
        words += ["--init-from", run.init.run]
    if run.placement is not None and run.placement.num_workers > 1:
        words += ["--num-workers", str(run.placement.num_workers)]
    if source is not None:
        return f"{_command(results, source)} && {shlex.join(words)}"
    clean = run.commit and run.commit != "unknown" and not run.commit.endswith("+changes")
    return f"git checkout {run.commit} && {shlex.join(words)}" if clean else shlex.join(words)
