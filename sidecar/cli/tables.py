"""Tables on standard output, as wide as the terminal; elsewhere nothing is folded or cut."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from sidecar.cli import exits

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.table import Table

_WIDE = 1000


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich.table import Table  # noqa: PLC0415 - rich, only when needed
    from rich.text import Text  # noqa: PLC0415

    made = Table(
        *heads,
        box=None,
        pad_edge=False,
        header_style="bold",
        padding=(0, 2, 0, 0),
        show_header=bool(heads),
    )
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def show_tables(*tables: Table) -> None:
    from rich.console import Console  # noqa: PLC0415

    terminal, text = exits.output().isatty(), io.StringIO()
    console = Console(
        file=text, force_terminal=terminal, width=None if terminal else _WIDE, highlight=False
    )
    for each in tables:
        console.print(each)
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    exits.write("".join(f"{line}\n" for line in lines).encode())
