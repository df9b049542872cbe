"""The command `sidecar`."""

import sys


def main() -> None:
    """The entry point. Ends the process; see sidecar.cli.exits for what its status means."""
    from sidecar.cli import exits  # noqa: PLC0415 - `import sidecar.cli.…` stays cheap
    from sidecar.cli.commands import app  # noqa: PLC0415

    try:
        app(prog_name="sidecar")
    except SystemExit as ended:
        # The command line's parser says 2 for wrong usage; BSD's sysexits, and we, say 64.
        sys.exit(exits.USAGE if ended.code == 2 else ended.code)  # noqa: PLR2004
