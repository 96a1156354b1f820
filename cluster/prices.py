"""What a request will cost on nodes of each type of a price table, which is written by hand, dated, and never fetched."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Literal

from pydantic import Field

from cluster.decide import State
from cluster.forecast import Forecast, Span, forecast, schedule
from cluster.placement import Node, choose, workers_on
from cluster.plan import Plan, Request
from imgcls.errors import DataError, PlacementError, RecipeError
from imgcls.rates import Rates
from imgcls.records import Record

HEAD = "head"
"""The entry that is up as long as the request takes; all others are types on which workers run."""
OLD_DAYS = 90


class NodePrice(Record):
    per_hour: Decimal
    market: Literal["on-demand", "spot", "reserved"]
    instance: str
    gpus: int
    cpus: int | None = None
    """Unless said, they do not limit; of a type without GPUs they are as many as this machine has."""
    hardware: str | None = None
    """The name that its rates have; unless said, it is taken to be as fast as the hardware at hand."""


class PriceTable(Record):
    currency: str
    as_of: date
    source: str
    node_types: dict[str, NodePrice]
    """By the names that the cluster's configuration gives to them; `head` is the head."""
    idle_timeout_s: float = 600.0
    """So long a node stays, and is paid for, when nothing runs on it."""
    boot_s: float = 0.0
    """From a node's allocation to its first run."""
    extras: dict[str, Decimal] = Field(default_factory=dict)
    """For whoever reads the table: not used."""

    @property
    def is_old(self) -> bool:
        return (date.today() - self.as_of).days > OLD_DAYS


def read_prices(path: Path, node_types: Collection[str] = ()) -> PriceTable:
    """node_types: those of a cluster. Raises RecipeError where it is no price table, or a type has no price."""
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        table = PriceTable.from_bytes(json.dumps(value, default=str).encode(), where=str(path))
    except (OSError, ValueError, yaml.YAMLError, DataError) as error:
        raise RecipeError(f"--prices: {error}\n  do: docs/plan-and-cost.md has its form") from None
    missing = sorted(set(node_types) - table.node_types.keys())
    if missing or not table.node_types.keys() - {HEAD}:
        raise RecipeError(
            f"--prices {path} has no price for {', '.join(missing) or 'any worker'}; it has: {', '.join(table.node_types)}\n"
            "  do: add it, by the name that the cluster's configuration gives to such nodes"
        )
    return table


@dataclass(frozen=True, slots=True)
class Cost:
    """Of the whole request, with all its workers on nodes of one type."""

    node_type: str
    price: NodePrice
    num_nodes: int = 0
    """At once, at the most; none where no worker fits."""
    node_hours: float | None = None
    """None where a rate is unknown."""

    @property
    def amount(self) -> Decimal | None:
        return None if self.node_hours is None else Decimal(str(self.node_hours)) * self.price.per_hour


def costs(
    table: PriceTable, request: Request, plan: Plan, state: State, found: Forecast, rates: Rates, *, cpus_here: float
) -> list[Cost]:
    """By node type; of the head, where the table has one, for as long as `found` says."""
    some = [
        _cost(name, price, table, state, of, node)
        for name, price in table.node_types.items()
        if name != HEAD
        for node in [_node_of(name, price, cpus_here)]
        for of in [_forecast_on(node, price, request, plan, state, found, rates)]
    ]
    if HEAD in table.node_types:
        hours = None if found.seconds is None else found.seconds / 3600
        some.insert(0, Cost(HEAD, table.node_types[HEAD], 1, hours))
    return some


def _node_of(name: str, price: NodePrice, cpus_here: float) -> Node:
    cpus = price.cpus if price.cpus is not None else (1e9 if price.gpus else cpus_here)
    return Node(float(cpus), float(price.gpus), name)


def _forecast_on(
    node: Node, price: NodePrice, request: Request, plan: Plan, state: State, found: Forecast, rates: Rates
) -> Forecast | None:
    """None where no worker fits on such a node."""
    fewer = (request.cpus_per_worker, request.gpus_per_worker)
    try:
        placement = choose([node], num_workers=1, cpus_per_worker=fewer[0], gpus_per_worker=fewer[1])
    except PlacementError:
        return None
    placement = placement.model_copy(update={"num_workers": request.num_workers})
    if price.hardware is None:
        return replace(found, placement=placement)
    room = len(found.runs)
    return forecast(plan, state, placement=placement, room=room, rates=rates, hardware=price.hardware)


def _cost(name: str, price: NodePrice, table: PriceTable, state: State, found: Forecast | None, node: Node) -> Cost:
    """As many nodes as the runs can use at once, each from its first run to its last, and until it is idle long enough."""
    if found is None:
        return Cost(name, price)
    workers, num_workers = workers_on(node, found.placement), found.placement.num_workers
    runs_per_node, nodes_per_run = max(1, workers // num_workers), math.ceil(num_workers / workers)
    spans = schedule(state, {run: one.seconds for run, one in found.runs.items()}, max(1, len(found.runs)))
    if spans is None:
        return Cost(name, price, nodes_per_run)
    by_node: dict[int, list[Span]] = {}
    for span in spans.values():
        by_node.setdefault(span.slot // runs_per_node, []).append(span)
    busy_s = sum(max(s.end for s in some) - min(s.start for s in some) for some in by_node.values())
    paid_s = busy_s + len(by_node) * (table.boot_s + table.idle_timeout_s)
    return Cost(name, price, len(by_node) * nodes_per_run, paid_s * nodes_per_run / 3600)
