"""What every VM of infra/ray/ runs for itself: the keeper in the container, and the loop outside it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

FOLDER = "/var/tmp/imgcls"
KEEPER = re.compile(
    rf"setsid --fork flock --nonblock {FOLDER}/keeper sh -c 'while sleep 3; do python -m cluster\.provide\.keeper (aws|gcp) "
    rf"""--instance "\$RAY_CLOUD_INSTANCE_ID" --file {FOLDER}/job; done' < /dev/null >> /tmp/ray/session_latest/logs/keeper\.log 2>&1"""
)
LOOP = re.compile(
    rf"""test -z "\$RAY_HEAD_IP" \|\| setsid --fork flock --nonblock {FOLDER}/loop sh -c 'while sleep 60; do """
    rf"""test -n "\$\(find {FOLDER}/job -mmin -30\)" \|\| sudo shutdown -h now; done' < /dev/null > /dev/null 2>&1"""
)


def keeping_faults(config: Mapping[str, Any], cloud: str) -> Iterator[str]:
    """What is wrong with the two in a filled configuration of Ray's launcher."""
    for node in ("head", "worker"):
        started = [KEEPER.fullmatch(command) for command in config[f"{node}_start_ray_commands"]]
        if [match[1] for match in started if match] != [cloud] or started[-1] is None:
            yield f"no keeper on a {node}, after `ray start`"
    commands = config.get("initialization_commands", [])
    made = f"mkdir -p {FOLDER} && touch {FOLDER}/job"
    if made not in commands or not any(LOOP.fullmatch(command) for command in commands[commands.index(made) + 1 :]):
        yield "no worker shuts itself down"
    if f"--volume={FOLDER}:{FOLDER}" not in config["docker"]["run_options"]:
        yield "the container does not reach the keeper's file"
