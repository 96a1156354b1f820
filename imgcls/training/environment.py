"""What a result says of where it came about: versions, hardware, commit."""

import ctypes
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from imgcls.cpus import usable_cpus
from imgcls.recipe import Recipe, digest_of

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "ray", "webdataset", "numpy", "pillow")

CPU_FACTS = ("vendor_id", "cpu family", "model", "cache size", "CPU implementer", "CPU part", "CPU variant")
KERNEL_CHOICES = (
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)
"""Environment variables by which a user chooses other kernels."""


def versions() -> dict[str, str]:
    facts = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def origin() -> dict[str, Any]:
    """Fields of a result."""
    return {"versions": versions(), "hardware": hardware(), "commit": commit()}


def hardware() -> dict[str, str]:
    """CPU, its vector units, GPU: what decides speed and the last bits."""
    cpu = _cpu_facts().get("model name") or platform.processor() or platform.machine()
    facts = {"cpu": cpu, "cpus": str(usable_cpus()), "vectors": _vectors()}
    return facts | dict(zip(("gpu",), gpus(), strict=False))  # the first one's name, where there is one


def gpus() -> list[str]:
    """Names of the CUDA devices of this process. Where there is no driver torch is not imported to say so, for seconds."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


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
    """What decides the last bits of a run, beside its request. Which ranks share a node does not: see `gradients`."""
    import torch

    facts = {name: version(name) for name in ("torchvision", "lightning", "numpy", "pillow")}
    facts |= {"torch": torch.__version__} | {name: os.environ[name] for name in KERNEL_CHOICES if name in os.environ}
    if accelerator == "gpu":
        cudnn = torch.backends.cudnn.version()
        facts["device"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
    else:
        num_threads = 1 if recipe.numerics == "elastic" else torch.get_num_threads()
        facts |= {"device": f"cpu {torch.backends.cpu.get_cpu_capability()}, {_cpu_model()}", "threads": str(num_threads)}
    if recipe.numerics != "elastic":
        facts["workers"] = str(world_size)
    return facts


def numerics_of_all(ranks: list[dict[str, str]]) -> dict[str, str]:
    """One for all ranks, with what each has where they are not alike."""
    facts = {name: [one.get(name, "") for one in ranks] for one in ranks for name in one}
    return {name: values[0] if len(set(values)) == 1 else " | ".join(values) for name, values in facts.items()}


def _vectors() -> str:
    """As `torch.backends.cpu.get_cpu_capability` names them; without torch where Linux lists an x86's."""
    flags = set(_cpu_facts().get("flags", "").split())
    if not flags or "ATEN_CPU_CAPABILITY" in os.environ:
        import torch

        return torch.backends.cpu.get_cpu_capability()
    known = {"AVX512": {"avx512vl", "avx512bw", "avx512dq", "fma"}, "AVX2": {"avx2", "fma"}}
    return next((name for name, needed in known.items() if needed <= flags), "DEFAULT")


def _cpu_model() -> str:
    """What MKL and oneDNN choose their kernels by: the vendor, the model, its caches and vector instructions."""
    facts = _cpu_facts()
    named = [facts[name] for name in CPU_FACTS if name in facts]
    vectors = [flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx", "fma"))]
    return " ".join([platform.machine(), *named, digest_of(sorted(vectors))[:8]])


@cache
def _cpu_facts() -> dict[str, str]:
    """Of the first CPU, as Linux names them; empty elsewhere."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0].splitlines()
        return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


@cache
def commit() -> str | None:
    """Of this checkout, with `+changes` where it is not as committed, records of figures aside.

    Handed on by `IMGCLS_COMMIT` where git is not.
    """
    if named := os.environ.get("IMGCLS_COMMIT"):
        return named

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)docs/measurements")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
