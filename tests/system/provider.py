"""The node provider of `autoscaled`: Ray's own fake one, whose nodes are processes of this machine."""

import os
import time
from typing import Any
from unittest.mock import patch

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE


class LocalProvider(FakeMultiNodeProvider):
    """Its nodes bear their type as a label, as those of a cloud do; Ray's own bear the head's."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: Any, labels: Any
    ) -> None:
        with self.lock, patch.dict(os.environ, RAY_NODE_TYPE_NAME=tags[TAG_RAY_USER_NODE_TYPE]):
            super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)


class SlowProvider(LocalProvider):
    """As a cloud whose nodes need long to come, or have to wait until others give them back."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: Any, labels: Any
    ) -> None:
        time.sleep(float(os.environ["NODES_NEED_S"]))
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
