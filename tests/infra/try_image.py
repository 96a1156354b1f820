"""Runs the Dockerfile's steps one by one in a root file system of its own: a trial of the image where there is no Docker.

    python -m tests.infra.try_image FOLDER [--bind PATH]...

Needs root, debootstrap, the network and 9 GB in FOLDER, which is made for it and deleted after it. `--bind` shows a file or
folder of this machine to the steps, read-only: what pip's settings here name. Mounts are in a namespace that ends with it.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Template

from ray.autoscaler._private.command_runner import _with_interactive

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Step:
    """An instruction, and what holds at it."""

    word: str
    rest: str
    stage: int
    env: dict[str, str]
    user: str
    workdir: str


def steps(text: str) -> Iterator[Step]:
    """Stages here stand on each other, so what a stage has set holds in the next."""
    env, args, user, workdir, stage = {"PATH": BASE_PATH}, dict[str, str](), "root", "/", -1
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in filter(str.strip, re.sub(r"\\\n\s*", " ", kept).splitlines()):
        word, rest = line.split(maxsplit=1)
        if word != "RUN":  # else its shell does it
            rest = Template(rest).safe_substitute(args | env)
        if word == "FROM":
            stage += 1
        elif word == "ARG":
            name, _, args[name] = rest.partition("=")
        elif word == "ENV":
            env |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "USER":
            user = rest
        elif word == "WORKDIR":
            workdir = str(PurePosixPath(workdir, rest))
        yield Step(word, rest, stage, dict(env), user, workdir)


def context() -> set[Path]:
    """What the allow-list beside the Dockerfile sends to the builder."""
    lines = [line for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines() if line[0] != "#"]
    assert lines[0] == "*"
    assert all(line.startswith("!") for line in lines[1:])
    return {file for line in lines[1:] for file in ROOT.glob(line[1:])}


def copied(step: Step) -> dict[str, Path]:
    """Path in the image -> file here, of a COPY."""
    *sources, target = step.rest.split()
    folder = PurePosixPath(step.workdir, target)
    named = {file: PurePosixPath(file.name if target.endswith("/") else "") for s in sources if (file := ROOT / s).is_file()}
    inside = {file: PurePosixPath(file.relative_to(ROOT / s)) for s in sources for file in (ROOT / s).rglob("*")}
    return {str(folder / name): file for file, name in (named | inside).items() if file in context()}


def base(root: Path, binds: list[str]) -> None:
    packages = "--include=python3.11-venv,python3-distutils,ca-certificates"
    command = ["debootstrap", "--variant=minbase", packages, "bookworm", root]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3.11")
    subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root / "dev/shm"], check=True)
    for path in map(Path, ("/etc/resolv.conf", "/etc/hosts", *binds)):
        inside = root / path.relative_to("/")
        (inside if path.is_dir() else inside.parent).mkdir(parents=True, exist_ok=True)
        if path.is_file():
            inside.touch()
        subprocess.run(["mount", "--bind", "-o", "ro", path, inside], check=True)


def carry_out(root: Path, binds: list[str]) -> int:
    """Inside the namespace. The exit code of `jobs.doctor`."""
    given = {name: value for name, value in os.environ.items() if re.match(r"PIP_|SSL_|\w+_proxy$", name, re.IGNORECASE)}

    def run(step: Step, *command: str, env: dict[str, str] | None = None) -> int:
        variables = [f"{name}={value}" for name, value in (step.env | (env or {})).items()]
        user = "0:0" if step.user == "root" else f"{step.user}:{step.user}"
        line = ["chroot", f"--userspec={user}", root, "/usr/bin/env", "-i", f"--chdir={step.workdir}", *variables, *command]
        return subprocess.run(line, stderr=subprocess.STDOUT).returncode

    todo = list(steps(DOCKERFILE.read_text()))
    for step in todo:
        print(f"--> {step.word} {step.rest}", flush=True)
        if step.word == "FROM" and step.stage == 0:
            print("    Debian bookworm by debootstrap, with its own Python 3.11, stands for this image", flush=True)
            base(root, binds)
        elif step.word == "RUN" and (code := run(step, "/bin/sh", "-c", step.rest, env=given)):
            return code
        elif step.word == "WORKDIR":
            (root / step.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif step.word == "COPY":
            for path, file in copied(step).items():
                (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, root / path.lstrip("/"))
    look = "id; which python ray; ray --version; ssh -V; rsync --version | head -1; ls -ld ~/.ray; du -sh /opt/venv"
    print(f"--> {look}, in the launcher's login shell", flush=True)
    run(todo[-1], "/bin/bash", "-c", " ".join(_with_interactive(look)))
    print("--> python -m jobs.doctor", flush=True)
    return run(todo[-1], "python", "-m", "jobs.doctor")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bind", action="append", default=[])
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        sys.exit(carry_out(given.folder.resolve(), given.bind))
    given.folder.mkdir()
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    try:
        inside = [sys.executable, "-m", "tests.infra.try_image", "--inside", *sys.argv[1:]]
        sys.exit(subprocess.run([*apart, *inside]).returncode)
    finally:
        shutil.rmtree(given.folder)
