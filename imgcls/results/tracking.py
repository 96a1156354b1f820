"""Results -> runs on an MLflow server, beside the page. Called by `jobs.report --mlflow`; the runs know nothing of it."""

import os
import re
from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING

from imgcls.errors import RecipeError, StorageError, first_line
from imgcls.recipe import leaves
from imgcls.records import RunResult, SuiteResults
from imgcls.training.history import METRICS, read_csv

if TYPE_CHECKING:
    from mlflow import MlflowClient

EPOCHS = "imgcls.epochs"
"""The tag that counts the epochs that were logged."""
STATUSES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""By default it waits for 120 s, eight times."""
Rows = list[dict[str, float]]
"""As `read_csv` reads them."""


def log_to_mlflow(results: SuiteResults, histories: dict[str, bytes], timings: dict[str, bytes], uri: str) -> None:
    """Each run of at least one epoch is one of MLflow's experiment `<id>`: its recipe, its history, its test scores.

    Called again it adds what is new. histories, timings: as CSV, of each run that has them.
    Raises RecipeError without the extra `mlflow`, StorageError where the server does not answer or refuses.
    """
    if not re.fullmatch(r"https?://[^@/]+(/.*)?|file:/.+|databricks(://.+)?", uri):
        remedy = "http://HOST:PORT, https://..., file:///FOLDER or databricks; credentials by MLFLOW_TRACKING_TOKEN"
        raise RecipeError(f"--mlflow: this is no address of a tracking server, or holds a password\n  do: {remedy}")
    os.environ.update({"MLFLOW_DISABLE_TELEMETRY": "true", **TIMEOUTS, **os.environ})
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ModuleNotFoundError as error:
        raise RecipeError(f"--mlflow: {error}\n  do: pip install 'mlflow-skinny>=3'") from None
    try:
        with redirect_stdout(StringIO()):  # it says the address of each run that ends
            client = MlflowClient(uri)
            there = client.get_experiment_by_name(results.id)
            experiment_id = there.experiment_id if there else client.create_experiment(results.id)
            for run in results.runs:
                if rows := read_csv(histories.get(run.name, b"")):
                    _log(client, experiment_id, run, rows, read_csv(timings.get(run.name, b"")))
    except (MlflowException, OSError, ValueError) as error:
        remedy = "look at the address, at MLFLOW_TRACKING_TOKEN, and whether the experiment was deleted there"
        raise StorageError(f"--mlflow: {first_line(error)}\n  do: {remedy}") from None


def _log(client: "MlflowClient", experiment_id: str, run: RunResult, rows: Rows, times: Rows) -> None:
    """times: may be short after a power cut; the last known one stands for those that are missing."""
    from mlflow.entities import Metric, Param, RunTag

    ended_ms = [round(1000 * time["ended_at"]) for time in times] or [0]
    ended_ms += [ended_ms[-1]] * (len(rows) - len(ended_ms))
    began_ms = ended_ms[0] - round(1000 * (times[0]["train_s"] + times[0]["validate_s"])) if times else 0
    # The request, and when it was carried out: the same one may have been run twice.
    tags = {"imgcls.digest": run.digest, "imgcls.first_epoch_ms": str(ended_ms[0])}
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    found = client.search_runs([experiment_id], wanted, max_results=1)
    tracked = found[0] if found else client.create_run(experiment_id, began_ms, tags, run.name)
    run_id, done = tracked.info.run_id, int(tracked.data.tags.get(EPOCHS, 0))
    if not tracked.data.params:
        facts = {"seed": run.seed, "data_digest": run.data_digest, "synthetic": run.synthetic} | leaves(run.recipe.to_json())
        client.log_batch(run_id, params=[Param(name, str(value)) for name, value in facts.items()])
    for row, at_ms in [*zip(rows, ended_ms, strict=False)][done:]:
        metrics = [Metric(name, row[name], at_ms, int(row["step"])) for name in METRICS]
        client.log_batch(run_id, metrics, tags=[RunTag(EPOCHS, f"{row['epoch']:.0f}")])
    if tracked.info.status == (status := STATUSES.get(run.status, "RUNNING")):
        return
    scores = {"loss": run.test.loss, "accuracy": run.test.accuracy} if run.test else {}
    facts = {"weights_sha256": run.weights_sha256, "commit": run.commit, "checkpoint": run.checkpoint}
    metrics = [Metric(f"test/{name}", value, ended_ms[-1], run.steps) for name, value in scores.items()]
    client.log_batch(run_id, metrics, tags=[RunTag(f"imgcls.{name}", value) for name, value in facts.items() if value])
    client.set_terminated(run_id, status, ended_ms[-1])
