"""infra/aws/stack.yaml and infra/ray/aws.yaml hold together, on a simulated AWS; nothing here reaches the network."""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import botocore.session
import pytest
import yaml
from botocore.model import ListShape, Shape, StructureShape
from botocore.validate import ParamValidator
from cfnlint.api import lint
from cfnlint.config import ManualArgs
from cfnlint.decode import decode_str
from moto import mock_aws
from moto.ec2.models.instance_types import INSTANCE_TYPES

ROOT = Path(__file__).parents[2]
REGION = "us-west-2"
SITE = {
    "region": REGION,
    "zones": "us-west-2a,us-west-2b",
    "subnet_a": "subnet-a",
    "subnet_b": "subnet-b",
    "security_group": "sg-1",
    "key_name": "key",
    "private_key": "~/key.pem",
    "ami": "ami-1",
    "head_profile": "heads",
    "worker_profile": "workers",
    "image": f"registry.test/imgcls@sha256:{'0' * 64}",
}
STACK = (ROOT / "infra/aws/stack.yaml").read_text()

Json = Any
GONE = object()


def filled(**changes: str) -> dict[str, Json]:
    text = (ROOT / "infra/ray/aws.yaml").read_text()
    text = re.sub(r"\$\{aws\.([a-z_]+)\}", lambda found: {**SITE, **changes}[found[1]], text)
    return json.loads(json.dumps(yaml.safe_load(text)))  # anchors become separate values


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


# The launcher's configuration


@cache
def run_instances() -> StructureShape:
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    assert isinstance(shape, StructureShape)
    return shape


def unknown_words(value: Json, shape: Shape, where: str) -> Iterator[str]:
    """botocore checks names and types of a request, and leaves enumerations to the server."""
    if isinstance(shape, StructureShape):
        for key in value.keys() & shape.members.keys():
            yield from unknown_words(value[key], shape.members[key], f"{where}.{key}")
    elif isinstance(shape, ListShape):
        for member in value:
            yield from unknown_words(member, shape.member, where)
    elif (words := getattr(shape, "enum", None)) and value not in words:
        yield f"{where}: {value} is none of AWS's words"


def launcher_faults(config: Mapping[str, Json]) -> list[str]:
    """What is wrong with a filled aws.yaml and what neither Ray nor botocore nor moto says."""
    faults = [
        f"provider.{key}: unknown to Ray's AWS provider"
        for key in config["provider"].keys()
        - {"type", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes"}
    ]
    if config["provider"].get("use_internal_ips") is not True or config["provider"].get("cache_stopped_nodes") is not False:
        faults.append("provider: nodes are reached by internal addresses, and ended when idle")
    if "ssm start-session" not in config["auth"].get("ssh_proxy_command", "") or "0.0.0.0" in json.dumps(config):
        faults.append("a port is open to the world")
    if not re.search(r"@sha256:[0-9a-f]{64}$", config["docker"]["image"]):
        faults.append("docker.image: has no digest")
    for node in ("head", "worker"):
        if "RAY_AUTH_MODE=token ray start" not in " ".join(config[f"{node}_start_ray_commands"]):
            faults.append(f"{node}_start_ray_commands: Ray starts without a token")
    if "--dashboard-host=127.0.0.1" not in " ".join(config["head_start_ray_commands"]):
        faults.append("head_start_ray_commands: the dashboard listens beyond the loopback interface")

    types, head = config["available_node_types"], config["head_node_type"]
    on_demand = [t for name, t in types.items() if name != head and "InstanceMarketOptions" not in t["node_config"]]
    for name, node_type in types.items():
        faults += [f"{name}: {fault}" for fault in type_faults(node_type, is_head=name == head)]
        if "InstanceMarketOptions" in node_type["node_config"] and not any(
            (twin["node_config"]["InstanceType"], twin["resources"]) == (node_type["node_config"]["InstanceType"], node_type["resources"])
            and twin["priority"] < node_type["priority"]
            for twin in on_demand
        ):
            faults.append(f"{name}: no on-demand type of the same size comes after it")
    profiles = [json.dumps(t["node_config"].get("IamInstanceProfile")) for name, t in types.items() if name != head]
    if json.dumps(types[head]["node_config"].get("IamInstanceProfile")) in profiles:
        faults.append("a worker has the head's rights")
    return faults


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
    metadata = node.get("MetadataOptions", {})
    if (metadata.get("HttpTokens"), metadata.get("HttpPutResponseHopLimit")) != ("required", 2):
        yield "credentials can be had without IMDSv2, or not from a container"
    if not all(disk["Ebs"].get("Encrypted") and disk["Ebs"]["VolumeType"] == "gp3" for disk in node["BlockDeviceMappings"]):
        yield "a disk is not encrypted, or not gp3"
    if is_head:
        if node_type["resources"].get("CPU") != 0 or "InstanceMarketOptions" in node:
            yield "runs can come to the head, or AWS can take it back"
        return
    if node_type["min_workers"] > node_type["max_workers"]:
        yield "min_workers is above max_workers"
    machine = INSTANCE_TYPES.get(node["InstanceType"], {"VCpuInfo": {"DefaultVCpus": 0}})
    gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {"Gpus": []})["Gpus"])
    if node_type["resources"] != {"CPU": machine["VCpuInfo"]["DefaultVCpus"], "GPU": gpus}:
        yield f"resources are not those of {node['InstanceType']}"


def test_the_launchers_configuration_has_no_fault():
    assert launcher_faults(filled()) == []


SPOT = "available_node_types/g5_spot"


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (f"{SPOT}/node_config/InstanceMarketOptions/MarketType", "sport", "sport is none of AWS's words"),
        (f"{SPOT}/node_config/MetadataOptions/HttpTokens", "requird", "requird is none of AWS's words"),
        (f"{SPOT}/node_config/MetadataOptions", GONE, "without IMDSv2"),
        (f"{SPOT}/node_config/InstanceType", "g5.small", "g5.small is none of AWS's words"),
        (f"{SPOT}/node_config/Monitor", True, 'Unknown parameter in input: "Monitor"'),
        (f"{SPOT}/node_config/IamInstanceProfile", GONE, "has no IamInstanceProfile"),
        (f"{SPOT}/node_config/IamInstanceProfile/Name", "heads", "has the head's rights"),
        (f"{SPOT}/node_config/SecurityGroupIds", GONE, "has no SecurityGroupIds"),
        (f"{SPOT}/node_config/BlockDeviceMappings/0/Ebs/Encrypted", False, "not encrypted"),
        (f"{SPOT}/min_workers", 5, "min_workers is above max_workers"),
        (f"{SPOT}/resources", {}, "resources are not those of g5.xlarge"),
        (f"{SPOT}/resources/GPU", 2, "resources are not those of g5.xlarge"),
        (f"{SPOT}/priority", 0, "no on-demand type of the same size"),
        ("available_node_types/g5_ondemand", GONE, "no on-demand type of the same size"),
        ("available_node_types/head/resources/CPU", 4, "runs can come to the head"),
        ("provider/use_internal_ip", True, "unknown to Ray's AWS provider"),
        ("provider/cache_stopped_nodes", GONE, "ended when idle"),
        ("auth/ssh_proxy_command", "nc %h %p", "open to the world"),
        ("docker/image", "registry.test/imgcls:latest", "no digest"),
        ("head_start_ray_commands", ["ray start --head --dashboard-host=127.0.0.1"], "without a token"),
        ("head_start_ray_commands/1", "RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0", "the dashboard"),
    ],
)
def test_a_mistake_that_ray_lets_through_is_found(path: str, value: Json, fault: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = planted(filled(), path, value)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert fault in "\n".join(launcher_faults(config))


# The stack

# What has no narrower resource than "*".
EVERYWHERE = {
    "ec2:DescribeInstances",
    "ecr:GetAuthorizationToken",
    "ssm:UpdateInstanceInformation",
    "ssmmessages:CreateControlChannel",
    "ssmmessages:CreateDataChannel",
    "ssmmessages:OpenControlChannel",
    "ssmmessages:OpenDataChannel",
}


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


def stack_faults(template: Mapping[str, Json]) -> list[str]:
    """What cfn-lint, which knows AWS's own schemas, and we find wrong with the stack."""
    text = json.dumps(template)
    faults = [f"{match.rule.id} {match.message}" for match in lint(text, config=ManualArgs(regions=[REGION]))]
    resources = template["Resources"]
    if "0.0.0.0/0" in text or "::/0" in text or "CidrIp" in text:
        faults.append("a port is open to addresses outside of the security group")
    for statement in statements(template):
        if statement["Effect"] == "Allow":
            if any("*" in action for action in actions(statement)):
                faults.append(f"{statement['Sid']}: allows whatever fits a wildcard")
            if "*" in statement["Resource"] and not actions(statement) <= EVERYWHERE:
                faults.append(f"{statement['Sid']}: allows it on everything")
    bucket = resources["Bucket"]
    own = {
        "BucketEncryption": {"ServerSideEncryptionConfiguration": [{"ServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]},
        "VersioningConfiguration": {"Status": "Enabled"},
        "OwnershipControls": {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]},
        "PublicAccessBlockConfiguration": dict.fromkeys(
            ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True
        ),
    }
    faults += [f"Bucket.{key} is another" for key in own if bucket["Properties"].get(key) != own[key]]
    if {bucket.get("DeletionPolicy"), bucket.get("UpdateReplacePolicy")} != {"Retain"}:
        faults.append("Bucket: goes with the stack")
    # A rule that expires current objects has to say which.
    for rule in bucket["Properties"]["LifecycleConfiguration"]["Rules"]:
        if "ExpirationInDays" in rule and rule.get("Prefix") != "scratch/":
            faults.append(f"Bucket: {rule['Id']} deletes what is still wanted")
    return faults


def test_the_stack_has_no_fault():
    assert stack_faults(decoded(STACK)) == []


def test_cfn_lint_has_nothing_to_say_of_the_stack_as_it_is_written():
    assert [match.message for match in lint(STACK, config=ManualArgs(regions=[REGION]))] == []


BUCKET = "Resources/Bucket/Properties"


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("Resources/AmongThemselves/Properties/CidrIp", "0.0.0.0/0", "open to addresses outside"),
        (
            "Resources/SecurityGroup/Properties/SecurityGroupIngress",
            [{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": "0.0.0.0/0"}],
            "open to addresses outside",
        ),
        ("Resources/NodePolicy/Properties/PolicyDocument/Statement/1/Action", "s3:*", "whatever fits a wildcard"),
        ("Resources/NodePolicy/Properties/PolicyDocument/Statement/1/Action", "s3:Nonsense", "W3037"),
        ("Resources/NodePolicy/Properties/PolicyDocument/Statement/1/Resource", "*", "allows it on everything"),
        ("Resources/HeadRole/Properties/Policies/0/PolicyDocument/Statement/5/Resource", "*", "allows it on everything"),
        (f"{BUCKET}/LifecycleConfiguration/Rules/0/Status", True, "E3030"),
        (f"{BUCKET}/LifecycleConfiguration/Rules/2/Prefix", GONE, "deletes what is still wanted"),
        (
            f"{BUCKET}/BucketEncryption/ServerSideEncryptionConfiguration/0/ServerSideEncryptionByDefault/SSEAlgorithm",
            "aes",
            "E3030",
        ),
        (f"{BUCKET}/VersioningConfiguration", GONE, "Bucket.VersioningConfiguration"),
        (f"{BUCKET}/PublicAccessBlockConfiguration/BlockPublicPolicy", False, "Bucket.PublicAccessBlockConfiguration"),
        ("Resources/Bucket/DeletionPolicy", "Delete", "goes with the stack"),
        ("Outputs/Bucket/Value/Ref", "Buckett", "E1020"),
    ],
)
def test_a_mistake_in_the_stack_is_found(path: str, value: Json, fault: str):
    assert fault in "\n".join(stack_faults(planted(decoded(STACK), path, value)))


def test_nodes_may_do_with_the_bucket_what_the_guide_lists_and_nothing_else():
    guide = (ROOT / "docs/storage.md").read_text().partition("**Rights.**")[2].partition("\n")[0]
    allowed = {action for statement in statements(decoded(STACK), "NodePolicy") for action in actions(statement)}
    assert {action for action in allowed if action.startswith("s3:")} == set(re.findall(r"s3:\w+", guide))


def test_requests_without_tls_are_refused():
    (statement,) = statements(decoded(STACK), "BucketPolicy")
    assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "s3:*")
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert len(statement["Resource"]) == 2  # the bucket, and what lies in it


def test_the_head_passes_and_ends_only_what_is_its_own():
    by_sid = {statement["Sid"]: statement for statement in statements(decoded(STACK), "HeadRole")}
    assert by_sid["WorkersRole"]["Resource"] == {"Fn::GetAtt": ["WorkerRole", "Arn"]}
    assert by_sid["WorkersRole"]["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    tag = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": {"Ref": "ClusterName"}}}
    ends = [s for s in by_sid.values() if "ec2:TerminateInstances" in actions(s)]
    assert [s["Condition"] for s in ends] == [tag]
    assert decoded(STACK)["Parameters"]["ClusterName"]["Default"] == filled()["cluster_name"]


# Both, on a simulated AWS


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The stack stands: its outputs, and what a user has beside it, under the keys of the site's file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("key.pem", ".ray/auth_token"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("0" * 64)
    with mock_aws():
        ec2, stacks = boto3.client("ec2", REGION), boto3.client("cloudformation", REGION)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnets = [
            ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{i}.0/24", AvailabilityZone=zone)["Subnet"]["SubnetId"]
            for i, zone in enumerate(SITE["zones"].split(","))
        ]
        ec2.create_key_pair(KeyName=SITE["key_name"])
        stacks.create_stack(
            StackName="imgcls",
            TemplateBody=STACK,
            Parameters=[{"ParameterKey": "VpcId", "ParameterValue": vpc}],
            Capabilities=["CAPABILITY_IAM"],
        )
        stack = stacks.describe_stacks(StackName="imgcls")["Stacks"][0]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        found = {
            re.sub(r"(?<=[a-z])(?=[A-Z])", "_", output["OutputKey"]).lower(): output["OutputValue"]
            for output in stack["Outputs"]
        }
        yield found | {
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
    iam, roles = boto3.client("iam", REGION), {}
    for node in ("head", "worker"):
        profile = iam.get_instance_profile(InstanceProfileName=outputs[f"{node}_profile"])["InstanceProfile"]
        (roles[node],) = (role["RoleName"] for role in profile["Roles"])
        (common,) = iam.list_attached_role_policies(RoleName=roles[node])["AttachedPolicies"]
        assert "NodePolicy" in common["PolicyName"]
    assert iam.list_role_policies(RoleName=roles["worker"])["PolicyNames"] == []
    assert iam.list_role_policies(RoleName=roles["head"])["PolicyNames"] == ["autoscaler"]


def inventory() -> tuple[set[str], set[str]]:
    """All roles and security groups of the account."""
    groups = boto3.client("ec2", REGION).describe_security_groups()["SecurityGroups"]
    return {role["Arn"] for role in boto3.client("iam", REGION).list_roles()["Roles"]}, {group["GroupId"] for group in groups}


def test_ray_launches_every_type_with_what_the_stack_gave(outputs: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    from ray.autoscaler._private.aws import config as aws_config
    from ray.autoscaler._private.aws.utils import client_cache, resource_cache
    from ray.autoscaler._private.providers import _get_node_provider, _get_node_provider_cls
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    for cached in (client_cache, resource_cache, aws_config._get_subnets_or_die):
        cached.cache_clear()
    before = inventory()
    config = prepare_config(filled(**{key: value for key, value in outputs.items() if key in SITE}))
    validate_config(config)
    types = AutoscalingConfig(config).get_node_type_configs()
    assert types is not None
    provider_class = _get_node_provider_cls(config["provider"])
    config = provider_class.bootstrap_config(provider_class.fillout_available_node_types_resources(config))
    assert config["head_setup_commands"] == config["worker_setup_commands"] == config["setup_commands"]

    called: set[str] = set()
    call = botocore.client.BaseClient._make_api_call
    monkeypatch.setattr(
        botocore.client.BaseClient,
        "_make_api_call",
        lambda client, name, request: called.add(f"ec2:{name}") or call(client, name, request),
    )
    provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    for name, node_type in config["available_node_types"].items():
        tags = {"ray-node-type": "worker", "ray-user-node-type": name, "ray-node-name": name}
        provider.create_node(node_type["node_config"], tags, 1)
    nodes = {provider.node_tags(node)["ray-user-node-type"]: node for node in provider.non_terminated_nodes({})}
    assert nodes.keys() == types.keys() == {"head", "g5_spot", "g5_ondemand", "g6_spot", "g6_ondemand"}
    provider.set_node_tags(nodes["head"], {"ray-node-status": "up-to-date"})
    seen = {name: description(node, outputs) for name, node in nodes.items()}
    provider.terminate_nodes(list(nodes.values()))
    monkeypatch.undo()

    assert seen == {
        name: {
            "type": "m6i.xlarge" if name == "head" else f"{name[:2]}.xlarge",
            "profile": "head" if name == "head" else "worker",
            "market": "spot" if name.endswith("_spot") else None,
            "tokens": "required",
            "hops": 2,
            "encrypted": [True],
            "groups": [outputs["security_group"]],
            "cluster": "imgcls",
        }
        for name in types
    }
    assert inventory() == before
    allowed = {action for statement in statements(decoded(STACK), "HeadRole") for action in actions(statement)}
    assert called - {"ec2:DescribeVolumes", "ec2:GetInstanceProfile"} == allowed - {"iam:PassRole"}


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
