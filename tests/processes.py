"""The processes of a command, found by their titles, to count and to kill them."""

import time
from collections.abc import Callable
from pathlib import Path


def until(true: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Wait until `true()`; returns the seconds that it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < timeout_s, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)
    return time.monotonic() - began


def _stat(folder: Path) -> list[str]:
    """State, parent, group, session and more of a process that runs; nothing for one that has ended, or is a zombie."""
    try:
        fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] == "Z" else fields


def descendants(pid: int) -> list[int]:
    """`pid`, its children and theirs, and all other processes of its session."""
    parents, sessions = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := _stat(folder):
            parents[int(folder.name)], sessions[int(folder.name)] = int(fields[1]), int(fields[3])
    family, grows = {child for child, session in sessions.items() if session == pid}, True
    while grows:
        more = {child for child, parent in parents.items() if parent in family or child == pid} - family
        family, grows = family | more, bool(more)
    return sorted(family)


def begun_at(pid: int) -> int:
    """In the kernel's ticks."""
    return int(_stat(Path("/proc", str(pid)))[19])


def title_of(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def alive(pids: list[int]) -> list[int]:
    """The processes that run; a zombie does not."""
    return [pid for pid in pids if _stat(Path("/proc", str(pid)))]
