"""`bench published`: our figures beside the published ones, on the best checkpoint and on the last weights.

The published scripts tested the last weights; a run here is tested on its best checkpoint by val/loss. This measures what
that choice does to the figure: the last checkpoint of each run is tested too.
"""

from datetime import date

import numpy as np

from imgcls import records, storage
from imgcls.catalogue import paper
from imgcls.catalogue.published import PUBLISHED
from imgcls.data.cache import open_cache
from imgcls.data.shards import read_manifest
from imgcls.data.splits import split_ids
from imgcls.errors import DataError
from imgcls.records import RunResult, SuiteResults
from imgcls.results.compare import groups, hits_of, published_beside, read_predictions
from imgcls.results.measurement import check_commit
from imgcls.results.statistics import Hits, accuracy, difference
from imgcls.runs import SuiteFolder
from imgcls.training import environment
from imgcls.training.checkpoints import CheckpointStore
from imgcls.training.predict import Predictor
from imgcls.training.weights import Model, find_model
from tests.proof.records import BesidePublished, PublishedRecord

AT_ONCE = 250


def beside_published(suite: SuiteFolder, data_url: str) -> PublishedRecord:
    """Raises DataError where a figure would not be honest, or no run has a published figure beside it."""
    results = records.read(SuiteResults, suite.results_url)
    tables, rows, used = read_predictions(suite.predictions(results)), list[BesidePublished](), list[RunResult]()
    for group in groups(results):
        runs = [run for run in group.values() if run.recipe in paper.SUITE and published_beside(run)]
        best = hits_of(runs, [tables[run.name] for run in runs]) if runs else None
        if best is None:
            continue
        last = np.stack([hits_of_last(suite, run, data_url) for run in runs])
        rows.append(_row(runs, best, last))
        used += runs
    if not rows:
        raise DataError(f"{suite.url} has no finished run of the catalogue paper on the published images")
    check_commit({run.commit or "unknown" for run in used}, results.id)
    return PublishedRecord(
        subject=f"published-{results.catalogue}",
        command=f"python -m jobs.bench published {results.id}",
        date=date.today().isoformat(),
        commit=used[0].commit or "unknown",
        versions=environment.versions(),
        hardware=used[0].hardware,
        rows=tuple(rows),
    )


def _row(runs: list[RunResult], best: Hits, last: Hits) -> BesidePublished:
    return BesidePublished(
        recipe=runs[0].recipe.name,
        published=PUBLISHED[runs[0].recipe.name].accuracy,
        seeds=tuple(run.seed for run in runs),
        best_epochs=tuple(run.best_epoch or 0 for run in runs),
        last_epochs=tuple(run.epochs for run in runs),
        best=accuracy(best),
        last=accuracy(last),
        last_minus_best=difference(last, best),
    )


def hits_of_last(suite: SuiteFolder, run: RunResult, data_url: str) -> Hits:
    """Which test images the weights of the run's last step have right, in the order of the sample ids."""
    store = CheckpointStore(suite.run(run.name).checkpoints_url)
    last = store.last()
    if last is None or last.step != run.steps:
        raise DataError(f"{store.url} lacks the checkpoint of the run's last step, {run.steps}")
    return hits_of_model(find_model(store.place(last.step)).model, data_url)


def hits_of_model(model: Model, data_url: str) -> Hits:
    recipe, predictor = model.recipe, Predictor(model)
    set_url = storage.join(data_url, recipe.dataset)
    manifest = read_manifest(set_url)
    cache = open_cache(set_url, manifest, px=recipe.input.stored_px, channels=recipe.input.channels)
    test = split_ids(recipe, manifest).test
    parts = (test[begin : begin + AT_ONCE] for begin in range(0, len(test), AT_ONCE))
    named = [top[0][0] for ids in parts for top in predictor.top([*cache.images[ids]], 1)]
    return np.array(named) == np.array(model.class_names)[cache.labels[test]]
