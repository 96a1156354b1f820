"""A real S3 server on this machine, for trying things out; prints what a process needs to reach it."""

import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import tyro

from imgcls.errors import StorageError
from sandbox.s3.proxy import FAULTS, faulty
from sandbox.s3.server import serving


def serve(
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")],
    buckets: tuple[str, ...] = ("data", "runs"),
    faults: tuple[str, ...] = FAULTS,
    fail: float = 0.0,
    seed: int = 0,
) -> None:
    """Serve buckets from FOLDER until Ctrl-C.

    Args:
        folder: Where the objects lie; what was there before is served again.
        buckets: Made where they are not there.
        faults: Kinds of fault, as in sandbox/s3/proxy.py.
        fail: This share of the requests goes wrong, through a proxy before the server.
        seed: Of which ones.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        server = stack.enter_context(serving(folder, buckets=buckets))
        port = server.port
        if fail:
            port = stack.enter_context(faulty(server.host, server.port, faults=faults, fail=fail, seed=seed)).port
        for name, value in server.env(port=port).items():
            print(f"export {name}={value}", flush=True)
        signal.pause()


if __name__ == "__main__":
    try:
        tyro.cli(serve, prog="python -m sandbox.s3")
    except StorageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(0)
