"""Several hosts on this machine: namespaces joined by a bridge. Linux, root, iproute2 and util-linux are needed.

Hosts are called h1, h2, ...; the address of h1 is 10.77.0.11. Each has its own network, host name, /etc/hosts, processes,
/dev/shm and /mnt (both in memory). All other files are the machine's. There is no way out, and none in from the machine.

A host is up as long as its first process, a `cat` that reads from a pipe of this process. If this process ends, however it
ends, the kernel ends the hosts with all that runs on them, and removes their links and mounts.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NET = "10.77.0"
HUB = "hub"
"""The host with the bridge. No address, nothing runs on it."""
_UNSHARE = ("unshare", "--net", "--uts", "--mount", "--propagation=private", "--pid", "--fork", "--", "sh", "-ec")
_FIRST_PROCESS = """
read -r pid rest </proc/self/stat
mount -t proc proc /proc
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -t tmpfs tmpfs /mnt
printf "$2" >/mnt/hosts
mount --bind /mnt/hosts /etc/hosts
hostname "$1"
ip link set lo up
echo "$pid"
trap '' CHLD
exec cat >/dev/null
"""
"""It says its pid on this machine. CHLD is ignored so that the kernel clears away processes whose parents have ended."""


@dataclass(frozen=True, slots=True)
class Hosts:
    count: int
    first: dict[str, tuple[subprocess.Popen[str], int]] = field(default_factory=dict)
    """Of each host that is up: `unshare`, and the pid of the host's first process on this machine."""

    @staticmethod
    def address(host: str) -> str:
        return f"{NET}.{10 + int(host[1:])}"

    def run(self, host: str, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._entering(host, words, options), **{"text": True, "check": True, **options})

    def popen(self, host: str, *words: str | Path, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(self._entering(host, words, options), **{"text": True, **options})

    def pids(self, host: str) -> list[int]:
        """All processes on the host but the first, by their pids on this machine."""
        first, found = self.first[host][1], []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(folder / "ns/pid") == os.readlink(f"/proc/{first}/ns/pid"):
                    found.append(int(folder.name))
        return [pid for pid in found if pid != first]

    def boot(self, host: str) -> None:
        """The host is up, and nothing runs on it. A host that crashed has lost its /mnt."""
        self._start(host)
        pid, port = str(self.first[host][1]), f"p{host[1:]}"
        with suppress(subprocess.CalledProcessError):  # after a crash the kernel removes the link, but later
            self._on_hub("ip", "link", "del", port, stderr=subprocess.DEVNULL)
        card = f"02:00:00:00:00:{int(host[1:]):02x}"  # the same after a crash: other hosts remember it
        self._on_hub("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "address", card, "netns", pid)
        self.heal(host)
        self.run(host, "ip", "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        self.run(host, "ip", "link", "set", "eth0", "up")

    def crash(self, host: str) -> None:
        """SIGKILL for all its processes. The kernel closes their connections: others hear of it, unless the link is cut."""
        process, pid = self.first.pop(host)
        os.kill(pid, signal.SIGKILL)
        process.communicate()

    def cut(self, host: str) -> None:
        """Packets from and to the host vanish; connections stay open."""
        self._on_hub("ip", "link", "set", f"p{host[1:]}", "nomaster")

    def heal(self, host: str) -> None:
        self._on_hub("ip", "link", "set", f"p{host[1:]}", "master", "br0", "up")

    def rate(self, host: str, mbit: float | None) -> None:
        """So much per second in each direction at most; None: as much as the machine can."""
        burst = max(65_536, int(mbit * 1250)) if mbit else 0  # 10 ms, and at least one packet of the largest size
        limit = ("tbf", "rate", f"{mbit}mbit", "burst", str(burst), "latency", "100ms") if mbit else ("pfifo",)
        self._on_hub("tc", "qdisc", "replace", "dev", f"p{host[1:]}", "root", *limit)
        self.run(host, "tc", "qdisc", "replace", "dev", "eth0", "root", *limit)

    def _start(self, host: str) -> None:
        names = "127.0.0.1 localhost\\n" + "".join(f"{self.address(name)} {name}\\n" for name in self._names())
        words = [*_UNSHARE, _FIRST_PROCESS, "sh", host, names]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        pid = process.stdout.readline()
        if not pid:
            raise OSError(f"no host {host}: {process.communicate()[1].strip()}")
        self.first[host] = process, int(pid)

    def _names(self) -> list[str]:
        return [f"h{number}" for number in range(1, self.count + 1)]

    def _on_hub(self, *words: str, **options: Any) -> None:
        subprocess.run(["nsenter", f"--target={self.first[HUB][1]}", "--net", "--", *words], check=True, **options)

    def _entering(self, host: str, words: tuple[str | Path, ...], options: dict[str, Any]) -> list[str]:
        """`nsenter` begins at the root of the host's files."""
        folder = options.pop("cwd", os.getcwd())
        enter = ("nsenter", f"--target={self.first[host][1]}", "--net", "--uts", "--mount", "--pid", "--")
        return [*enter, "env", f"--chdir={folder}", *map(str, words)]


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """h1 to h<count>, all up and linked. Nothing of them is left at the end. Raises OSError where it cannot be."""
    made = Hosts(count)
    try:
        made._start(HUB)
        made._on_hub("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0", "stp_state", "0")
        made._on_hub("ip", "link", "set", "br0", "up")
        for host in made._names():
            made.boot(host)
        yield made
    finally:
        for host in [*made.first]:
            made.crash(host)


def why_not() -> str:
    """Why this machine cannot have hosts; empty where it can."""
    missing = [tool for tool in ("ip", "tc", "nsenter", "unshare") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        return f"hosts need root, iproute2 and util-linux{', here is no ' * bool(missing)}{', '.join(missing)}"
    try:
        with hosts(1) as made:
            made.rate("h1", 1)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"this machine cannot have hosts: {error}"
    return ""
