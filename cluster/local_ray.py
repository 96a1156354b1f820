"""A local Ray without the processes that a command does not use: each delays the start, and polls as long as runs train.

No monitor of an autoscaler, no head of a dashboard, and no reader of logs unless they are shown. In place of the dashboard's
agent, for whose ports the raylet waits, a shell says that there are none, as the agent of a Ray without its extra `default`
does, and ends with the raylet. These are Ray's own seams in 2.60, `ray/_private/node.py` and `services.py`, none public.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

AGENT = (
    "for port in metrics_agent_port metrics_export_port dashboard_agent_listen_port; do "
    'printf -- -1 >"$0/${port}_$RAY_NODE_ID"; done; exec cat'
)
"""Its first word is the folder of Ray's session; its standard input is a pipe that ends with the raylet."""


@contextmanager
def lean(*, verbose: bool) -> Iterator[None]:
    """Inside, `ray.init` starts no more than that."""
    from ray._private import node, parameter, ray_constants, services

    python = services._build_python_executable_command_memory_profileable

    def program(component: str, session_dir: str, unbuffered: bool = True) -> list[str]:
        is_agent = component == ray_constants.PROCESS_TYPE_DASHBOARD_AGENT
        return ["sh", "-c", AGENT, session_dir] if is_agent else python(component, session_dir, unbuffered)

    fewer = partial(parameter.RayParams, no_monitor=True, include_log_monitor=verbose)  # pyright: ignore
    with (
        patch.object(parameter, "RayParams", fewer),
        patch.object(node.Node, "start_api_server", lambda node, **options: None),
        patch.object(services, python.__name__, program),
    ):
        yield
