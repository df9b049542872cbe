"""`sidecar run`: the daemon, from its configuration to its exit status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.cli import configuration, exits
from sidecar.errors import AddressUnavailable, ConfigInvalid, EmbeddedServerFailed

if TYPE_CHECKING:
    from pathlib import Path


def run(path: Path | None, *, debug: bool) -> int:
    try:
        config = configuration.load(path)
        debug = debug or config.log.level == "debug"
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
