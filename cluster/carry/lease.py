"""One command at a run: a lease in the run's folder (`imgcls.runs`), renewed while the command lives.

A new command that finds a lease watches it: renewed, it belongs to a living command, and the run is refused; else it has
lapsed, and is taken over by creating the next number, which succeeds for one command only. Nobody writes what another
one wrote, and clocks of two machines are never compared.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from imgcls import records, storage
from imgcls.errors import ImgclsError, LeaseError, StorageError
from imgcls.runs import Lease, RunFolder

RENEW_S = 5.0
LAPSE_S = 30.0
"""A lease that was not renewed for so long is nobody's."""
GIVE_UP_S = 300.0
"""Storage that has not answered for so long ends the command."""


when_answered = Retrying(
    retry=retry_if_exception_type(StorageError), wait=wait_fixed(1), stop=stop_after_delay(GIVE_UP_S), reraise=True
)
"""Calls a function with these arguments until storage answers it. Raises StorageError after `GIVE_UP_S`."""


class Leases:
    """The leases that a command holds. `lost`: runs that another command has taken over since."""

    def __init__(self, runs: Sequence[RunFolder], command: str, say: Callable[[str], None]) -> None:
        self.runs, self.command, self.say = {run.name: run for run in runs}, command, say
        self.lost: set[str] = set()
        self.numbers: dict[str, int] = {}
        """Of the leases that were taken, by run."""
        self._lease = Lease(command=command, host=_here(), pid=os.getpid(), renewals=0)
        self._answered_s, self._error = time.monotonic(), ""

    def renew(self) -> None:
        """Each lease by itself: one that cannot be read or written leaves the others alone."""
        self._lease = self._lease.model_copy(update={"renewals": self._lease.renewals + 1})
        mine = [run for name, run in self.runs.items() if name not in self.lost]
        with ThreadPoolExecutor(16) as pool:  # a request each takes its time
            renewals = [pool.submit(self._renew, run) for run in mine]
        errors = [renewal.exception() for renewal in renewals]  # the thread that renews does not end with one of them
        before, self._error = self._error, (str(errors[0]) or repr(errors[0])) if errors and all(errors) else ""
        if not self._error:
            self._answered_s = time.monotonic()
        if bool(self._error) != bool(before):
            trouble = f"storage: {self._error}; tried again for {GIVE_UP_S / 60:.0f} min"
            self.say(trouble if self._error else "storage answers again")

    def _renew(self, run: RunFolder) -> None:
        with storage.within(LAPSE_S / 3):
            if run.holder() == self.command:
                records.write(self._lease, run.lease_url(self.numbers[run.name]))
            else:
                self.lost.add(run.name)

    def check_answered(self) -> None:
        """Raises StorageError where storage has not answered for too long."""
        if self._error and time.monotonic() - self._answered_s > GIVE_UP_S:
            raise StorageError(
                f"storage has not answered for {GIVE_UP_S / 60:.0f} min: {self._error}\n"
                "  do: when it does, give the same command again: it goes on from what is committed"
            )

    def take(self) -> None:
        """Raises LeaseError where another command is at one of the runs, or was quicker."""
        before = {name: run.newest_lease() for name, run in self.runs.items()}
        self._wait_for(before)
        for name, run in self.runs.items():
            now = run.newest_lease()
            number = 1 if now is None else now[0] + 1
            renewed = now is not None and now != before[name] and not now[1].released
            if renewed or not storage.create_bytes(run.lease_url(number), records.sealed(self._lease)):
                raise LeaseError(_taken(run))
            self.numbers[name] = number
            for older in run.numbers("leases"):
                if older < number:
                    storage.delete(run.lease_url(older))

    def _wait_for(self, before: Mapping[str, tuple[int, Lease] | None]) -> None:
        """Returns when each of these has lapsed or was given back. Raises LeaseError as soon as one is renewed."""
        held = [name for name, lease in before.items() if lease is not None and not _is_over(lease[1])]
        if held:
            names = ", ".join(held)
            self.say(f"another command was at {names}: waiting up to {LAPSE_S:.0f} s for it to answer or to lapse")
        until = time.monotonic() + LAPSE_S
        while held and time.monotonic() < until:
            time.sleep(0.5)
            now = {name: self.runs[name].newest_lease() for name in held}
            held = [name for name, lease in now.items() if lease is not None and not lease[1].released]
            if renewed := [name for name in held if now[name] != before[name]]:
                raise LeaseError(_taken(self.runs[renewed[0]]))

    def release(self) -> None:
        released = self._lease.model_copy(update={"released": True})
        with storage.within(LAPSE_S / 2):
            for name in self.numbers.keys() - self.lost:
                with suppress(ImgclsError):  # then it lapses
                    records.write(released, self.runs[name].lease_url(self.numbers[name]))


@contextmanager
def leases(runs: Sequence[RunFolder], *, command: str, say: Callable[[str], None]) -> Iterator[Leases]:
    """The runs are this command's inside.

    Raises LeaseError where another command is at one of them, StorageError where storage has not answered for too long.
    """
    held = Leases(runs, command, say)
    try:
        held.take()
        with repeated(held.renew, every_s=RENEW_S):
            yield held
    except Exception:
        held.check_answered()  # where storage answers no more it is that, and not what others made of it
        raise
    finally:
        held.release()


@contextmanager
def repeated(call: Callable[[], None], *, every_s: float) -> Iterator[None]:
    """Inside, another thread makes this call again and again."""
    stop = threading.Event()

    def calling() -> None:
        while not stop.wait(every_s):
            call()

    thread = threading.Thread(target=calling, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _taken(run: RunFolder) -> str:
    newest = run.newest_lease()
    holder = f" (process {newest[1].pid} on {newest[1].host.partition('/')[0]})" if newest else ""
    return f"another command is at {run.name}{holder}\n  do: wait until it is done, stop it, or take another --id"


def _is_over(lease: Lease) -> bool:
    """It was given back, or its process was on this machine, and is there no more."""
    if lease.released or lease.host != _here():
        return lease.released
    try:
        os.kill(lease.pid, 0)
    except OSError as error:  # a process of another user may not be signalled, and is there
        return isinstance(error, ProcessLookupError)
    return False


def _here() -> str:
    """This machine since it was started, and the process numbers that are seen here: a container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()
