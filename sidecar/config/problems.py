"""What is wrong with a configuration: where, and in what words."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

from sidecar.config.values import clipped

KeyPath: TypeAlias = tuple[str | int, ...]


class Problem(NamedTuple):
    path: KeyPath
    text: str
    """What is wrong; what is accepted."""


class Variable(NamedTuple):
    name: str
    value: str


def dotted(path: KeyPath) -> str:
    """A key path as in TOML, with [0] for the first of an array."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{key_text(part)}" for part in path]
    return "".join(parts).removeprefix(".")


def key_text(key: str) -> str:
    return clipped(key) if _is_bare(key) else f'"{clipped(key)}"'


def _is_bare(key: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-]+", key) is not None


def first_part(path: KeyPath) -> str:
    return str(path[0]) if path else ""


def as_table(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def as_tables(value: object) -> list[dict[str, object]]:
    return [as_table(item) for item in value] if isinstance(value, list) else []


def did_you_mean(key: str, accepted: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, accepted, n=1)
    return f"did you mean {close[0]!r}? " if close else ""
