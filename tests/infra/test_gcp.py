"""infra/ray/gcp.yaml is what Ray's launcher and Compute Engine accept, and what we mean. Nothing reaches the network."""

import copy
import json
import os
import re
import shutil
import subprocess
import traceback
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import httplib2
import jsonschema
import pytest
import yaml
from google.auth.credentials import AnonymousCredentials
from googleapiclient import discovery
from ray.autoscaler._private.command_runner import SSHCommandRunner
from ray.autoscaler._private.providers import _get_node_provider, _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from jobs.render import INFRA
from tests.infra.keeping import FOLDER, keeping_faults
from tests.infra.site import IMAGE, filled

RAYS_ACCOUNT = "ray-autoscaler-sa-v1@project.iam.gserviceaccount.com"
MACHINES = {"e2-standard-4": (4, 0), "n1-standard-4": (4, 0), "g2-standard-4": (4, 1)}
"""CPUs and built-in GPUs: cloud.google.com/compute/docs/machine-resource."""

Config = dict[str, Any]
build_once = cache(discovery.build)  # Google's description of Compute Engine has 4 MB, and Ray reads it four times a launch


def config() -> Config:
    return yaml.safe_load(filled("ray/gcp.yaml", gcp_private_key="/dev/null"))


class Google:
    """Answers what `ray up` asks of a project without Ray's service account, and refuses anything else."""

    def __init__(self) -> None:
        self.instances: list[Config] = []
        self.policies: list[Config] = []

    def request(self, uri: str, method: str = "GET", body: str = "{}", **_: object) -> tuple[httplib2.Response, bytes]:
        answer = self._answer(f"{method} {uri.partition('?')[0]}", json.loads(body or "{}"))
        return httplib2.Response({"status": "200" if answer else "404"}), json.dumps(answer).encode()

    def _answer(self, asked: str, body: Config) -> Config:
        account = {"email": RAYS_ACCOUNT, "projectId": "project"}
        match asked.replace("https://", "").replace(".googleapis.com", "").split("/"):
            case ["GET cloudresourcemanager", "v1", "projects", project]:
                return {"projectId": project, "lifecycleState": "ACTIVE"}
            case ["POST cloudresourcemanager", "v1", "projects", "project:getIamPolicy"]:
                return {"bindings": [{"role": "roles/owner", "members": ["user:a@example.org"]}]}
            case ["POST cloudresourcemanager", "v1", "projects", "project:setIamPolicy"]:
                self.policies.append(body["policy"])
                return body["policy"]
            case ["GET iam", *_, "serviceAccounts", _]:
                return {}
            case ["POST iam", *_, "serviceAccounts"]:
                return account
            case ["POST compute", *_, "zones", "zone", "instances"]:
                self.instances.append(body)
                return {"name": "operation"}
            case ["GET compute", *_, "operations", "operation"]:
                return {"status": "DONE"}
        raise AssertionError(f"Ray asks Google for what this file should leave no need for: {asked}")


def launched(config: Config) -> Google:
    """What Google was asked when every node type was launched once, in order; raises what Ray finds wrong."""
    google = Google()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("httplib2.Http.request", lambda _, *given, **named: google.request(*given, **named))
        patch.setattr("google.auth.default", lambda *_, **__: (AnonymousCredentials(), None))
        patch.setattr("googleapiclient.discovery.build", build_once)
        prepared = prepare_config(copy.deepcopy(config))
        validate_config(prepared)
        AutoscalingConfig(prepared, skip_content_hash=True).get_node_type_configs()
        provider_class: Any = _get_node_provider_cls(prepared["provider"])
        ready = provider_class.bootstrap_config(provider_class.fillout_available_node_types_resources(prepared))
        provider = _get_node_provider(ready["provider"], ready["cluster_name"], use_cache=False)
        for name, node_type in ready["available_node_types"].items():
            role = "head" if name == ready["head_node_type"] else "worker"
            tags = {
                "ray-node-type": role,
                "ray-user-node-type": name,
                "ray-node-name": f"ray-{ready['cluster_name']}-{role}",
            }
            provider.create_node(node_type["node_config"], tags, 1)
    return google


@cache
def instance_schema() -> jsonschema.Draft202012Validator:
    """`Instance` of Google's discovery document as a JSON Schema that is closed: an unknown field is an error."""
    document = resources.files("googleapiclient") / "discovery_cache/documents/compute.v1.json"

    def closed(found: Config) -> Config:
        if "$ref" in found:
            return {"$ref": f"#/$defs/{found['$ref']}"}
        schema = {key: found[key] for key in ("type", "enum") if found.get(key, "any") != "any"}
        if "items" in found:
            schema["items"] = closed(found["items"])
        if found.get("type") == "object":
            schema["properties"] = {name: closed(field) for name, field in found.get("properties", {}).items()}
            others = found.get("additionalProperties")
            schema["additionalProperties"] = closed(others) if others else False
        return schema

    definitions = {name: closed(found) for name, found in json.loads(document.read_text())["schemas"].items()}
    return jsonschema.Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": definitions})


def faults(config: Config) -> list[str]:
    """What Ray's launcher, Compute Engine's schema and we find wrong, one sentence each."""
    try:
        google = launched(config)
    except (Exception, SystemExit) as error:
        return [f"Ray: {str(error) or traceback.extract_tb(error.__traceback__)[-1].line}"]
    bodies = dict(zip(config["available_node_types"], google.instances, strict=True))
    broken = [
        f"{name}: {error.json_path}: {error.message}"
        for name, body in bodies.items()
        for error in instance_schema().iter_errors(body)
    ]
    return broken or our_faults(config, bodies)


def our_faults(config: Config, bodies: dict[str, Config]) -> list[str]:
    """What we find wrong. bodies: the node types as Compute Engine is asked for them, or as the file says them."""
    found = [f"{name}: {fault}" for name, body in bodies.items() for fault in node_faults(name, config, body)]
    return cluster_faults(prepare_config(copy.deepcopy(config))) + list(keeping_faults(config, "gcp")) + found


def cluster_faults(config: Config) -> list[str]:
    keys = {"type", "project_id", "region", "availability_zone", "use_internal_ips"}
    provider, docker, auth = config["provider"], config["docker"], config["auth"]
    commands = [command for key, value in config.items() if key.endswith("commands") for command in value]
    hosts = re.findall(r"--dashboard-host[= ]*(\S+)", " ".join(commands))
    return [
        fault
        for fault, wrong in {
            f"provider has {set(provider) ^ keys} too much or too little": set(provider) != keys,
            "nodes are not reached by their internal addresses": provider.get("use_internal_ips") is not True,
            "SSH does not go through IAP by the instance's name": not auth.get("ssh_proxy_use_node_id")
            or "start-iap-tunnel %h %p --listen-on-stdin" not in auth["ssh_proxy_command"],
            "the image is not named by its digest": not re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", docker["image"]),
            "too few open files": "--ulimit=nofile=65536:65536" not in docker["run_options"],
            "workers' containers see no GPU": "--gpus=all" not in docker["worker_run_options"],
            "the dashboard listens beyond loopback": hosts != ["127.0.0.1"],
            "Ray starts without a token": "--env=RAY_AUTH_MODE=token" not in docker["run_options"],
            "nodes do not get our token": config["file_mounts"] != {"/home/imgcls/.ray/auth_token": "~/.ray/auth_token"},
            "it grows beyond five workers": config["max_workers"] > 5,
            "workers stay idle for more than ten minutes": not 0 < config["idle_timeout_minutes"] <= 10,
            "packages are installed on a node": any("pip install" in command for command in commands),
        }.items()
        if wrong
    ]


def node_faults(name: str, config: Config, body: Config) -> list[str]:
    """Faults of one node type. body: what Compute Engine is asked to make of it."""
    node_types = config["available_node_types"]
    node_type, is_head = node_types[name], name == config["head_node_type"]
    cpus, gpus = MACHINES[body["machineType"].rpartition("/")[2]]
    gpus += sum(accelerator["acceleratorCount"] for accelerator in body.get("guestAccelerators", []))
    size = {"CPU": 0, "driver": 16} if is_head else {"CPU": cpus, "GPU": gpus}
    accounts = [account["email"] for account in body.get("serviceAccounts", [])]
    scopes = [account.get("scopes") for account in body.get("serviceAccounts", [])]
    networks = body["networkInterfaces"]
    metadata = {item["key"]: item["value"] for item in body["metadata"]["items"]}
    market = name.partition("_")[2].replace("ondemand", "on-demand")
    twin = node_types.get(name.replace("spot", "ondemand"), node_type)
    # A GPU cannot migrate, and the autoscaler replaces a worker that is gone.
    scheduling = {"onHostMaintenance": "MIGRATE" if is_head else "TERMINATE", "automaticRestart": is_head}
    scheduling |= {"provisioningModel": "STANDARD"}
    if market == "spot":
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
    return [
        fault
        for fault, wrong in {
            f"resources are {node_type['resources']}, the machine has {size}": node_type["resources"] != size,
            "it has an external address": any({"accessConfigs", "ipv6AccessConfigs"} & {*network} for network in networks),
            "it is not in our subnetwork": [network["subnetwork"] for network in networks] != ["subnetwork"],
            f"its scopes are {scopes}": scopes != [["https://www.googleapis.com/auth/cloud-platform"]],
            "no firewall rule of ours holds for it": body.get("tags") != {"items": ["imgcls"]},
            "its disk stays when it is gone": not all(disk.get("autoDelete") for disk in body["disks"]),
            f"it runs as {accounts}": accounts != ["head-service-account" if is_head else "worker-service-account"],
            "the project's SSH keys open it": metadata.get("block-project-ssh-keys") != "true",
            "our SSH key does not open it": metadata.get("ssh-keys") != "ubuntu:ssh-ed25519 public-key"
            or metadata.get("enable-oslogin") != "FALSE",
            "it is no shielded VM": not {"enableVtpm", "enableIntegrityMonitoring"}
            <= {key for key, value in body.get("shieldedInstanceConfig", {}).items() if value},
            f"its scheduling should be {scheduling}": body.get("scheduling") != scheduling,
            "its label is not its market": not is_head and node_type["labels"] != {"capacity": market},
            "it never goes when idle": not is_head and not 0 < node_type["idle_timeout_s"] <= 600,
            "it costs without work": node_type["min_workers"] != 0,
            "it may outnumber the cluster": node_type["max_workers"] > config["max_workers"],
            "it is not preferred to its twin on demand": market == "spot" and node_type["priority"] <= twin["priority"],
            "its twin on demand has another size": market == "spot"
            and (node_type["resources"], machine(node_type)) != (twin["resources"], machine(twin)),
        }.items()
        if wrong
    ]


def machine(node_type: Config) -> tuple[Any, ...]:
    return tuple(node_type["node_config"].get(key) for key in ("machineType", "guestAccelerators", "disks"))


def test_the_template_parses_before_it_is_filled():
    assert yaml.safe_load((INFRA / "ray/gcp.yaml").read_text())["cluster_name"] == "${gcp.cluster_name}"


def test_ray_compute_engine_and_we_find_no_fault():
    assert faults(config()) == []


def node(name: str, **changes: Any) -> Callable[[Config], None]:
    return lambda config: config["available_node_types"][name].update(changes)


def vm(name: str, **changes: Any) -> Callable[[Config], None]:
    return lambda config: config["available_node_types"][name]["node_config"].update(changes)


def section(name: str, **changes: Any) -> Callable[[Config], None]:
    return lambda config: config[name].update(changes)


def without(*path: str) -> Callable[[Config], None]:
    def remove(config: Config) -> None:
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return remove


def replaced(old: str, new: str) -> Callable[[Config], None]:
    return lambda config: config.update(yaml.safe_load(yaml.safe_dump(config).replace(old, new)))


NAT = [{"subnetwork": "subnetwork", "accessConfigs": [{"type": "ONE_TO_ONE_NAT"}]}]


@pytest.mark.parametrize(
    ("mistake", "fault"),
    [
        (replaced("SPOT", "SPOTT"), "'SPOTT' is not one of"),
        (without("auth", "ssh_private_key"), "Ray asks Google for what this file should leave no need for"),
        (without("auth", "ssh_proxy_command"), "Ray: 'ssh_proxy_command' is a required property"),
        (without("docker", "container_name"), "Ray: Must provide a container & image name"),
        (node("g2_spot", min_workers=3, max_workers=2), "Ray: assert self.min_worker_nodes <= self.max_worker_nodes"),
        (node("g2_spot", min_workers=-1), "Ray: assert self.min_worker_nodes >= 0"),
        (vm("g2_spot", machineTyp="g2-standard-4"), "'machineTyp' was unexpected"),
        (vm("g2_spot", scheduling=[{"preemptible": True}]), "is not of type 'object'"),
        (vm("head", networkInterfaces=NAT), "head: it has an external address"),
        (vm("head", serviceAccounts=[{"email": RAYS_ACCOUNT}]), f"head: it runs as ['{RAYS_ACCOUNT}']"),
        (without("available_node_types", "t4_spot", "node_config", "networkInterfaces"), "Ray asks Google"),
    ],
)
def test_a_planted_mistake_is_found(mistake: Callable[[Config], None], fault: str):
    """Where the fault does not begin with "Ray:", Ray's launcher asked for all five instances and saw nothing."""
    wrong = config()
    mistake(wrong)
    assert any(fault in found for found in faults(wrong)), faults(wrong)


@pytest.mark.parametrize(
    ("mistake", "fault"),
    [
        (replaced("dashboard-host", "dashbord-host"), "the dashboard listens beyond loopback"),
        (replaced("dashboard-host=127.0.0.1", "dashboard-host=0.0.0.0"), "the dashboard listens beyond loopback"),
        (replaced("-host=127.0.0.1", "-host=127.0.0.1 --dashboard-host=0.0.0.0"), "the dashboard listens beyond loopback"),
        (replaced("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"), "Ray starts without a token"),
        (replaced("~/.ray/auth_token", "~/auth_token"), "nodes do not get our token"),
        (section("docker", image=IMAGE.replace("@sha256", "")), "the image is not named by its digest"),
        (replaced("project-ssh-keys", "project-ssh-key"), "the project's SSH keys open it"),
        (without("setup_commands"), "packages are installed on a node"),
        (without("head_setup_commands"), "packages are installed on a node"),
        (section("provider", use_internal_ip=True), "provider has {'use_internal_ip'} too much"),
        (section("provider", use_internal_ips=False), "nodes are not reached by their internal addresses"),
        (section("auth", ssh_proxy_use_node_id=False), "SSH does not go through IAP"),
        (replaced("keeper gcp", "keeper aws"), "no keeper on a head"),
        (replaced("sudo shutdown", "shutdown"), "no worker shuts itself down"),
        (replaced("--volume=", "--env=VOLUME="), "the container does not reach the keeper's file"),
        (section("docker", worker_run_options=[]), "workers' containers see no GPU"),
        (lambda config: config.update(max_workers=50), "it grows beyond five workers"),
        (lambda config: config.update(idle_timeout_minutes=600), "workers stay idle for more than ten minutes"),
        (node("g2_spot", resources={}), "g2_spot: resources are {}, the machine has {'CPU': 4, 'GPU': 1}"),
        (node("g2_spot", min_workers=1), "g2_spot: it costs without work"),
        (node("t4_spot", max_workers=6), "it may outnumber the cluster"),
        (node("t4_spot", priority=0), "it is not preferred to its twin on demand"),
        (node("t4_spot", idle_timeout_s=0), "it never goes when idle"),
        (node("t4_ondemand", resources={"CPU": 2, "GPU": 1}), "t4_spot: its twin on demand has another size"),
        (vm("g2_ondemand", machineType="n1-standard-4"), "g2_spot: its twin on demand has another size"),
        (vm("g2_spot", scheduling={"provisioningModel": "STANDARD"}), "g2_spot: its scheduling should be"),
        (vm("head", scheduling={"provisioningModel": "SPOT"}), "head: its scheduling should be"),
        (vm("t4_spot", guestAccelerators=[]), "the machine has {'CPU': 4, 'GPU': 0}"),
        (vm("t4_spot", shieldedInstanceConfig={}), "it is no shielded VM"),
        (replaced("autoDelete: true", "autoDelete: false"), "head: its disk stays when it is gone"),
        (replaced("auth/cloud-platform", "auth/devstorage.read_only"), "head: its scopes are"),
        (
            without("available_node_types", "t4_spot", "node_config", "tags"),
            "t4_spot: no firewall rule of ours holds for it",
        ),
    ],
)
def test_a_mistake_in_what_we_mean_is_found_before_a_launch(mistake: Callable[[Config], None], fault: str):
    wrong = config()
    mistake(wrong)
    written = {name: node_type["node_config"] for name, node_type in wrong["available_node_types"].items()}
    assert any(fault in found for found in our_faults(wrong, written)), our_faults(wrong, written)


def test_ray_binds_wide_roles_to_an_account_of_its_own_whatever_the_file_says():
    [policy] = launched(config()).policies
    bound = {binding["role"] for binding in policy["bindings"] if f"serviceAccount:{RAYS_ACCOUNT}" in binding["members"]}
    assert bound > {"roles/compute.admin", "roles/storage.objectAdmin"}
    assert bound == set(re.findall(r"roles/\w+\.\w+", (INFRA / "ray/gcp.yaml").read_text())), "the file names what Ray binds"


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a program that runs a line of shell first on the path; the file is what these lines write to `$SAID`."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))

    def program(name: str, line: str) -> Path:
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
        return tmp_path / "said"

    return program


@pytest.mark.skipif(not shutil.which("ssh"), reason="no ssh here")
def test_ssh_asks_iap_for_the_instance_by_its_name(said: Callable[[str, str], Path]):
    asked = said("gcloud", 'echo "$@" > "$SAID"')
    name = launched(config()).instances[0]["name"]
    runner = SSHCommandRunner("", name, None, config()["auth"], "imgcls", subprocess, True)
    with pytest.raises(Exception, match="SSH command failed"):
        runner.run("uptime", timeout=10, with_output=True)
    assert asked.read_text().split() == (
        f"compute start-iap-tunnel {name} 22 --listen-on-stdin --project=project --zone=zone".split()
    )


def initialized(uid: int, said: Callable[[str, str], Path]) -> tuple[list[subprocess.CompletedProcess[str]], str]:
    """What a VM whose `ubuntu` has this id makes of the commands before the container, and what docker is told."""
    said("id", f'[ "$1" = -u ] && echo {uid} || echo ubuntu docker')
    said("curl", """echo '{"access_token": "of-this-node", "expires_in": 3599}'""")
    told = said("docker", 'echo "$@" >> "$SAID"; cat >> "$SAID"')
    others = (command for command in config()["initialization_commands"] if FOLDER not in command)
    commands = [["bash", "-c", command] for command in others]
    ended = [subprocess.run(command, capture_output=True, text=True, check=False) for command in commands]
    return ended, told.read_text()


def test_a_node_logs_in_to_the_registry_of_the_image_as_itself(said: Callable[[str, str], Path]):
    ended, told = initialized(1000, said)
    assert [done.returncode for done in ended] == [0, 0, 0]
    assert told == "login -u oauth2accesstoken --password-stdin https://registry.example\nof-this-node\n"


def test_a_vm_image_whose_user_could_not_share_files_with_the_container_is_refused(said: Callable[[str, str], Path]):
    ended, _ = initialized(1001, said)
    assert ended[0].returncode == 1
    assert "has UID 1001 in this VM image, the container's has 1000" in ended[0].stderr
