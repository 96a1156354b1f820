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

FOLDER = ROOT / "infra" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "data" / "kuberay-1.7.0"
KUBERNETES = "1.35"
VALUES = {
    "namespace": "imgcls",
    "image": f"registry.example/imgcls@sha256:{'0' * 64}",
    "job_image": f"registry.example/imgcls-job@sha256:{'1' * 64}",
    "bucket": "our-bucket",
    "role_annotation_key": "eks.amazonaws.com/role-arn",
    "role": "arn:aws:iam::123456789012:role/imgcls",
}
needs_schemas = pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"the operator's schemas are not in {SCHEMAS}")


def resource(name: str) -> dict[str, Any]:
    """The file with placeholders filled. What an alias repeats is a copy, which can be changed alone."""
    text = re.sub(r"\$\{kubernetes\.([a-z_]+)\}", lambda found: VALUES[found[1]], (FOLDER / f"{name}.yaml").read_text())
    return json.loads(json.dumps(yaml.safe_load(text)))


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
    version = tuple(map(int, cluster.get("rayVersion", "0").split(".")))
    if cluster["authOptions"]["mode"] == "token" and version < (2, 52):
        yield "authOptions.mode token needs rayVersion 2.52 or later"
    if is_job and cluster["authOptions"].get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth: not with a RayJob"
    if is_job and spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if is_job and spec["submissionMode"] == "SidecarMode" and "submitterPodTemplate" in spec:
        yield "submitterPodTemplate: not with SidecarMode"


def our_faults(of: dict[str, Any]) -> Iterator[str]:
    """What we want of a cluster beside that."""
    if of["kind"] == "RayJob" and not (
        of["spec"].get("activeDeadlineSeconds", 0) > 0
        and of["spec"].get("preRunningDeadlineSeconds", 0) > 0
        and of["spec"].get("shutdownAfterJobFinishes")
    ):
        yield "a RayJob that is paid for without an end"
    for group in groups(of)[1:]:
        if "replicas" in group:
            yield f"{group['groupName']}: replicas is the autoscaler's, and `kubectl apply` would set it back"
        if group["minReplicas"] > group["maxReplicas"]:
            yield f"{group['groupName']}: minReplicas is more than maxReplicas"
        for container in group["template"]["spec"]["containers"]:
            limits = container["resources"]["limits"]
            if [limits.get("cpu"), limits.get("nvidia.com/gpu")] != [
                group["resources"].get(kind) for kind in ("CPU", "GPU")
            ]:
                yield f"{group['groupName']}: the pod has other CPUs or GPUs than Ray is told"


def pod_faults(pod: dict[str, Any]) -> Iterator[str]:
    """What we want of every pod. A mount without a volume the API server refuses as well."""
    spec, volumes = pod["spec"], pod["spec"].get("volumes", [])
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser") != 1000:
        yield "a pod that may run as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "a pod without a seccomp profile"
    if spec.get("serviceAccountName") != resource("service-account")["metadata"]["name"]:
        yield f"serviceAccountName {spec.get('serviceAccountName')} is not ours"
    if not all("sizeLimit" in volume["emptyDir"] for volume in volumes):
        yield "an emptyDir without sizeLimit"
    for container in spec["containers"]:
        if not re.fullmatch(r"[^@\s]+@sha256:[0-9a-f]{64}", container["image"]):
            yield f"image {container['image']} is not named by its digest"
        if missing := {mount["name"] for mount in container.get("volumeMounts", [])} - {one["name"] for one in volumes}:
            yield f"volumeMounts {missing}: no such volume"
        if container.get("securityContext") != {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}:
            yield f"{container['name']}: rights that it does not need"
        requests, limits = (container["resources"].get(kind, {}) for kind in ("requests", "limits"))
        if not {"cpu", "memory"} <= limits.keys() or requests != limits:
            yield f"{container['name']}: no limit, or a request that differs from it"


def faults(of: dict[str, Any]) -> list[str]:
    if of["kind"] not in ("RayCluster", "RayJob"):
        return kubernetes_faults(json.dumps(of))
    refused = schema_faults(of) if SCHEMAS.is_dir() else []
    refused += [fault for pod in pods(of) for fault in kubernetes_faults(json.dumps(pod))]
    return refused or [*operator_faults(of), *our_faults(of), *(fault for pod in pods(of) for fault in pod_faults(pod))]


def network_faults(policy: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    wanted = policy["spec"]["podSelector"].get("matchLabels", {})
    if not wanted.items() <= pod["metadata"].get("labels", {}).items():
        yield "a pod that the policy does not protect"
    for rule in policy["spec"]["ingress"]:
        if not rule.get("from") or not all(peer.get("podSelector", {}).get("matchLabels") for peer in rule["from"]):
            yield "ingress from anywhere"
    if not any({"protocol": "UDP", "port": 53} in rule.get("ports", []) for rule in policy["spec"]["egress"]):
        yield "no DNS"


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
POD = f"{SPOT}/template/spec"
MISTAKES = {
    "a field of a container that does not exist": ("raycluster", f"{POD}/containers/0/imagePolicy", "Always", "imagePolicy"),
    "a field of the autoscaler's container": ("raycluster", "spec/autoscalerOptions/env/0/values", "1", "'values'"),
    "a string for a number": ("raycluster", f"{POD}/terminationGracePeriodSeconds", "120", "not of type 'integer'"),
    "minReplicas above maxReplicas": ("raycluster", f"{SPOT}/minReplicas", 4, "minReplicas is more"),
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
    "a submitter with rights": (
        "rayjob",
        "spec/submitterPodTemplate/spec/containers/0/securityContext",
        None,
        "rights that",
    ),
    "an autoscaler with rights": ("raycluster", "spec/autoscalerOptions/securityContext", {}, "autoscaler: rights that"),
    "memory that may not be there": (
        "raycluster",
        f"{POD}/containers/0/resources/requests/memory",
        "1Gi",
        "differs from it",
    ),
    "shared memory without a limit": ("raycluster", f"{POD}/volumes/0/emptyDir", {"medium": "Memory"}, "without sizeLimit"),
    "an account that nobody makes": ("raycluster", f"{POD}/serviceAccountName", "default", "is not ours"),
    "an annotation that is no string": ("service-account", "metadata/annotations/role", 1, "not of type"),
    "a field of the policy that does not exist": ("network-policy", "spec/egress/2/ports/0/protocols", "TCP", "protocols"),
}
SCHEMA_MISTAKES = {
    "a field of the cluster that does not exist": ("raycluster", "spec/enableInTreeAutoscalling", True, "Autoscalling"),
    "a version that does not exist": ("raycluster", "spec/autoscalerOptions/version", "v3", "'v3'"),
    "a number that is a string": ("raycluster", f"{SPOT}/maxReplicas", "3", "not of type 'integer'"),
    "a parameter that is a number": ("raycluster", f"{SPOT}/rayStartParams/object-store-memory", 1, "not of type 'string'"),
    "an amount with a space": ("raycluster", f"{POD}/containers/0/resources/limits/memory", "12 Gi", "12 Gi"),
    "a group without a name": ("rayjob", "spec/rayClusterSpec/workerGroupSpecs/1/groupName", None, "groupName"),
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


def test_the_pods_are_reached_by_our_pods_and_the_operator_alone():
    policy, made = resource("network-policy"), [*pods(resource("raycluster")), *pods(resource("rayjob"))]
    assert [fault for pod in made for fault in network_faults(policy, pod)] == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("spec/podSelector/matchLabels/app", "ray", "does not protect"),
        ("spec/ingress/0", {}, "from anywhere"),
        ("spec/ingress/1/from/0/podSelector", None, "from anywhere"),
        ("spec/egress/1/ports", [{"protocol": "TCP", "port": 53}], "no DNS"),
    ],
)
def test_a_hole_in_the_wall_is_found(path: str, value: Any, words: str):
    pod = next(pods(resource("raycluster")))
    assert any(words in fault for fault in network_faults(changed("network-policy", path, value), pod))


def test_the_job_starts_the_cluster_of_raycluster_yaml_with_our_packages_in_the_image():
    job, cluster = (json.dumps(cluster_spec(resource(name))) for name in ("rayjob", "raycluster"))
    assert job == cluster.replace(VALUES["image"], VALUES["job_image"])


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
    sizes = {field: getattr(flags.options, field) for field in ("num_workers", "cpus_per_worker", "gpus_per_worker")}
    assert choose(nodes, **sizes).gpus_per_worker == 1
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


@pytest.mark.parametrize(("limit_s", "groups_tried"), [(900, ["gpu-spot"]), (0, ["gpu-spot", "gpu-on-demand"])])
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
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    goodbye_s = float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S))
    assert goodbye_s + 30 <= spec["terminationGracePeriodSeconds"] <= 120  # the notice of AWS
    store, memory = int(group["rayStartParams"]["object-store-memory"]), container["resources"]["limits"]["memory"]
    assert 2 * store <= parse_quantity(volume["emptyDir"]["sizeLimit"]) <= parse_quantity(memory) / 2
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]


def test_every_variable_of_ray_is_one_that_ray_reads():
    rooms = [Path(ray.__file__).parent / room for room in ("_common", "_private", "autoscaler")]
    code = "".join(path.read_text() for room in rooms for path in room.rglob("*.py"))
    containers = [container for pod in pods(resource("raycluster")) for container in pod["spec"]["containers"]]
    ours = {variable["name"] for container in containers for variable in container.get("env", [])}
    assert len(ours) == 3
    assert [name for name in ours if f'"{name}"' not in code] == []
