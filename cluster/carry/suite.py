"""Recipes -> Ray Tune runs, by `decide`. A single run is a suite of one.

Comes in: a `Request`. Goes out: the suite's results, from the runs' own records. The suite's state is its storage:
the same request again does what is left, whoever made it and wherever it stopped.
"""

import os
import secrets
import time
from collections.abc import Callable
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any

from cluster import placement as placements
from cluster import session
from cluster.carry import warm
from cluster.carry.decide import Done, Start, Status, SuiteState, after_end, next_start, start_order
from cluster.carry.lease import Leases, leases, when_answered
from cluster.carry.plan import Plan, Request, check_alike, check_search
from cluster.carry.run import Assignment, trial
from cluster.foretell.experience import cached_sets, forecast_of, keep_rates
from cluster.look.preflight import check_seen_by_nodes
from imgcls import records, storage
from imgcls.data.cache import check_room
from imgcls.errors import CheckpointError
from imgcls.records import Placement, SuiteRecord, SuiteResults
from imgcls.training.environment import commit
from imgcls.training.history import read_csv

if TYPE_CHECKING:
    from cluster.carry.halving import Halving
    from cluster.carry.searcher import PlanSearcher, View


def run_suite(request: Request, plan: Plan, *, view: "View", command: str) -> SuiteResults:
    """Every run of the plan is finished, failed, or blocked by a failed one; the suite's records say so.

    Raises StorageError where nothing can be written, CheckpointError where a run of the same name differs, and
    PlacementError where the workers can never run: all before anything is written.
    """
    began = time.monotonic()
    suite, state = request.suite, state_of(request, plan)
    for run, status in state.statuses.items():
        if status is not Status.OPEN:
            view.already(run, status)
    check_search(request)
    check_alike(suite.configs(), request, plan)
    if isinstance(next_start(state, room=1)[1], Done):
        write_down(request, plan)
        return suite.publish().model_copy(update={"took": {}})  # what an earlier command did is not this one's
    cached, mine = cached_sets(plan), [run for run, status in state.statuses.items() if status is Status.OPEN]
    if not session.names_cluster():  # refused before Ray starts, where it will be
        placements.choose([placements.local_node()], request.options)
        check_room((storage.join(request.data_url, decoded[0].name), *decoded) for decoded in plan.decoded_sets(mine))
    with leases([suite.run(run) for run in mine], command=secrets.token_hex(8), say=view.say) as held:
        for run in mine:
            storage.clean_temporary(suite.run(run).url)
        view.say("Ray starts")
        with session.session(verbose=request.options.verbose):
            nodes = placements.cluster_nodes(config := placements.autoscaling_config())
            placement = placements.choose(nodes, request.options)
            predicted = forecast_of(plan, state, nodes, placement)
            check_seen_by_nodes([request.data_url, request.storage_url])
            write_down(request, plan)
            searcher = _carry_out(request, plan, held, placement, config, view)
            # Drawing needs seconds of imports, of packages that Ray does not use, and Ray as many to end.
            Thread(target=import_module, args=("imgcls.results.page",)).start()
    took = {run: searcher.ended_s[run] - at for run, at in searcher.began_s.items() if run in searcher.ended_s}
    results = suite.publish(
        seconds=round(time.monotonic() - began, 1),
        command=command,
        predicted_s=predicted.seconds and round(predicted.seconds, 1),
        predicted={name: round(run.seconds, 1) for name, run in predicted.runs.items() if run.seconds is not None},
        took={name: round(seconds, 1) for name, seconds in took.items()},
    )
    if took:
        busy_s = max(searcher.ended_s.values()) - min(searcher.began_s.values())
        keep_rates(request, plan, results, cached, session_s=time.monotonic() - began - busy_s)
    return results


def state_of(request: Request, plan: Plan) -> SuiteState:
    """What each run came to so far, in the order in which they start."""
    results = {name: request.suite.run(name).result() for name in start_order(plan.sources)}
    statuses = {name: Status(result.status) if result else Status.OPEN for name, result in results.items()}
    if request.retry_failed:
        statuses = {name: Status.OPEN if status is Status.FAILED else status for name, status in statuses.items()}
    return SuiteState(statuses, plan.sources)


def write_down(request: Request, plan: Plan) -> None:
    """What is asked for lies in the suite's folder; with `retry_failed` the failures are gone.

    Raises CheckpointError where another command, at the same time, has asked for something else under these names.
    """
    suite, record = request.suite, SuiteRecord(id=request.id, data=request.data_url, search=request.search)
    storage.create_bytes(suite.record_url, records.sealed(record))  # one that lies there stays
    check_search(request)
    created = [name for name, config in plan.configs.items() if suite.run(name).create_config(config)]
    try:
        check_alike(suite.configs(), request, plan)
    except CheckpointError:
        for name in created:
            storage.delete(suite.run(name).config_url)
        raise
    for name, config in plan.configs.items():
        if name not in created and suite.run(name).config() != config:
            records.write(config, suite.run(name).config_url)  # its source's weights may lie elsewhere now
        if request.retry_failed:
            suite.run(name).forget_failure()
    records.write(record, suite.record_url)


def _carry_out(
    request: Request, plan: Plan, held: Leases, placement: Placement, config: dict[str, Any] | None, view: "View"
) -> "PlanSearcher":
    """config: `autoscaling_config`."""

    def room() -> int:
        return placements.how_many_fit(placements.cluster_nodes(config), placement)

    state = state_of(request, plan)  # as it is now that nobody else is at it
    view.connected()
    options = request.options
    session.set_train_environment(hang_timeout_s=options.hang_timeout_s)  # a part of the workers' environment
    environment, begin_workers = _begin_workers(placement)
    begin_workers(num_begun := _starting(state, room()))  # before the imports below, which take seconds
    from ray import tune

    from cluster.carry.searcher import PlanSearcher, SuiteCallback, outlive_lack_of_memory

    def ended(state: SuiteState, run: str) -> SuiteState:
        folder = request.suite.run(run)
        committed = when_answered(folder.state)
        state, stop = after_end(state, run, committed, command=held.command, max_failures=options.max_failures)
        if stop is not None:
            folder.fail(plan.configs[run], stop.reason)
        return state

    searcher = PlanSearcher(state, room=room, ended=ended, view=view, begin_workers=begin_workers, num_begun=num_begun)
    session.keep_credentials_here()
    outlive_lack_of_memory(view.say)
    carried = tune.with_parameters(trial, assignments=_assignments(request, plan, held.command, placement, environment))
    with storage.temporary_folder("tune") as folder:
        tune.Tuner(
            tune.with_resources(carried, {"CPU": 0, placements.HEAD: 0.001}),
            tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1, scheduler=_halving(request, plan, state, held)),
            run_config=tune.RunConfig(
                name=storage.name_of(folder),
                storage_path=folder,
                verbose=0,
                callbacks=[SuiteCallback(searcher, held)],
                failure_config=tune.FailureConfig(max_failures=options.max_failures),
            ),
        ).fit()
    return searcher


def _starting(state: SuiteState, room: int) -> int:
    """How many runs start before any has ended."""
    count = 0
    while isinstance((step := next_start(state, room=room))[1], Start):
        state, count = step[0], count + 1
    return count


def _begin_workers(placement: Placement) -> tuple[dict[str, str], Callable[[int], None]]:
    """The workers' environment, and what begins the workers of so many runs before their trials do, where that can be."""
    environment = {"IMGCLS_COMMIT": commit() or "unknown"}
    if "IMGCLS_CACHE" in os.environ:
        environment["IMGCLS_CACHE"] = os.environ["IMGCLS_CACHE"]
    if session.names_cluster() or placement.gpus_per_worker:
        return environment, lambda runs: None
    environment |= warm.environment()
    return environment, lambda runs: warm.prestart(runs * placement.num_workers, environment)


def _halving(request: Request, plan: Plan, state: SuiteState, held: Leases) -> "Halving | None":
    """What stops trials of a search."""
    if request.search is None:
        return None
    from cluster.carry.halving import Halving

    def history_of(run: str) -> list[dict[str, float]]:
        url = request.suite.run(run).history_url
        return read_csv(when_answered(storage.read_bytes_if_there, url) or b"")

    def stop(run: str, reason: str) -> None:
        folder = request.suite.run(run)
        if when_answered(folder.state).holder == held.command:
            when_answered(folder.stop, plan.configs[run], reason)

    runs = sorted(state.statuses, key=lambda run: state.statuses[run] is Status.OPEN)
    return Halving(request.search, runs, history_of=history_of, stop=stop)


def _assignments(
    request: Request, plan: Plan, command: str, placement: Placement, environment: dict[str, str]
) -> dict[str, Assignment]:
    return {
        name: Assignment(
            command=command,
            config=config,
            data_url=request.data_url,
            run_url=request.suite.run(name).url,
            placement=placement,
            options=request.options,
            tested=plan.tested,
            environment=environment,
        )
        for name, config in plan.configs.items()
    }
