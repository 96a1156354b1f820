"""What a request will take: steps, seconds, GPU-hours, from rates that were measured. Pure, starts nothing.

Comes in: a plan, what is open of it, a placement, rates. Goes out: a `Forecast`. Called by a dry run, and before every
run, to stand beside what it took.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.decide import Start, Status, SuiteState, Wait, after_end, next_start
from cluster.placement import Node, workers_on
from cluster.plan import Plan
from imgcls.data.order import num_steps
from imgcls.data.splits import split_ids
from imgcls.rates import Rates, decoding_of, hardware_name, overhead_of, work_of
from imgcls.records import Manifest, Placement, RunConfig
from imgcls.runs import RunState
from imgcls.training import environment


@dataclass(frozen=True, slots=True)
class RunForecast:
    source: str | None
    steps: int
    train_images: int
    evaluated_images: int
    seconds: float | None
    """None where a rate is unknown."""


@dataclass(frozen=True, slots=True)
class Forecast:
    placement: Placement
    hardware: str
    """Whose rates these are."""
    room: int
    """Runs at once."""
    runs: dict[str, RunForecast]
    """Those that are open, in the order in which they start."""
    seconds: float | None
    """Of the command."""

    @property
    def gpu_hours(self) -> float | None:
        taken = [run.seconds for run in self.runs.values()]
        gpus = self.placement.num_workers * self.placement.gpus_per_worker
        return sum(s for s in taken if s is not None) * gpus / 3600 if None not in taken else None


def forecast(
    plan: Plan,
    state: SuiteState,
    *,
    placement: Placement,
    room: int,
    rates: Rates,
    hardware: str,
    cached: Collection[str] = (),
) -> Forecast:
    """cached: decoded sets (`rates.decoding_of`) that lie on the nodes already."""
    there, runs = set(cached), dict[str, RunForecast]()
    for name, status in state.statuses.items():
        if status is Status.OPEN:
            config = plan.configs[name]
            runs[name] = _of_run(config, plan.manifests[config.recipe.dataset], placement, rates, hardware, there)
    spans = schedule(state, {name: run.seconds for name, run in runs.items()}, room)
    session_s = rates.get("session", "", hardware)
    seconds = None
    if spans is not None and session_s is not None:
        seconds = max((span.end for span in spans.values()), default=0.0) + session_s
    return Forecast(placement, hardware, room, runs, seconds)


def hardware_of(nodes: Sequence[Node], placement: Placement, rates: Rates) -> str:
    """Whose rates are to be asked for: of this machine, or of the GPU that the cluster's nodes name."""
    fitting = [node for node in nodes if workers_on(node, placement)]
    gpus = {node.gpu for node in fitting if node.gpu}
    if placement.gpus_per_worker and len(gpus) == 1:
        named = gpus.pop()
        return next((rate.hardware for rate in rates.rates if named in rate.hardware), named)
    if len(fitting) == 1:  # this machine, or the one node of the cluster: a command joins on a node
        return hardware_name(environment.hardware())
    return "nodes of several kinds" if len(gpus) > 1 else "this cluster's nodes"


def _of_run(
    config: RunConfig, manifest: Manifest, placement: Placement, rates: Rates, hardware: str, there: set[str]
) -> RunForecast:
    """there: decoded sets; this run's is added."""
    recipe, splits = config.recipe, split_ids(config.recipe, manifest)
    steps = num_steps(len(splits.train), size=recipe.global_batch_size, keep_last=recipe.last_batch == "keep")
    trained = min(steps * recipe.global_batch_size, len(splits.train)) * recipe.length.epochs
    evaluated = len(splits.val) * recipe.length.epochs + len(splits.test)
    work = work_of(recipe, placement)
    parts = [
        _over(trained, rates.get("train", work, hardware)),
        _over(evaluated, rates.get("evaluate", work, hardware)),
        rates.get("overhead", overhead_of(placement), hardware),
    ]
    decoded = decoding_of(manifest, px=recipe.input.stored_px, channels=recipe.input.channels)
    if decoded not in there:  # the first run on a set decodes it, the others wait or come later
        there.add(decoded)
        count = sum(shard.num_samples for shard in manifest.shards)
        parts.append(_over(count, rates.get("decode", decoded, hardware)))
    seconds = None if None in parts else sum(part for part in parts if part is not None)
    return RunForecast(config.source_run, steps * recipe.length.epochs, trained, evaluated, seconds)


def _over(count: int, per_s: float | None) -> float | None:
    return None if per_s is None else count / per_s


@dataclass(frozen=True, slots=True)
class Span:
    """When a run is under way, seconds from the first start, and in which of the places for a run."""

    start: float
    end: float
    slot: int


def schedule(state: SuiteState, seconds: Mapping[str, float | None], room: int) -> dict[str, Span] | None:
    """When each open run is under way, as `decide` starts them; None where one's seconds are unknown."""
    if None in seconds.values():
        return None
    spans, ends = dict[str, Span](), list[tuple[float, int, str]]()
    now, free = 0.0, list(range(room))
    while True:
        state, action = next_start(state, room=room)
        if isinstance(action, Start):
            slot = heapq.heappop(free)
            spans[action.run] = Span(now, now + (seconds[action.run] or 0.0), slot)
            heapq.heappush(ends, (spans[action.run].end, slot, action.run))
        elif ends:
            now, slot, run = heapq.heappop(ends)
            heapq.heappush(free, slot)
            state, _ = after_end(state, run, RunState(result="finished"), command="", max_failures=0)
        else:
            assert not isinstance(action, Wait)
            return spans
