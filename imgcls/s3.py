"""`s3://` by s3fs, set up once and for all: registered with fsspec, so that any `s3://` URL opens through it.

By itself s3fs keeps listings for ever, reads large objects in parallel parts whose losses nobody sees, tries again at
three levels whose product may be minutes, and waits without end for a server that accepts a PUT and does not answer.
Here an operation is one request; `storage` tries again. Endpoint and credentials come from the environment of each
process, by botocore's own chain, and are in no argument: a pickle of this holds no secret.
"""

import errno
import zlib
from base64 import b64encode
from typing import Any

from botocore.handlers import add_expect_header
from s3fs import S3FileSystem

CONNECT_S, SILENCE_S = 3, 10
"""Until a connection is there, and without a byte from the other side."""


class S3(S3FileSystem):
    retries = 1

    def __init__(self, **options: Any) -> None:
        once = {"mode": "standard", "total_max_attempts": 1}
        config = {"retries": once, "connect_timeout": CONNECT_S, "read_timeout": SILENCE_S}
        super().__init__(use_listings_cache=False, max_concurrency=1, config_kwargs=config, **options)

    async def set_session(self, *arguments: Any, **options: Any) -> Any:
        client = await super().set_session(*arguments, **options)
        # It makes the client wait for the server's leave to send a body, and for that there is no time limit.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        return client

    async def _pipe_file(self, path: str, data: bytes, *sizes: Any, mode: str = "overwrite", **options: Any) -> Any:
        """In one PUT, whatever the size: then the store keeps a checksum, and every GET compares it.

        The checksum is ours, in a header that a store may ignore. botocore's own, over TLS, would come behind the body in
        a form that stores beside AWS refuse: aws-chunked, without a length.
        """
        config = (await self.set_session()).meta.config
        if config.request_checksum_calculation != "when_required":
            options["ChecksumCRC32"] = b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
        try:
            return await super()._pipe_file(path, data, max(1, len(data)), 1, mode, **options)
        except OSError as error:
            # What s3fs makes of a 412 without a `Condition`, and of much else.
            answer = getattr(error.__cause__, "response", {})
            if error.errno == errno.EINVAL and answer.get("Error", {}).get("Code") == "PreconditionFailed":
                raise FileExistsError(errno.EEXIST, "exists already", path) from None
            raise
