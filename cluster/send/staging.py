"""What a job brings to a cluster: an allow-list of files, and the words of its command as they read there. No secrets.

Comes in: the words of a command, as a person would type them here. Goes out: a `Job`, with its files and its words.
Called by `jobs.submit`. Reads files, and copies them into the folder that is uploaded.
"""

import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgcls.disk import local_path
from imgcls.errors import RecipeError
from imgcls.training.environment import commit

ROOT = Path(__file__).parents[2]
PACKAGES = ("jobs", "cluster", "imgcls")
FILES = (
    *(f"{package}/**/*{suffix}" for package in PACKAGES for suffix in (".py", ".html", ".css", ".mplstyle")),
    *("pyproject.toml", "requirements.txt", "docs/measurements/suite-*.json"),
)
"""Patterns of our own files below `ROOT`, a checkout or the folder where the packages are installed."""
LIMIT_BYTES = 2_000_000
GIVEN = "given"
"""The job's folder for files that the command names."""
FILE_FLAGS = ("--recipe", "--prices", "--cluster", "--space")
PLACES = {
    "pack": ("--to", "--source", "--verify"),
    **dict.fromkeys(("train", "suite", "search"), ("--data", "--storage", "--init-from")),
    "evaluate": ("--data",),
    "report": ("--storage",),
    "doctor": ("--data", "--storage"),
}
"""The commands that can be jobs, and their flags that name a place."""
REQUIRED = ("--to", "--data", "--storage")
"""Flags whose default, but `doctor`'s, is a folder beside the command, which in a job goes away with it."""

_SECRET_NAME = re.compile(r"(?i)SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|ACCESS_?KEY|API_?KEY|(^|_)(KEY|AUTH|PW|PAT)$")
_SECRET_VALUE = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN|://[^/@\s]+:[^/@\s]+@|\b(ghp|gho|xox[bp]|hf|sk)[_-]\w{16,}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A command on its way to a cluster."""

    id: str
    words: tuple[str, ...]
    """The command's name and its arguments, as they read there."""
    files: dict[str, Path]
    """Path in the job's working folder -> path here."""
    env: dict[str, str]
    driver_resource: str | None = None

    def request(self, python: str) -> dict[str, Any]:
        """The arguments of Ray's `submit_job`, without the working folder."""
        return {
            "submission_id": self.id,
            "entrypoint": self._command(python),
            "runtime_env": {"env_vars": self.env},
            "metadata": {"command": self._command("python")},
            # None: Ray runs it on the head.
            "entrypoint_resources": None if self.driver_resource is None else {self.driver_resource: 1.0},
        }

    def _command(self, python: str) -> str:
        return shlex.join([python, "-m", f"jobs.{self.words[0]}", *self.words[1:]])

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files.values())

    def stage(self, folder: Path) -> None:
        """Copies the files into `folder`, which is uploaded as the job's working folder."""
        for name, file in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def prepare(
    words: Sequence[str], *, id: str | None = None, env: Sequence[str] = (), driver_resource: str | None = None
) -> Job:
    """Raises RecipeError for what cannot work on the cluster, and for what must not go there."""
    if not words or words[0] not in PLACES:
        problem = f"{words[0]} cannot be a job" if words else "there is no command to submit"
        raise RecipeError(f"{problem}\n  do: ... -- suite --data s3://... --storage s3://...; or {', '.join(PLACES)}")
    variables = _environment(env)
    if any(map(_is_secret, words)):
        raise _secret_refused(f"an argument of {words[0]} holds a secret", seen="command")
    _refuse_relative_places(words)
    words, named_files = _with_files(words)
    job = Job(
        id=id or f"imgcls-{words[0]}-{secrets.token_hex(4)}",
        words=tuple(words),
        files={str(file.relative_to(ROOT)): file for pattern in FILES for file in ROOT.glob(pattern)} | named_files,
        # The cluster has no git.
        env={"IMGCLS_COMMIT": commit() or "unknown", **variables},
        driver_resource=driver_resource,
    )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", job.id):
        raise RecipeError(f"--job-id {job.id!r}: letters, digits, dots, dashes and underscores")
    if job.num_bytes > LIMIT_BYTES:
        largest = sorted(job.files.items(), key=lambda item: -item[1].stat().st_size)[:3]
        names = ", ".join(f"{name} ({file.stat().st_size:,} bytes)" for name, file in largest)
        raise RecipeError(
            f"the job's files have {job.num_bytes:,} bytes, {LIMIT_BYTES:,} is the limit; the largest: {names}\n"
            "  do: leave data in a bucket, and name it there"
        )
    return job


def _with_files(words: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """The words with each file of `FILE_FLAGS` by its path in the job's folder; and these files."""
    words_there, files = list(words), dict[str, Path]()
    for index, flag, value in _flags(words, FILE_FLAGS):
        if "://" in value:
            continue
        path = local_path(value)
        if not path.is_file():
            raise RecipeError(f"{flag} {value}: there is no such file")
        name = f"{GIVEN}/{len(files)}-{path.name}"
        files[name] = path
        words_there[index] = words[index].removesuffix(value) + name
    return words_there, files


def _flags(words: Sequence[str], flags: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """(index of the word that holds the value, flag, value), for `--flag value` and `--flag=value`."""
    for index, word in enumerate(words):
        name, has_value, value = word.partition("=")
        flag = name.replace("_", "-")  # both spellings are taken
        if flag in flags and has_value:
            yield index, flag, value
        elif flag in flags and index + 1 < len(words):
            yield index + 1, flag, words[index + 1]


def _refuse_relative_places(words: Sequence[str]) -> None:
    """In a job a relative path is in the working folder, which goes away with the job."""
    command, places = words[0], [(flag, value) for _, flag, value in _flags(words, PLACES[words[0]])]
    flags = {flag for flag, _ in places}
    if command == "evaluate" and len(words) > 1 and not words[1].startswith("-"):
        places.append(("CHECKPOINT", words[1]))
    for flag, value in places:
        if (flag, value) != ("--source", "synthetic"):
            check_lasting(flag, value)
    missing = [flag for flag in PLACES[command] if flag in REQUIRED and flag not in flags]
    if missing and command != "doctor" and "--help" not in words and "--verify" not in flags:
        raise RecipeError(
            f"{command} without {' and '.join(missing)}: the default is beside the command, and goes away with the job\n"
            f"  do: {' '.join(f'{flag} s3://...' for flag in missing)}"
        )


def check_lasting(flag: str, place: str) -> None:
    """Raises RecipeError unless the place is a URL or an absolute path."""
    if "://" not in place and not place.startswith("/"):
        message = f"{flag} {place} is relative: in a job that folder goes away with the job"
        raise RecipeError(f"{message}\n  do: a URL, or an absolute path")


def _environment(variables: Sequence[str]) -> dict[str, str]:
    environment = {}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise RecipeError(f"--env {name}: write --env NAME=VALUE")
        if _SECRET_NAME.search(name) or _is_secret(value):
            raise _secret_refused(f"--env {name}: looks like a secret", seen="environment")
        environment[name] = value
    return environment


def _secret_refused(problem: str, *, seen: str) -> RecipeError:
    return RecipeError(
        f"{problem}; a job's {seen} is seen by all who see the cluster's dashboard\n"
        "  do: give it to the nodes: an instance role, a file, or the environment of `ray start`"
    )


def _is_secret(text: str) -> bool:
    """The text has the form of a secret, or holds the value of a variable of this process with a secret's name."""
    values = (value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8)
    return bool(_SECRET_VALUE.search(text)) or any(value in text for value in values)
