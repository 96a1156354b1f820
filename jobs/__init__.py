"""Doors, one file a command: parse, call one function, print, exit code."""

import os
import signal
import sys

INTERRUPTED = 130
GOES_ON = "\ninterrupted: the same command goes on where it stopped\n"


def end(signum: int, frame: object) -> None:
    """Ctrl-C while modules are imported, which takes seconds; `_door.enter` takes over from it."""
    os.write(2, GOES_ON.encode())
    os._exit(INTERRUPTED)


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # by `python -m jobs.NAME`
    signal.signal(signal.SIGINT, end)
