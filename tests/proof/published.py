"""`bench published`: our figures beside the published ones, on the best checkpoint and on the last weights.

Three of the published scripts tested the last weights; a run here is tested on its best checkpoint by val/loss. This
measures what that choice does to the figure: the last checkpoint of each run is tested too.
"""

from collections.abc import Callable
from datetime import date

import numpy as np

from cluster.carry.run import silence_libraries
from imgcls import records, storage
from imgcls.catalogue.published import PUBLISHED
from imgcls.errors import DataError
from imgcls.records import RunResult, SuiteResults
from imgcls.results.compare import Predictions, groups, hits_of, published_beside, read_predictions
from imgcls.results.statistics import accuracy, difference
from imgcls.runs import RunFolder, SuiteFolder
from imgcls.training import environment
from imgcls.training.checkpoints import CheckpointStore
from imgcls.training.evaluate import evaluated
from imgcls.training.weights import Model, find_model
from imgcls.training.world import World
from tests.proof.measurement import check_commit, measure
from tests.proof.records import BesidePublished, PublishedRecord


def beside_published(suite: SuiteFolder, data_url: str, say: Callable[[str], None]) -> PublishedRecord:
    """Of a suite of the catalogue `paper`. Raises DataError where a figure would not be honest."""
    storage.check_places(reads=[suite.url, data_url])
    results = records.read(SuiteResults, suite.results_url)
    tables = read_predictions(suite.predictions(results))
    runs = measure(results, tables).runs  # it refuses what is changed, synthetic, or of several machines
    names = {run.name for run in runs}
    for run in runs:
        own_source = run.init is None or run.init.run in names
        if run.catalogue != "paper" or published_beside(run) is None or not own_source or run.name not in tables:
            raise DataError(
                f"{results.id}: {run.name} is not of the catalogue paper on the published images, starts from another run's "
                "weights, or has not kept what it predicted\n  do: python -m jobs.suite --catalogue paper --id OTHER"
            )
    check_commit({environment.commit() or "unknown"}, "bench published")
    silence_libraries(verbose=False)
    rows = list[BesidePublished]()
    for group in groups(results):
        rows.append(_row(suite, [*group.values()], tables, data_url))
        say(f"{rows[-1].recipe}: last minus best {rows[-1].last_minus_best.center:+.4f}")
    return PublishedRecord(
        subject="published-paper",
        command=f"python -m jobs.bench published {results.id}",
        date=date.today().isoformat(),
        commit=runs[0].commit or "unknown",
        versions=runs[0].versions,
        hardware=runs[0].hardware,
        rows=tuple(rows),
    )


def _row(suite: SuiteFolder, runs: list[RunResult], tables: Predictions, data_url: str) -> BesidePublished:
    """All tested again here, so that best and last differ in the weights alone."""
    tested = {run.name: _tested(suite.run(run.name), run, tables[run.name], data_url) for run in runs}
    best, last = (hits_of(runs, [tested[run.name][which] for run in runs]) for which in (0, 1))
    assert best is not None
    assert last is not None
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


def _tested(folder: RunFolder, run: RunResult, table: np.ndarray, data_url: str) -> tuple[np.ndarray, np.ndarray]:
    """What the best and the last weights predict. Raises DataError where the best ones do not do so as the run says."""
    store = CheckpointStore(folder.checkpoints_url)
    last = next(reversed(store.committed()), None)
    if last is None or (last.step, last.run_digest) != (run.steps, run.digest):
        raise DataError(f"{store.url} lacks the checkpoint of the run's last step, {run.steps}")
    best, of_last = (_predictions(find_model(place), data_url) for place in (folder.model_url, store.place(last.step)))
    if not np.array_equal(best[["sample", "label", "prediction"]], table[["sample", "label", "prediction"]]):
        raise DataError(
            f"{run.name}, tested again on {data_url}, predicts otherwise than it did\n"
            "  do: name the data that it was trained on with --data, on a machine of the kind where it ran"
        )
    return best, of_last


def _predictions(source: Model, data_url: str) -> np.ndarray:
    with environment.threads(1):  # as a worker has
        return evaluated(source, data_url=data_url, split="test", world=World(accelerator="auto")).predicted
