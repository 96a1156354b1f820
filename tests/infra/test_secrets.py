"""No secret stands in infra/: detect-secrets by its default settings, and long hex strings, which it misses in a command."""

import random
import re
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


def secrets(text: str, copy: Path) -> list[str]:
    """The lines that seem to hold one, in a file of this kind. Read as plain lines too: of YAML it reads the values only."""
    lines = [line for line in text.splitlines() if line.split(":")[0].strip(" -") not in NO_SECRETS]
    seen = [line for line in lines if re.search(r"(?<!sha256:)\b[0-9a-f]{32,}\b", line)]
    for file in (copy, copy.with_name("lines")):
        file.write_text("\n".join(lines))
        found = SecretsCollection()
        with default_settings():
            found.scan_file(str(file))
        seen += [lines[secret.line_number - 1] for _, secret in found]
    return seen


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(INFRA)))
def test_no_file_holds_a_secret(file: Path, tmp_path: Path):
    assert secrets(file.read_text(), tmp_path / file.name) == []


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("file", ONE_OF_EACH_KIND, ids=lambda file: file.suffix or file.name)
def test_a_secret_is_seen_in_every_kind_of_file(file: Path, kind: str, tmp_path: Path):
    assert PLANTED[kind] in secrets(f"{file.read_text()}\n{PLANTED[kind]}\n", tmp_path / file.name)
