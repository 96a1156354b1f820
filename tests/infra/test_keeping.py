"""The loop by which a worker's VM shuts itself down, by the very line of each file; `sudo` here keeps what it was told."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.infra.keeping import FOLDER, line_of
from tests.processes import descendants, title_of, until

FILES = ("ray/aws.yaml", "ray/gcp.yaml")


class Vm:
    """Half an hour is 5.4 s here."""

    def __init__(self, path: str, folder: Path) -> None:
        self.folder, self.file, self.said = folder, folder / "job", folder / "said"
        changes = {"sleep 60": "sleep 0.2", "-30": "-0.09"}
        self.line = line_of(path, "initialization_commands", "shutdown", **changes).replace(FOLDER, str(folder))
        (folder / "sudo").write_text(f'#!/bin/sh\necho "$@" >> {self.said}\n')
        (folder / "sudo").chmod(0o755)

    def start(self, **environment: str) -> None:
        env = {"PATH": f"{self.folder}:{os.environ['PATH']}"} | environment
        subprocess.run(["bash", "-c", self.line], env=env, check=True, timeout=60)

    @property
    def loops(self) -> list[int]:
        """Their `flock`s have left this process's family; a title has the folder."""
        pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
        return [pid for pid in pids if title_of(pid).startswith("flock ") and str(self.folder) in title_of(pid)]

    def loops_alone(self) -> bool:
        """One loop, and it runs: its `flock` holds the lock."""
        return len(self.loops) == 1 and any(title_of(pid).startswith("sh ") for pid in descendants(self.loops[0]))


@pytest.fixture(params=[FILES[0], pytest.param(FILES[1], marks=pytest.mark.slow)])
def vm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Vm]:
    vm = Vm(request.param, tmp_path)
    vm.file.touch()
    yield vm
    for pid in vm.loops:
        for one in [*descendants(pid), pid]:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_is_shut_down_when_its_file_is_old_and_not_before(vm: Vm):
    vm.start(RAY_HEAD_IP="10.0.0.1")
    began = time.monotonic()
    for _ in range(36):  # 7.2 s
        began = time.monotonic()
        vm.file.touch()
        time.sleep(0.2)
    assert not vm.said.exists()
    until(vm.said.exists, 60, "a shutdown")
    assert time.monotonic() - began > 5
    assert set(vm.said.read_text().splitlines()) == {"shutdown -h now"}


def test_a_file_that_is_gone_is_old(vm: Vm):
    vm.start(RAY_HEAD_IP="10.0.0.1")
    vm.file.unlink()
    until(vm.said.exists, 60, "a shutdown")


def test_a_second_start_makes_no_second_loop(vm: Vm):
    vm.start(RAY_HEAD_IP="10.0.0.1")
    until(vm.loops_alone, 60, "the loop")
    loop = vm.loops[0]
    vm.line = vm.line.replace("setsid --fork", "setsid --wait")
    with pytest.raises(subprocess.CalledProcessError):  # its `flock` has ended, with exit code 1
        vm.start(RAY_HEAD_IP="10.0.0.1")
    assert vm.loops == [loop]


@pytest.mark.slow
def test_the_head_stays_unless_its_user_leaves_out_the_condition(vm: Vm):
    vm.start()
    time.sleep(2)
    assert vm.loops == []
    vm.line = vm.line.removeprefix('test -z "$RAY_HEAD_IP" || ')
    vm.start()
    until(vm.said.exists, 60, "a shutdown")
