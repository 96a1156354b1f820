"""What every VM of infra/ray/ runs for itself: the keeper in the container, and the loop outside it."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from tests.infra.site import filled

FOLDER = "/var/tmp/imgcls"
KEEPER = (
    f"setsid --fork flock --nonblock {FOLDER}/keeper sh -c 'while sleep 3; do python -m cluster.provide.keeper %s "
    f'--instance "$RAY_CLOUD_INSTANCE_ID" --file {FOLDER}/job; done\' '
    "< /dev/null >> /tmp/ray/session_latest/logs/keeper.log 2>&1"
)
LOOP = (
    f'test -z "$RAY_HEAD_IP" || setsid --fork flock --nonblock {FOLDER}/loop sh -c '
    f"'while sleep 60; do test -n \"$(find {FOLDER}/job -mmin -30)\" || sudo shutdown -h now; done' "
    "< /dev/null > /dev/null 2>&1"
)


def keeping_faults(config: Mapping[str, Any], cloud: str) -> Iterator[str]:
    """What is wrong with the two in a filled configuration of Ray's launcher."""
    for node in ("head", "worker"):
        *_, before, last = config[f"{node}_start_ray_commands"]
        if not before.startswith("ray start ") or last != KEEPER % cloud:
            yield f"no keeper on a {node}, after `ray start`"
    if config.get("initialization_commands", [])[:2] != [f"mkdir -p {FOLDER} && touch {FOLDER}/job", LOOP]:
        yield "no worker shuts itself down, whatever fails afterwards"
    if f"--volume={FOLDER}:{FOLDER}" not in config["docker"]["run_options"]:
        yield "the container does not reach the keeper's file"


def line_of(path: str, section: str, word: str, **changes: str) -> str:
    """The command with this word in a section of the rendered file; in it, `changes` of text."""
    (line,) = (command for command in yaml.safe_load(filled(path))[section] if word in command)
    for old, new in changes.items():
        assert old in line
        line = line.replace(old, new)
    return line
