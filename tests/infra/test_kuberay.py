"""What Kubernetes, the KubeRay operator and Ray's autoscaler would say to infra/kuberay, and what we want of it."""

import copy
import functools
import gzip
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import tyro
import yaml
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.utils import parse_quantity
from ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider import KubeRayProvider
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, InstanceReconcileConfig
from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage
from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
from ray.autoscaler.v2.instance_manager.subscribers.cloud_instance_updater import CloudInstanceUpdater
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler

from cluster.placement import addable_nodes, choose
from jobs.suite import suite
from tests.conftest import ROOT
from tests.infra.site import IMAGE, filled

SCHEMAS = ROOT.parent / "shared" / "data" / "kuberay-1.7.0"
KUBERNETES = "1.35"
needs_schemas = pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"the operator's schemas are not in {SCHEMAS}")


def resource(name: str, **values: str) -> dict[str, Any]:
    """The filled file. What an alias repeats is a copy, which can be changed alone."""
    return json.loads(json.dumps(yaml.safe_load(filled(f"kuberay/{name}.yaml", **values))))


def cluster_spec(of: dict[str, Any]) -> dict[str, Any]:
    return of["spec"]["rayClusterSpec"] if of["kind"] == "RayJob" else of["spec"]


def groups(of: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster_spec(of)["headGroupSpec"], *cluster_spec(of)["workerGroupSpecs"]]


def pods(of: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pods that the operator makes, the autoscaler's container in the head's."""
    templates = [copy.deepcopy(group["template"]) for group in groups(of)]
    autoscaler = {key: cluster_spec(of)["autoscalerOptions"].get(key) for key in ("env", "resources", "securityContext")}
    containers = templates[0]["spec"]["containers"]
    containers += [{"name": "autoscaler", "image": container["image"], **autoscaler} for container in containers[:1]]
    if of["kind"] == "RayJob":
        templates.append(of["spec"]["submitterPodTemplate"])
    for template in templates:
        metadata = {"name": "pod", **template.get("metadata", {})}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def env(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container.get("env", [])}


def spot_wait_s(of: dict[str, Any]) -> int:
    """How long the autoscaler waits for a worker before it tries the other group."""
    return int(env(cluster_spec(of)["autoscalerOptions"]).get("RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S", 3600))


@functools.cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(gzip.decompress((SCHEMAS / f"{kind}.schema.json.gz").read_bytes())))


def schema_faults(of: dict[str, Any]) -> list[str]:
    return [error.message for error in validator(of["kind"].lower()).iter_errors(of)]


@functools.cache
def kubernetes_faults(as_json: str) -> list[str]:
    try:
        kubernetes_validate.validate(json.loads(as_json), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


def operator_faults(of: dict[str, Any]) -> Iterator[str]:
    """What the operator refuses beside its schema: ray-operator/controllers/ray/utils/validation.go, for what we use."""
    spec, cluster, is_job = of["spec"], cluster_spec(of), of["kind"] == "RayJob"
    name, longest = of["metadata"]["name"], 47 if is_job else 53
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"metadata.name {name}: a DNS-1035 label of at most {longest} characters"
    for group in groups(of):
        label, parameters, pod = group.get("groupName", "head"), group.get("rayStartParams", {}), group["template"]["spec"]
        if not pod["containers"]:
            yield f"{label}: no container"
        if group.get("resources") and parameters.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield f"{label}: resources are set in rayStartParams and in resources"
        if "labels" in parameters:
            yield f"{label}: labels belong to the group, not to rayStartParams"
        if pod.get("restartPolicy", "Never") != "Never":
            yield f"{label}: restartPolicy is Never with the autoscaler's version v2"
        if group.get("suspend"):
            yield f"{label}: suspended under an autoscaler"
    version, auth = tuple(map(int, cluster.get("rayVersion", "0").split("."))), cluster.get("authOptions", {})
    if auth.get("mode") == "token" and version < (2, 52):
        yield "authOptions.mode token needs rayVersion 2.52 or later"
    if is_job and auth.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth: not with a RayJob"
    if is_job and spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if is_job and spec["submissionMode"] == "SidecarMode" and "submitterPodTemplate" in spec:
        yield "submitterPodTemplate: not with SidecarMode"


OUR_LABELS = {"app.kubernetes.io/part-of": "imgcls"}
ON_DEMAND = {"capacity": "on-demand"}
TOLERATIONS = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
NO_RIGHTS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def present(there: dict[str, bool]) -> list[str]:
    return [fault for fault, is_there in there.items() if is_there]


def cluster_faults(of: dict[str, Any]) -> list[str]:
    """What we do not want of a cluster beside that."""
    spec, cluster, (head, *workers) = of["spec"], cluster_spec(of), groups(of)
    options = cluster["autoscalerOptions"]
    there = {
        "authOptions: not the token that the operator makes": cluster.get("authOptions") != {"mode": "token"},
        "suspend: nothing starts": spec.get("suspend", False) or cluster.get("suspend", False),
        "no autoscaler of version v2": not cluster.get("enableInTreeAutoscaling") or options.get("version") != "v2",
        "idleTimeoutSeconds: idle workers are paid for": not 60 <= options.get("idleTimeoutSeconds", 60) <= 15 * 60,
        "spot is waited for less than a cold node needs, or too long": not 10 * 60 <= spot_wait_s(of) <= 30 * 60,
        "more than five workers": sum(group["maxReplicas"] for group in workers) > 5,
        "the head is on spot": head["template"]["spec"].get("nodeSelector") != ON_DEMAND,
    }
    for group in workers:
        name, pod, told = group["groupName"], group["template"]["spec"], group["resources"]
        limits = [container["resources"]["limits"] for container in pod["containers"]]
        there |= {
            f"{name}: replicas is the autoscaler's, and `kubectl apply` would set it back": "replicas" in group,
            f"{name}: minReplicas are paid for without work": group["minReplicas"] != 0,
            f"{name}: name, Ray's label and nodeSelector are of different capacity": not (
                {"capacity": name.removeprefix("gpu-")} == group.get("labels") == pod.get("nodeSelector")
            ),
            f"{name}: no toleration for the taint of GPU nodes": pod.get("tolerations") != TOLERATIONS,
            f"{name}: the pod has other CPUs or GPUs than Ray is told": (
                [(limit.get("cpu"), limit.get("nvidia.com/gpu")) for limit in limits] != [(told.get("CPU"), told.get("GPU"))]
            ),
        }
    return present(there)


def job_faults(job: dict[str, Any]) -> list[str]:
    spec = job["spec"]
    starting_s, running_s, kept_s = (
        spec.get(field, 0) for field in ("preRunningDeadlineSeconds", "activeDeadlineSeconds", "ttlSecondsAfterFinished")
    )
    return present(
        {
            "a RayJob without an end": not (
                0 < starting_s <= 3600 and running_s > 0 and spec.get("shutdownAfterJobFinishes")
            ),
            "backoffLimit: all attempts together may take more than 8 hours": running_s * (1 + spec.get("backoffLimit", 0))
            > 8 * 3600,
            "backoffLimit: a job that loses its head is not tried again": not spec.get("backoffLimit"),
            "ttlSecondsAfterFinished: no time to read the logs, or too long a bill": not 0 < kept_s <= 3600,
            "the submitter is on spot": spec["submitterPodTemplate"]["spec"].get("nodeSelector") != ON_DEMAND,
        }
    )


def pod_faults(pod: dict[str, Any]) -> list[str]:
    """What we do not want of any pod. A mount without a volume the API server refuses as well."""
    spec, volumes = pod["spec"], pod["spec"].get("volumes", [])
    security, names = spec.get("securityContext", {}), {container["name"] for container in spec["containers"]}
    there = {
        "a pod that the policy does not protect": not OUR_LABELS.items() <= pod["metadata"].get("labels", {}).items(),
        "a pod that shares the node's network or processes": bool(spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}),
        "a pod that may run as root": (security.get("runAsNonRoot"), security.get("runAsUser")) != (True, 1000),
        "a pod without a seccomp profile": security.get("seccompProfile") != {"type": "RuntimeDefault"},
        "the account is not ours": spec.get("serviceAccountName") != resource("service-account")["metadata"]["name"],
        "automountServiceAccountToken: for the autoscaler's pod, and no other": (
            spec.get("automountServiceAccountToken", False) != ("autoscaler" in names)
        ),
        "a volume other than an emptyDir with sizeLimit": not all("sizeLimit" in one.get("emptyDir", {}) for one in volumes),
    }
    for container in spec["containers"]:
        name, resources = container["name"], container["resources"]
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        there |= {
            f"{name}: the image is not named by its digest": not re.fullmatch(
                r"[^@\s]+@sha256:[0-9a-f]{64}", container["image"]
            ),
            f"{name}: volumeMounts: no such volume": not mounts <= {volume["name"] for volume in volumes},
            f"{name}: rights that it does not need": container.get("securityContext") != NO_RIGHTS,
            f"{name}: no limit, or a request that differs from it": (
                not {"cpu", "memory"} <= limits.keys() or requests != limits
            ),
        }
    return present(there)


PEERS = {
    "our pods": {"podSelector": {"matchLabels": OUR_LABELS}},
    "the operator": {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-operator"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    },
}
ALLOWED = {
    "from": {"our pods, all ports", "the operator, TCP 8265"},
    "to": {"our pods, all ports", *(f"all, {port}" for port in ("UDP 53", "TCP 53", "TCP 443", "TCP 6443"))},
}


def allowed(rules: list[dict[str, Any]], side: str) -> set[str]:
    """Peer and port of every rule; peers or ports that a rule leaves out are all."""
    return {
        f"{next((name for name, known in PEERS.items() if peer == known), peer or 'all')}, "
        + (" ".join(map(str, port.values())) or "all ports")
        for rule in rules
        for peer in rule.get(side) or [{}]
        for port in rule.get("ports") or [{}]
    }


def policy_faults(policy: dict[str, Any]) -> list[str]:
    spec = policy["spec"]
    seen = {"from": allowed(spec.get("ingress", []), "from"), "to": allowed(spec.get("egress", []), "to")}
    return present(
        {
            "the policy protects other pods": spec["podSelector"] != PEERS["our pods"]["podSelector"],
            "policyTypes: one direction is open": sorted(spec.get("policyTypes", [])) != ["Egress", "Ingress"],
            **{f"open {side} {way}": True for side in seen for way in seen[side] - ALLOWED[side]},
            **{f"closed {side} {way}": True for side in seen for way in ALLOWED[side] - seen[side]},
        }
    )


def account_faults(account: dict[str, Any]) -> list[str]:
    return present({"every pod may call the Kubernetes API": account.get("automountServiceAccountToken") is not False})


def faults(of: dict[str, Any]) -> list[str]:
    by_ray = of["kind"] in ("RayCluster", "RayJob")
    whole = [*pods(of)] if by_ray else [of]
    refused = schema_faults(of) if by_ray and SCHEMAS.is_dir() else []
    refused += [fault for part in whole for fault in kubernetes_faults(json.dumps(part))]
    if refused:
        return refused
    ours = present({"not in our namespace": of["metadata"].get("namespace") != "namespace"})
    if by_ray:
        ours += [*operator_faults(of), *cluster_faults(of), *(fault for pod in whole for fault in pod_faults(pod))]
    others = {"RayJob": job_faults, "NetworkPolicy": policy_faults, "ServiceAccount": account_faults}
    return ours + (others[of["kind"]](of) if of["kind"] in others else [])


def changed(name: str, path: str, value: Any) -> dict[str, Any]:
    """The resource with another value at `a/b/0/c`; None takes the field away."""
    whole: Any = resource(name)
    *above, last = [int(word) if word.isdigit() else word.replace("~", "/") for word in path.split("/")]
    inner: Any = functools.reduce(lambda part, key: part[key], above, whole)
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return whole


HEAD, SPOT = "spec/headGroupSpec", "spec/workerGroupSpecs/0"
POD, SUBMITTER = f"{SPOT}/template/spec", "spec/submitterPodTemplate/spec"
MISTAKES = {
    "a field of a container that does not exist": ("raycluster", f"{POD}/containers/0/imagePolicy", "Always", "imagePolicy"),
    "a field of the autoscaler's container": ("raycluster", "spec/autoscalerOptions/env/0/values", "1", "'values'"),
    "a string for a number": ("raycluster", f"{POD}/terminationGracePeriodSeconds", "120", "not of type 'integer'"),
    "a number of workers": ("raycluster", f"{SPOT}/replicas", 0, "replicas is the autoscaler's"),
    "a token without rayVersion": ("raycluster", "spec/rayVersion", None, "needs rayVersion"),
    "a token in an old Ray": ("rayjob", "spec/rayClusterSpec/rayVersion", "2.51.0", "needs rayVersion"),
    "pods that start again": ("raycluster", f"{HEAD}/template/spec/restartPolicy", "Always", "restartPolicy is Never"),
    "num-cpus beside resources": (
        "raycluster",
        f"{HEAD}/rayStartParams/num-cpus",
        "0",
        "in rayStartParams and in resources",
    ),
    "labels for ray start": ("raycluster", f"{SPOT}/rayStartParams/labels", "a=b", "labels belong to the group"),
    "a mount without a volume": ("raycluster", f"{POD}/volumes", [], "no such volume"),
    "an upper-case name": ("raycluster", "metadata/name", "Imgcls", "DNS-1035"),
    "a name that is too long": ("rayjob", "metadata/name", "i" * 48, "at most 47"),
    "a group without containers": ("raycluster", f"{POD}/containers", [], "no container"),
    "a GPU group without a GPU": (
        "raycluster",
        f"{POD}/containers/0/resources/limits/nvidia.com~gpu",
        None,
        "other CPUs or GPUs",
    ),
    "a RayJob without a deadline": ("rayjob", "spec/activeDeadlineSeconds", None, "without an end"),
    "a RayJob that keeps its cluster": ("rayjob", "spec/shutdownAfterJobFinishes", None, "needs shutdownAfterJobFinishes"),
    "a submitter in the head's pod": ("rayjob", "spec/submissionMode", "SidecarMode", "not with SidecarMode"),
    "an image by its tag": ("raycluster", f"{POD}/containers/0/image", "registry.example/imgcls:1.0", "by its digest"),
    "the user root": ("raycluster", f"{POD}/securityContext/runAsUser", 0, "run as root"),
    "a submitter with rights": ("rayjob", f"{SUBMITTER}/containers/0/securityContext", None, "rights that"),
    "an autoscaler with rights": ("raycluster", "spec/autoscalerOptions/securityContext", {}, "autoscaler: rights that"),
    "memory that may not be there": (
        "raycluster",
        f"{POD}/containers/0/resources/requests/memory",
        "1Gi",
        "differs from it",
    ),
    "shared memory without a limit": ("raycluster", f"{POD}/volumes/0/emptyDir", {"medium": "Memory"}, "with sizeLimit"),
    "an account that nobody makes": ("raycluster", f"{POD}/serviceAccountName", "default", "account is not ours"),
    "an annotation that is no string": ("service-account", "metadata/annotations/role", 1, "not of type"),
    "a field of the policy that does not exist": ("network-policy", "spec/egress/2/ports/0/protocols", "TCP", "protocols"),
    "no token": ("raycluster", "spec/authOptions/mode", "disabled", "authOptions"),
    "no token for a job": ("rayjob", "spec/rayClusterSpec/authOptions/mode", "disabled", "authOptions"),
    "no authOptions": ("raycluster", "spec/authOptions", None, "authOptions"),
    "Kubernetes' tokens": ("raycluster", "spec/authOptions/enableK8sTokenAuth", True, "authOptions"),
    "Kubernetes' tokens for a job": (
        "rayjob",
        "spec/rayClusterSpec/authOptions/enableK8sTokenAuth",
        True,
        "not with a RayJob",
    ),
    "a suspended cluster": ("raycluster", "spec/suspend", True, "suspend"),
    "a suspended job": ("rayjob", "spec/suspend", True, "suspend"),
    "a suspended group": ("raycluster", f"{SPOT}/suspend", True, "suspended under an autoscaler"),
    "no autoscaler": ("raycluster", "spec/enableInTreeAutoscaling", None, "no autoscaler"),
    "an old autoscaler": ("raycluster", "spec/autoscalerOptions/version", "v1", "no autoscaler of version v2"),
    "idle workers for a day": ("raycluster", "spec/autoscalerOptions/idleTimeoutSeconds", 60000, "idle workers"),
    "9 s for a node": ("raycluster", "spec/autoscalerOptions/env/0/value", "9", "less than a cold node needs"),
    "an hour for a node": ("raycluster", "spec/autoscalerOptions/env", [], "or too long"),
    "six workers": ("raycluster", f"{SPOT}/maxReplicas", 4, "more than five"),
    "a worker without work": ("raycluster", f"{SPOT}/minReplicas", 1, "paid for without work"),
    "spot workers on-demand": ("raycluster", f"{POD}/nodeSelector/capacity", "on-demand", "different capacity"),
    "on-demand that is spot": (
        "rayjob",
        "spec/rayClusterSpec/workerGroupSpecs/1/labels/capacity",
        "spot",
        "different capacity",
    ),
    "workers on any node": ("raycluster", f"{POD}/nodeSelector", None, "different capacity"),
    "a head on spot": ("raycluster", f"{HEAD}/template/spec/nodeSelector/capacity", "spot", "head is on spot"),
    "a submitter on spot": ("rayjob", f"{SUBMITTER}/nodeSelector/capacity", "spot", "submitter is on spot"),
    "no tolerations": ("raycluster", f"{POD}/tolerations", None, "no toleration"),
    "a cluster that goes with its logs": ("rayjob", "spec/ttlSecondsAfterFinished", None, "time to read the logs"),
    "a cluster that stays for a day": ("rayjob", "spec/ttlSecondsAfterFinished", 86400, "too long a bill"),
    "50 attempts": ("rayjob", "spec/backoffLimit", 50, "all attempts together"),
    "one attempt": ("rayjob", "spec/backoffLimit", None, "not tried again"),
    "no seccomp": ("raycluster", f"{POD}/securityContext/seccompProfile", None, "seccomp"),
    "no seccomp of the submitter": ("rayjob", f"{SUBMITTER}/securityContext/seccompProfile", None, "seccomp"),
    "the node's network": ("raycluster", f"{POD}/hostNetwork", True, "the node's network"),
    "the node's files": ("raycluster", f"{POD}/volumes/0", {"name": "shared-mem", "hostPath": {"path": "/"}}, "other than"),
    "a worker with the API's token": ("raycluster", f"{POD}/automountServiceAccountToken", True, "for the autoscaler's pod"),
    "an autoscaler without it": (
        "raycluster",
        f"{HEAD}/template/spec/automountServiceAccountToken",
        None,
        "for the autoscaler's pod",
    ),
    "the API's token for every pod": ("service-account", "automountServiceAccountToken", True, "every pod may call"),
    "a pod without our label": ("rayjob", "spec/submitterPodTemplate/metadata/labels", {}, "does not protect"),
    "a policy elsewhere": ("network-policy", "metadata/namespace", None, "not in our namespace"),
    "a policy of others": ("network-policy", "spec/podSelector/matchLabels", {"app": "ray"}, "protects other pods"),
    "all may come in": ("network-policy", "spec/policyTypes", ["Egress"], "one direction is open"),
    "a rule for everyone": ("network-policy", "spec/ingress/0", {}, "open from all, all ports"),
    "all of the operator's namespace": ("network-policy", "spec/ingress/1/from/0/podSelector", None, "open from {"),
    "an operator of any namespace": ("network-policy", "spec/ingress/1/from/0/namespaceSelector", {}, "open from {"),
    "the operator at all ports": ("network-policy", "spec/ingress/1/ports", None, "open from the operator, all ports"),
    "a way to everywhere": ("network-policy", "spec/egress/0", {}, "open to all, all ports"),
    "no DNS": ("network-policy", "spec/egress/1/ports/0", {"protocol": "TCP", "port": 53}, "closed to all, UDP 53"),
    "no bucket": ("network-policy", "spec/egress/2/ports/0/port", 80, "closed to all, TCP 443"),
    "no API server": ("network-policy", "spec/egress/2/ports/1", None, "closed to all, TCP 6443"),
}
SCHEMA_MISTAKES = {
    "a field of the cluster that does not exist": ("raycluster", "spec/enableInTreeAutoscalling", True, "Autoscalling"),
    "a version that does not exist": ("raycluster", "spec/autoscalerOptions/version", "v3", "'v3'"),
    "a number that is a string": ("raycluster", f"{SPOT}/maxReplicas", "3", "not of type 'integer'"),
    "a parameter that is a number": ("raycluster", f"{SPOT}/rayStartParams/object-store-memory", 1, "not of type 'string'"),
    "an amount with a space": ("raycluster", f"{POD}/containers/0/resources/limits/memory", "12 Gi", "12 Gi"),
    "a group without a name": ("rayjob", "spec/rayClusterSpec/workerGroupSpecs/1/groupName", None, "groupName"),
    "workers without a bound": ("raycluster", f"{SPOT}/maxReplicas", None, "'maxReplicas' is a required property"),
    "a field of the job that does not exist": ("rayjob", "spec/activeDeadline", 1, "activeDeadline"),
}


@pytest.mark.parametrize("name", ["service-account", "network-policy", "raycluster", "rayjob"])
def test_kubernetes_and_the_operator_take_the_files(name: str):
    assert faults(resource(name)) == []


@needs_schemas
@pytest.mark.parametrize("kind", ["raycluster", "rayjob"])
def test_the_operators_schema_takes_the_files(kind: str):
    assert schema_faults(resource(kind)) == []


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        *(pytest.param(*mistake, id=name) for name, mistake in MISTAKES.items()),
        *(pytest.param(*mistake, id=name, marks=needs_schemas) for name, mistake in SCHEMA_MISTAKES.items()),
    ],
)
def test_a_mistake_is_found(name: str, path: str, value: Any, words: str):
    assert any(words in fault for fault in faults(changed(name, path, value)))


def test_the_job_starts_the_cluster_of_raycluster_yaml_with_our_packages_in_the_image():
    job = cluster_spec(resource("rayjob", kubernetes_job_image="the-job's"))
    assert json.dumps(job) == json.dumps(cluster_spec(resource("raycluster"))).replace(IMAGE, "the-job's")


def autoscaling() -> dict[str, Any]:
    """What Ray's autoscaler makes of the cluster."""
    return _derive_autoscaling_config_from_ray_cr(resource("raycluster"))


def test_rays_autoscaler_may_add_five_workers_of_one_size_spot_first():
    config = autoscaling()
    AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()  # it checks them
    head, spot, on_demand = (config["available_node_types"][name] for name in ("headgroup", "gpu-spot", "gpu-on-demand"))
    assert (head["resources"]["CPU"], spot["max_workers"], on_demand["max_workers"], config["max_workers"]) == (0, 3, 2, 5)
    assert spot["resources"] == on_demand["resources"] == {"CPU": 3, "GPU": 1, "memory": 12 << 30}
    assert (spot["min_workers"], spot["labels"]) == (0, {"capacity": "spot"})
    assert (on_demand["min_workers"], on_demand["labels"]) == (0, {"capacity": "on-demand"})
    assert spot["priority"] > on_demand["priority"]
    assert config["idle_timeout_minutes"] == 10


def test_a_worker_of_the_jobs_command_fits_a_pod():
    python, _, door, *words = shlex.split(resource("rayjob")["spec"]["entrypoint"])
    flags = tyro.cli(functools.wraps(suite)(lambda **named: named["flags"]), args=words)
    assert (python, door, flags.catalogue) == ("python", "jobs.suite", "paper")
    nodes = addable_nodes([], autoscaling())
    assert choose(nodes, flags.options).gpus_per_worker == 1
    assert len(nodes) == 5


class Kubernetes:
    """The API server as Ray's autoscaler uses it, with the operator behind it. No worker of it ever comes up."""

    def __init__(self, cluster: dict[str, Any]) -> None:
        self.cluster, self.pods, self.made = cluster, {"head": pod_of("head", "head", "headgroup")}, list[str]()
        for group in cluster["spec"]["workerGroupSpecs"]:
            group["replicas"] = 0  # the schema's default

    def get(self, path: str) -> dict[str, Any]:
        pods = {"metadata": {"resourceVersion": "1"}, "items": [*self.pods.values()]}
        return self.cluster if path.startswith("rayclusters/") else pods

    def patch(self, path: str, payload: list[dict[str, Any]]) -> dict[str, Any]:
        for operation in payload:
            *above, last = operation["path"].strip("/").split("/")
            part: Any = self.cluster
            for key in above:
                part = part[int(key)] if key.isdigit() else part.setdefault(key, {})
            part[last] = operation["value"]
        for group in self.cluster["spec"]["workerGroupSpecs"]:
            for name in group.get("scaleStrategy", {}).get("workersToDelete", []):
                self.pods.pop(name, None)
            while sum(name.startswith(group["groupName"]) for name in self.pods) < group["replicas"]:
                name = f"{group['groupName']}-{len(self.made)}"
                self.pods[name] = pod_of(name, "worker", group["groupName"])
                self.made.append(group["groupName"])
        return self.cluster


def pod_of(name: str, kind: str, group: str) -> dict[str, Any]:
    labels = {"ray.io/node-type": kind, "ray.io/group": group}
    return {"metadata": {"name": name, "labels": labels}, "status": {}, "spec": {"containers": [{"name": "ray"}]}}


@pytest.mark.parametrize(
    ("limit_s", "groups_tried"), [(spot_wait_s(resource("raycluster")), ["gpu-spot"]), (0, ["gpu-spot", "gpu-on-demand"])]
)
def test_where_spot_does_not_come_in_time_on_demand_is_tried(
    limit_s: int, groups_tried: list[str], monkeypatch: pytest.MonkeyPatch
):
    limits = InstanceReconcileConfig(allocate_status_timeout_s=limit_s)
    monkeypatch.setattr(AutoscalingConfig, "get_instance_reconcile_config", lambda self: limits)
    config, kubernetes = AutoscalingConfig(autoscaling(), skip_content_hash=True), Kubernetes(resource("raycluster"))
    client: Any = kubernetes
    provider = KubeRayProvider("imgcls", config.get_provider_config(), gcs_client=None, k8s_api_client=client)
    monitor = CloudResourceMonitor()
    manager = InstanceManager(InstanceStorage("session", InMemoryStorage()), [CloudInstanceUpdater(provider), monitor])
    messages: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
    head = {"node_id": b"0" * 28, "instance_id": "head", "ray_node_type_name": "headgroup", "status": "RUNNING"}
    wanted = {"request": {"resources_bundle": {"CPU": 3.0, "GPU": 1.0}}, "count": 1}
    for version in (1, 2):
        state = messages.ClusterResourceState(
            cluster_resource_state_version=version,
            node_states=[{**head, "total_resources": {"node:__internal_head__": 1.0}}],
            pending_resource_requests=[wanted],
        )
        Reconciler.reconcile(
            manager, ResourceDemandScheduler(), provider, monitor, state, provider.get_non_terminated(), config
        )
    assert kubernetes.made == groups_tried


@pytest.mark.parametrize("group", groups(resource("raycluster")), ids=lambda group: group.get("groupName", "head"))
def test_a_pod_ends_after_rays_goodbye_and_its_shared_memory_holds_the_object_store(group: dict[str, Any]):
    spec = group["template"]["spec"]
    (container,), (volume,) = spec["containers"], spec["volumes"]
    goodbye_s = float(env(container).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S))
    assert goodbye_s + 30 <= spec["terminationGracePeriodSeconds"] <= 120  # the notice of AWS
    store, memory = int(group["rayStartParams"]["object-store-memory"]), container["resources"]["limits"]["memory"]
    assert 2 * store <= parse_quantity(volume["emptyDir"]["sizeLimit"]) <= parse_quantity(memory) / 2
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]


def test_every_variable_of_ray_is_one_that_ray_reads():
    rooms = [Path(ray.__file__).parent / room for room in ("_common", "_private", "autoscaler")]
    code = "".join(path.read_text() for room in rooms for path in room.rglob("*.py"))
    containers = [container for pod in pods(resource("raycluster")) for container in pod["spec"]["containers"]]
    ours = {name for container in containers for name in env(container)}
    assert len(ours) == 3
    assert [name for name in ours if f'"{name}"' not in code] == []
