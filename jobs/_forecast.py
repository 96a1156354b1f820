"""`--dry-run`: what a request would do, fetch, take and cost, as a page of lines; nothing is started."""

from collections.abc import Sequence
from pathlib import Path

from cluster import placement as placements
from cluster import session
from cluster.carry.plan import Plan, Request
from cluster.carry.suite import state_of
from cluster.foretell.experience import forecast_of
from cluster.foretell.forecast import Forecast
from cluster.foretell.prices import HEAD, Cost, PriceTable, costs, read_prices
from imgcls import rates, storage
from imgcls.data.cache import missing_shards
from jobs._door import DONE
from jobs._terminal import Lines, duration, say_table

UNKNOWN = "unknown"


def say_plan(lines: Lines, request: Request, plan: Plan, prices: Path | None, cluster: Path | None) -> int:
    """The exit code. Raises PlacementError where the workers can never run, RecipeError for what is no price table."""
    state = state_of(request, plan)
    if cluster is None and session.names_cluster():
        with session.session(verbose=request.options.verbose):
            nodes = placements.cluster_nodes(placements.autoscaling_config())
    else:
        nodes = [placements.local_node()] if cluster is None else placements.defined_nodes(cluster)
    table = read_prices(prices, {node.type for node in nodes} - {placements.HERE}) if prices else None
    p = placements.choose(nodes, request.options)
    forecast = forecast_of(plan, state, nodes, p, defined=cluster is not None)
    open_runs = len(forecast.runs)
    lines.say(f"{request.id}: {open_runs} runs to do, {len(plan.configs) - open_runs} are over; nothing is started")
    _say_runs(lines, plan, forecast)
    lines.say(
        f"each run: {p.num_workers} workers with {p.cpus_per_worker:g} CPUs and {p.gpus_per_worker:g} GPUs; "
        f"{min(forecast.room, max(open_runs, 1))} at once on {placements.what_there_is(nodes)}"
    )
    _say_data(lines, request, plan)
    _say_time(lines, forecast)
    if table is not None:
        cpus = {node.type: node.cpus for node in (placements.local_node(), *nodes)}
        _say_costs(lines, table, costs(table, request, plan, forecast, cpus), prices)
    return DONE


def _say_runs(lines: Lines, plan: Plan, forecast: Forecast) -> None:
    rows: list[Sequence[str]] = [("run", "after", "data set", "px", "steps", "images trained", "evaluated", "predicted")]
    for name, run in forecast.runs.items():
        config, recipe = plan.configs[name], plan.configs[name].recipe
        counts = (f"{count:,}" for count in (run.steps, run.train_images, run.evaluated_images))
        rows.append((name, config.source_run or "", recipe.dataset, str(recipe.input.px), *counts, duration(run.seconds)))
    say_table(lines, rows)


def _say_data(lines: Lines, request: Request, plan: Plan) -> None:
    for dataset, manifest in plan.manifests.items():
        set_url, shards = storage.join(request.data_url, dataset), manifest.shards
        size = f"{dataset}: {len(shards)} shards, {sum(shard.num_bytes for shard in shards):,} bytes"
        if storage.is_local(set_url):
            lines.say(f"{size}, read from {storage.shown(set_url)}")
        else:
            missing = missing_shards(manifest)
            lines.say(f"{size}; to fetch: {len(missing)}, {sum(s.num_bytes for s in missing):,} bytes (not in the seconds)")


def _say_time(lines: Lines, forecast: Forecast) -> None:
    seconds, hours = duration(forecast.seconds), UNKNOWN if forecast.gpu_hours is None else f"{forecast.gpu_hours:.3f}"
    lines.say(f"predicted: {seconds} for the command, {hours} GPU-hours; rates of {forecast.hardware}")
    if forecast.seconds is None:
        lines.say("  a rate is unknown here; `python -m jobs.bench calibrate` measures it, and so does every finished run")
    overhead = forecast.rates.find("overhead", rates.overhead_of(forecast.placement), forecast.hardware)
    session_rate = forecast.rates.find("session", "", forecast.hardware)
    for rate, where in ((overhead, "of each run beside its training"), (session_rate, "of the command beside its runs")):
        if rate is not None and rate.source == "guess":
            lines.say(f"  {rate.value:.0f} s {where} are a guess; the first finished run measures them")


def _say_costs(lines: Lines, table: PriceTable, by_type: list[Cost], path: Path | None) -> None:
    lines.say(f"cost in {table.currency}, by {path} of {table.as_of} ({table.source}), if all workers run on one type:")
    rows = [("node type", "instance", "market", "nodes", "node-hours", "cost", "")]
    for cost in by_type:
        price, notes = cost.price, list[str]()
        hours, amount = (UNKNOWN, UNKNOWN) if cost.node_hours is None else (f"{cost.node_hours:.3f}", f"{cost.amount:.4f}")
        if not cost.num_nodes and cost.node_hours is None:
            hours, amount, notes = "", "", ["no worker fits"]
        else:
            notes += ["as fast as the hardware at hand"] if not price.hardware else []
            notes += ["a spot price is an estimate"] if price.market == "spot" else []
        rows.append((cost.node_type, price.instance, price.market, str(cost.num_nodes), hours, amount, "; ".join(notes)))
    say_table(lines, rows)
    lines.say(f"  a node is paid until it has been idle for {table.idle_timeout_s:g} s, {HEAD} as long as it all takes")
    if table.is_old:
        lines.say(f"  the prices are of {table.as_of}: look whether they still hold")
