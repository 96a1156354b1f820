import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster import session
from tests.conftest import ROOT
from tests.processes import alive, descendants, until

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


def in_a_session(*prefix: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables
    return subprocess.run(
        [*prefix, sys.executable, "-c", IN_A_SESSION],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def without_network(setup: str) -> tuple[str, ...]:
    tools = shutil.which("unshare") and shutil.which("ip")
    if not tools or subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine or user cannot make a network namespace")
    return ("unshare", "-n", "sh", "-c", f'{setup} exec "$@"', "sh")


@pytest.mark.slow
def test_local_ray_starts_without_any_network_and_where_its_sockets_have_no_room_and_says_nothing_of_it(tmp_path: Path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    done = in_a_session(*without_network("ip link set lo up;"), TMPDIR=str(long))
    assert (done.stdout, done.stderr) == ("reached 127.0.0.1 token 0\n", "")
    assert list(long.iterdir()) == []


@pytest.mark.slow
def test_a_local_ray_ends_with_its_command_even_if_that_is_killed():
    code = "from cluster.session import session\nwith session(verbose=False): print('up', flush=True); input()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert command.stdout is not None
    assert command.stdout.readline() == b"up\n"
    started = descendants(command.pid)
    assert len(started) >= 4
    command.kill()
    command.communicate()
    until(lambda: not alive(started), 10, "its processes to end")


@pytest.mark.parametrize("length", range(8, 60, 4))
def test_rays_sockets_have_room_wherever_its_temporary_folder_is(length: int, monkeypatch: pytest.MonkeyPatch):
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as root:
        usual = Path(root, "x" * length)
        monkeypatch.setenv("TMPDIR", str(usual))
        with session._environment({}), session._room_for_ray():
            folder = Path(os.environ["TMPDIR"], "ray")
            socket_path = folder / "session_2026-11-25_10-11-12_123456_4194303/sockets/dash_TaskEventsHead"
            socket_path.parent.mkdir(parents=True)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(socket_path))
            assert (folder == usual / "ray") == (len(str(usual / "ray")) <= 36)
        assert folder == usual / "ray" or not folder.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user")
def test_a_folder_of_ray_that_another_user_made_is_not_used_and_without_any_the_variable_is_named():
    code = """if True:
        import os
        from pathlib import Path
        from cluster import session
        os.setgid(12345), os.setuid(12345)
        with session._environment({}), session._room_for_ray():
            Path(os.environ["RAY_TMPDIR"], "ray").mkdir()
        session.SHORT = ("/proc", "/sys")
        try:
            with session._room_for_ray():
                pass
        except session.ClusterError as error:
            print(error)
    """
    with tempfile.TemporaryDirectory() as theirs:
        environment = os.environ | {"TMPDIR": theirs, "PYTHONPATH": str(ROOT)}
        environment.pop("RAY_TMPDIR", None)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        assert f"none of /proc, /sys, {theirs} can be written" in done.stdout
        assert "do: set RAY_TMPDIR and TMPDIR" in done.stdout


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1"])
def test_a_killed_cluster_whose_address_ray_still_has_is_refused_at_once(address: str, tmp_path: Path):
    code = """if True:
        import functools
        from ray._private import services
        from cluster import session
        services.find_gcs_addresses = functools.cache(set)  # clusters of other tests are not looked for
        try:
            with session.session(verbose=False):
                pass
        except session.ClusterError as error:
            print(error)
    """
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    environment = os.environ | {"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"no Ray cluster answers at RAY_ADDRESS=auto: {address}: [Errno "), done.stderr
    assert done.stderr == ""


def test_a_machine_that_does_not_reach_itself_is_named_not_waited_for():
    done = in_a_session(*without_network(""))
    assert "this machine does not reach itself at 127.0.0.1" in done.stderr
