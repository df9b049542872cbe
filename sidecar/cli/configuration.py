"""The configuration as the command line names it: read it, or say all that is wrong with it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sidecar import config
from sidecar.cli.exits import complain

if TYPE_CHECKING:
    from pathlib import Path

    from sidecar.errors import ConfigInvalid


def load(path: Path | None) -> config.Config:
    """The configuration with its environment and default places. Raises ConfigInvalid."""
    environment = os.environ  # noqa: TID251 - the command line is where the environment enters
    return config.with_places(config.load(path, environment), environment)


def name_of(path: Path | None) -> str:
    return "the default configuration" if path is None else str(path)


def complain_of(error: ConfigInvalid, path: Path | None) -> None:
    """Each problem on a line of its own, under the name of the file."""
    complain(f"{name_of(path)} is not valid (SIDECAR_... variables included):")
    for problem in error.problems:
        complain("  " + problem.replace("\n", "\n    "))
