"""A proxy that forwards HTTP requests to an S3 server, and spoils some of them.

Bytes pass unchanged, also the Host header, so that signatures stay valid. Whether request number n fails, and how, is a
function of (seed, n). The proxy receives a request whole before it forwards it: it is slow on purpose.

    500 503       an S3 error instead of the request
    reset         the connection is reset before anything happens
    reset-body    it is reset in the middle of the answer's body
    truncate      the body ends in its middle, in order, though its length was announced
    short         half of the body, and a length that agrees with it
    corrupt       one byte of the body is another
    stall         `stall_s` of silence before the answer
    lost          the server carried out the request; its answer is lost, the connection reset
    hang          no answer, as long as the client stays

It can also act as a store that `lacks` something: conditional puts (501), or bodies without a length (411).
"""

import asyncio
import random
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NoReturn

FAULTS = ("500", "503", "reset", "reset-body", "truncate", "short", "corrupt", "stall", "lost")
_OF_THE_BODY = ("reset-body", "truncate", "short", "corrupt")
_CODES = {
    "500": ("500 Internal Server Error", "InternalError", "injected"),
    "503": ("503 Slow Down", "SlowDown", "injected"),
    "501": ("501 Not Implemented", "NotImplemented", "A header you provided implies functionality that is not implemented"),
    "411": ("411 Length Required", "MissingContentLength", "You must provide the Content-Length HTTP header."),
}
_LACKS = {"501": rb"(?i)\r\nif-none-match:", "411": rb"(?i)\r\ntransfer-encoding:"}
"""Answer -> the header of a request that gets it."""


@dataclass(frozen=True, slots=True)
class Passed:
    """One request and what became of it."""

    at: float
    """By `time.time`, when it was answered or failed."""
    request: str
    """METHOD /path"""
    fault: str
    """Empty if the request was forwarded unchanged."""
    status: int


class _ClosedError(Exception):
    """The connection to the client is over."""


@dataclass
class Proxy:
    """faults, fail and match may be changed at any time."""

    target: tuple[str, int]
    faults: tuple[str, ...] = FAULTS
    fail: float = 0.0
    """The share of the requests that fail."""
    match: str = ""
    """Only requests whose `METHOD /path` matches this expression fail."""
    most: int | None = None
    """The number of requests that fail at most."""
    lacks: tuple[str, ...] = ()
    """501, 411 or both: the answer to each request that needs what the store lacks."""
    tls: ssl.SSLContext | None = None
    stall_s: float = 5.0
    seed: int = 0
    host: str = "127.0.0.1"
    """Where it listens."""
    port: int = 0
    passed: list[Passed] = field(default_factory=list)
    _number: int = 0

    @property
    def injected(self) -> list[Passed]:
        return [one for one in self.passed if one.fault]

    def _choose(self, request: str) -> str:
        self._number += 1
        by_number = random.Random(f"{self.seed}/{self._number}")
        if by_number.random() >= self.fail or not re.search(self.match, request):
            return ""
        if self.most is not None and len(self.injected) >= self.most:
            return ""
        return by_number.choice(self.faults)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = (_ClosedError, ConnectionError, asyncio.IncompleteReadError, TimeoutError, asyncio.CancelledError)
        with suppress(*ends):
            while True:
                await self._one(reader, writer)
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request = b" ".join(head.split(b" ", 2)[:2]).decode()
        lacked = [answer for answer in self.lacks if re.search(_LACKS[answer], head)]
        fault = lacked[0] if lacked else self._choose(request)
        if fault in ("reset", "hang"):
            self.passed.append(Passed(time.time(), request, fault, 0))
        if fault == "reset":
            _reset(writer)
        if fault == "hang":
            while await reader.read(1 << 16):
                pass
            raise _ClosedError
        body = await reader.readexactly(int(_header(head, "content-length") or 0))
        answer_head, answer = _error(fault) if fault in _CODES else await self._handed_on(head, body)
        if fault in _OF_THE_BODY and (not answer or not _header(answer_head, "content-length")):
            fault = ""
        if fault == "stall":
            await asyncio.sleep(self.stall_s)
        # Before the client can know of it.
        self.passed.append(Passed(time.time(), request, fault, int(answer_head.split(b" ", 2)[1])))
        await _give(writer, fault, answer_head, answer)
        if lacked:  # the body of no length is still to come
            raise _ClosedError

    async def _handed_on(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        upstream, to = await asyncio.open_connection(*self.target, limit=1 << 20)
        try:
            to.write(re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)[:-2] + b"Connection: close\r\n\r\n" + body)
            await to.drain()
            answer_head = await upstream.readuntil(b"\r\n\r\n")
            answer = b"" if head.startswith(b"HEAD ") else await upstream.read()
            return re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", answer_head), answer
        finally:
            to.close()


async def _give(writer: asyncio.StreamWriter, fault: str, head: bytes, body: bytes) -> None:
    half = len(body) // 2
    if fault == "lost":
        _reset(writer)
    if fault == "short":
        head, body = re.sub(rb"(?i)(\r\ncontent-length:)[^\r]*", rb"\1 %d" % half, head), body[:half]
    if fault == "corrupt":
        body = body[:half] + bytes([body[half] ^ 0x5A]) + body[half + 1 :]
    writer.write(head + (body[:half] if fault in ("reset-body", "truncate") else body))
    await writer.drain()
    if fault == "reset-body":
        await asyncio.sleep(0.05)
        _reset(writer)
    if fault == "truncate":
        raise _ClosedError


def _reset(writer: asyncio.StreamWriter) -> NoReturn:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    raise _ClosedError


def _header(head: bytes, name: str) -> str:
    found = re.search(rb"(?i)\r\n" + name.encode() + rb":\s*([^\r]*)", head)
    return found[1].decode() if found else ""


def _error(fault: str) -> tuple[bytes, bytes]:
    status, code, message = _CODES[fault]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode(), body


@contextmanager
def faulty(target: str, port: int, **options) -> Iterator[Proxy]:
    """A proxy in a thread of this process, listening on `proxy.port`. options: the fields of `Proxy`."""
    proxy, loop = Proxy((target, port), **options), asyncio.new_event_loop()
    listening = threading.Event()

    async def run() -> None:
        server = await asyncio.start_server(proxy.serve, proxy.host, 0, limit=1 << 20, ssl=proxy.tls)
        proxy.port = server.sockets[0].getsockname()[1]
        listening.set()
        with suppress(asyncio.CancelledError):
            await server.serve_forever()

    def end() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    listening.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(end)
        thread.join()
