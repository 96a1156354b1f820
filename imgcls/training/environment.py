"""What a result says of where it came about: versions, hardware, commit."""

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from imgcls.recipe import Recipe

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "ray", "webdataset", "numpy", "pillow")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str]:
    """CPU, its vector units, GPU: what decides speed and the last bits."""
    import torch

    found = {"cpu": _cpu_name(), "cpus": str(os.cpu_count()), "vectors": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch computes with so many inside; None leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def numerics(recipe: Recipe, *, world_size: int, accelerator: str) -> dict[str, str]:
    """What decides the last bits of a run, beside its request."""
    import torch

    found = {name: version(name) for name in ("torch", "torchvision", "lightning", "numpy")}
    if accelerator == "gpu":
        found["device"] = torch.cuda.get_device_name()
    else:
        num_threads = 1 if recipe.numerics == "elastic" else torch.get_num_threads()
        found |= {"device": f"cpu {torch.backends.cpu.get_cpu_capability()}", "threads": str(num_threads)}
    if recipe.numerics != "elastic":
        found["workers"] = str(world_size)
    return found


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def commit() -> str | None:
    """Of this checkout, with `+changes` where it is not as committed, records of figures aside.

    Handed on by `IMGCLS_COMMIT` where git is not.
    """
    if told := os.environ.get("IMGCLS_COMMIT"):
        return told
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)docs/measurements")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
