"""How a command ends: the exit statuses, and the last word on an error that nobody expected."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

import typer

OK: Final = 0
FAILED: Final = 1
"""A client command: the sidecar is not reachable, or said no."""
USAGE: Final = 64
INTERNAL: Final = 70
CONFIGURATION: Final = 78
INTERRUPTED: Final = 130


def leave(work: Callable[[], int], *, debug: bool) -> NoReturn:
    """Do the work and end the command with its status; an error that it lets out is INTERNAL."""
    try:
        status = work()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        forget_stdout()
        status = OK
    except Exception as error:  # noqa: BLE001 - the process ends with it
        internal(error, debug=debug)
        status = INTERNAL
    raise typer.Exit(status)


def internal(error: Exception, *, debug: bool) -> None:
    """Say that something of ours broke; where it did is for those who ask."""
    if debug:
        traceback.print_exception(error)
        return
    complain(f"internal error: {type(error).__name__}: {error} (--debug shows where)")


def complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - it is a command


def forget_stdout() -> None:
    """Nobody reads it any more: keep Python from saying so when it flushes at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
