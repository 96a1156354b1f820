"""One command at a run: a lease in the run's folder, renewed while the command lives.

<run>/leases/00001.json     written by its command alone; the command of the newest number holds the run

A new command that finds a lease watches it: renewed, it belongs to a living command, and the run is refused; else it has
lapsed, and is taken over by creating the next number, which succeeds for one command only. Nobody writes what another
one wrote, and clocks of two machines are never compared.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from imgcls import records, storage
from imgcls.errors import ImgclsError, LeaseError, StorageError
from imgcls.records import Record

T = TypeVar("T")

RENEW_S = 5.0
LAPSE_S = 30.0
"""A lease that was not renewed for so long is nobody's."""
GIVE_UP_S = 300.0
"""Storage that has not answered for so long ends the command."""


def when_answered(read: Callable[[], T]) -> T:
    """What `read` finds as soon as storage answers. Raises StorageError after `GIVE_UP_S`."""
    trying = Retrying(
        retry=retry_if_exception_type(StorageError), wait=wait_fixed(1), stop=stop_after_delay(GIVE_UP_S), reraise=True
    )
    return trying(read)


class Lease(Record):
    command: str
    host: str
    pid: int
    renewals: int
    released: bool = False
    """Nobody holds the run; the file stays, so that its number is not used again."""


class Leases:
    """The leases that a command holds. `lost`: runs that another command has taken over since."""

    def __init__(self, run_urls: dict[str, str], command: str, say: Callable[[str], None]) -> None:
        self.run_urls, self.command, self.say = run_urls, command, say
        self.lost: set[str] = set()
        self.numbers: dict[str, int] = {}
        """Of the leases that were taken, by run."""
        self._renewals = 0
        self._answered_s, self._error = time.monotonic(), ""

    def renew(self) -> None:
        """Each lease by itself: one that cannot be read or written leaves the others alone."""
        self._renewals += 1
        mine = [run for run in self.run_urls if run not in self.lost]
        with ThreadPoolExecutor(16) as pool:  # a request each takes its time
            errors = list(pool.map(lambda run: self._renew(run, self.run_urls[run]), mine))
        if errors and all(errors):
            if not self._error:
                self.say(f"storage: {errors[0]}; tried again for {GIVE_UP_S / 60:.0f} min")
            self._error = str(errors[0])
            return
        if self._error:
            self.say("storage answers again")
        self._answered_s, self._error = time.monotonic(), ""

    def _renew(self, run: str, run_url: str) -> ImgclsError | None:
        try:
            with storage.within(LAPSE_S / 3):
                if holder_of(run_url) == self.command:
                    records.write(_lease(self.command, self._renewals), _url(run_url, self.numbers[run]))
                else:
                    self.lost.add(run)
        except ImgclsError as error:
            return error
        return None

    def check_answered(self) -> None:
        """Raises StorageError where storage has not answered for too long."""
        if self._error and time.monotonic() - self._answered_s > GIVE_UP_S:
            raise StorageError(
                f"storage has not answered for {GIVE_UP_S / 60:.0f} min: {self._error}\n"
                "  do: when it does, give the same command again: it goes on from what is committed"
            )

    def take(self) -> None:
        """Raises LeaseError where another command is at one of the runs, or was quicker."""
        found = {run: _newest(run_url) for run, run_url in self.run_urls.items()}
        _watch({run: newest for run, newest in found.items() if newest is not None}, self.run_urls, self.say)
        for run, run_url in self.run_urls.items():
            now = _newest(run_url)
            number = 1 if now is None else now[0] + 1
            renewed = now is not None and now != found[run] and not now[1].released
            if renewed or not storage.create_bytes(_url(run_url, number), records.sealed(_lease(self.command, 0))):
                raise LeaseError(_taken(run, _newest(run_url)))
            self.numbers[run] = number
            for older in _numbers(run_url):
                if older < number:
                    storage.delete(_url(run_url, older))

    def release(self) -> None:
        with storage.within(LAPSE_S / 2):
            for run in self.numbers.keys() - self.lost:
                with suppress(ImgclsError):  # then it lapses
                    given_back = _lease(self.command, self._renewals).model_copy(update={"released": True})
                    records.write(given_back, _url(self.run_urls[run], self.numbers[run]))


@contextmanager
def leases(run_urls: dict[str, str], *, command: str, say: Callable[[str], None]) -> Iterator[Leases]:
    """The runs are this command's inside. Raises LeaseError where another command is at one of them."""
    held = Leases(run_urls, command, say)
    stop = threading.Event()

    def renewing() -> None:
        while not stop.wait(RENEW_S):
            held.renew()

    thread = threading.Thread(target=renewing, name="leases", daemon=True)
    try:
        held.take()
        thread.start()
        yield held
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()
        held.release()


def holder_of(run_url: str) -> str | None:
    """The command whose lease lies there, renewed or not, and was not given back."""
    newest = _newest(run_url)
    return newest[1].command if newest and not newest[1].released else None


def _newest(run_url: str) -> tuple[int, Lease] | None:
    for number in reversed(_numbers(run_url)):
        lease = records.read_if_there(Lease, _url(run_url, number))
        if lease is not None:
            return number, lease
    return None


def _watch(found: dict[str, tuple[int, Lease]], run_urls: dict[str, str], say: Callable[[str], None]) -> None:
    """Returns when all of these have lapsed. Raises LeaseError as soon as one is renewed."""
    watched = {run: newest for run, newest in found.items() if not _is_over(newest[1])}
    if watched:
        say(f"another command was at {', '.join(watched)}: waiting up to {LAPSE_S:.0f} s for it to answer or to lapse")
    until = time.monotonic() + LAPSE_S
    while watched and time.monotonic() < until:
        time.sleep(0.5)
        now = {run: _newest(run_urls[run]) for run in watched}
        for run, newest in now.items():
            if newest is not None and newest != watched[run] and not newest[1].released:
                raise LeaseError(_taken(run, newest))
        watched = {run: newest for run, newest in now.items() if newest is not None and not newest[1].released}


def _taken(run: str, by_whom: tuple[int, Lease] | None) -> str:
    by = f" (process {by_whom[1].pid} on {by_whom[1].host.partition('/')[0]})" if by_whom else ""
    return f"another command is at {run}{by}\n  do: wait until it is done, stop it, or take another --id"


def _is_over(lease: Lease) -> bool:
    """It was given back, or its process was on this machine, and is there no more."""
    if lease.released:
        return True
    if lease.host != _here() or lease.pid == os.getpid():
        return False
    try:
        os.kill(lease.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _lease(command: str, renewals: int) -> Lease:
    return Lease(command=command, host=_here(), pid=os.getpid(), renewals=renewals)


def _here() -> str:
    """This machine since it was started, and the process numbers that are seen here: a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _numbers(run_url: str) -> list[int]:
    names = [name.removesuffix(".json") for name in storage.files(storage.join(run_url, "leases"))]
    return [int(name) for name in names if name.isdigit()]


def _url(run_url: str, number: int) -> str:
    return storage.join(run_url, "leases", f"{number:05d}.json")
