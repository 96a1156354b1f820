"""Processes that a command brings, by their title: to be counted, and to be killed."""

import time
from collections.abc import Callable
from pathlib import Path


def until(true: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < timeout_s, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)
    return time.monotonic() - began


def descendants(pid: int) -> list[int]:
    """`pid`, its children and theirs, and whatever else is in its session."""
    parents, sessions = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(folder.name)], sessions[int(folder.name)] = int(fields[1]), int(fields[3])
    found, grows = {one for one, session in sessions.items() if session == pid}, True
    while grows:
        more = {one for one, parent in parents.items() if parent in found or one == pid} - found
        found, grows = found | more, bool(more)
    return sorted(found)


def title_of(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def alive(pids: list[int]) -> list[int]:
    """Those that run; a zombie does not."""
    found = []
    for pid in pids:
        try:
            state = (
                Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
            )
        except OSError:
            continue
        if state != "Z":
            found.append(pid)
    return found
