"""What the client commands share: where the sidecar is, how a call ends, and what Ctrl-C does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sidecar.cli import exits
from sidecar.client import CallFailed, Sidecar, default_target

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

SOCKET_VARIABLE = "SIDECAR_SOCKET"


def target_of(socket: Path | None, address: str | None) -> str:
    """The client's target. Raises BadParameter."""
    if address is not None:
        if socket is not None:
            raise typer.BadParameter("use --socket or --address, not both")
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise typer.BadParameter(f"--address {address!r}: use HOST:PORT, as 127.0.0.1:7400")
        return address
    named = socket or os.environ.get(SOCKET_VARIABLE)  # noqa: TID251 - the environment enters here
    return f"unix:{Path(named).absolute()}" if named else default_target()


def call(target: str, work: Callable[[Sidecar], Awaitable[int]]) -> int:
    """Do *work* with a connection; a call that fails is one line and the status FAILED."""

    async def connected() -> int:
        async with Sidecar(target) as sidecar:
            return await work(sidecar)

    try:
        return asyncio.run(connected())
    except CallFailed as error:
        exits.complain(explain(error, target))
        return exits.FAILED


def explain(error: CallFailed, target: str) -> str:
    if error.code == "UNAVAILABLE" and not error.reason:
        return (
            f"no sidecar answers at {target.removeprefix('unix:')}{_why(target)}: start one with "
            "`sidecar run`, or say where it is with --socket, --address or SIDECAR_SOCKET"
        )
    wait = "" if error.retry_after is None else f" (try again in {error.retry_after:g} s)"
    return f"{error.reason or error.code}: {error.message}{wait}"


def _why(target: str) -> str:
    if not target.startswith("unix:"):
        return ""
    path = Path(target.removeprefix("unix:"))
    try:
        return " (the socket is there, but nobody listens)" if path.exists() else " (no such file)"
    except PermissionError:
        return " (permission denied)"


@contextlib.contextmanager
def ended_by_signals(end: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call *end*; a second one has its usual effect."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def restore() -> None:
        for number in signals:
            loop.remove_signal_handler(number)

    def handle() -> None:
        restore()
        end()

    for number in signals:
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        restore()
