"""How a command ends: the exit statuses, and the last word on an error that nobody expected."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import BinaryIO, Final, NoReturn

import typer

OK: Final = 0
FAILED: Final = 1
"""A client command: the sidecar is not reachable, or said no."""
USAGE: Final = 64
INTERNAL: Final = 70
CONFIGURATION: Final = 78
INTERRUPTED: Final = 130


class OutputFailed(Exception):
    """What a command has to say cannot be written."""


def leave(work: Callable[[], int], *, debug: bool) -> NoReturn:
    """Do the work and end the command with its status; an error that it lets out is INTERNAL."""
    try:
        status = work()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        forget_stdout()
        status = OK
    except OutputFailed as error:
        complain(f"cannot write to standard output: {error}")
        forget_stdout()
        status = FAILED
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


def output() -> BinaryIO:
    """Standard output. Raises OutputFailed where the command was started without one."""
    if sys.stdout is None:
        raise OutputFailed("it is closed")
    return sys.stdout.buffer


def write(data: bytes) -> None:
    """To standard output, at once. Raises OutputFailed; BrokenPipeError when its reader has gone."""
    out = output()
    try:
        out.write(data)
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputFailed(error.strerror) from error


def say(line: str) -> None:
    """A line on standard output, as `write`."""
    write(line.encode(errors="surrogateescape") + b"\n")


def complain(line: str) -> None:
    if sys.stderr is not None:  # else print would take standard output
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - it is a command


def forget_stdout() -> None:
    """Nobody reads it any more: keep Python from saying so when it flushes at its end."""
    if sys.stdout is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
