import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

IN_A_SESSION = """
import os
from cluster.session import session
before = dict(os.environ)
with session(verbose=False):
    import ray
    told = os.environ["RAY_AUTH_MODE"], os.environ["RAY_USAGE_STATS_ENABLED"]
    print("reached", ray.nodes()[0]["NodeManagerAddress"], *told)
assert dict(os.environ) == before
"""


def in_a_session(*prefix: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [*prefix, sys.executable, "-c", IN_A_SESSION],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def without_network(setup: str) -> tuple[str, ...]:
    tools = shutil.which("unshare") and shutil.which("ip")
    if not tools or subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine or user cannot make a network namespace")
    return ("unshare", "-n", "sh", "-c", f'{setup} exec "$@"', "sh")


def test_local_ray_starts_without_any_network_and_says_nothing_of_it():
    done = in_a_session(*without_network("ip link set lo up;"))
    assert (done.stdout, done.stderr) == ("reached 127.0.0.1 token 0\n", "")


def test_a_machine_that_does_not_reach_itself_is_named_not_waited_for():
    done = in_a_session(*without_network(""))
    assert "this machine does not reach itself at 127.0.0.1" in done.stderr
