"""What a person can do about an error of object storage."""

import re

REMEDIES = {
    "certificate verify failed": "AWS_CA_BUNDLE: a file with the certificate of the authority that signed the store's own",
    "Could not connect|no answer within|timeout on|Invalid endpoint|SSL validation": "the endpoint is wrong, down or closed "
    "to this node: look at AWS_ENDPOINT_URL (unset for AWS), its port, http or https, security groups",
    "two commands|if-none-match": "a store with conditional puts (If-None-Match), as AWS, MinIO, Ceph and SeaweedFS have, "
    "or a folder",
    "content-?length|content-sha256|x-amz-.*(checksum|trailer)|not implemented": "the store does not read today's "
    "checksums: AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    "access key id you provided|InvalidAccessKeyId": "the store knows no such key: look at AWS_ACCESS_KEY_ID, and whether "
    "AWS_ENDPOINT_URL is the store that gave it",
    "signature": "the secret does not belong to the key: give AWS_SECRET_ACCESS_KEY again",
    "token.*(expired|invalid)": "log in again; AWS_SESSION_TOKEN is a part of the credentials",
    "Unable to locate credentials": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials, or a role of the node",
    "time is too large": "set this node's clock: chrony, or another NTP client",
    "bucket does not exist": "make the bucket, or name one that exists",
    "specified endpoint": "the bucket is in another region: AWS_DEFAULT_REGION",
    "cannot be (written|deleted): .*(access denied|forbidden|not authorized)": "the credential may only read: it needs "
    "s3:PutObject, s3:GetObject and s3:DeleteObject here",
    "access denied|forbidden|not authorized": "the credential may not list here: it needs s3:ListBucket and s3:GetObject",
}
"""Pattern in a store's message (case is ignored) -> remedy. The first match counts."""


def remedy_for(error: str, otherwise: str = "") -> str:
    """The remedy that the error itself names, else that of the first pattern in `REMEDIES` that matches it."""
    message, _, own = error.partition("\n  do: ")
    matches = (remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, message, re.IGNORECASE))
    return own or next(matches, otherwise)
