"""Runs on an MLflow server: MLflow's own client, and in place of a server its store of files."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imgcls.catalogue import quick
from imgcls.errors import RecipeError, StorageError
from imgcls.records import RunResult
from imgcls.results.tracking import log_to_mlflow
from tests.conftest import ROOT
from tests.imgcls.results.test_results import HISTORY, config, result, suite

pytest.importorskip("mlflow")

TIMING = b"epoch,train_s,validate_s,ended_at,images_per_s\n1,2.0,1.0,1000.5,40\n2,2.0,1.0,1003.5,40\n"
FIRST_EPOCH = HISTORY[: HISTORY.index(b"2,20")]
RUN = result(quick.SCRATCH, 0.625)
OPEN = RunResult.of(config(quick.SCRATCH), status="open", error="not finished yet")
FAILED = RunResult.of(config(quick.SCRATCH), status="failed", error="it failed")


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow refuses new ones
    return (tmp_path / "mlruns").as_uri()


def log(uri: str, run: RunResult, history: bytes = HISTORY, timing: bytes = TIMING) -> None:
    log_to_mlflow(suite(run, result(quick.BASIC_CNN, 0.5)), {run.name: history}, {run.name: timing}, uri)


def tracked_at(uri: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("quick")
    assert experiment is not None
    return [
        (run, client.get_metric_history(run.info.run_id, "val/loss"))
        for run in client.search_runs([experiment.experiment_id])
    ]


BEFORE = {
    "nothing": [],
    "its first epoch": [(OPEN, FIRST_EPOCH)],
    "a failure": [(FAILED, FIRST_EPOCH), (OPEN, FIRST_EPOCH)],
    "all of it": [(RUN, HISTORY)],
}


@pytest.mark.parametrize("before", BEFORE)
def test_a_run_is_there_once_with_each_epoch_once_whatever_was_logged_before(uri: str, before: str):
    for earlier, history in BEFORE[before]:
        log(uri, earlier, history)
        ((tracked, losses),) = tracked_at(uri)
        assert (tracked.info.run_name, tracked.info.start_time, len(losses)) == (
            "scratch-seed0",
            997500,
            history.count(b",00f"),
        )
        assert tracked.info.status == {"open": "RUNNING", "failed": "FAILED"}.get(earlier.status, "FINISHED")
    log(uri, RUN)
    ((tracked, losses),) = tracked_at(uri)
    assert [(one.step, one.value, one.timestamp) for one in losses] == [(10, 1.9, 1000500), (20, 1.6, 1003500)]
    assert (tracked.data.metrics["test/accuracy"], tracked.data.params["optimizer.lr"]) == (0.625, "0.002")
    assert (tracked.info.status, tracked.info.end_time) == ("FINISHED", 1003500)
    assert tracked.data.tags["imgcls.weights_sha256"] == "a" * 64


def test_the_same_request_run_at_another_time_is_another_run(uri: str):
    log(uri, RUN)
    log(uri, result(quick.SCRATCH, 0.5), timing=TIMING.replace(b",100", b",200"))
    assert sorted(run.data.metrics["test/accuracy"] for run, _ in tracked_at(uri)) == [0.5, 0.625]


def test_a_run_whose_parameters_were_cut_off_gets_them_the_next_time(uri: str, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            log(uri, RUN)
    log(uri, RUN)
    ((tracked, _),) = tracked_at(uri)
    assert tracked.data.params["optimizer.lr"] == "0.002"


@pytest.mark.parametrize("timing", [b"", TIMING[: TIMING.index(b"2,2.0")]])
def test_epochs_whose_times_are_lost_are_logged_too(uri: str, timing: bytes):
    log(uri, RUN, timing=timing)
    ((_, losses),) = tracked_at(uri)
    assert [one.step for one in losses] == [10, 20]


@pytest.mark.parametrize("address", ["127.0.0.1:5000", "", "http://user:secretpw@127.0.0.1", "sqlite:///x.db", "http://"])
def test_an_address_that_cannot_be_one_is_refused_and_not_shown(address: str):
    with pytest.raises(RecipeError, match="no address of a tracking server, or holds a password") as refused:
        log_to_mlflow(suite(), {}, {}, address)
    assert "secretpw" not in str(refused.value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://[::1"])
def test_a_server_that_does_not_answer_is_named(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StorageError, match=r"--mlflow: .*\n  do: look at the address"):
        log_to_mlflow(suite(), {}, {}, address)


def test_a_folder_that_cannot_be_written_is_named(uri: str, tmp_path: Path):
    (tmp_path / "mlruns").write_text("a file")
    with pytest.raises(StorageError, match=r"--mlflow: .*mlruns.*\n  do: look at the address"):
        log_to_mlflow(suite(), {}, {}, uri)


SILENT = """
import socket, sys
def no_network(*address, **_):
    print("asked for", address, file=sys.stderr)
    raise OSError("no network here")
socket.getaddrinfo = no_network
from tests.imgcls.results.test_tracking import RUN, log
log(sys.argv[1], RUN)
import time
time.sleep(2)
"""


@pytest.mark.slow
def test_mlflow_is_told_not_to_report_its_use_and_says_nothing(uri: str, tmp_path: Path):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MLFLOW_DISABLE"))}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SILENT, uri], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, "asked for" in done.stderr) == (0, "", False), done.stderr
    assert len(tracked_at(uri)) == 1
