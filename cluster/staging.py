"""What a job brings to a cluster: an allow-list of files, the command's words as they read there, no secret.

Comes in: the words of a command, as a person would give it here. Goes out: a folder to upload, and words that hold there.
Called by `jobs.submit`. Pure, but for copying.
"""

import os
import re
import secrets
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgcls.disk import local_path
from imgcls.errors import RecipeError
from imgcls.training.environment import commit

ROOT = Path(__file__).parent.parent
PACKAGES = ("jobs", "cluster", "imgcls")
SUFFIXES = (".py", ".html", ".css")
PAPERS = ("pyproject.toml", "requirements.txt")
LIMIT_BYTES = 2_000_000
GIVEN = "given"
"""The folder of files that the command names."""
FILE_FLAGS = ("--recipe", "--prices")
PLACES = {
    "pack": ("--to", "--source", "--verify"),
    "train": ("--data", "--storage", "--init-from"),
    "suite": ("--data", "--storage", "--init-from"),
    "evaluate": ("--data",),
    "report": ("--storage",),
    "doctor": ("--data", "--storage"),
}
"""The commands that can be jobs, and their flags that name a place."""
REQUIRED = {"pack": ("--to",), "train": ("--data", "--storage"), "suite": ("--data", "--storage"), "report": ("--storage",)}
"""Flags whose default is a folder beside the command, which in a job goes away with it."""

_SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|ACCESS_?KEY|API_?KEY|(^|_)(KEY|AUTH|PW|PAT)$", re.IGNORECASE
)
_SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN|://[^/@\s]+:[^/@\s]+@|\b(ghp|gho|xox[bp]|hf|sk)[_-]\w{16,}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A command on its way to a cluster."""

    id: str
    words: tuple[str, ...]
    """Name and arguments of a door, as they read there."""
    files: dict[str, Path]
    """Where each lies in the job's working folder, and here."""
    env: dict[str, str]
    driver_resource: str | None = None

    def request(self, python: str) -> dict[str, Any]:
        """What is asked of the cluster, but for the working folder: arguments of Ray's `submit_job`."""
        request: dict[str, Any] = {
            "submission_id": self.id,
            "entrypoint": self._command(python),
            "runtime_env": {"env_vars": self.env},
            "metadata": {"command": self._command("python")},
        }
        if self.driver_resource is not None:  # else the head's, which is Ray's default
            request["entrypoint_resources"] = {self.driver_resource: 1.0}
        return request

    def _command(self, python: str) -> str:
        return shlex.join([python, "-m", f"jobs.{self.words[0]}", *self.words[1:]])

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())

    def stage(self, folder: Path) -> None:
        """`folder` is the job's working folder, as it will be there."""
        for name, file in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def prepare(
    words: Sequence[str], *, id: str | None = None, env: Sequence[str] = (), driver_resource: str | None = None
) -> Job:
    """Raises RecipeError for what could not work there, or should not go there."""
    if not words or words[0] not in PLACES:
        given = f"{words[0]} cannot be a job" if words else "there is no command to submit"
        raise RecipeError(f"{given}\n  do: ... -- suite --data s3://... --storage s3://...; or {', '.join(PLACES)}")
    given_env = _environment(env)
    _refuse_secrets(words)
    _refuse_relative_places(words)
    words, named = _with_files(words)
    files = _our_files() | named
    job = Job(
        id=id or f"imgcls-{words[0]}-{secrets.token_hex(4)}",
        words=tuple(words),
        files=files,
        # There is no git where it goes.
        env={"IMGCLS_COMMIT": commit() or "unknown", **given_env},
        driver_resource=driver_resource,
    )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", job.id):
        raise RecipeError(f"--job-id {job.id!r}: letters, digits, dots, dashes and underscores")
    if job.num_bytes > LIMIT_BYTES:
        largest = sorted(files.items(), key=lambda item: -item[1].stat().st_size)[:3]
        named = ", ".join(f"{name} ({file.stat().st_size:,} bytes)" for name, file in largest)
        raise RecipeError(
            f"the job's files have {job.num_bytes:,} bytes, {LIMIT_BYTES:,} is the limit; the largest: {named}\n"
            "  do: leave data in a bucket, and name it there"
        )
    return job


def _our_files() -> dict[str, Path]:
    """Of this checkout, or of where it is installed."""
    found = {
        str(file.relative_to(ROOT)): file
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix in SUFFIXES
    }
    others = [*(ROOT / name for name in PAPERS), *(ROOT / "docs" / "measurements").glob("suite-*.json")]
    return found | {str(file.relative_to(ROOT)): file for file in others if file.exists()}


def _with_files(words: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """The words with the files of `FILE_FLAGS` as they are called there, and these files."""
    found, files = list(words), dict[str, Path]()
    for at, flag, value in _flags(words, FILE_FLAGS):
        path = local_path(value)
        if not path.is_file():
            raise RecipeError(f"{flag} {value}: there is no such file")
        name = f"{GIVEN}/{len(files)}-{path.name}"
        files[name] = path
        found[at] = name if "=" not in words[at] or words[at] == value else f"{flag}={name}"
    return found, files


def _flags(words: Sequence[str], flags: Sequence[str]) -> list[tuple[int, str, str]]:
    """(index of the word that holds the value, flag, value), for `--flag value` and `--flag=value`."""
    found = []
    for at, word in enumerate(words):
        flag, has_value, value = word.partition("=")
        if flag in flags and has_value:
            found.append((at, flag, value))
        elif word in flags and at + 1 < len(words):
            found.append((at + 1, word, words[at + 1]))
    return found


def value_of(flag: str, words: Sequence[str]) -> str | None:
    found = _flags(words, [flag])
    return found[-1][2] if found else None


def _refuse_relative_places(words: Sequence[str]) -> None:
    """In a job a relative path is in the working folder, which goes away with the job."""
    door, named = words[0], _flags(words, PLACES[words[0]])
    for flag, value in [(flag, value) for _, flag, value in named] + _checkpoint(words):
        if not is_lasting(value) and not (flag == "--source" and value == "synthetic"):
            raise RecipeError(relative(flag, value))
    missing = [flag for flag in REQUIRED.get(door, ()) if flag not in {flag for _, flag, _ in named}]
    if missing and "--help" not in words and not (door == "pack" and "--verify" in {flag for _, flag, _ in named}):
        raise RecipeError(
            f"{door} without {' and '.join(missing)}: the default is beside the command, and goes away with the job\n"
            f"  do: {' '.join(f'{flag} s3://...' for flag in missing)}"
        )


def _checkpoint(words: Sequence[str]) -> list[tuple[str, str]]:
    named = words[0] == "evaluate" and len(words) > 1 and not words[1].startswith("-")
    return [("CHECKPOINT", words[1])] if named else []


def is_lasting(place: str) -> bool:
    """A URL or an absolute path."""
    return "://" in place or place.startswith("/")


def relative(flag: str, value: str) -> str:
    return f"{flag} {value} is relative: in a job that folder goes away with the job\n  do: a URL, or an absolute path"


def _environment(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise RecipeError(f"--env {name}: write --env NAME=VALUE")
        if _SECRET_NAME.search(name) or _is_secret(value):
            raise RecipeError(
                f"--env {name}: looks like a secret; a job's environment is seen by all who see the cluster's dashboard\n"
                "  do: give it to the nodes: an instance role, a file, or the environment of `ray start`"
            )
        found[name] = value
    return found


def _refuse_secrets(words: Sequence[str]) -> None:
    for word in words:
        if _is_secret(word):
            raise RecipeError(
                f"an argument of {words[0]} holds a secret; a job's command is seen by all who see the cluster's dashboard\n"
                "  do: give it to the nodes: an instance role, a file, or the environment of `ray start`"
            )


def _is_secret(text: str) -> bool:
    """It looks like one, or it holds what a variable here holds that is called like one."""
    mine = (value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8)
    return bool(_SECRET_VALUE.search(text)) or any(value in text for value in mine)
