"""Read a configuration, check it, and say all that is wrong at once."""

from __future__ import annotations

import datetime as dt
import os
import re
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import (
    ValidationError,
)

from sidecar.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails
from sidecar.config.agreement import cross_checks
from sidecar.config.environment import lay_over, put
from sidecar.config.problems import (
    KeyPath,
    Problem,
    Variable,
    as_table,
    did_you_mean,
    dotted,
    first_part,
)
from sidecar.config.tables import (
    BROKER_TYPES,
    EMBEDDED_BROKER,
    Config,
    JetStream,
    Route,
    Settings,
    Subscription,
)
from sidecar.config.values import EPOCH, listed, moment_of, socket_path


def load(path: Path | None, environment: Mapping[str, str]) -> Config:
    """
    Read *path* (None: nothing but defaults), lay the environment over it, check everything.

    SIDECAR_<PATH> sets a key, with "__" between the parts: SIDECAR_GRPC__ADDRESS. The value is
    TOML, or a bare string; an array is set as a whole. Raises ConfigInvalid with every problem.
    """
    data = {} if path is None else _read(path)
    overlay, problems = lay_over(data, environment)
    return _checked(data, overlay, problems)


def check(data: dict[str, Any]) -> Config:
    """Validate a parsed configuration. Raises ConfigInvalid with every problem at once."""
    return _checked(data, {}, [])


def check_subscription(described: dict[str, object]) -> Subscription:
    """A subscription that an app describes, checked like a declared one. Raises ConfigInvalid."""
    try:
        return Subscription.model_validate(described)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
    raise ConfigInvalid([_line(_problem(item, Subscription), described, {}) for item in wrong])


def start_time_ns(start: str) -> int | None:
    """The time of a `start` that is one, in ns since 1970."""
    if start in {"earliest", "latest"}:
        return None
    return (moment_of(start) - EPOCH) // dt.timedelta(microseconds=1) * 1000


def default_socket_dir(environment: Mapping[str, str]) -> Path:
    """Where the sockets are unless named: the user's runtime directory, or a private temporary one."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "sidecar"
    return Path(tempfile.gettempdir()) / f"sidecar-{os.getuid()}"


def default_data_dir(environment: Mapping[str, str]) -> Path:
    state = environment.get("XDG_STATE_HOME")
    base = Path(state) if state else Path(environment.get("HOME", "/")) / ".local" / "state"
    return base / "sidecar"


def with_places(config: Config, environment: Mapping[str, str]) -> Config:
    """
    The configuration with the default sockets and data directory filled in.

    Raises ConfigInvalid when a default socket's path is longer than the system takes.
    """
    sockets = default_socket_dir(environment)
    places = {
        "grpc": config.grpc.unix_socket or str(sockets / "grpc.sock"),
        "http": config.http.unix_socket or str(sockets / "http.sock"),
    }
    problems = []
    for door, path in places.items():
        try:
            socket_path(path)
        except ValueError as error:
            problems.append(f"{door}.unix_socket: {error}")
    if problems:
        raise ConfigInvalid(problems)
    data_dir = config.embedded.data_dir or str(default_data_dir(environment))
    return config.model_copy(
        update={
            "grpc": config.grpc.model_copy(update={"unix_socket": places["grpc"]}),
            "http": config.http.model_copy(update={"unix_socket": places["http"]}),
            "embedded": config.embedded.model_copy(update={"data_dir": data_dir}),
        }
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid([f"cannot read {path}: {error.strerror}"]) from error
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, numbers and depths without end
        raise ConfigInvalid([f"{path} is not TOML: {error}"]) from None


def _checked(
    data: dict[str, Any], overlay: Mapping[KeyPath, Variable], problems: list[Problem]
) -> Config:
    config, wrong = _validate(data, overlay)
    problems = [*problems, *wrong, *cross_checks(data)]
    if config is None or problems:
        tables = list(Config.model_fields)
        problems.sort(key=lambda p: tables.index(t) if (t := first_part(p.path)) in tables else -1)
        raise ConfigInvalid([_line(problem, data, overlay) for problem in problems])
    return _with_defaults(config)


def _validate(
    data: dict[str, Any], overlay: Mapping[KeyPath, Variable]
) -> tuple[Config | None, list[Problem]]:
    try:
        return Config.model_validate(data), []
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
    not_text = [_key_path(item["loc"]) for item in wrong if item["type"] == "string_type"]
    spelled = [path for path in not_text if path in overlay]
    if not spelled:
        return None, [_problem(item) for item in wrong]
    for path in spelled:  # a variable whose text looks like a number, a date, …: it was text
        put(data, path, overlay[path].value)
    return _validate(data, overlay)


def _with_defaults(config: Config) -> Config:
    """No brokers: the embedded one. No routes and one broker: everything goes there."""
    if not config.brokers:
        embedded = JetStream(type="jetstream", embedded=True, auto_create_streams=True)
        config = config.model_copy(update={"brokers": {EMBEDDED_BROKER: embedded}})
    if not config.routes and len(config.brokers) == 1:
        everything = Route(topic=">", broker=next(iter(config.brokers)))
        config = config.model_copy(update={"routes": [everything]})
    return config


def _line(problem: Problem, data: object, overlay: Mapping[KeyPath, Variable]) -> str:
    path, text = problem
    line = f"{dotted(path)}: {text}" if path else text
    # Above or below: SIDECAR_GPRC__ADDRESS sets gprc.address, and gprc is what is unknown.
    there = _existing(data, path)
    sources = [v.name for set_, v in overlay.items() if set_[: len(there)] == there[: len(set_)]]
    return f"{line} (see {listed(sources)})" if there and sources else line


def _existing(data: object, path: KeyPath) -> KeyPath:
    """The part of *path* that is there: of a key that is missing, the table that misses it."""
    for i, part in enumerate(path):
        items = enumerate(data) if isinstance(data, list) else as_table(data).items()
        inside: dict[object, object] = dict(items)
        if part not in inside:
            return path[:i]
        data = inside[part]
    return path


_TEXTS = {
    "missing": "is missing; it has no default",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": 'must be a string, as "text"',
    "string_unicode": "must be valid Unicode",
    "bool_type": "must be true or false",
    "list_type": "must be an array, as [1, 2]",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
}


def _problem(item: ErrorDetails, root: type[Settings] = Config) -> Problem:
    kind, path, context = item["type"], _key_path(item["loc"]), item.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(path, _unknown_key(item["loc"], root))
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        return Problem((*path, "type"), f"must be one of {listed(map(repr, BROKER_TYPES))}")
    if kind == "literal_error":
        return Problem(path, f"must be {context['expected']}")
    if kind == "value_error":
        return Problem(path, str(context["error"]))
    text = re.sub("^(Input|List) should", "must", item["msg"]).replace(" after validation", "")
    return Problem(path, _TEXTS.get(kind) or text)


def _key_path(loc: KeyPath) -> KeyPath:
    """Where it is in the file: pydantic puts the broker's type, or "[key]", behind its name."""
    return (*loc[:2], *loc[3:]) if loc[:1] == ("brokers",) else loc


def _unknown_key(loc: KeyPath, root: type[Settings]) -> str:
    fields = _table_at(loc[:-1], root).model_fields
    accepted = [field.alias or name for name, field in fields.items()]
    return f"unknown key; {did_you_mean(str(loc[-1]), accepted)}accepted here: {listed(accepted)}"


def _table_at(loc: KeyPath, table: type[Settings]) -> type[Settings]:
    if loc[:1] == ("brokers",):
        table, loc = BROKER_TYPES[loc[2]], loc[3:]
    for part in loc:
        if isinstance(part, str):
            table = _table_of(_field(table, part).annotation) or table
    return table


def _field(table: type[Settings], key: str) -> FieldInfo:
    """*key* as in the file, which may be a word of Python's, as "not"."""
    return table.model_fields.get(key) or table.model_fields[f"{key}_"]


def _table_of(annotation: object) -> type[Settings] | None:
    """The table that is a key's value, an array of which it is, or that may be left out."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((t for inner in get_args(annotation) if (t := _table_of(inner))), None)
