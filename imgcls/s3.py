"""`s3://` by s3fs, configured in one place and registered with fsspec, so that any `s3://` URL opens through it.

s3fs alone never refreshes its listings, reads large objects in parallel parts without noticing a lost one, retries at
three levels whose product may be minutes, and waits without limit for a server that accepts a PUT and does not answer.
Here an operation is one request, and `storage` retries it. Endpoint and credentials come from the environment of each
process, by botocore's own chain, and are in no argument: a pickle of this class holds no secret.
"""

import errno
import ssl
import zlib
from base64 import b64encode
from traceback import extract_tb
from typing import Any

import aiohttp
from botocore import exceptions as boto
from botocore.handlers import add_expect_header
from botocore.parsers import ResponseParserError
from s3fs import S3FileSystem

from imgcls.storage import TransientError

BROKEN_CONNECTION = (ConnectionError, ssl.SSLError, boto.ConnectionError, boto.HTTPClientError)
BROKEN_TRANSFER = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ClientResponseError)
DAMAGED_ANSWER = (boto.IncompleteReadError, boto.ChecksumError, boto.FlexibleChecksumError, ResponseParserError)
TRANSIENT = (*BROKEN_CONNECTION, *BROKEN_TRANSFER, *DAMAGED_ANSWER, boto.CredentialRetrievalError)
"""The last one: the service that lends the credentials of a role failed."""
BROKEN_NETWORK = {errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EAGAIN}
OVERLOADED = {408, 425, 429, *range(500, 600)} - {501, 505, 507}
"""HTTP status of a server, or of a gateway before it, that is overloaded or broken for now."""
TRY_AGAIN = {
    *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"),
    *("ConditionalRequestConflict", "OperationAborted", "PriorRequestNotComplete"),
    *("Throttling", "ThrottlingException", "RequestThrottled", "RequestThrottledException", "RequestLimitExceeded"),
}
"""Other codes: the request was damaged on its way, met another one at the same object, or was one too many."""
ANSWERS = (OSError, boto.BotoCoreError, boto.ClientError, ResponseParserError, aiohttp.ClientError)
"""Failures that the network, the store or the configuration causes. An exception of another type is a fault in code."""


def is_transient(error: Exception) -> bool:
    """Another try may succeed. s3fs makes an OSError of S3's answer, which is its cause."""
    answer = error.__cause__ if isinstance(error.__cause__, boto.ClientError) else error
    if isinstance(answer, boto.ClientError):
        status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in OVERLOADED or answer.response["Error"].get("Code") in TRY_AGAIN
    return isinstance(error, TRANSIENT) or (isinstance(error, OSError) and error.errno in BROKEN_NETWORK)


class S3(S3FileSystem):
    retries = 1
    connect_timeout, read_timeout = 3, 10
    """Seconds for a connection, and of silence of the other side."""

    def __init__(self, **options: Any) -> None:
        once = {"retries": {"mode": "standard", "total_max_attempts": 1}}
        super().__init__(use_listings_cache=False, max_concurrency=1, config_kwargs=once, **options)

    async def attempt(self, operation: str, *arguments: Any, **options: Any) -> Any:
        """One operation of fsspec.

        Raises TransientError or TimeoutError for a transient failure, another OSError for any other of `ANSWERS`.
        """
        try:
            return await getattr(self, f"_{operation}")(*arguments, **options)
        except ANSWERS as error:
            # aiobotocore makes an HTTPClientError of any exception, also of a fault in code.
            reason = error.kwargs["error"] if type(error) is boto.HTTPClientError else error
            if is_transient(reason) or isinstance(reason, UnicodeDecodeError):  # a damaged header
                raise TransientError(getattr(error, "strerror", None) or str(error)) from error
            # ENOENT: a file that the configuration names. What s3fs raises for a missing object has no errno.
            stays = isinstance(error, OSError) and error.errno != errno.ENOENT
            if stays or not isinstance(reason, ANSWERS):
                raise
            raise OSError(errno.EINVAL, str(error)) from error
        except (ValueError, KeyError, TypeError, RuntimeError) as error:  # botocore has no kinds of its own for them
            damaged = any(place.filename.endswith("botocore/parsers.py") for place in extract_tb(error.__traceback__))
            if not damaged and "refreshed credentials are still expired" not in str(error):
                raise
            raise TransientError(f"{'the answer is damaged: ' * damaged}{error}") from error

    async def set_session(self, *arguments: Any, **options: Any) -> Any:
        try:
            client = await super().set_session(*arguments, **options)
        except ValueError as error:  # botocore's word for an endpoint that is no URL
            raise OSError(errno.EINVAL, str(error)) from None
        # It makes the client wait for the server's leave to send a body, and for that there is no time limit.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client

    async def _pipe_file(self, path: str, data: bytes, *sizes: Any, mode: str = "overwrite", **options: Any) -> Any:
        """In one PUT, whatever the size: then the store keeps a checksum, and every GET compares it.

        The checksum is ours, in a header that a store may ignore. Over TLS botocore sends its own behind the body in a
        form that stores other than AWS refuse: aws-chunked, without a length.
        """
        config = (await self.set_session()).meta.config
        if config.request_checksum_calculation != "when_required":
            options["ChecksumCRC32"] = b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
        try:
            return await super()._pipe_file(path, data, max(1, len(data)), 1, mode, **options)
        except OSError as error:
            # s3fs raises EINVAL for a 412 without a `Condition`, and for much else.
            answer = getattr(error.__cause__, "response", {})
            if error.errno == errno.ENOSYS and mode == "create":
                raise OSError(errno.ENOSYS, f"{error.strerror}: two commands could work on one run at once") from None
            if error.errno == errno.EINVAL and answer.get("Error", {}).get("Code") == "PreconditionFailed":
                raise FileExistsError(errno.EEXIST, "exists already", path) from None
            raise
