"""Runs the Dockerfile's steps one by one in a root file system of its own: a trial of the image where there is no Docker.

    python -m tests.infra.try_image FOLDER [PATH]...

Needs root, debootstrap, network and 9 GB in FOLDER, which it makes and deletes. The steps see each PATH of this machine,
read-only: what pip's settings name. All mounts are in a namespace that ends with it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from string import Template
from typing import NamedTuple

from ray.autoscaler._private.command_runner import _with_interactive

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
LOOK = "id; which python ray; ray --version; ssh -V; rsync --version | head -1; ls -ld ~/.ray; du -sh /opt/venv"
do = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)


class Step(NamedTuple):
    """An instruction, and what holds after it."""

    word: str
    rest: str
    env: dict[str, str]
    user: str
    workdir: str


def steps(text: str) -> Iterator[Step]:
    """Stages here stand on each other, so what a stage has set holds in the next."""
    env, args = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"}, dict[str, str]()
    now = {"USER": "0", "WORKDIR": "/"}
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in filter(str.strip, re.sub(r"\\\n\s*", " ", kept).splitlines()):
        word, rest = line.split(maxsplit=1)
        rest = rest if word == "RUN" else Template(rest).safe_substitute(args | env)
        if word == "ARG":
            name, _, args[name] = rest.partition("=")
        elif word == "ENV":
            env |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word in now:
            now[word] = rest
        yield Step(word, rest, dict(env), now["USER"], now["WORKDIR"])


def context() -> set[Path]:
    """What the allow-list beside the Dockerfile sends to the builder."""
    everything, *allowed = [s for s in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines() if s[0] != "#"]
    assert everything == "*"
    return {file for pattern in allowed for file in ROOT.glob(pattern[1:])}


def copied(step: Step) -> dict[str, Path]:
    """Path in the image -> file here, of a COPY."""
    *sources, target = step.rest.split()
    there, sent = PurePosixPath(step.workdir, target), context()
    files = {there / source if target.endswith("/") else there: ROOT / source for source in sources}
    files |= {there / file.relative_to(ROOT / source): file for source in sources for file in (ROOT / source).rglob("*")}
    return {str(path): file for path, file in files.items() if file in sent}


def in_image(text: str, folder: str) -> dict[str, Path]:
    """Path below this folder of the image -> file here."""
    files = {path: file for step in steps(text) if step.word == "COPY" for path, file in copied(step).items()}
    return {path.removeprefix(folder): file for path, file in files.items() if path.startswith(folder)}


def base(root: Path, binds: list[Path]) -> None:
    print("    Debian bookworm by debootstrap, with its own Python 3.11, stands for this image", flush=True)
    packages = "python3.11-venv,python3-distutils,ca-certificates"
    do(["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root])
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3.11")
    do(["mount", "-t", "proc", "proc", root / "proc"])
    do(["mount", "-t", "tmpfs", "tmpfs", root / "dev/shm"])
    for path in (Path("/etc/resolv.conf"), Path("/etc/hosts"), *binds):
        inside = root / path.relative_to("/")
        do(["install", "-D", "/dev/null", inside] if path.is_file() else ["mkdir", "-p", inside])
        do(["mount", "--bind", "-o", "ro", path, inside])


def run(root: Path, step: Step, *command: str, env: dict[str, str] | None = None) -> int:
    variables = [f"{name}={value}" for name, value in (step.env | (env or {})).items()]
    as_user = ["chroot", f"--userspec={step.user}:{step.user}", root, "env", "-i", f"--chdir={step.workdir}"]
    return subprocess.run([*as_user, *variables, *command], stderr=subprocess.STDOUT).returncode


def carry_out(root: Path, binds: list[Path]) -> int:
    """Inside the namespace. The exit code of `jobs.doctor`."""
    pips = {name: value for name, value in os.environ.items() if re.match(r"PIP_|SSL_|\w+_proxy$", name, re.IGNORECASE)}
    todo = list(steps(DOCKERFILE.read_text()))
    for step in todo:
        print(f"--> {step.word} {step.rest}", flush=True)
        if step.word == "FROM" and not (root / "etc").exists():
            base(root, binds)
        elif step.word == "RUN" and (code := run(root, step, "/bin/sh", "-c", step.rest, env=pips)):
            return code
        elif step.word == "WORKDIR":
            (root / step.workdir[1:]).mkdir(parents=True, exist_ok=True)
        for path, file in (copied(step) if step.word == "COPY" else {}).items():
            (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, root / path[1:])
    print(f"--> {LOOK}; in the launcher's login shell. Then jobs.doctor", flush=True)
    run(root, todo[-1], "/bin/bash", "-c", " ".join(_with_interactive(LOOK)))
    return run(root, todo[-1], "python", "-m", "jobs.doctor")


if __name__ == "__main__":
    folder, *binds = [Path(word).absolute() for word in sys.argv[1:] if word != "--inside"]
    if "--inside" in sys.argv:
        sys.exit(carry_out(folder, binds))
    folder.mkdir()
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", sys.executable, "-m", "tests.infra.try_image"]
    try:
        sys.exit(subprocess.run([*apart, *sys.argv[1:], "--inside"]).returncode)
    finally:
        shutil.rmtree(folder)
