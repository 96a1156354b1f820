"""No secret stands in infra/: detect-secrets by its default settings, and long hex strings, which it misses in a command."""

import random
import re
import shutil
from pathlib import Path

import pytest
from detect_secrets.core.secrets_collection import SecretsCollection
from detect_secrets.settings import default_settings

INFRA = Path(__file__).parents[2] / "infra"
FILES = [file for file in INFRA.rglob("*") if file.is_file() and file.suffix != ".pyc"]
ONE_OF_EACH_KIND = list({file.suffix or file.name: file for file in FILES}.values())
NO_SECRETS = {"secretName": "names a Secret of Kubernetes", "sourceImage": "names a public image"}
"""Keys whose values detect-secrets takes for secrets."""

rng = random.Random(1)  # the planted ones are made here, else this file would hold them
TOKEN = "".join(rng.choices("0123456789abcdef", k=64))
PLANTED = {
    "an AWS key": f"# aws_access_key_id: AKIA{''.join(rng.choices('ABCDEFGHIJKLMNOPQRSTUVWXYZ234567', k=16))}",
    "a password": f'# password: "{"".join(rng.choices("abcdefghijkmnpqrstuvwxyz23456789", k=20))}"',
    "a token": f"# auth_token: {TOKEN}",
    "a token in a command": f"# export RAY_AUTH_TOKEN={TOKEN} && ray start",
    "a private key": f"# {'-' * 5}BEGIN RSA PRIVATE KEY{'-' * 5}",
}


def secrets(file: Path) -> list[str]:
    """The lines that seem to hold one."""
    found = SecretsCollection()
    with default_settings():
        found.scan_file(str(file))
    lines = file.read_text().splitlines()
    seen = [lines[secret.line_number - 1] for _, secret in found]
    seen += [line for line in lines if re.search(r"(?<!sha256:)\b[0-9a-f]{32,}\b", line)]
    return [line for line in seen if line.split(":")[0].strip(" -") not in NO_SECRETS]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(INFRA)))
def test_no_file_holds_a_secret(file: Path):
    assert secrets(file) == []


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("file", ONE_OF_EACH_KIND, ids=lambda file: file.suffix or file.name)
def test_a_secret_is_seen_in_every_kind_of_file(file: Path, kind: str, tmp_path: Path):
    copy = Path(shutil.copy(file, tmp_path))
    copy.write_text(f"{copy.read_text()}\n{PLANTED[kind]}\n")
    assert PLANTED[kind] in secrets(copy)
