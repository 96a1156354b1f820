"""A node type that asks for spot instances gets on-demand ones where the cloud has no spot capacity.

Ray's autoscaler does not do this: after a launch that failed it tries the same node type again, whatever the others are.
Comes in: the autoscaler's request for nodes of a type, as RunInstances takes it. Goes out: that request to the provider.
"""

import logging
from typing import Any

from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider

MARKET = "InstanceMarketOptions"
NO_SPOT = {
    *("InsufficientInstanceCapacity", "InsufficientCapacity", "UnfulfillableCapacity"),
    *("SpotMaxPriceTooLow", "MaxSpotInstanceCountExceeded", "Unsupported"),
}
"""Codes of EC2 for a request that an on-demand one can replace. Source: Error codes for the Amazon EC2 API.

Of several subnets Ray gives the last one's error. Where a zone has no such instances that is `Unsupported`, which hides
what the other zones lack.
"""

# Ray's logger: its autoscaler writes it to monitor.log, `ray up` to the terminal.
logger = logging.getLogger("ray.autoscaler.imgcls")


class OnDemandFallback(NodeProvider):
    """Mixed into a provider, before it. Every launch asks for spot first; errors of another kind are raised unchanged."""

    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: Any, labels: Any
    ) -> Any:
        create = super().create_node_with_resources_and_labels
        try:
            return create(node_config, tags, count, resources, labels)
        except NodeLaunchException as error:
            if MARKET not in node_config or error.category not in NO_SPOT:
                raise
            logger.warning(f"no spot capacity, {count} on-demand node(s) instead, at their price: {error}; tags {tags}")
        on_demand = {key: value for key, value in node_config.items() if key != MARKET}
        return create(on_demand, tags, count, resources, labels)
