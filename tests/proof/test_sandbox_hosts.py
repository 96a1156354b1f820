"""The hosts of sandbox/hosts.py are apart, can be cut and slowed down, and leave nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from sandbox.hosts import Hosts, hosts, why_not
from tests.conftest import ROOT
from tests.processes import alive, until

ONE_LINE = "import socket; print(socket.create_server(('', 5000)).accept()[0].recv(9))"
SAYS = "import socket; socket.create_connection(('h1', 5000), 5).sendall(b'hello'); print('said')"
SINK = "import socket; c = socket.create_server(('', 5000)).accept()[0]\nwhile c.recv(1 << 20): pass"
POUR = "import socket; s = socket.create_connection(('h1', 5000)); [s.sendall(bytes(1 << 18)) for _ in range(8)]"
LISTENS = "cat /proc/net/tcp | grep -q ':1388 '"


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with hosts(2) as made:
        yield made


def listening(two: Hosts, code: str) -> subprocess.Popen[str]:
    process = two.popen("h1", sys.executable, "-c", code, stdout=subprocess.PIPE)
    until(lambda: two.run("h1", "sh", "-c", LISTENS, check=False).returncode == 0, 60, "h1 to listen")
    return process


def test_each_host_has_a_name_an_address_and_a_disk_of_its_own(two: Hosts):
    two.run("h1", "sh", "-c", "echo one >/mnt/file; echo one >/dev/shm/file")
    assert two.run("h2", "hostname", capture_output=True).stdout.strip() == "h2"
    assert "10.77.0.12" in two.run("h2", "ip", "-br", "addr", capture_output=True).stdout
    assert two.run("h2", "ls", "/mnt", "/dev/shm", capture_output=True).stdout.split() == ["/dev/shm:", "/mnt:", "hosts"]
    assert two.run("h1", "hostname", "--fqdn", capture_output=True).stdout.strip() == "h1"


def test_what_is_sent_over_a_cut_link_arrives_when_it_heals(two: Hosts):
    server = listening(two, ONE_LINE)
    two.cut("h1")
    client = two.popen("h2", sys.executable, "-c", SAYS, stdout=subprocess.PIPE)
    time.sleep(0.5)
    assert (client.poll(), server.poll()) == (None, None)
    two.heal("h1")
    assert client.communicate(timeout=10)[0] == "said\n"
    assert server.communicate(timeout=10)[0] == "b'hello'\n"


def test_a_link_carries_no_more_than_its_rate(two: Hosts):
    server = listening(two, SINK)
    two.rate("h1", 10)
    began = time.monotonic()
    two.run("h2", sys.executable, "-c", POUR)
    server.wait(10)
    seconds = time.monotonic() - began
    two.rate("h1", None)
    assert seconds > 1.2  # 17 Mbit, of which the bucket and buffers take some at once


def test_a_host_that_crashed_boots_again_without_its_files(two: Hosts):
    lives = two.popen("h1", "sleep", "600")
    until(lambda: bool(two.pids("h1")), 60, "sleep")
    pids = two.pids("h1")
    two.crash("h1")
    assert not alive(pids)
    assert lives.wait(5) == -signal.SIGKILL
    two.boot("h1")
    assert two.run("h1", "ls", "/mnt", capture_output=True).stdout == "hosts\n"
    test_what_is_sent_over_a_cut_link_arrives_when_it_heals(two)


@pytest.mark.usefixtures("two")
def test_nothing_is_left_of_hosts_whose_maker_was_killed():
    code = (
        "from sandbox.hosts import hosts\n"
        "with hosts(2) as made:\n"
        "    made.popen('h1', 'sleep', '600')\n"
        "    print(*[pid for _, pid in made.first.values()], flush=True)\n"
        "    input()"
    )
    words, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, text=True, stdin=pipe, stdout=pipe) as maker:
        assert maker.stdout is not None
        pids = [int(pid) for pid in maker.stdout.readline().split()]
        assert len(alive(pids)) == 3
        os.kill(maker.pid, signal.SIGKILL)
    until(lambda: not alive(pids), 60, "the hosts to be gone")
