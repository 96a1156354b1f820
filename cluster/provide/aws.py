"""Ray's provider for AWS, with on-demand instances where there are no spot ones: `provider.module` of infra/ray/aws.yaml."""

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from cluster.provide.fallback import OnDemandFallback


class SpotOrOnDemand(OnDemandFallback, AWSNodeProvider):
    pass
