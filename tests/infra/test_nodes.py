"""Node types of a cluster come from the files that define it: for placement, for a dry run, for prices."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from cluster.placement import defined_nodes, how_many_fit
from imgcls.errors import PlacementError
from imgcls.records import Placement
from tests.conftest import ROOT, Command, own_certificate

DEFINITIONS = ("ray/aws.yaml", "ray/gcp.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml")


@pytest.mark.parametrize("path", DEFINITIONS)
def test_each_definition_gives_a_head_without_work_and_workers_with_a_gpu(path: str):
    head, *workers = defined_nodes(ROOT / "infra" / path)
    assert (head.type, head.cpus) == ("head", 0)
    assert {worker.gpus for worker in workers} == {1}
    assert min(worker.cpus for worker in workers) >= 1
    most = Placement(num_workers=5, cpus_per_worker=1, gpus_per_worker=1)
    assert how_many_fit([head, *workers], most) == 1
    assert how_many_fit([head, *workers], most.model_copy(update={"num_workers": 6})) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: RayCluster\nspec: {}", "enableInTreeAutoscaling is not set"),
        ("kind: RayCluster\nspec: {enableInTreeAutoscaling: true}", "lacks 'headGroupSpec'"),
        ("kind: RayService\nspec: {}", "a RayService"),
        ("cluster_name: a", "lacks 'available_node_types'"),
        ("[]", "list"),
        ("{", "expected"),
    ],
)
def test_a_file_that_defines_no_cluster_that_grows_is_refused(text: str, says: str, tmp_path: Path):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(PlacementError, match=says):
        defined_nodes(tmp_path / "cluster.yaml")
    with pytest.raises(PlacementError, match="No such file"):
        defined_nodes(tmp_path / "none.yaml")


PRICES = """
currency: USD
as_of: 2026-11-01
source: invented
boot_s: 300
node_types:
  head: {per_hour: "0.20", market: on-demand, instance: m6i.xlarge, gpus: 0}
"""


def prices(tmp_path: Path, path: str, leave_out: str = "") -> Path:
    types = {node.type: node for node in defined_nodes(ROOT / "infra" / path) if node.gpus and node.type != leave_out}
    rows = [f'  {name}: {{per_hour: "1.00", market: spot, instance: any, gpus: 1, cpus: 4}}\n' for name in types]
    (tmp_path / "prices.yaml").write_text(PRICES + "".join(rows))
    return tmp_path / "prices.yaml"


@pytest.mark.parametrize("path", DEFINITIONS)
def test_a_dry_run_counts_and_prices_the_nodes_of_a_definition_without_a_cluster(
    path: str, enter_command: Command, packed: Path, tmp_path: Path
):
    words = ("suite", "--data", packed, "--storage", tmp_path / "runs", "--dry-run", "--cluster", ROOT / "infra" / path)
    words += ("--set", "train_fraction=1.0")
    done = enter_command(*words, "--prices", prices(tmp_path, path))
    assert done.returncode == 0, done.stderr
    assert "1 workers with 1 CPUs and 1 GPUs" in done.stdout
    for node in defined_nodes(ROOT / "infra" / path):
        assert node.type in done.stdout
    assert not (tmp_path / "runs").exists()
    without = defined_nodes(ROOT / "infra" / path)[-1].type
    done = enter_command(*words, "--prices", prices(tmp_path, path, leave_out=without))
    assert (done.returncode, f"no price for {without}" in done.stderr) == (2, True)
    for more in (("--gpus-per-worker", "2"), ("--num-workers", "6")):
        done = enter_command(*words, *more)
        assert (done.returncode, "can never run: this cluster has 1 head" in done.stderr) == (2, True)
    assert "5 in all" in done.stderr


ON_HEAD = """
import json
import sys
from pathlib import Path
from cluster import session
session.POD_NAMESPACE = Path(sys.argv[1])
from cluster.placement import addable_nodes, find_autoscaling_config
from imgcls.errors import PlacementError
try:
    nodes = addable_nodes([], find_autoscaling_config("127.0.0.1:1"))
    print(json.dumps([(node.type, node.cpus, node.gpus) for node in nodes]))
except PlacementError as error:
    print(json.dumps(str(error)))
"""


def test_on_a_head_of_kuberay_the_nodes_that_can_be_added_are_those_of_its_raycluster(tmp_path: Path):
    """Asked over TLS, as the autoscaler beside it does; a server of ours stands for Kubernetes'."""
    path = ROOT / "infra/kuberay/raycluster.yaml"
    certificate, tls = own_certificate(tmp_path)
    (tmp_path / "namespace").write_text("training")
    asked, status = list[str](), [200]

    class Kubernetes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status[0])
            self.end_headers()
            self.wfile.write(json.dumps(yaml.safe_load(path.read_text())).encode())

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Kubernetes)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT_HTTPS": str(server.server_port),
        "RAY_KUBERAY_CA_CERT_PATH": str(certificate),
        "RAY_KUBERAY_CLIENT_CERT_PATH": str(certificate),
        "RAY_KUBERAY_CLIENT_KEY_PATH": str(tmp_path / "key.pem"),
        "RAY_CLUSTER_NAME": "imgcls",
    }

    def on_head() -> object:
        words = [sys.executable, "-c", ON_HEAD, str(tmp_path / "namespace")]
        done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    workers = [node for node in defined_nodes(path) if node.gpus]
    assert on_head() == [[node.type, node.cpus, node.gpus] for node in workers]
    assert asked == ["/apis/ray.io/v1/namespaces/training/rayclusters/imgcls"]
    status[0] = 403  # what a pod gets that has no autoscaler beside it
    assert on_head() == []
    server.shutdown()
    server.server_close()
    assert "RayCluster imgcls in namespace training: " in str(on_head())
