"""CPUs that this process may use, which in a container or under `taskset` are fewer than the machine has."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

QUOTAS = {"": ("sys/fs/cgroup", "cpu.max"), "cpu": ("sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")}
"""A cgroup's controller, empty in version 2 -> where its groups are, and the files of a quota and its period."""


def usable_cpus(root: Path = Path("/")) -> int:
    """By this process's affinity and the quotas of its cgroup and of those above it; at least 1.

    root: where /proc and /sys are. A part of a CPU counts as one.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([allowed, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    with suppress(OSError):  # no cgroups here
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
            for controller in QUOTAS.keys() & controllers.split(","):
                mount, *names = QUOTAS[controller]
                # In a container the path may be one of the host; the container's own group is then the mount itself.
                group = root / mount / path.lstrip("/")
                for folder in (group, *group.parents):
                    with suppress(OSError, ValueError):  # no such file, or "max"
                        quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                        if quota > 0:
                            yield quota / period
