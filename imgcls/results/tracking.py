"""Results -> runs on an MLflow server, beside the page. Called by `jobs.report --mlflow`; the runs know nothing of it."""

import os
from typing import TYPE_CHECKING

from imgcls.errors import RecipeError, StorageError
from imgcls.records import RunResult, SuiteResults
from imgcls.training.history import read_csv

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGEST, EPOCHS = "imgcls.digest", "imgcls.epochs"
"""Tags: the request of the run, by which it is found again, and how many of its epochs were logged."""
METRICS = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr")
STATUSES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def log_to_mlflow(results: SuiteResults, histories: dict[str, bytes], timings: dict[str, bytes], uri: str) -> None:
    """Each run that has begun is one of MLflow's experiment `<id>`: its recipe, its history by step, its test scores.

    Called again it adds what is new. histories, timings: as CSV, of each run that has them.
    Raises RecipeError without the extra `mlflow`, StorageError where the server does not answer or refuses.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 by default, which takes minutes
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ModuleNotFoundError as error:
        raise RecipeError(f"--mlflow: {error}\n  do: pip install 'mlflow-skinny>=3'") from None
    try:
        client = MlflowClient(uri)
        there = client.get_experiment_by_name(results.id)
        experiment_id = there.experiment_id if there else client.create_experiment(results.id)
        for run in results.runs:
            if run.name in histories:
                _log(client, experiment_id, run, histories[run.name], timings.get(run.name, b""))
    except MlflowException as error:
        reason = str(error).strip().splitlines()[0]
        raise StorageError(f"--mlflow: {reason}\n  do: look at the address, and at MLFLOW_TRACKING_TOKEN") from None


def _log(client: "MlflowClient", experiment_id: str, run: RunResult, history: bytes, timing: bytes) -> None:
    from mlflow.entities import Metric, Param, RunTag

    times = read_csv(timing)
    ended_ms = [round(1000 * time["ended_at"]) for time in times]
    found = client.search_runs([experiment_id], f"tags.`{DIGEST}` = '{run.digest}'", max_results=1)
    began_ms = ended_ms[0] - round(1000 * (times[0]["train_s"] + times[0]["validate_s"])) if times else None
    tracked = found[0] if found else client.create_run(experiment_id, began_ms, {DIGEST: run.digest}, run.name)
    run_id, done = tracked.info.run_id, int(tracked.data.tags.get(EPOCHS, 0))
    if not found:
        facts = {"seed": run.seed, "data_digest": run.data_digest, "synthetic": run.synthetic}
        for name, part in run.recipe.to_json().items():
            facts |= {f"{name}.{leaf}": value for leaf, value in part.items()} if isinstance(part, dict) else {name: part}
        client.log_batch(run_id, params=[Param(name, str(value)) for name, value in facts.items()])
    for row, at_ms in [*zip(read_csv(history), ended_ms, strict=False)][done:]:
        metrics = [Metric(name, row[name], at_ms, int(row["step"])) for name in METRICS]
        client.log_batch(run_id, metrics, tags=[RunTag(EPOCHS, f"{row['epoch']:.0f}")])
    if run.status in STATUSES and tracked.info.status == "RUNNING":
        scores = {"loss": run.test.loss, "accuracy": run.test.accuracy} if run.test else {}
        facts = {"weights_sha256": run.weights_sha256, "commit": run.commit, "checkpoint": run.checkpoint}
        client.log_batch(
            run_id,
            [Metric(f"test/{name}", value, ended_ms[-1] if times else 0, run.steps) for name, value in scores.items()],
            tags=[RunTag(f"imgcls.{name}", value) for name, value in facts.items() if value],
        )
        client.set_terminated(run_id, STATUSES[run.status], ended_ms[-1] if times else None)
