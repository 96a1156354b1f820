"""The Dockerfile: hadolint with every rule on, then rules of ours; `try_image.py` runs its steps."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.send.staging import prepare
from imgcls.errors import RecipeError
from tests.infra.try_image import DOCKERFILE, ROOT, context, in_image, steps

TEXT = DOCKERFILE.read_text()
DRIVER = {
    "NVIDIA_VISIBLE_DEVICES": "all",
    "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64",
}


def hadolint(text: str) -> str:
    command = [Path(sys.executable).parent / "hadolint", "--failure-threshold=style", "--disable-ignore-pragma", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def faults(text: str) -> str:
    """What hadolint does not ask for."""
    seen = list(steps(text))
    last = seen[-1]
    base = next(step.rest for step in seen if step.word == "FROM")
    commands = "\n".join(step.rest for step in seen if step.word == "RUN")
    installs = re.findall(r"pip install[^&;\n]*", commands)
    uids = [*re.findall(r"--(?:uid|owner|group)[ =](\S+)", commands), last.user]
    variables = [pair for step in seen if step.word in ("ARG", "ENV") for pair in re.findall(r"(\w+)=?(\S*)", step.rest)]
    there = {
        "the base is no exact version with its digest": not re.match(r"\S+:\d+\.\d+\.\d+\S*@sha256:[0-9a-f]{64} ", base),
        "pip installs without hashes": not installs or not all("--require-hashes" in install for install in installs),
        "pip runs a package's setup code": not all("--only-binary=:all:" in install for install in installs),
        "the user, or the owner of ~/.ray, is not UID 1000, on which the launcher's files build": uids != ["1000"] * 4,
        "others read the token": "--mode=700 /home/imgcls/.ray" not in commands,
        "a variable has the form of a secret": any(is_secret(name, value) for name, value in variables),
        "a download is run": "ADD" in {step.word for step in seen} or bool(re.search(r"(curl|wget)\b.*\|", commands)),
        "python is not the venv's": not last.env["PATH"].startswith("/opt/venv/bin:"),
        "python is not the venv's in login shells": not re.search(r'"PATH=/opt/venv/bin:.*> /etc/profile\.d/', commands),
        "the launcher finds no home": last.env.get("HOME") != "/home/imgcls",
        "the launcher finds no rsync": not re.search(r"apt-get install .*\brsync=", commands),
        "nodes do not find what they run": last.env.get("PYTHONPATH") != "/opt/node"
        or {"cluster/__init__.py", "cluster/provide/aws.py", "cluster/provide/keeper.py"}
        - in_image(text, "/opt/node/").keys(),
        "no driver": not DRIVER.items() <= last.env.items(),
    }
    return "\n".join(fault for fault, is_there in there.items() if is_there)


def is_secret(name: str, value: str) -> bool:
    """By the rule of `jobs.submit`."""
    try:
        prepare(["doctor"], env=[f"{name}={value}"])
    except RecipeError:
        return True
    return False


def test_the_dockerfile_has_no_fault():
    assert hadolint(TEXT) == faults(TEXT) == ""


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("python:3.11.16-slim-bookworm@", "python:latest@", "base"),
        ("python:3.11.16-slim-bookworm@", "python:3.11-slim-bookworm@", "base"),
        (r"(slim-bookworm)@sha256:\w+", r"\1", "base"),
        ("FROM .* AS deps", "FROM python:latest AS deps", "DL3007"),
        ("--require-hashes ", "", "hashes"),
        ("&& pip install", "&& pip install torch==2.14.1 && pip install", "hashes"),
        ("--no-cache-dir", "", "DL3042"),
        ("&& pip install", "&& pip install torch && pip install", "DL3013"),
        ("USER 1000", "USER root", "UID 1000"),
        ("USER 1000", "USER 0", "UID 1000"),
        ("USER 1000", "USER imgcls", "DL3066"),
        (r"\Z", "USER root", "DL3002"),
        ("USER 1000\n", "", "UID 1000"),
        (r"rsync=3\.\*", "rsync", "DL3008"),
        (r"rsync=3\.\*", "", "rsync"),
        ("ARG COMMIT=unknown", "ARG RAY_AUTH_TOKEN", "secret"),
        ("ENV IMGCLS_COMMIT=", "ENV AWS_SECRET_ACCESS_KEY=", "DL3064"),
        ("ENV IMGCLS_COMMIT=", "ENV INDEX=https://me:letmein@index/", "secret"),
        ("RUN useradd", "RUN curl -fsSL https://x.example | bash && useradd", "download"),
        ("COPY jobs jobs", "ADD https://x.example/jobs jobs", "download"),
        ("ENV PATH=/opt/venv/bin:", "ENV PATH=", "python is not the venv's"),
        (r"\n    && echo .*", "", "login shells"),
        ("    HOME=.*\n", "", "home"),
        ("    NVIDIA_VISIBLE_DEVICES=.*\n", "", "driver"),
        ("=compute,utility", "=utility", "driver"),
        ("    LD_LIBRARY_PATH=.*\n", "", "driver"),
        ("ENV PYTHONPATH=/opt/node\n", "", "what they run"),
        ("COPY cluster/provide .*\n", "", "what they run"),
        ("COPY cluster/__init__.py .*\n", "", "what they run"),
        ("--uid 1000", "--uid 1001", "UID 1000"),
        ("--owner=1000", "--owner=root", "UID 1000"),
        ("--mode=700", "--mode=777", "read the token"),
        (" --only-binary=:all:", "", "setup code"),
    ],
)
def test_a_mistake_is_seen(right: str, wrong: str, said: str):
    changed, count = re.subn(right, wrong, TEXT)
    assert count == 1
    assert said in hadolint(changed) + faults(changed)


def test_the_job_image_holds_what_submit_sends_and_no_more():
    sent = prepare(["doctor"]).files
    assert in_image(TEXT, "/home/imgcls/app/") == sent
    assert context() == {*sent.values(), ROOT / "infra/requirements.txt"}


def test_what_nodes_run_starts_with_what_the_image_has_of_our_code(tmp_path: Path):
    for path, file in in_image(TEXT, "/opt/node/").items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, tmp_path / path)
    absent = "import sys; sys.modules.update(dict.fromkeys(('imgcls', 'jobs'))); "
    for line in ("import cluster.provide.aws", "import runpy; runpy.run_module('cluster.provide.keeper')"):
        env = {"PYTHONPATH": str(tmp_path), "PATH": os.defpath}
        words = [sys.executable, "-c", f"{absent}{line}; import cluster; print(cluster.__file__)"]
        done = subprocess.run(words, env=env, cwd="/", capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"{tmp_path}/cluster/__init__.py\n"), done.stderr
