"""infra/aws/stack.yaml and infra/ray/aws.yaml hold together, on a simulated AWS; nothing here reaches the network."""

import copy
import json
import os
import re
import subprocess
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, cast

import boto3
import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from cfnlint.api import lint
from cfnlint.core import get_rules
from cfnlint.decode import decode_str
from moto import mock_aws
from moto.ec2.models.instance_types import INSTANCE_TYPES, InstanceTypeBackend

from tests.conftest import ROOT
from tests.infra.keeping import keeping_faults
from tests.infra.site import filled

# moto makes no policy of a bucket, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS..S3..BucketPolicy")

REGION = "us-west-2"
ZONES = ("us-west-2a", "us-west-2b")
STACK = (ROOT / "infra/aws/stack.yaml").read_text()

Json = Any
GONE = object()


def launcher(**values: str) -> dict[str, Json]:
    """aws.yaml filled, with a value of its own at every place: anchors would share them."""
    return json.loads(json.dumps(yaml.safe_load(filled("ray/aws.yaml", **values))))


def planted(whole: Json, path: str, value: Json) -> Json:
    """A copy of `whole` with another value at `path`, or none."""
    changed = copy.deepcopy(whole)
    *way, last = [int(word) if word.isdigit() else word for word in path.split("/")]
    place = changed
    for word in way:
        place = place[word]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return changed


def differences(where: str, found: Collection[Json], stated: Collection[Json]) -> Iterator[str]:
    yield from (f"{where} has {one}" for one in found if one not in stated)
    yield from (f"{where} lacks {one}" for one in stated if one not in found)


# The launcher's configuration

RUN_OPTIONS = [
    "--env=RAY_AUTH_MODE=token",
    "--env=AWS_DEFAULT_REGION=region",
    "--ulimit=nofile=65536:65536",
    "--security-opt=no-new-privileges",
    "--volume=/var/tmp/imgcls:/var/tmp/imgcls",
]
PROVIDER = {"type": "external", "module": "cluster.provide.aws.SpotOrOnDemand"}
SESSION_MANAGER = {
    "ssh_user": "ubuntu",
    "ssh_private_key": "private-key",
    "ssh_proxy_use_node_id": True,
    "ssh_proxy_command": "aws ssm start-session --region region --target %h "
    "--document-name AWS-StartSSHSession --parameters portNumber=%p",
}
IMDSV2 = {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 2}  # two hops: from a container
DISK = {"VolumeSize": 200, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
ONE_TIME = {
    "MarketType": "spot",
    "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
}


@cache
def run_instances() -> Json:
    return botocore.session.get_session().get_service_model("ec2").shape_for("RunInstancesRequest")


def unknown_words(value: Json, shape: Json, where: str) -> Iterator[str]:
    """botocore checks names and types of a request, and leaves enumerations to the server."""
    if shape.type_name == "structure":
        for key in value.keys() & shape.members.keys():
            yield from unknown_words(value[key], shape.members[key], f"{where}.{key}")
    elif shape.type_name == "list":
        for member in value:
            yield from unknown_words(member, shape.member, where)
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield f"{where}: {value} is none of AWS's words"


def launcher_faults(config: Mapping[str, Json]) -> Iterator[str]:
    """What is wrong with a filled aws.yaml, and what neither Ray nor a simulated AWS says."""
    provider, types, head = config["provider"], config["available_node_types"], config["head_node_type"]
    known = {*PROVIDER, "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes"}
    yield from (f"provider.{key}: unknown to Ray's AWS provider" for key in provider.keys() - known)
    if not PROVIDER.items() <= provider.items():
        yield "provider: spot types get no on-demand instances"
    if (provider.get("use_internal_ips"), provider.get("cache_stopped_nodes")) != (True, False):
        yield "provider: nodes are not reached by internal addresses, or not terminated when idle"
    yield from differences("SSH, which goes through Session Manager,", config["auth"].items(), SESSION_MANAGER.items())
    yield from differences("docker.run_options", config["docker"]["run_options"], RUN_OPTIONS)
    yield from differences("docker.worker_run_options", config["docker"]["worker_run_options"], ["--gpus=all"])
    if not re.search(r"@sha256:[0-9a-f]{64}$", config["docker"]["image"]):
        yield "docker.image: has no digest"
    hosts = re.findall(r"--dashboard-host[= ]*(\S+)", " ".join(config["head_start_ray_commands"]))
    yield from differences("the dashboard, on the loopback interface only,", hosts, ["127.0.0.1"])
    if not any('test "$(id -u)" = 1000 ||' in command for command in config.get("initialization_commands", [])):
        yield "initialization_commands: a machine image whose user has another UID is not refused"
    yield from keeping_faults(config, "aws")
    if not (config["max_workers"] <= 5 and 0 < config["idle_timeout_minutes"] <= 10):
        yield "it grows beyond five workers, or keeps them idle for more than ten minutes"

    def size(node_type: Json) -> Json:
        return node_type["node_config"]["InstanceType"], node_type["resources"]

    def spot(node_type: Json) -> bool:
        return "InstanceMarketOptions" in node_type["node_config"]

    workers = [node_type for name, node_type in types.items() if name != head]
    for name, mine in types.items():
        yield from (f"{name}: {fault}" for fault in type_faults(mine, is_head=mine is types[head]))
        twins = (w for w in workers if not spot(w) and size(w) == size(mine) and w["priority"] < mine["priority"])
        if spot(mine) and not any(twins):
            yield f"{name}: no on-demand type of the same size comes after it"
    profiles = [w["node_config"].get("IamInstanceProfile") for w in workers]
    if types[head]["node_config"].get("IamInstanceProfile") in profiles:
        yield "a worker has the head's rights"


def type_faults(node_type: Mapping[str, Json], *, is_head: bool) -> Iterator[str]:
    node = node_type["node_config"]
    request = {**node, "SubnetId": node["SubnetIds"][0], "MinCount": 1, "MaxCount": 1}
    del request["SubnetIds"]
    if report := ParamValidator().validate(request, run_instances()).generate_report():
        yield report
    yield from unknown_words(request, run_instances(), "node_config")
    for key in ("ImageId", "KeyName", "SubnetIds", "SecurityGroupIds", "IamInstanceProfile"):
        if not node.get(key):
            yield f"has no {key}"
    if node.get("InstanceInitiatedShutdownBehavior") != "terminate":
        yield "it is paid for when it has shut itself down"
    yield from differences("MetadataOptions", node.get("MetadataOptions", {}).items(), IMDSV2.items())
    yield from differences("a disk", [disk["Ebs"] for disk in node["BlockDeviceMappings"]], [DISK])
    if is_head:
        if node_type["resources"].get("CPU") != 0 or "InstanceMarketOptions" in node:
            yield "runs can come to the head, or AWS can take it back"
        return
    market = node.get("InstanceMarketOptions")
    yield from differences("InstanceMarketOptions", (market or ONE_TIME).items(), ONE_TIME.items())
    yield from differences("its label", node_type["labels"].items(), {"capacity": "spot" if market else "on-demand"}.items())
    if node_type["min_workers"] != 0 or not 0 < node_type.get("idle_timeout_s", 600) <= 600:
        yield "it costs without work"
    machine = INSTANCE_TYPES.get(node["InstanceType"], {"VCpuInfo": {"DefaultVCpus": 0}})
    gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {"Gpus": []})["Gpus"])
    if node_type["resources"] != {"CPU": machine["VCpuInfo"]["DefaultVCpus"], "GPU": gpus}:
        yield f"resources are not those of {node['InstanceType']}"


def test_the_launchers_configuration_has_no_fault():
    assert list(launcher_faults(launcher())) == []


SPOT = "available_node_types/g5_spot"
NODE = f"{SPOT}/node_config"
START = "ray start --head --dashboard-host=127.0.0.1"


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (f"{NODE}/InstanceMarketOptions/MarketType", "sport", "sport is none of AWS's words"),
        (f"{NODE}/InstanceMarketOptions/SpotOptions/SpotInstanceType", "persistent", "InstanceMarketOptions lacks"),
        (f"{NODE}/InstanceMarketOptions/SpotOptions/InstanceInterruptionBehavior", "stop", "InstanceMarketOptions lacks"),
        (f"{NODE}/MetadataOptions/HttpTokens", "requird", "requird is none of AWS's words"),
        (f"{NODE}/MetadataOptions/HttpEndpoint", "disabled", "MetadataOptions lacks ('HttpEndpoint', 'enabled')"),
        (f"{NODE}/MetadataOptions", GONE, "MetadataOptions lacks ('HttpTokens', 'required')"),
        (f"{NODE}/InstanceType", "g5.small", "g5.small is none of AWS's words"),
        (f"{NODE}/Monitor", True, 'Unknown parameter in input: "Monitor"'),
        (f"{NODE}/IamInstanceProfile", GONE, "has no IamInstanceProfile"),
        (f"{NODE}/IamInstanceProfile/Name", "head-profile", "has the head's rights"),
        (f"{NODE}/InstanceInitiatedShutdownBehavior", "stop", "paid for when it has shut itself down"),
        (f"{NODE}/SecurityGroupIds", GONE, "has no SecurityGroupIds"),
        (f"{NODE}/BlockDeviceMappings/0/Ebs/Encrypted", False, "a disk lacks"),
        (f"{NODE}/BlockDeviceMappings/0/Ebs/DeleteOnTermination", False, "a disk lacks"),
        (f"{SPOT}/min_workers", 1, "g5_spot: it costs without work"),
        (f"{SPOT}/idle_timeout_s", 601, "g5_spot: it costs without work"),
        (f"{SPOT}/labels/capacity", "on-demand", "g5_spot: its label lacks ('capacity', 'spot')"),
        ("available_node_types/g5_ondemand/labels/capacity", "spot", "its label lacks ('capacity', 'on-demand')"),
        (f"{SPOT}/resources", {}, "resources are not those of g5.xlarge"),
        (f"{SPOT}/resources/GPU", 2, "resources are not those of g5.xlarge"),
        (f"{SPOT}/priority", 0, "no on-demand type of the same size"),
        ("available_node_types/g5_ondemand", GONE, "no on-demand type of the same size"),
        ("available_node_types/head/resources/CPU", 4, "runs can come to the head"),
        ("max_workers", 50, "beyond five workers"),
        ("idle_timeout_minutes", 600, "idle for more than ten minutes"),
        ("provider/use_internal_ip", True, "unknown to Ray's AWS provider"),
        ("provider/module", "ray.autoscaler._private.aws.node_provider.AWSNodeProvider", "get no on-demand instances"),
        ("provider/cache_stopped_nodes", GONE, "not terminated when idle"),
        ("auth/ssh_proxy_command", "nc %h %p", "Session Manager, has ('ssh_proxy_command', 'nc %h %p')"),
        ("docker/image", "registry.test/imgcls:latest", "no digest"),
        ("docker/run_options", [], "docker.run_options lacks --env=RAY_AUTH_MODE=token"),
        ("docker/run_options", [*RUN_OPTIONS, "--privileged"], "docker.run_options has --privileged"),
        ("docker/worker_run_options", ["--gpus=all", "--privileged"], "docker.worker_run_options has --privileged"),
        ("initialization_commands", GONE, "another UID is not refused"),
        ("initialization_commands/1", "true", "no worker shuts itself down"),
        ("worker_start_ray_commands/2", GONE, "no keeper on a worker"),
        ("head_start_ray_commands/2", GONE, "no keeper on a head"),
        ("head_start_ray_commands/1", "ray start --head --dashboard-host=0.0.0.0", "loopback interface only, has 0.0.0.0"),
        ("head_start_ray_commands/1", f"{START} --dashboard-host 0.0.0.0", "loopback interface only, has 0.0.0.0"),
    ],
)
def test_a_mistake_that_ray_lets_through_is_found(path: str, value: Json, fault: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = planted(launcher(), path, value)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert fault in "\n".join(launcher_faults(config))


@pytest.mark.parametrize(
    ("up", "maximum", "launched", "terminated"),
    [
        (0, {}, {"g6_spot": 4, "g5_spot": 1}, 0),
        (0, {"g6_spot": 0, "g5_spot": 0}, {"g6_ondemand": 4, "g5_ondemand": 1}, 0),
        (2, {"g6_spot": 2, "g5_spot": 0}, {"g6_ondemand": 3}, 0),
        (2, {"g6_spot": 0, "g5_spot": 0}, {"g6_ondemand": 3}, 2),  # until they are gone they count
    ],
)
def test_on_demand_takes_over_and_spot_nodes_above_their_maximum_are_terminated(
    up: int, maximum: dict[str, int], launched: dict[str, int], terminated: int
):
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.schema import AutoscalerInstance
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated import instance_manager_pb2

    config = launcher()
    for name, most in maximum.items():
        config = planted(config, f"available_node_types/{name}/max_workers", most)
    types = AutoscalingConfig(planted(config, "auth/ssh_private_key", GONE), skip_content_hash=True).get_node_type_configs()
    assert types is not None
    instance = cast(Any, instance_manager_pb2).Instance
    nodes = [instance(instance_type="g6_spot", status=instance.ALLOCATED, instance_id=str(i)) for i in range(up)]
    request = SchedulingRequest(
        node_type_configs=types,
        max_num_nodes=config["max_workers"] + 1,  # the head is a node
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1})] * 5),
        current_instances=[AutoscalerInstance(im_instance=node, cloud_instance_id=node.instance_id) for node in nodes],
        disable_launch_config_check=True,
    )
    plan = ResourceDemandScheduler(event_logger=None).schedule(request)
    assert {launch.instance_type: launch.count for launch in plan.to_launch} == launched
    assert len(plan.to_terminate) == terminated


# The stack

AWS = "arn:${AWS::Partition}:"
EC2 = AWS + "ec2:${AWS::Region}:${AWS::AccountId}:"


def allow(sid: str, action: Json, resource: Json, **condition: Json) -> dict[str, Json]:
    statement = {"Sid": sid, "Effect": "Allow", "Action": action, "Resource": resource}
    return statement | ({"Condition": condition} if condition else {})


def sub(text: str) -> Json:
    return {"Fn::Sub": text}


def arn(resource: str) -> Json:
    return {"Fn::GetAtt": [resource, "Arn"]}


def policy(*statements: Json) -> Json:
    return {"Version": "2012-10-17", "Statement": list(statements)}


CLUSTER, GROUP = {"Ref": "ClusterName"}, {"Fn::GetAtt": ["SecurityGroup", "GroupId"]}
OF_EC2 = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
ROLE = {"AssumeRolePolicyDocument": policy(OF_EC2), "ManagedPolicyArns": [{"Ref": "NodePolicy"}]}
SESSIONS = ["CreateControlChannel", "CreateDataChannel", "OpenControlChannel", "OpenDataChannel"]
WITHOUT_TLS = {
    "Sid": "OnlyTls",
    "Effect": "Deny",
    "Principal": "*",
    "Action": "s3:*",
    "Resource": [arn("Bucket"), sub("${Bucket.Arn}/*")],
    "Condition": {"Bool": {"aws:SecureTransport": "false"}},
}
LAUNCH_WITH = ("subnet/*", "network-interface/*", "volume/*", "key-pair/*", "spot-instances-request/*")
STATEMENTS = {
    "BucketPolicy": [WITHOUT_TLS],
    "WorkerRole": [],
    "NodePolicy": [
        allow("ListBucket", "s3:ListBucket", arn("Bucket")),
        allow("Objects", ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"], sub("${Bucket.Arn}/*")),
        allow("Registry", "ecr:GetAuthorizationToken", "*"),
        allow(
            "Image",
            ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"],
            sub(AWS + "ecr:${AWS::Region}:${AWS::AccountId}:repository/${RepositoryName}"),
        ),
        allow("Sessions", ["ssm:UpdateInstanceInformation", *(f"ssmmessages:{action}" for action in SESSIONS)], "*"),
    ],
    "HeadRole": [
        allow("Look", "ec2:DescribeInstances", "*"),
        allow(
            "LaunchWorkers",
            "ec2:RunInstances",
            sub(EC2 + "instance/*"),
            StringEquals={"aws:RequestTag/ray-cluster-name": CLUSTER, "ec2:MetadataHttpTokens": "required"},
            ArnEquals={"ec2:InstanceProfile": arn("WorkerProfile")},
        ),
        allow(
            "LaunchWith",
            "ec2:RunInstances",
            [
                sub(EC2 + "security-group/${SecurityGroup.GroupId}"),
                *(sub(EC2 + one) for one in LAUNCH_WITH),
                sub(AWS + "ec2:${AWS::Region}::image/*"),
            ],
        ),
        allow("TagAtLaunch", "ec2:CreateTags", sub(EC2 + "instance/*"), StringEquals={"ec2:CreateAction": "RunInstances"}),
        allow(
            "OwnInstances",
            ["ec2:CreateTags", "ec2:TerminateInstances"],
            sub(EC2 + "instance/*"),
            StringEquals={"aws:ResourceTag/ray-cluster-name": CLUSTER},
        ),
        allow("WorkersRole", "iam:PassRole", arn("WorkerRole"), StringEquals={"iam:PassedToService": "ec2.amazonaws.com"}),
    ],
}
PROPERTIES = {
    "Bucket": {
        "BucketEncryption": {
            "ServerSideEncryptionConfiguration": [{"ServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]
        },
        "VersioningConfiguration": {"Status": "Enabled"},
        "OwnershipControls": {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]},
        "PublicAccessBlockConfiguration": dict.fromkeys(
            ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True
        ),
    },
    "BucketPolicy": {"Bucket": {"Ref": "Bucket"}},
    "NodePolicy": {},
    "AmongThemselves": {"GroupId": GROUP, "SourceSecurityGroupId": GROUP, "IpProtocol": "-1"},
    "SecurityGroup": {"VpcId": {"Ref": "VpcId"}},
    "HeadRole": ROLE,
    "WorkerRole": ROLE,
    "HeadProfile": {"Roles": [{"Ref": "HeadRole"}]},
    "WorkerProfile": {"Roles": [{"Ref": "WorkerRole"}]},
}
"""What is compared elsewhere, and descriptions, left out."""

LIFECYCLE = [
    {"Id": "unfinished", "Status": "Enabled", "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}},
    {
        "Id": "deleted",
        "Status": "Enabled",
        "NoncurrentVersionExpiration": {"NoncurrentDays": {"Ref": "DaysToUndelete"}},
        "ExpiredObjectDeleteMarker": True,
    },
    {"Id": "scratch", "Status": "Enabled", "Prefix": "scratch/", "ExpirationInDays": {"Ref": "DaysOfScratch"}},
]


def decoded(text: str) -> dict[str, Json]:
    template, errors = decode_str(text)
    assert not errors
    return json.loads(json.dumps(template))


def statements(template: Mapping[str, Json], *names: str) -> list[dict[str, Json]]:
    """The statements of the policies in the named resources; of all, without a name."""
    found = []
    for name in names or template["Resources"]:
        own = template["Resources"][name]["Properties"]
        documents = [own.get("PolicyDocument"), *(policy["PolicyDocument"] for policy in own.get("Policies", []))]
        found += [statement for document in documents if document for statement in document["Statement"]]
    return found


def actions(statement: Mapping[str, Json]) -> set[str]:
    said = statement["Action"]
    return {said} if isinstance(said, str) else set(said)


@cache
def rules():
    return get_rules([], [], ["W", "E"])  # warnings too


def linted(text: str) -> list[str]:
    return [f"{match.rule.id} {match.message}" for match in lint(text, rules=rules(), regions=[REGION])]


def stack_faults(template: Mapping[str, Json]) -> Iterator[str]:
    """What is wrong with the stack: by our own rules, then by cfn-lint, which knows AWS's own schemas."""
    resources = template["Resources"]
    yield from differences("the stack", resources, PROPERTIES)
    for name, stated in STATEMENTS.items():
        yield from differences(name, statements(template, name), stated)
    left_out = {"Description", "GroupDescription", "Policies", "PolicyDocument", "LifecycleConfiguration"}
    for name, stated in PROPERTIES.items():
        found = {key: value for key, value in resources[name]["Properties"].items() if key not in left_out}
        yield from differences(name, found.items(), stated.items())
    bucket = resources["Bucket"]
    yield from differences("Bucket", bucket["Properties"]["LifecycleConfiguration"]["Rules"], LIFECYCLE)
    if (bucket.get("DeletionPolicy"), bucket.get("UpdateReplacePolicy")) != ("Retain", "Retain"):
        yield "Bucket goes with the stack"
    yield from linted(json.dumps(template))


def test_the_stack_has_no_fault():
    assert linted(STACK) == list(stack_faults(decoded(STACK))) == []


BUCKET = "Resources/Bucket/Properties"
GROUPS = "Resources/SecurityGroup/Properties"
NODES = "Resources/NodePolicy/Properties/PolicyDocument/Statement"
HEAD = "Resources/HeadRole/Properties/Policies/0/PolicyDocument/Statement"
SSH = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
BY_LIST = {"Type": "AWS::EC2::SecurityGroupIngress", "Properties": {**SSH, "GroupId": GROUP, "SourcePrefixListId": "pl-1"}}


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("Resources/AmongThemselves/Properties/CidrIp", "0.0.0.0/0", "AmongThemselves has ('CidrIp', '0.0.0.0/0')"),
        (f"{GROUPS}/SecurityGroupIngress", [{**SSH, "CidrIp": "0.0.0.0/0"}], "SecurityGroup has ('SecurityGroupIngress'"),
        (f"{GROUPS}/SecurityGroupIngress", [{**SSH, "SourcePrefixListId": "pl-1"}], "SecurityGroup has ('SecurityGroupIngr"),
        ("Resources/Ssh", BY_LIST, "the stack has Ssh"),
        (f"{NODES}/1/Action", "s3:*", "NodePolicy lacks {'Sid': 'Objects'"),
        (f"{NODES}/1/Action", "s3:Nonsense", "W3037"),
        (f"{NODES}/1/Resource", "*", "NodePolicy lacks {'Sid': 'Objects'"),
        (f"{NODES}/1/Resource", sub(AWS + "s3:::*/*"), "NodePolicy lacks {'Sid': 'Objects'"),
        (f"{HEAD}/1/Condition", GONE, "HeadRole lacks {'Sid': 'LaunchWorkers'"),
        (f"{HEAD}/1/Condition/ArnEquals", GONE, "HeadRole lacks {'Sid': 'LaunchWorkers'"),
        (f"{HEAD}/1/Condition/StringEquals/ec2:MetadataHttpTokens", GONE, "HeadRole lacks {'Sid': 'LaunchWorkers'"),
        (f"{HEAD}/3/Condition", GONE, "HeadRole lacks {'Sid': 'TagAtLaunch'"),
        (f"{HEAD}/4/Condition", GONE, "HeadRole lacks {'Sid': 'OwnInstances'"),
        (f"{HEAD}/5/Resource", "*", "HeadRole lacks {'Sid': 'WorkersRole'"),
        (
            "Resources/HeadRole/Properties/AssumeRolePolicyDocument/Statement/0/Principal",
            {"AWS": "*"},
            "HeadRole lacks ('AssumeRolePolicyDocument'",
        ),
        ("Resources/WorkerRole/Properties/ManagedPolicyArns/0", AWS + "iam::aws:policy/Admin", "WorkerRole lacks ('Managed"),
        ("Resources/BucketPolicy/Properties/PolicyDocument/Statement/0/Condition", GONE, "BucketPolicy lacks"),
        (f"{BUCKET}/LifecycleConfiguration/Rules/0/Status", True, "E3030"),
        (f"{BUCKET}/LifecycleConfiguration/Rules/0", GONE, "Bucket lacks {'Id': 'unfinished'"),
        (f"{BUCKET}/LifecycleConfiguration/Rules/1", GONE, "Bucket lacks {'Id': 'deleted'"),
        (f"{BUCKET}/LifecycleConfiguration/Rules/2/Prefix", GONE, "Bucket lacks {'Id': 'scratch'"),
        (
            f"{BUCKET}/BucketEncryption/ServerSideEncryptionConfiguration/0/ServerSideEncryptionByDefault/SSEAlgorithm",
            "aes",
            "E3030",
        ),
        (f"{BUCKET}/VersioningConfiguration", GONE, "Bucket lacks ('VersioningConfiguration'"),
        (f"{BUCKET}/PublicAccessBlockConfiguration/BlockPublicPolicy", False, "Bucket lacks ('PublicAccessBlock"),
        ("Resources/Bucket/DeletionPolicy", "Delete", "goes with the stack"),
        ("Outputs/Bucket/Value/Ref", "Buckett", "E6101"),
    ],
)
def test_a_mistake_in_the_stack_is_found(path: str, value: Json, fault: str):
    assert any(fault in found for found in stack_faults(planted(decoded(STACK), path, value)))


def test_nodes_may_do_with_the_bucket_what_the_guide_lists_and_nothing_else():
    guide = (ROOT / "docs/storage.md").read_text().partition("**Rights.**")[2].partition("\n")[0]
    allowed = {action for statement in statements(decoded(STACK), "NodePolicy") for action in actions(statement)}
    assert {action for action in allowed if action.startswith("s3:")} == set(re.findall(r"s3:\w+", guide))


# Both, on a simulated AWS


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The stack stands: its outputs, and what a user has beside it, under the keys of the site's file."""
    home = tmp_path_factory.mktemp("home")
    for name in ("key.pem", ".ray/auth_token"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("0" * 64)
    few = [kind for kind in InstanceTypeBackend.instance_types if kind.name in ("m6i.xlarge", "g5.xlarge", "g6.xlarge")]
    with mock_aws(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setattr(InstanceTypeBackend, "instance_types", few)  # Ray asks for all, which takes 6 s
        ec2, stacks = boto3.client("ec2", REGION), boto3.client("cloudformation", REGION)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnets = [
            ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{i}.0/24", AvailabilityZone=zone)["Subnet"]["SubnetId"]
            for i, zone in enumerate(ZONES)
        ]
        ec2.create_key_pair(KeyName="key-name")
        stacks.create_stack(
            StackName="imgcls",
            TemplateBody=STACK,
            Parameters=[
                {"ParameterKey": "VpcId", "ParameterValue": vpc},
                {"ParameterKey": "ClusterName", "ParameterValue": "ours"},
            ],
            Capabilities=["CAPABILITY_IAM"],
        )
        stack = stacks.describe_stacks(StackName="imgcls")["Stacks"][0]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        found = {
            re.sub(r"(?<=[a-z])(?=[A-Z])", "_", output["OutputKey"]).lower(): output["OutputValue"]
            for output in stack["Outputs"]
        }
        yield found | {
            "cluster_name": "ours",
            "region": REGION,
            "zones": ",".join(ZONES),
            "private_key": "~/key.pem",
            "subnet_a": subnets[0],
            "subnet_b": subnets[1],
            "ami": ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
        }


def test_the_outputs_are_the_bucket_the_group_and_one_role_each(outputs: dict[str, str]):
    boto3.client("s3", REGION).head_bucket(Bucket=outputs["bucket"])
    (group,) = boto3.client("ec2", REGION).describe_security_groups(GroupIds=[outputs["security_group"]])["SecurityGroups"]
    (rule,) = group["IpPermissions"]
    assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [outputs["security_group"]]
    assert rule["IpRanges"] == rule["Ipv6Ranges"] == []
    iam = boto3.client("iam", REGION)
    for node, own in (("head", ["autoscaler"]), ("worker", [])):
        profile = iam.get_instance_profile(InstanceProfileName=outputs[f"{node}_profile"])["InstanceProfile"]
        (role,) = profile["Roles"]
        assert iam.list_role_policies(RoleName=role["RoleName"])["PolicyNames"] == own


def inventory() -> tuple[set[str], set[str]]:
    """All roles and security groups of the account."""
    groups = boto3.client("ec2", REGION).describe_security_groups()["SecurityGroups"]
    roles = boto3.client("iam", REGION).list_roles()["Roles"]
    return {role["Arn"] for role in roles}, {group["GroupId"] for group in groups}


def bootstrapped(outputs: Mapping[str, str]) -> dict[str, Json]:
    """aws.yaml with the stack's outputs, as `ray up` makes it ready."""
    from ray.autoscaler._private.aws import config as aws_config
    from ray.autoscaler._private.aws.utils import client_cache, resource_cache
    from ray.autoscaler._private.providers import _get_node_provider_cls
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    for cached in (client_cache, resource_cache, aws_config._get_subnets_or_die):
        cached.cache_clear()
    config = prepare_config(launcher(**{f"aws_{key}": value for key, value in outputs.items()}))
    validate_config(config)
    assert AutoscalingConfig(copy.deepcopy(config)).get_node_type_configs()
    provider = _get_node_provider_cls(config["provider"])
    return provider.bootstrap_config(provider.fillout_available_node_types_resources(config))


def test_ray_launches_every_type_with_what_the_stack_gave(outputs: dict[str, str]):
    from ray.autoscaler._private.providers import _get_node_provider

    before = inventory()
    config = bootstrapped(outputs)
    provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    called: set[str] = set()
    for ec2 in (provider.ec2, provider.ec2_fail_fast):
        ec2.meta.client.meta.events.register("before-call", lambda model, **_: called.add(f"ec2:{model.name}"))
    for name, node_type in config["available_node_types"].items():
        create(provider, name, node_type)
    nodes = {provider.node_tags(node)["ray-user-node-type"]: node for node in provider.non_terminated_nodes({})}
    assert nodes.keys() == {"head", "g5_spot", "g5_ondemand", "g6_spot", "g6_ondemand"}
    provider.set_node_tags(nodes["head"], {"ray-node-status": "up-to-date"})
    seen = {name: description(node, outputs) for name, node in nodes.items()}
    provider.terminate_nodes(list(nodes.values()))

    assert seen == {
        name: {
            "type": "m6i.xlarge" if name == "head" else f"{name[:2]}.xlarge",
            "profile": "head" if name == "head" else "worker",
            "market": "spot" if name.endswith("_spot") else None,
            "tokens": "required",
            "hops": 2,
            "encrypted": [True],
            "groups": [outputs["security_group"]],
            "cluster": "ours",
        }
        for name in nodes
    }
    assert inventory() == before
    allowed = {action for statement in statements(decoded(STACK), "HeadRole") for action in actions(statement)}
    assert called == allowed - {"iam:PassRole"}


def create(provider: Json, name: str, node_type: Json) -> None:
    """As Ray's autoscaler asks for a node."""
    tags = {"ray-node-type": "worker", "ray-user-node-type": name, "ray-node-name": name}
    provider.create_node_with_resources_and_labels(node_type["node_config"], tags, 1, node_type["resources"], {})


@pytest.mark.parametrize(
    ("name", "code", "refused", "market"),
    [
        ("g5_spot", None, "spot", "spot"),
        ("g5_spot", "InsufficientInstanceCapacity", "spot", None),
        ("g5_spot", "SpotMaxPriceTooLow", "spot", None),
        ("g5_spot", "MaxSpotInstanceCountExceeded", "spot", None),
        ("g5_spot", "Unsupported", "spot", None),
        ("g5_spot", "Unsupported", "spot and on-demand", "raised"),
        ("g5_spot", "InsufficientInstanceCapacity", "spot and on-demand", "raised"),
        ("g5_spot", "UnauthorizedOperation", "spot", "raised"),
        ("g5_spot", "InvalidAMIID.NotFound", "spot", "raised"),
        ("g5_ondemand", "InsufficientInstanceCapacity", "on-demand", "raised"),
    ],
)
def test_where_there_is_no_spot_capacity_the_node_is_on_demand_and_other_errors_are_raised(
    outputs: dict[str, str], caplog: pytest.LogCaptureFixture, name: str, code: str | None, refused: str, market: str | None
):
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    caplog.set_level("WARNING", logger="ray")  # a test before this one may have silenced it
    config = bootstrapped(outputs)
    provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    node_type = config["available_node_types"][name]
    asked = copy.deepcopy(node_type["node_config"])

    def answer(params: Json, **_: object) -> Json:
        """AWS's, in place of what moto would say; None: moto says it."""
        kind = "spot" if params["body"].get("InstanceMarketOptions.MarketType") == "spot" else "on-demand"
        if code is None or kind not in refused.split():
            return None
        return SimpleNamespace(status_code=500), {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {}}

    events = provider.ec2_fail_fast.meta.client.meta.events
    events.register("before-call.ec2.RunInstances", answer)
    try:
        if market == "raised":
            with pytest.raises(NodeLaunchException) as raised:
                create(provider, name, node_type)
            assert raised.value.category == code
            assert provider.non_terminated_nodes({}) == []
            assert ("on-demand node" in caplog.text) == (refused == "spot and on-demand")
            return
        create(provider, name, node_type)
        (node,) = provider.non_terminated_nodes({})
        seen = description(node, outputs)
        provider.terminate_nodes([node])
        assert (seen["type"], seen["profile"], seen["market"]) == ("g5.xlarge", "worker", market)
        said = [record.getMessage() for record in caplog.records if "on-demand node" in record.msg]
        assert [f"({code})" in line and name in line for line in said] == [True] * (code is not None)
        assert node_type["node_config"] == asked
    finally:
        events.unregister("before-call.ec2.RunInstances", answer)


class Shell:
    """Stands for the subprocess module, of which Ray uses this much: what would be run, and what a node would answer."""

    ANSWERS: ClassVar = {
        "printenv HOME": "/home/imgcls",
        ".Config.Env": '["HOME=/home/imgcls"]',
        "meminfo": "MemAvailable: 16000000 kB",
    }

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.config_of_head: dict[str, Json] = {}

    def check_call(self, words: list[str], **_: object) -> None:
        self.lines.append(" ".join(words))
        if words[-1].endswith("ray_bootstrap_config.yaml") and words[0] == "rsync":
            self.config_of_head = json.loads(Path(words[-2]).read_text())

    def check_output(self, words: list[str], **_: object) -> bytes:
        self.check_call(words)
        return next((answer for key, answer in self.ANSWERS.items() if key in words[-1]), "").encode()


def test_ray_up_reaches_the_head_by_session_manager_and_starts_ray_in_its_container(
    outputs: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    from ray.autoscaler._private import commands
    from ray.autoscaler._private.aws import node_provider

    monkeypatch.setattr(node_provider, "TAG_BATCH_DELAY", 0)
    shell = Shell()
    config = bootstrapped(outputs)
    options = {"no_restart": False, "restart_only": False, "yes": True, "override_cluster_name": None}
    commands.get_or_create_head_node(config, "aws.yaml", **options, _runner=cast(ModuleType, shell))

    assert all("ProxyCommand=aws ssm start-session" in line for line in shell.lines)
    (run,) = (line for line in shell.lines if "docker run" in line)
    assert "/~/.ray/auth_token:/home/imgcls/.ray/auth_token " in run
    assert "--env=RAY_AUTH_MODE=token" in run
    assert "--gpus" not in run
    (start,) = (line for line in shell.lines if "ray start" in line)
    assert "docker exec" in start
    assert "--autoscaling-config=/home/imgcls/ray_bootstrap_config.yaml" in start
    assert shell.lines.index(start) > next(i for i, line in enumerate(shell.lines) if "chmod 600 /home/imgcls/.ray" in line)
    (keeper,) = (line for line in shell.lines if "cluster.provide.keeper aws" in line)
    assert "docker exec" in keeper
    assert "export RAY_CLOUD_INSTANCE_ID=i-" in keeper
    assert shell.lines.index(keeper) > shell.lines.index(start)
    (loop,) = (line for line in shell.lines if "sudo shutdown -h now" in line)
    assert "docker" not in loop
    assert shell.lines.index(loop) < shell.lines.index(run)
    # The head reaches workers by their addresses, and passes on its own token.
    assert shell.config_of_head["auth"] == {"ssh_user": "ubuntu", "ssh_private_key": "~/ray_bootstrap_key.pem"}
    assert shell.config_of_head["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert shell.config_of_head["docker"]["worker_run_options"] == ["--gpus=all"]


def test_a_node_logs_in_to_the_registry_that_the_image_names(tmp_path: Path):
    for name in ("aws", "docker"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/log\n')
        (tmp_path / name).chmod(0o755)
    login = launcher(aws_region=REGION)["initialization_commands"][-1]
    subprocess.run(["bash", "-c", login], env={"PATH": f"{tmp_path}:{os.defpath}"}, check=True)
    assert sorted((tmp_path / "log").read_text().splitlines()) == [
        f"aws ecr get-login-password --region {REGION}",
        "docker login --username AWS --password-stdin registry.example",
    ]


def description(node: str, outputs: Mapping[str, str]) -> dict[str, Json]:
    ec2, iam = boto3.client("ec2", REGION), boto3.client("iam", REGION)
    (reservation,) = ec2.describe_instances(InstanceIds=[node])["Reservations"]
    (instance,) = reservation["Instances"]
    disks = ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [node]}])["Volumes"]
    profiles = {
        iam.get_instance_profile(InstanceProfileName=outputs[f"{kind}_profile"])["InstanceProfile"]["Arn"]: kind
        for kind in ("head", "worker")
    }
    return {
        "type": instance["InstanceType"],
        "profile": profiles[instance["IamInstanceProfile"]["Arn"]],
        "market": instance.get("InstanceLifecycle"),
        "tokens": instance["MetadataOptions"]["HttpTokens"],
        "hops": instance["MetadataOptions"]["HttpPutResponseHopLimit"],
        "encrypted": [disk["Encrypted"] for disk in disks],
        "groups": [group["GroupId"] for group in instance["SecurityGroups"]],
        "cluster": {tag["Key"]: tag["Value"] for tag in instance["Tags"]}["ray-cluster-name"],
    }
