"""Recipes -> Ray Tune runs, by `decide`. A single run is a suite of one.

Comes in: a `Request`. Goes out: the suite's results, from the runs' own records. The suite's state is its storage:
the same request again does what is left, whoever made it and wherever it stopped.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any

from cluster import attempts, session
from cluster import placement as placements
from cluster.decide import Asked, Done, End, State, Status, blocked_by, decide, start_order
from cluster.forecast import Forecast, forecast, hardware_of
from cluster.lease import Leases, leases, when_answered
from cluster.plan import Plan, Request, check_alike
from cluster.preflight import check_seen_by_nodes
from cluster.run import Assignment, record_failure, told, trial
from imgcls import rates, records, storage
from imgcls.catalogue import CATALOGUES
from imgcls.data.cache import check_room, is_cached
from imgcls.errors import CheckpointError, DataError, StorageError
from imgcls.records import Manifest, Placement, RunConfig, RunResult, SuiteRecord, SuiteResults, sealed
from imgcls.training.environment import commit

if TYPE_CHECKING:
    from cluster.searcher import PlanSearcher, View


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
    check_alike(configs_of(request.suite_url), request, plan)
    if isinstance(decide(state, Asked(room=1))[1], Done):
        write_down(request, plan)
        return publish(request.suite_url)
    caches, cached = list(_caches(request, plan, state)), cached_sets(plan)
    if not session.names_cluster():
        # Refused before Ray starts, where it will be.
        choose(request, [placements.local_node()])
        check_room(caches)
    mine = {run: request.run_url(run) for run, status in state.statuses.items() if status is Status.OPEN}
    with leases(mine, command=state.command, say=view.say) as held:
        for run_url in mine.values():
            storage.clean_temporary(run_url)
        with session.session(verbose=request.verbose):
            config = placements.autoscaling_config()
            nodes = placements.cluster_nodes(config)
            placement = choose(request, nodes)
            predicted = forecast_of(plan, state, nodes, placement)
            check_seen_by_nodes([request.data_url, request.storage_url])
            write_down(request, plan)
            # As it is now that nobody else is at it.
            state = replace(state_of(request, plan), command=state.command)

            def room() -> int:
                return placements.how_many_fit(placements.cluster_nodes(config), placement)

            searcher = _carry_out(request, plan, state, held, placement, room, view)
            # Drawing needs seconds of imports, of packages that Ray does not use, and Ray as many to end.
            Thread(target=import_module, args=("imgcls.results.page",)).start()
    took = {run: searcher.ended_s[run] - at for run, at in searcher.began_s.items() if run in searcher.ended_s}
    results = publish(request.suite_url, Work(time.monotonic() - began, command, predicted, took))
    if took:
        busy_s = max(searcher.ended_s.values()) - min(searcher.began_s.values())
        _keep_rates(request, plan, results, cached, session_s=time.monotonic() - began - busy_s)
    return results


def cached_sets(plan: Plan) -> list[str]:
    """Decoded sets that lie on this node, as `rates.decoding_of` names them."""
    wanted = {(c.recipe.dataset, c.recipe.input.stored_px, c.recipe.input.channels) for c in plan.configs.values()}
    return [
        rates.decoding_of(plan.manifests[dataset], px=px, channels=channels)
        for dataset, px, channels in wanted
        if is_cached(plan.manifests[dataset], px=px, channels=channels)
    ]


def forecast_of(plan: Plan, state: State, nodes: list[placements.Node], placement: Placement) -> Forecast:
    """By what is known of the hardware at hand."""
    known = rates.known()
    return forecast(
        plan,
        state,
        placement=placement,
        room=placements.how_many_fit(nodes, placement),
        rates=known,
        hardware=hardware_of(nodes, placement, known),
        cached=cached_sets(plan),
    )


def _keep_rates(request: Request, plan: Plan, results: SuiteResults, cached: list[str], *, session_s: float) -> None:
    """What this command's finished runs showed serves the next forecast."""
    done = [run for run in results.finished if run.name in results.took]
    found = [
        rate
        for run in done
        for once in [len(attempts.look(request.run_url(run.name)).attempts) == 1]
        for rate in rates.rates_of(run, took_s=results.took[run.name] if once else None)
    ]
    decoding_s: dict[tuple[str, str], tuple[int, float]] = {}
    for run in done:
        into, manifest = run.recipe.input, plan.manifests[run.recipe.dataset]
        decoded = rates.decoding_of(manifest, px=into.stored_px, channels=into.channels)
        if decoded not in cached:
            key, count = (decoded, rates.hardware_name(run.hardware)), sum(s.num_samples for s in manifest.shards)
            decoding_s[key] = (count, max(run.seconds["cache"], decoding_s.get(key, (0, 0.0))[1]))
    found += [rates.new("decode", of, where, n / s, "run") for (of, where), (n, s) in decoding_s.items() if s]
    if done:
        found.append(rates.new("session", "", rates.hardware_name(done[0].hardware), session_s, "run"))
    with suppress(StorageError):  # a cache that cannot be written is no reason to fail now
        rates.keep(found)


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


def write_down(request: Request, plan: Plan) -> None:
    """What is asked for lies in the suite's folder; with `retry_failed` the failures are gone.

    Raises CheckpointError where another command, at the same time, has asked for something else under these names.
    """
    urls = {name: storage.join(request.run_url(name), "config.json") for name in plan.configs}
    new = [name for name in plan.configs if not storage.exists(urls[name])]
    created = [name for name in new if storage.create_bytes(urls[name], sealed(plan.configs[name]))]
    try:
        check_alike(configs_of(request.suite_url), request, plan)
    except CheckpointError:
        for name in created:
            storage.delete(urls[name])
        raise
    for name, config in plan.configs.items():
        if name not in created and storage.read_bytes_if_there(urls[name]) != sealed(config):
            records.write(config, urls[name])  # the same request, from weights that lie elsewhere now
    records.write(SuiteRecord(id=request.id, data=request.data_url), storage.join(request.suite_url, "suite.json"))
    if request.retry_failed:
        for name in plan.configs:
            if status_of(request.run_url(name)) is Status.FAILED:
                storage.delete(storage.join(request.run_url(name), "result.json"))


def configs_of(suite_url: str) -> dict[str, RunConfig]:
    """Every run that was ever asked for under the id, in the order of the catalogues, then of the seeds."""
    found = []
    for name in storage.folders(suite_url):
        config = records.read_if_there(RunConfig, storage.join(suite_url, name, "config.json"))
        if config is not None:
            found.append(config)
    return {config.name: config for config in sorted(found, key=_place)}


def _place(config: RunConfig) -> tuple[str, int, str, int]:
    names = [recipe.name for recipe in CATALOGUES.get(config.catalogue, ())]
    name = config.recipe.name
    return config.catalogue, names.index(name) if name in names else len(names), name, config.seed


def status_of(run_url: str) -> Status:
    return _status(result_of(run_url))


def _carry_out(
    request: Request, plan: Plan, state: State, held: Leases, placement: Placement, room: Callable[[], int], view: "View"
) -> "PlanSearcher":
    from ray import tune

    from cluster.searcher import LeaseStopper, PlanSearcher, ProgressCallback

    searcher = PlanSearcher(
        state,
        room=room,
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
    return searcher


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


@dataclass(frozen=True, slots=True)
class Work:
    """What a command did: seconds of its own and of its runs, beside what was predicted."""

    seconds: float
    command: str
    predicted: Forecast
    took: dict[str, float]

    def told(self) -> dict[str, Any]:
        runs = {name: run.seconds for name, run in self.predicted.runs.items()}
        return {
            "seconds": round(self.seconds, 1),
            "command": self.command,
            "predicted_s": self.predicted.seconds and round(self.predicted.seconds, 1),
            "predicted": {name: round(seconds, 1) for name, seconds in runs.items() if seconds is not None},
            "took": {name: round(seconds, 1) for name, seconds in self.took.items()},
        }


WORK = ("seconds", "command", "predicted_s", "predicted", "took")


def publish(suite_url: str, work: Work | None = None) -> SuiteResults:
    """The suite's results from its runs' records; `results.json` and `report.html` lie beside them.

    work: that was just done; where there was none, what the results said before stays. Other commands may be at work
    under the same id: whoever writes last has looked once more after it wrote.
    """
    from imgcls.results.page import render

    url = storage.join(suite_url, "results.json")
    told = work.told() if work else {"seconds": 0.0, "command": ""}
    if work is None and (before := records.read_if_there(SuiteResults, url)):
        told = before.model_dump(include=set(WORK))
    results = read_results(suite_url, **told)
    while True:
        records.write(results, url)
        page = render(results, histories(suite_url, results)).encode()
        storage.write_bytes(storage.join(suite_url, "report.html"), page)
        written, results = results, read_results(suite_url, **told)
        if results == written:
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


def read_results(suite_url: str, **work: Any) -> SuiteResults:
    suite = records.read(SuiteRecord, storage.join(suite_url, "suite.json"))
    configs = configs_of(suite_url)
    found = {name: result_of(storage.join(suite_url, name)) for name in configs}
    statuses = {name: _status(result) for name, result in found.items()}
    blocked = blocked_by(statuses, {name: config.source_run for name, config in configs.items()})
    return SuiteResults(
        id=suite.id,
        catalogue=", ".join(dict.fromkeys(config.catalogue for config in configs.values())),
        synthetic=any(config.synthetic for config in configs.values()),
        url=storage.shown(suite_url),
        data=storage.shown(suite.data),
        runs=tuple(
            result or _unfinished(configs[name], storage.join(suite_url, name), blocked.get(name))
            for name, result in found.items()
        ),
        **work,
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
