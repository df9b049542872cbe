"""`sidecar run`: the daemon, from its configuration to its exit status."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sidecar.cli import configuration, exits
from sidecar.errors import AddressUnavailable, ConfigInvalid, EmbeddedServerFailed

if TYPE_CHECKING:
    from pathlib import Path


def run(path: Path | None, *, debug: bool) -> int:
    try:
        config = configuration.load(path)
        debug = debug or config.log.level == "debug"
        # Before gRPC is loaded: it would print its own words about a taken address, and take part
        # in the fork that starts the embedded server again.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # noqa: TID251 - gRPC reads nothing else
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # noqa: TID251
        from sidecar.app import serve  # noqa: PLC0415 - a wrong configuration is told without it

        return serve(config, announce=exits.complain)
    except ConfigInvalid as error:
        configuration.complain_of(error, path)
        return exits.CONFIGURATION
    except (AddressUnavailable, EmbeddedServerFailed) as error:
        exits.complain(f"cannot start: {error.message}")
        return exits.CONFIGURATION
    except Exception as error:  # noqa: BLE001 - the process ends with it
        exits.internal(error, debug=debug)
        return exits.INTERNAL
