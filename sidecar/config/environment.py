"""Settings from the environment: SIDECAR_<PATH>."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

from sidecar.config.problems import KeyPath, Problem, Variable, as_table

ENVIRONMENT_PREFIX = "SIDECAR_"


_OF_THE_COMMAND_LINE = {"SIDECAR_CONFIG", "SIDECAR_SOCKET"}
_SERVICE_LINK = re.compile(
    r"(\w+_)?(SERVICE_(HOST|PORT)\w*=|PORT\w*=(tcp|udp|sctp)://|PORT_\d+_(TCP|UDP|SCTP)_\w+=)"
)
"""Kubernetes puts these into every pod beside a Service called "sidecar" or "sidecar-…"."""


def lay_over(
    data: dict[str, Any], environment: Mapping[str, str]
) -> tuple[dict[KeyPath, Variable], list[Problem]]:
    """Set in *data* what the environment says; returns who said what, and what has no place."""
    overlay: dict[KeyPath, Variable] = {}
    problems = []
    for name, value in sorted(environment.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in _OF_THE_COMMAND_LINE:
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX)
        if "__" not in key and _SERVICE_LINK.match(f"{key}={value}"):
            continue
        path = _spelled_path(data, key.lower().split("__"))
        overlay[path] = Variable(name, value)
        if not put(data, path, _parsed(value)):
            problems.append(Problem(path, "is not in a table; set the array or value as a whole"))
    return overlay, problems


def _spelled_path(data: dict[str, Any], parts: list[str]) -> KeyPath:
    """As the file spells it: names of variables tell neither case nor, mostly, "-" from "_"."""
    path: list[str] = []
    table: dict[str, Any] = data
    for part in parts:
        plain = part.replace("-", "_")
        same = [key for key in table if key.lower().replace("-", "_") == plain]
        path.append(part if part in table or not same else same[0])
        table = as_table(table.get(path[-1]))
    return tuple(path)


def _parsed(value: str) -> object:
    try:
        document = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return value
    return document["value"] if len(document) == 1 else value


def put(data: dict[Any, Any], path: KeyPath, value: object) -> bool:
    for part in path[:-1]:
        inner = data.setdefault(part, {})
        if not isinstance(inner, dict):
            return False
        data = inner
    data[path[-1]] = value
    return True
