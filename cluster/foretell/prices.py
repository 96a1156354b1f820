"""What a request will cost on nodes of each type of a price table, which is written by hand, dated, and never fetched."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

from cluster.carry.plan import Plan, Request
from cluster.foretell.forecast import Forecast, Span, runs_of, schedule
from cluster.placement import HERE, Node, choose, workers_on
from imgcls.errors import DataError, PlacementError, RecipeError
from imgcls.records import Placement, Record

HEAD = "head"
"""The entry of the node that is up as long as the request takes; workers run on all the others."""
OLD_DAYS = 90


class NodePrice(Record):
    per_hour: Annotated[Decimal, Field(ge=0)]
    market: Literal["on-demand", "spot", "reserved"]
    instance: str
    gpus: int
    cpus: int | None = None
    """Unless given: no limit for a type with GPUs, as many as this machine has for a type without."""
    hardware: str | None = None
    """The name of its rates; unless given, it counts as being as fast as the hardware at hand."""


class PriceTable(Record):
    currency: str
    as_of: date
    source: str
    node_types: dict[str, NodePrice]
    """By their names in the cluster's configuration; `head` is the head."""
    idle_timeout_s: Annotated[float, Field(ge=0)] = 600.0
    """A node on which nothing runs is kept, and paid for, this long."""
    boot_s: Annotated[float, Field(ge=0)] = 0.0
    """From a node's allocation to its first run."""
    extras: dict[str, Decimal] = Field(default_factory=dict)
    """Notes for readers of the table; not used."""

    @property
    def is_old(self) -> bool:
        return (date.today() - self.as_of).days > OLD_DAYS


def read_prices(path: Path, node_types: Collection[str] = ()) -> PriceTable:
    """node_types: those of a cluster. Raises RecipeError if the file is no price table, or a type has no price."""
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
    """The most at the same time; 0 where no worker fits."""
    node_hours: float | None = None
    """None where a rate is unknown."""

    @property
    def amount(self) -> Decimal | None:
        return None if self.node_hours is None else Decimal(str(self.node_hours)) * self.price.per_hour


def costs(table: PriceTable, request: Request, plan: Plan, found: Forecast, cpus: Mapping[str, float]) -> list[Cost]:
    """By node type. First the head, where the table has one, for the seconds of `found`, the forecast for this hardware.

    cpus: of nodes, by their types. A type of the table that is not among them has this machine's, or any number beside GPUs.
    """
    results = []
    for name, price in table.node_types.items():
        if name == HEAD:
            results.insert(0, Cost(name, price, 1, None if found.seconds is None else found.seconds / 3600))
            continue
        cpus_of_node = cpus.get(name, 1e9 if price.gpus else cpus[HERE]) if price.cpus is None else price.cpus
        node = Node(float(cpus_of_node), float(price.gpus), name)
        try:  # a run's workers may need several nodes
            placement = choose([node] * request.options.num_workers, request.options)
        except PlacementError:
            results.append(Cost(name, price))
            continue
        runs, room = found.runs, max(1, len(found.runs))
        if price.hardware is not None:
            runs = runs_of(plan, found.state, placement, found.rates, price.hardware)
        spans = schedule(found.state, {run: predicted.seconds for run, predicted in runs.items()}, room)
        results.append(_cost(node, price, table, placement, spans))
    return results


def _cost(node: Node, price: NodePrice, table: PriceTable, placement: Placement, spans: Mapping[str, Span] | None) -> Cost:
    """As many nodes as the runs can use at the same time; each is paid from its boot until its idle timeout is over."""
    workers = workers_on(node, placement)
    runs_per_node = max(1, workers // placement.num_workers)
    nodes_per_run = math.ceil(placement.num_workers / workers)
    if spans is None:
        return Cost(node.type, price, nodes_per_run)
    by_node: dict[int, list[Span]] = {}
    for span in spans.values():
        by_node.setdefault(span.slot // runs_per_node, []).append(span)
    busy_s = sum(max(span.end for span in group) - min(span.start for span in group) for group in by_node.values())
    paid_s = busy_s + len(by_node) * (table.boot_s + table.idle_timeout_s)
    return Cost(node.type, price, len(by_node) * nodes_per_run, paid_s * nodes_per_run / 3600)
