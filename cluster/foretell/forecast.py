"""What a request will take: steps, seconds, GPU-hours, from rates that were measured. Pure, starts nothing.

Comes in: a plan, the statuses of its runs, a placement, rates. Goes out: a `Forecast`. Called for a dry run, and before
every command, whose results show it beside the seconds that it took.
"""

import heapq
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.carry.decide import Start, Status, SuiteState, Wait, after_end, next_start
from cluster.carry.plan import Plan
from cluster.placement import Node, workers_on
from imgcls.data.order import num_steps
from imgcls.data.splits import split_ids
from imgcls.rates import Rates, decoding_of, hardware_name, overhead_of, work_of
from imgcls.records import Placement
from imgcls.runs import RunState
from imgcls.training import environment


@dataclass(frozen=True, slots=True)
class RunForecast:
    steps: int
    train_images: int
    evaluated_images: int
    seconds: float | None
    """None if a rate is unknown."""


@dataclass(frozen=True, slots=True)
class Forecast:
    state: SuiteState
    placement: Placement
    rates: Rates
    hardware: str
    """Whose rates these are."""
    room: int
    """Runs at the same time."""
    runs: dict[str, RunForecast]
    """The open runs, in the order in which they start."""

    @property
    def seconds(self) -> float | None:
        """Of the command."""
        spans = schedule(self.state, {name: run.seconds for name, run in self.runs.items()}, self.room)
        runs_s = None if spans is None else max((span.end for span in spans.values()), default=0.0)
        return _sum([runs_s, self.rates.get("session", "", self.hardware)])

    @property
    def gpu_hours(self) -> float | None:
        seconds = _sum([run.seconds for run in self.runs.values()])
        gpus = self.placement.num_workers * self.placement.gpus_per_worker
        return None if seconds is None else seconds * gpus / 3600


def runs_of(
    plan: Plan, state: SuiteState, placement: Placement, rates: Rates, hardware: str, cached: Collection[str] = ()
) -> dict[str, RunForecast]:
    """What each open run will take. cached: decoded sets that lie on the nodes already, by `rates.decoding_of`."""
    decoded, runs = set(cached), dict[str, RunForecast]()
    for name in (run for run, status in state.statuses.items() if status is Status.OPEN):
        recipe = plan.configs[name].recipe
        manifest = plan.manifests[recipe.dataset]
        splits = split_ids(recipe, manifest)
        steps = num_steps(len(splits.train), size=recipe.global_batch_size, keep_last=recipe.last_batch == "keep")
        trained = min(steps * recipe.global_batch_size, len(splits.train)) * recipe.length.epochs
        evaluated = len(splits.val) * recipe.length.epochs + plan.tested * len(splits.test)
        work = work_of(recipe, placement)
        parts = [
            _over(trained, rates.get("train", work, hardware)),
            _over(evaluated, rates.get("evaluate", work, hardware)),
            rates.get("overhead", overhead_of(placement), hardware),
        ]
        decoding = decoding_of(manifest, px=recipe.input.stored_px, channels=recipe.input.channels)
        if decoding not in decoded:  # the first run on a set decodes it, the others wait or come later
            decoded.add(decoding)
            parts.append(_over(manifest.num_samples, rates.get("decode", decoding, hardware)))
        runs[name] = RunForecast(steps * recipe.length.epochs, trained, evaluated, _sum(parts))
    return runs


def hardware_of(nodes: Sequence[Node], placement: Placement, rates: Rates) -> str:
    """The name of the hardware whose rates count: this machine, or the GPU that the cluster's nodes name."""
    fitting = [node for node in nodes if workers_on(node, placement)]
    gpus = {node.gpu for node in fitting if node.gpu}
    if placement.gpus_per_worker and len(gpus) == 1:
        gpu = gpus.pop()
        return next((rate.hardware for rate in rates.rates if re.search(rf"\b{re.escape(gpu)}\b", rate.hardware)), gpu)
    if len(fitting) == 1:  # this machine, or the one node of the cluster: a command joins on a node
        return hardware_name(environment.hardware())
    return "nodes of several kinds" if len(gpus) > 1 else "this cluster's nodes"


def _over(count: int, per_s: float | None) -> float | None:
    return None if per_s is None else count / per_s


def _sum(seconds: Sequence[float | None]) -> float | None:
    """None if one is unknown."""
    return None if None in seconds else sum(filter(None, seconds))


@dataclass(frozen=True, slots=True)
class Span:
    """When a run is under way, in seconds from the first start, and in which of the `room` slots."""

    start: float
    end: float
    slot: int


def schedule(state: SuiteState, seconds: Mapping[str, float | None], room: int) -> dict[str, Span] | None:
    """When each open run is under way, as `decide` starts them; None if the seconds of one are unknown."""
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
