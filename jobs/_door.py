"""What every door shares: reading the command line, exit codes, and errors without a traceback."""

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import tyro
from tyro.extras import subcommand_cli_from_dict

from imgcls.errors import ImgclsError, PlacementError, RecipeError
from jobs import GOES_ON, INTERRUPTED, end

DONE, SOME_FAILED, WRONG_COMMAND, MISSING_OR_BROKEN = 0, 1, 2, 3


def enter(command: Callable[..., int] | Mapping[str, Callable[..., int]]) -> None:
    """Runs `command`, or the one of several that the first argument names, with the arguments; exits with its code.

    An ImgclsError is printed as it is; Ctrl-C and SIGTERM end with how to go on.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale may lack a class's letters
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if signal.getsignal(signal.SIGINT) is end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        prog, config = f"python -m jobs.{Path(sys.argv[0]).stem}", (tyro.conf.FlagCreatePairsOff,)
        if isinstance(command, Mapping):
            words, about = [word for word in sys.argv[1:] if word != "--verbose"], "--verbose: tracebacks too."
            code = subcommand_cli_from_dict(dict(command), prog=prog, description=about, args=words, config=config)
        else:
            code = tyro.cli(command, prog=prog, config=config)
    except ImgclsError as error:
        print(f"error: {error}", file=sys.stderr)
        if "--verbose" in sys.argv:
            traceback.print_exc()
        code = WRONG_COMMAND if isinstance(error, RecipeError | PlacementError) else MISSING_OR_BROKEN
    except KeyboardInterrupt:
        sys.stderr.write(GOES_ON)
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output, as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    sys.exit(code)
