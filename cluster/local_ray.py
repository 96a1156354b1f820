"""A local Ray without the processes that a command does not use: each delays the start, and polls as long as runs train.

No monitor of an autoscaler, no head of a dashboard, and no reader of logs unless they are shown. In place of the dashboard's
agent, for whose ports the raylet waits, a shell says that there are none, as the agent of a Ray without its extra `default`
does, and ends with the raylet. These are Ray's own seams in 2.60, `ray/_private/node.py` and `services.py`, none public.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

PORTS = "metrics_agent metrics_export dashboard_agent_listen"
NO_PORTS = f'for p in {PORTS}; do printf -- -1 >"$0/new_$p" && mv "$0/new_$p" "$0/${{p}}_port_$RAY_NODE_ID"; done; exec cat'
"""In the folder of Ray's session, where the raylet looks for whole files. An agent's input is a pipe that ends with it."""
WITH_RAYLET = 'exec 3<&0; (cat <&3; kill -9 $$) & exec "$@"'
"""By itself the other agent looks for the rest of Ray for a minute where a command was killed."""


@contextmanager
def lean(*, verbose: bool) -> Iterator[None]:
    """Inside, `ray.init` starts no more than that."""
    from ray._private import node, parameter, services

    python = services._build_python_executable_command_memory_profileable

    def program(component: str, session_dir: str, unbuffered: bool = True) -> list[str]:
        words = python(component, session_dir, unbuffered)
        agents = {"dashboard_agent": (NO_PORTS, session_dir), "runtime_env_agent": (WITH_RAYLET, "sh", *words)}
        return ["sh", "-c", *agents[component]] if component in agents else words

    with (
        patch.object(parameter, "RayParams", partial(parameter.RayParams, no_monitor=True, include_log_monitor=verbose)),  # pyright: ignore
        patch.object(node.Node, "start_api_server", lambda node, **options: None),
        patch.object(services, python.__name__, program),
    ):
        yield
