"""One command at a run: a lease in the run's folder, renewed while the command lives.

A new command that finds a lease watches it: renewed, it belongs to a living command, and the run is refused; else it has
lapsed, and is taken over. Clocks of two machines are never compared.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
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


class Leases:
    """The leases that a command holds. `lost`: runs that another command has taken over since."""

    def __init__(self, run_urls: dict[str, str], command: str, say: Callable[[str], None]) -> None:
        self.run_urls, self.command, self.say = run_urls, command, say
        self.lost: set[str] = set()
        self._renewals = 0
        self._answered_s, self._error = time.monotonic(), ""

    def renew(self) -> None:
        """Each lease by itself: one that cannot be read or written leaves the others alone."""
        self._renewals += 1
        errors = [self._renew(run, run_url) for run, run_url in self.run_urls.items() if run not in self.lost]
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
                    records.write(_lease(self.command, self._renewals), _url(run_url))
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

    def release(self) -> None:
        with storage.within(LAPSE_S / 2):
            for run_url in self.run_urls.values():
                with suppress(ImgclsError):  # then it lapses
                    if holder_of(run_url) == self.command:
                        storage.delete(_url(run_url))


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
        _take(run_urls, command, say)
        thread.start()
        yield held
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()
        held.release()


def holder_of(run_url: str) -> str | None:
    """The command whose lease lies there, renewed or not."""
    lease = records.read_if_there(Lease, _url(run_url))
    return lease.command if lease else None


def _take(run_urls: dict[str, str], command: str, say: Callable[[str], None]) -> None:
    mine = records.sealed(_lease(command, 0))
    found = {run: records.read_if_there(Lease, _url(run_url)) for run, run_url in run_urls.items()}
    _watch({run: lease for run, lease in found.items() if lease is not None}, run_urls, say)
    for run, run_url in run_urls.items():
        if found[run] is not None:
            now = records.read_if_there(Lease, _url(run_url))
            if now not in (None, found[run]):  # another one was quicker
                raise LeaseError(_taken(run, now))
            storage.delete(_url(run_url))
        if not storage.create_bytes(_url(run_url), mine):
            raise LeaseError(_taken(run, records.read_if_there(Lease, _url(run_url))))


def _watch(found: dict[str, Lease], run_urls: dict[str, str], say: Callable[[str], None]) -> None:
    """Returns when all of these have lapsed. Raises LeaseError as soon as one is renewed."""
    watched = {run: lease for run, lease in found.items() if not _is_dead(lease)}
    if watched:
        say(f"another command was at {', '.join(watched)}: waiting up to {LAPSE_S:.0f} s for it to answer or to lapse")
    until = time.monotonic() + LAPSE_S
    while watched and time.monotonic() < until:
        time.sleep(0.5)
        now = {run: records.read_if_there(Lease, _url(run_urls[run])) for run in watched}
        for run, lease in now.items():
            if lease is not None and lease != watched[run]:
                raise LeaseError(_taken(run, lease))
        watched = {run: lease for run, lease in now.items() if lease is not None}


def _taken(run: str, lease: Lease | None) -> str:
    by = f" (process {lease.pid} on {lease.host.partition('/')[0]})" if lease else ""
    return f"another command is at {run}{by}\n  do: wait until it is done, stop it, or take another --id"


def _is_dead(lease: Lease) -> bool:
    """Its process was on this machine, and is there no more."""
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
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _url(run_url: str) -> str:
    return storage.join(run_url, "lease.json")
