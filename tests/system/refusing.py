"""A provider without spot capacity, and the same with the fallback that cluster/provide/aws.py puts before AWS's."""

from typing import Any

from ray.autoscaler.node_launch_exception import NodeLaunchException

from cluster.provide.fallback import MARKET, OnDemandFallback
from tests.system.provider import LocalProvider


class NoSpot(LocalProvider):
    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: Any, labels: Any
    ) -> None:
        if MARKET in node_config:
            raise NodeLaunchException("InsufficientInstanceCapacity", "there is no spot capacity in this test", None)
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)


class NoSpotButOnDemand(OnDemandFallback, NoSpot):
    pass
