"""Recipes -> Ray Tune runs, by `decide`. A single run is a suite of one.

Comes in: a `Request`. Goes out: the suite's results, from the runs' own records. The suite's state is its storage:
the same request again does what is left, whoever made it and wherever it stopped.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster import attempts, session
from cluster import placement as placements
from cluster.decide import Asked, Done, End, State, Status, blocked_by, decide, start_order
from cluster.lease import Leases, leases, when_answered
from cluster.plan import Plan, Request, extended
from cluster.run import Assignment, record_failure, told, trial
from imgcls import records, storage
from imgcls.data.cache import check_room
from imgcls.errors import DataError
from imgcls.records import Manifest, Placement, RunConfig, RunResult, SuiteRecord, SuiteResults
from imgcls.training.environment import commit

if TYPE_CHECKING:
    from cluster.searcher import View


def run_suite(request: Request, plan: Plan, *, view: "View", command: str) -> SuiteResults:
    """Every run of the plan is finished, failed, or blocked by a failed one; the suite's records say so.

    Raises StorageError where nothing can be written, CheckpointError where a run of the same name differs, and
    PlacementError where the workers can never run: all before anything is written.
    """
    began = time.monotonic()
    state = state_of(request, plan)
    for run, status in state.statuses.items():
        if status is not Status.OPEN:
            view.already(run, status)
    record = extended(read_suite(request.suite_url), request, plan)
    if isinstance(decide(state, Asked(room=1))[1], Done):
        write_down(request, plan, record)
        return publish(request.suite_url)
    if not session.names_cluster():
        # Refused before Ray starts, where it will be.
        choose(request, [placements.local_node()])
        check_room(_caches(request, plan, state))
    mine = {run: request.run_url(run) for run, status in state.statuses.items() if status is Status.OPEN}
    with leases(mine, command=state.command, say=view.say) as held:
        for run_url in mine.values():
            storage.clean_temporary(run_url)
        with session.session(verbose=request.verbose):
            placement = choose(request, placements.cluster_nodes())
            write_down(request, plan, record)
            # As it is now that nobody else is at it.
            state = replace(state_of(request, plan), command=state.command)
            _carry_out(request, plan, state, held, placement, view)
    return publish(request.suite_url, seconds=round(time.monotonic() - began, 1), command=command)


def _caches(request: Request, plan: Plan, state: State) -> Iterator[tuple[str, Manifest, int, int]]:
    """What the open runs train on."""
    for name, config in plan.configs.items():
        if state.statuses[name] is Status.OPEN:
            recipe, into = config.recipe, config.recipe.input
            set_url = storage.join(request.data_url, recipe.dataset)
            yield set_url, plan.manifests[recipe.dataset], into.stored_px, into.channels


def choose(request: Request, nodes: list[placements.Node]) -> Placement:
    return placements.choose(
        nodes,
        num_workers=request.num_workers,
        cpus_per_worker=request.cpus_per_worker,
        gpus_per_worker=request.gpus_per_worker,
    )


def state_of(request: Request, plan: Plan) -> State:
    """What each run came to so far, in the order in which they start; for a command of its own."""
    found = {name: status_of(request.run_url(name)) for name in start_order(plan.sources)}
    if request.retry_failed:
        found = {name: Status.OPEN if status is Status.FAILED else status for name, status in found.items()}
    return State(
        command=secrets.token_hex(8), max_failures=request.max_failures, statuses=found, sources=plan.sources
    )  # fmt: skip


def write_down(request: Request, plan: Plan, record: SuiteRecord) -> None:
    """What is asked for lies in the suite's folder; with `retry_failed` the failures are gone."""
    for name, config in plan.configs.items():
        target = storage.join(request.run_url(name), "config.json")
        if storage.read_bytes_if_there(target) != records.sealed(config):
            records.write(config, target)
    # After them: each run that it names has its config.
    records.write(record, storage.join(request.suite_url, "suite.json"))
    if request.retry_failed:
        for name in plan.configs:
            if status_of(request.run_url(name)) is Status.FAILED:
                storage.delete(storage.join(request.run_url(name), "result.json"))


def read_suite(suite_url: str) -> SuiteRecord | None:
    return records.read_if_there(SuiteRecord, storage.join(suite_url, "suite.json"))


def status_of(run_url: str) -> Status:
    return _status(result_of(run_url))


def _carry_out(request: Request, plan: Plan, state: State, held: Leases, placement: Placement, view: "View") -> None:
    from ray import tune

    from cluster.searcher import LeaseStopper, PlanSearcher, ProgressCallback

    searcher = PlanSearcher(
        state,
        room=lambda: placements.how_many_fit(placements.cluster_nodes(), placement),
        look=lambda run: when_answered(lambda: attempts.look(request.run_url(run))),
        failed=lambda run, reason: record_failure(plan.configs[run], request.run_url(run), reason),
        view=view,
    )
    session.keep_credentials_here()
    carried = tune.with_parameters(trial, assignments=_assignments(request, plan, state.command, placement))
    with storage.temporary_folder("tune") as folder, _storage_named(held):
        tune.Tuner(
            tune.with_resources(carried, {"CPU": 0, "node:__internal_head__": 0.001}),
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1),
            run_config=tune.RunConfig(
                name=storage.name_of(folder),
                storage_path=folder,
                verbose=0,
                stop=LeaseStopper(searcher, held),
                callbacks=[ProgressCallback(view)],
                # The bound on Train's restarts and these together is `decide`'s.
                failure_config=tune.FailureConfig(max_failures=request.max_failures),
            ),
        ).fit()


@contextmanager
def _storage_named(held: Leases) -> Iterator[None]:
    """Where storage answers no more it is that, and not what Tune made of it."""
    try:
        yield
    except Exception:
        held.check_answered()
        raise


def _assignments(request: Request, plan: Plan, command: str, placement: Placement) -> dict[str, str]:
    environment = told(commit())
    return {
        name: Assignment(
            command=command,
            config=config,
            data_url=request.data_url,
            run_url=request.run_url(name),
            placement=placement,
            keeping=request.keeping,
            accept_different_numerics=request.accept_different_numerics,
            max_failures=request.max_failures,
            hang_timeout_s=request.hang_timeout_s,
            verbose=request.verbose,
            environment=environment,
        ).model_dump_json()
        for name, config in plan.configs.items()
    }


def publish(suite_url: str, *, seconds: float | None = None, command: str | None = None) -> SuiteResults:
    """The suite's results from its runs' records; `results.json` and `report.html` lie beside them.

    seconds, command: of the work that was just done; where there was none, what the results said before stays.
    """
    from imgcls.results.page import render

    url = storage.join(suite_url, "results.json")
    suite = records.read(SuiteRecord, storage.join(suite_url, "suite.json"))
    if command is None and (before := records.read_if_there(SuiteResults, url)):
        seconds, command = before.seconds, before.command
    results = read_results(suite_url, suite, seconds=seconds or 0.0, command=command or "")
    records.write(results, url)
    storage.write_bytes(storage.join(suite_url, "report.html"), render(results, histories(suite_url, results)).encode())
    return results


def histories(suite_url: str, results: SuiteResults) -> dict[str, bytes]:
    """Each run's history.csv, where it has one. Raises DataError where a finished run's is another than was written."""
    found = {}
    for run in results.runs:
        url = storage.join(suite_url, run.name, "history.csv")
        data = storage.read_bytes_if_there(url)
        if data is None:
            continue
        if run.history_sha256 not in (None, storage.sha256(data)):
            raise DataError(f"{url} was altered: its SHA-256 is not the one in result.json\n  do: bring it back")
        found[run.name] = data
    return found


def read_results(suite_url: str, suite: SuiteRecord, *, seconds: float, command: str) -> SuiteResults:
    configs = {name: records.read(RunConfig, storage.join(suite_url, name, "config.json")) for name in suite.runs}
    found = {name: result_of(storage.join(suite_url, name)) for name in suite.runs}
    statuses = {name: _status(result) for name, result in found.items()}
    blocked = blocked_by(statuses, {name: config.source_run for name, config in configs.items()})
    return SuiteResults(
        id=suite.id,
        catalogue=suite.catalogue,
        synthetic=suite.synthetic,
        url=storage.shown(suite_url),
        data=storage.shown(suite.data),
        runs=tuple(
            result or _unfinished(configs[name], storage.join(suite_url, name), blocked.get(name))
            for name, result in found.items()
        ),
        seconds=seconds,
        command=command,
    )


def _unfinished(config: RunConfig, run_url: str, failed_source: str | None) -> RunResult:
    if failed_source:
        return RunResult.of(config, status="blocked", error=f"its source {failed_source} failed")
    before = attempts.look(run_url).attempts
    refused = before[-1].error if before and before[-1].end is End.REFUSED else None
    return RunResult.of(config, status="open", error=refused or "not finished yet: the same command goes on")


def result_of(run_url: str) -> RunResult | None:
    return records.read_if_there(RunResult, storage.join(run_url, "result.json"))


def _status(result: RunResult | None) -> Status:
    if result is None:
        return Status.OPEN
    return Status.FINISHED if result.status == "finished" else Status.FAILED
