"""Options that many commands have."""

from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an internal error.")]
Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        help="The sidecar's gRPC socket. Default: SIDECAR_SOCKET, else where `sidecar run` puts it.",
        show_default=False,
    ),
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="TCP instead of the socket."),
]
