"""What a suite and its runs leave: every name in their folders, and the typed records behind the names. No policy.

<storage>/<id>/                                     SuiteFolder
    suite.json  results.json  report.html           of a search recipe.json too, the best of its trials
    <recipe>-seed<N>/                               RunFolder
        config.json  result.json                    the request, and what it came to
        history.csv  timing.csv  log.txt  events.out.tfevents.*  model.pt
        audits/00001.json                           by whoever checked the run when it was over
        predictions.npy                             of each test sample, columns as in `records.PREDICTED`
        checkpoints/step-00000268/                  CheckpointFolder
            checkpoint.ckpt  committed.json         the data, and the marker, which is written last
        attempts/00001/began.json                   by rank 0, when the run goes on
                       rank-0.json                  by a rank that could say how the attempt ended
        leases/00001.json                           by its command alone; the command of the newest number holds the run
"""

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Literal

from imgcls import records, storage
from imgcls.catalogue import CATALOGUES
from imgcls.errors import DataError
from imgcls.records import Audit, Lease, Record, RunConfig, RunResult, SuiteRecord, SuiteResults

LOG_TAIL_LINES = 20
WORK = ("seconds", "command", "predicted_s", "predicted", "took")
"""Fields of `SuiteResults` that say what the last command did."""


class End(Enum):
    """How an attempt ended."""

    UNKNOWN = "unknown"
    """Nobody could say: killed, or under way."""
    CRASHED = "crashed"
    PREEMPTED = "preempted"
    """Its node was about to be taken away; whatever came then is not counted."""
    REFUSED = "refused"
    """It would have gone on under other numerics, which nobody has accepted."""


class Began(Record):
    command: str
    at: str
    host: str
    pid: int


class Ending(Record):
    end: End
    error: str = ""
    step: int = 0
    trace: str = ""


class CheckpointFacts(Record):
    """What the writer of a checkpoint knows of it."""

    step: int
    epoch: int
    """Whole epochs behind it."""
    best_step: int | None
    """Of the best epoch's checkpoint, which is needed when training ends; None before an epoch has ended."""
    finished: bool
    """Nothing is left to train."""
    run_digest: str
    numerics: dict[str, str]
    """What decides the last bits beside the request, see `environment.numerics`."""


class Committed(CheckpointFacts):
    """The marker: what the checkpoint beside it is."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a run, as its records say."""

    command: str
    end: End = End.UNKNOWN
    error: str = ""
    step: int = 0
    """At which it crashed."""


@dataclass(frozen=True, slots=True)
class RunState:
    """What is committed of one run."""

    result: Literal["finished", "failed", "stopped"] | None = None
    attempts: tuple[Attempt, ...] = ()
    holder: str | None = None
    """The command that holds the run's lease; None too where that cannot be read."""
    damage: str = ""
    """Why no attempt can be counted, where a record is damaged, or of another version."""


class Place(str):
    """A name in a folder; asked of the folder, it is the URL of what has that name."""

    def __get__(self, folder: "Folder", kind: type) -> str:
        return storage.join(folder.url, self)


@dataclass(frozen=True)
class Folder:
    url: str


class CheckpointFolder(Folder):
    DATA = "checkpoint.ckpt"
    data_url = Place(DATA)
    _marker_url = Place("committed.json")

    def marker(self) -> Committed | None:
        return records.read_if_there(Committed, self._marker_url)

    def commit(self, marker: Committed) -> None:
        records.write(marker, self._marker_url)

    def delete(self) -> None:
        """The marker goes first: a kill in between leaves a folder that nobody reads."""
        storage.delete(self._marker_url)
        storage.delete(self.url)


class RunFolder(Folder):
    CONFIG, RESULT, MODEL = "config.json", "result.json", "model.pt"
    EVENTS = "events.out.tfevents."
    config_url = Place(CONFIG)
    result_url = Place(RESULT)
    model_url = Place(MODEL)
    history_url = Place("history.csv")
    timing_url = Place("timing.csv")
    predictions_url = Place("predictions.npy")
    log_url = Place("log.txt")
    checkpoints_url = Place("checkpoints")

    @property
    def name(self) -> str:
        return storage.name_of(self.url)

    @property
    def suite(self) -> "SuiteFolder":
        return SuiteFolder(self.url.rstrip("/").rpartition("/")[0])

    def config(self) -> RunConfig | None:
        return records.read_if_there(RunConfig, self.config_url)

    def create_config(self, config: RunConfig) -> bool:
        """False where one lies there already."""
        return not storage.exists(self.config_url) and storage.create_bytes(self.config_url, records.sealed(config))

    def result(self) -> RunResult | None:
        return records.read_if_there(RunResult, self.result_url)

    def finish(self, result: RunResult) -> None:
        """An earlier result stays."""
        storage.create_bytes(self.result_url, records.sealed(result))

    def fail(self, config: RunConfig, reason: str) -> None:
        """The run is over, failed: its result says why, with the last lines of its log. An earlier result stays."""
        log = (storage.read_bytes_if_there(self.log_url) or b"").decode(errors="replace")
        lines = (*log.splitlines(), *self._last_trace().splitlines())
        self.finish(RunResult.of(config, status="failed", error=reason, log_tail=lines[-LOG_TAIL_LINES:]))

    def stop(self, config: RunConfig, reason: str) -> None:
        """The run is over, stopped by a search. An earlier result stays."""
        self.finish(RunResult.of(config, status="stopped", error=reason))

    def forget_failure(self) -> None:
        if (result := self.result()) and result.status == "failed":
            storage.delete(self.result_url)

    def history(self, result: RunResult) -> bytes | None:
        """Its history as CSV, where it has one. Raises DataError where it is another than the result says."""
        return self._checked(self.history_url, result.history_sha256)

    def predictions(self, result: RunResult) -> bytes | None:
        """What it predicted of each test sample, where that was kept. Raises DataError as `history` does."""
        return self._checked(self.predictions_url, result.predictions_sha256) if result.predictions_sha256 else None

    def _checked(self, url: str, digest: str | None) -> bytes | None:
        data = storage.read_bytes_if_there(url)
        if data is not None and digest not in (None, storage.sha256(data)):
            raise DataError(f"{url} was altered: its SHA-256 is not the one in {self.RESULT}\n  do: bring it back")
        return data

    def state(self) -> RunState:
        """Of a run that is over, its result alone."""
        holder = None
        try:
            if result := self.result():
                return RunState(result.status)  # pyright: ignore[reportArgumentType]
            holder = self.holder()
            return RunState(None, self.attempts(), holder)
        except DataError as damage:
            return RunState(None, (), holder, str(damage))

    def attempts(self) -> tuple[Attempt, ...]:
        """By their number; a folder without a beginning is a lost write."""
        return tuple(filter(None, map(self._attempt, storage.folders(storage.join(self.url, "attempts")))))

    def begin(self, command: str) -> int:
        """A new attempt of this process is on record; returns its number."""
        number = int(max(storage.folders(storage.join(self.url, "attempts")), default="0")) + 1
        at = datetime.now(UTC).isoformat(timespec="seconds")
        began = Began(command=command, at=at, host=socket.gethostname(), pid=os.getpid())
        records.write(began, storage.join(self.url, "attempts", f"{number:05d}", "began.json"))
        return number

    def end(self, number: int, ending: Ending, *, rank: int) -> None:
        """How the attempt ended is on record. What a rank said first stays: what comes after it is its consequence."""
        url = storage.join(self.url, "attempts", f"{number:05d}", f"rank-{rank}.json")
        storage.create_bytes(url, records.sealed(ending))

    def _attempt(self, name: str) -> Attempt | None:
        began = records.read_if_there(Began, storage.join(self.url, "attempts", name, "began.json"))
        ending = next(iter(self._endings(name)), Ending(end=End.UNKNOWN))
        return began and Attempt(began.command, ending.end, ending.error, ending.step)

    def _endings(self, name: str) -> list[Ending]:
        """Of all ranks that could say one: a preemption first, whoever saw it."""
        url = storage.join(self.url, "attempts", name)
        ranks = [file for file in storage.files(url) if file.startswith("rank-")]
        endings = [records.read(Ending, storage.join(url, rank)) for rank in ranks]
        return sorted(endings, key=lambda ending: ending.end is not End.PREEMPTED)

    def _last_trace(self) -> str:
        """The traceback of a rank of the last attempt, where one left it, and it is whole."""
        with suppress(DataError):
            last = max(storage.folders(storage.join(self.url, "attempts")), default="0")
            return next((ending.trace for ending in self._endings(last) if ending.trace), "")
        return ""

    def audits(self) -> list[Audit]:
        url = storage.join(self.url, "audits")
        return [records.read(Audit, storage.join(url, name)) for name in storage.files(url) if name.endswith(".json")]

    def keep_audit(self, audit: Audit) -> None:
        number = 1 + max(self.numbers("audits"), default=0)
        while not storage.create_bytes(storage.join(self.url, "audits", f"{number:05d}.json"), records.sealed(audit)):
            number += 1  # another auditor was there at the same time

    def lease_url(self, number: int) -> str:
        return storage.join(self.url, "leases", f"{number:05d}.json")

    def numbers(self, folder: str) -> list[int]:
        """Of the records in this folder of the run."""
        names = [name.removesuffix(".json") for name in storage.files(storage.join(self.url, folder))]
        return [int(name) for name in names if name.isdigit()]

    def newest_lease(self) -> tuple[int, Lease] | None:
        for number in reversed(self.numbers("leases")):
            if lease := records.read_if_there(Lease, self.lease_url(number)):
                return number, lease
        return None

    def holder(self) -> str | None:
        """The command whose lease lies there, renewed or not, and was not given back."""
        newest = self.newest_lease()
        return newest[1].command if newest and not newest[1].released else None


class SuiteFolder(Folder):
    page_url = Place("report.html")
    recipe_url = Place("recipe.json")
    record_url = Place("suite.json")
    results_url = Place("results.json")

    def run(self, name: str) -> RunFolder:
        return RunFolder(storage.join(self.url, name))

    def record(self) -> SuiteRecord | None:
        return records.read_if_there(SuiteRecord, self.record_url)

    def configs(self) -> dict[str, RunConfig]:
        """Every run that was ever asked for under the id, in the order of the catalogues, then of the seeds."""
        configs = [self.run(name).config() for name in storage.folders(self.url)]
        return {config.name: config for config in sorted(filter(None, configs), key=_rank)}

    def results(self, **work: Any) -> SuiteResults:
        """From the runs' own records. work: fields of `WORK`."""
        suite, configs = records.read(SuiteRecord, self.record_url), self.configs()
        there = {name: self.run(name).result() for name in configs}
        sources = {name: config.source_run for name, config in configs.items()}
        blocked = held_up(sources, {name for name, result in there.items() if result and result.status != "finished"})
        return SuiteResults(
            id=suite.id,
            catalogue=", ".join(dict.fromkeys(config.catalogue for config in configs.values())),
            synthetic=any(config.synthetic for config in configs.values()),
            url=storage.shown(self.url),
            data=storage.shown(suite.data),
            runs=tuple(result or self._unfinished(configs[name], blocked.get(name)) for name, result in there.items()),
            search=suite.search,
            **work,
        )

    def _unfinished(self, config: RunConfig, failed_source: str | None) -> RunResult:
        if failed_source:
            return RunResult.of(config, status="blocked", error=f"its source {failed_source} failed")
        state = self.run(config.name).state()
        refused = [attempt.error for attempt in state.attempts[-1:] if attempt.end is End.REFUSED]
        error = next(filter(None, (state.damage, *refused)), "not finished yet: the same command goes on")
        return RunResult.of(config, status="open", error=error)

    def page(self, results: SuiteResults) -> str:
        """Raises DataError where a history or what was predicted is another than its run's result says."""
        from imgcls.results.page import render, render_search

        histories = self._of_each(results, RunFolder.history)
        if results.search is not None:
            return render_search(results, histories, self._timings(results))
        audits = {run.name: [audit.told for audit in self.run(run.name).audits()] for run in results.runs}
        return render(results, histories, self.predictions(results), audits)

    def log_to_mlflow(self, results: SuiteResults, uri: str) -> None:
        """Raises as `tracking.log_to_mlflow`, and DataError as `page`."""
        from imgcls.results.tracking import log_to_mlflow

        log_to_mlflow(results, self._of_each(results, RunFolder.history), self._timings(results), uri)

    def predictions(self, results: SuiteResults) -> dict[str, bytes]:
        """By run, where they were kept. Raises DataError where they are others than the run's result says."""
        return self._of_each(results, RunFolder.predictions)

    def _timings(self, results: SuiteResults) -> dict[str, bytes]:
        return self._of_each(results, lambda run, _: storage.read_bytes_if_there(run.timing_url))

    def _of_each(self, results: SuiteResults, read: Callable[[RunFolder, RunResult], bytes | None]) -> dict[str, bytes]:
        found = {run.name: read(self.run(run.name), run) for run in results.runs}
        return {name: data for name, data in found.items() if data is not None}

    def publish(self, **work: Any) -> SuiteResults:
        """The suite's results from its runs' records; they, and the page, lie in the folder.

        work: fields of `WORK`, of a command that has just ended; without them, what the results said before stays. Other
        commands may be at work under the same id: whoever writes last has looked once more after it wrote.
        """
        if not work and (before := records.read_if_there(SuiteResults, self.results_url)):
            work = before.model_dump(include=set(WORK))
        written, results = None, self.results(**work)
        while results != written:
            records.write(results, self.results_url)
            storage.write_bytes(self.page_url, self.page(results).encode())
            if results.search is not None and results.best is not None:
                recipe = replace(results.best.recipe, name=results.search.recipe.name).to_json()
                storage.write_bytes(self.recipe_url, json.dumps({"recipe": recipe}, indent=1).encode())
            written, results = results, self.results(**work)
        return results


def held_up(sources: Mapping[str, str | None], by: set[str]) -> dict[str, str]:
    """Runs that wait, near or far, for a run in `by`, with that run."""
    waiting = {}
    for run, source in sources.items():
        while source is not None and source not in by:
            source = sources.get(source)
        if source is not None:
            waiting[run] = source
    return waiting


def _rank(config: RunConfig) -> tuple[str, int, str, int]:
    name = config.recipe.name
    names = [*(recipe.name for recipe in CATALOGUES.get(config.catalogue, ())), name]
    return config.catalogue, names.index(name), name, config.seed
