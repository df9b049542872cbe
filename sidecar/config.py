"""Every setting, in the order of config.example.toml: read, check, and say all that is wrong at once."""

from __future__ import annotations

import datetime
import ipaddress
import os
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from sidecar.errors import ConfigInvalid, InvalidTopic
from sidecar.event import check_pattern, check_topic

ENVIRONMENT_PREFIX = "SIDECAR_"
MIB = 1024 * 1024


def _name(value: str) -> str:
    if not value or not all(c.isalnum() or c in "-_" for c in value) or not value.isascii():
        raise ValueError('use letters, digits, "-" and "_"')
    return value


def _pattern(value: str) -> str:
    try:
        check_pattern(value)
    except InvalidTopic as error:
        raise ValueError(error.message) from None
    return value


def _dead_letter_topic(value: str) -> str:
    try:
        check_topic(value.replace("{topic}", "topic"))
    except InvalidTopic as error:
        raise ValueError(f'{error.message}; "{{topic}}" stands for the event\'s topic') from None
    return value


def _address(value: str) -> str:
    if value:
        split_address(value)
    return value


def _start(value: str) -> str:
    if value not in {"earliest", "latest"}:
        try:
            parsed = datetime.datetime.fromisoformat(value)
        except ValueError:
            parsed = None
        if parsed is None or parsed.tzinfo is None:
            raise ValueError('use "earliest", "latest" or a time as "2026-01-31T12:00:00Z"')
    return value


Name = Annotated[str, AfterValidator(_name)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Address = Annotated[str, AfterValidator(_address)]
Seconds = Annotated[float, Field(gt=0, le=365 * 86400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Bytes = Annotated[int, Field(ge=1024, le=2**40)]


class Settings(BaseModel):
    """A table of the configuration: unknown keys and wrong types are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class App(Settings):
    name: Name = "app"


class Grpc(Settings):
    address: Address = "127.0.0.1:7400"
    unix_socket: str = ""


class Http(Settings):
    address: Address = ""
    unix_socket: str = ""


class Admin(Settings):
    address: Address = "127.0.0.1:7402"


class Log(Settings):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class Limits(Settings):
    max_event_bytes: Annotated[int, Field(ge=1024, le=512 * MIB)] = MIB
    max_batch_events: Count = 10_000
    max_batch_bytes: Annotated[int, Field(ge=1024, le=1024 * MIB)] = 16 * MIB
    max_streams: Count = 1000
    open_timeout_seconds: Seconds = 10

    @model_validator(mode="after")
    def _batch_holds_an_event(self) -> Self:
        if self.max_batch_bytes < self.max_event_bytes:
            raise ValueError("max_batch_bytes is less than max_event_bytes: no such event fits")
        return self


class Publishing(Settings):
    timeout_seconds: Seconds = 10
    max_pending_events: Count = 20_000
    max_pending_bytes: Bytes = 32 * MIB
    full_wait_seconds: Annotated[float, Field(ge=0, le=3600)] = 1


class Drain(Settings):
    timeout_seconds: Seconds = 25


class Embedded(Settings):
    data_dir: str = ""
    binary: str = ""
    start_timeout_seconds: Seconds = 10


class TopicDefaults(Settings):
    topic: Pattern
    event_type: str = ""
    source: str = ""
    content_type: str = ""


class Memory(Settings):
    type: Literal["memory"]
    max_events: Count = 100_000
    max_bytes: Bytes = 64 * MIB
    duplicate_window_seconds: Seconds = 120


class NatsConnection(Settings):
    """What both NATS drivers need to connect."""

    servers: Annotated[list[str], Field(max_length=100)] = []
    embedded: bool = False
    user: str = ""
    password: SecretStr = SecretStr("")
    password_file: str = ""
    token: SecretStr = SecretStr("")
    token_file: str = ""
    connect_timeout_seconds: Seconds = 2
    reconnect_seconds: Seconds = 2
    ping_seconds: Seconds = 20
    content_mode: Literal["binary", "structured"] = "binary"

    @field_validator("servers")
    @classmethod
    def _server_urls(cls, servers: list[str]) -> list[str]:
        for server in servers:
            scheme, found, rest = server.partition("://")
            if not found or scheme not in {"nats", "tls"} or not rest:
                raise ValueError('a server looks like "nats://host:4222"')
        return servers

    @model_validator(mode="after")
    def _somewhere_to_connect(self) -> Self:
        if self.embedded and self.servers:
            raise ValueError("embedded = true brings its own server: leave out servers")
        if not self.embedded and not self.servers:
            raise ValueError('name servers, as ["nats://host:4222"], or set embedded = true')
        return self

    def secret(self, field: Literal["password", "token"]) -> str:
        """The secret's value, from the configuration or its file. Raises ConfigInvalid."""
        path = getattr(self, f"{field}_file")
        if path:
            try:
                return Path(path).read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ConfigInvalid([f"{field}_file: cannot read {path}: {error.strerror}"]) from error
        value: SecretStr = getattr(self, field)
        return value.get_secret_value()


class Nats(NatsConnection):
    type: Literal["nats"]
    max_waiting_events: Count = 10_000


class Stream(Settings):
    name: Name
    subjects: Annotated[list[Pattern], Field(min_length=1)]
    storage: Literal["file", "memory"] = "file"
    retention: Literal["limits", "interest", "workqueue"] = "limits"
    max_age_seconds: Annotated[float, Field(ge=0)] = 0
    max_bytes: Annotated[int, Field(ge=-1)] = -1
    max_events: Annotated[int, Field(ge=-1)] = -1
    replicas: Annotated[int, Field(ge=1, le=5)] = 1
    duplicate_window_seconds: Seconds = 120


class JetStream(NatsConnection):
    type: Literal["jetstream"]
    auto_create_streams: bool = False
    streams: list[Stream] = []
    ack_wait_seconds: Annotated[float, Field(ge=1, le=86400)] = 30


BrokerSettings = Annotated[Memory | Nats | JetStream, Field(discriminator="type")]


class Route(Settings):
    topic: Pattern | None = None
    event_type: Pattern | None = None
    broker: str

    @model_validator(mode="after")
    def _matches_something(self) -> Self:
        if self.topic is None and self.event_type is None:
            raise ValueError('say what it matches: topic or event_type, as topic = ">"')
        return self


class Retry(Settings):
    max_attempts: Annotated[int, Field(ge=1, le=1000)] = 5
    initial_seconds: Annotated[float, Field(ge=0, le=86400)] = 0.2
    max_seconds: Annotated[float, Field(ge=0, le=86400)] = 30
    multiplier: Annotated[float, Field(ge=1, le=100)] = 2
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.2
    total_seconds: Annotated[float, Field(ge=0)] = 0


class DeadLetter(Settings):
    topic: Annotated[str, AfterValidator(_dead_letter_topic)] | None = None
    broker: str | None = None


class Subscription(Settings):
    name: Name
    topic: Pattern
    broker: str | None = None
    ordering: Literal["key", "none"] = "key"
    max_in_flight: Annotated[int, Field(ge=1, le=100_000)] = 256
    lease_seconds: Annotated[float, Field(ge=0.1, le=86400)] = 30
    start: Annotated[str, AfterValidator(_start)] = "earliest"
    event_types: list[Pattern] = []
    retry: Retry = Retry()
    dead_letter: DeadLetter = DeadLetter()


class Config(Settings):
    """The whole configuration, checked. Broker names, routes and subscriptions agree."""

    app: App = App()
    grpc: Grpc = Grpc()
    http: Http = Http()
    admin: Admin = Admin()
    log: Log = Log()
    limits: Limits = Limits()
    publishing: Publishing = Publishing()
    drain: Drain = Drain()
    embedded: Embedded = Embedded()
    topics: list[TopicDefaults] = []
    brokers: dict[Name, BrokerSettings] = {}
    routes: list[Route] = []
    subscriptions: list[Subscription] = []

    @property
    def needs_embedded_server(self) -> bool:
        return any(isinstance(b, NatsConnection) and b.embedded for b in self.brokers.values())


EMBEDDED_BROKER = "embedded"
"""The name of the broker that is there when the configuration names none."""


def load(path: Path | None, environment: Mapping[str, str]) -> Config:
    """
    Read *path* (None: nothing but defaults), lay the environment over it, check everything.

    SIDECAR_<PATH> sets a key, with "__" between the parts: SIDECAR_GRPC__ADDRESS. The value is
    TOML, or a bare string. Raises ConfigInvalid with every problem at once.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigInvalid([f"cannot read {path}: {error.strerror}"]) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigInvalid([f"{path} is not TOML: {error}"]) from error
    raw = _lay_over(data, environment)
    return check(data, raw)


def check(data: dict[str, Any], raw: Mapping[tuple[str, ...], str] | None = None) -> Config:
    """
    Validate a parsed configuration. Raises ConfigInvalid with every problem at once.

    *raw* holds environment values as they were written: a secret that looks like a number is tried
    again as a string.
    """
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        again = [
            path for path in map(_path, _string_expected(error)) if raw is not None and path in raw
        ]
        if raw is not None and again:
            for found in again:
                _put(data, found, raw[found])
            return check(data, {k: v for k, v in raw.items() if k not in again})
        raise ConfigInvalid(sorted(_problems(error))) from None
    config = _with_defaults(config)
    problems = [*_cross_checks(config)]
    if problems:
        raise ConfigInvalid(problems)
    return config


def start_time_ns(start: str) -> int | None:
    """The time of a `start` that is one, in ns since 1970."""
    if start in {"earliest", "latest"}:
        return None
    moment = datetime.datetime.fromisoformat(start)
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (moment - epoch) // datetime.timedelta(microseconds=1) * 1000


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" as a pair; brackets around an IPv6 host are taken off. Raises ValueError."""
    host, found, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not found or not host or not port.isdigit() or int(port) > 65535:  # noqa: PLR2004
        raise ValueError('an address looks like "127.0.0.1:7400"; "" turns it off')
    return host, int(port)


def is_loopback(address: str) -> bool:
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
    """The configuration with the default sockets and data directory filled in."""
    sockets = default_socket_dir(environment)
    data_dir = config.embedded.data_dir or str(default_data_dir(environment))
    return config.model_copy(
        update={
            "grpc": config.grpc.model_copy(
                update={"unix_socket": config.grpc.unix_socket or str(sockets / "grpc.sock")}
            ),
            "http": config.http.model_copy(
                update={"unix_socket": config.http.unix_socket or str(sockets / "http.sock")}
            ),
            "embedded": config.embedded.model_copy(update={"data_dir": data_dir}),
        }
    )


def _with_defaults(config: Config) -> Config:
    """No brokers: the embedded one. No routes and one broker: everything goes there."""
    if not config.brokers:
        embedded = JetStream(type="jetstream", embedded=True, auto_create_streams=True)
        config = config.model_copy(update={"brokers": {EMBEDDED_BROKER: embedded}})
    if not config.routes and len(config.brokers) == 1:
        everything = Route(topic=">", broker=next(iter(config.brokers)))
        config = config.model_copy(update={"routes": [everything]})
    return config


def _cross_checks(config: Config) -> list[str]:
    """What no single table can know."""
    problems = []
    names = ", ".join(config.brokers)
    if not config.routes:
        problems.append(f'routes: name the broker of each topic, as topic = ">" (brokers: {names})')
    for i, route in enumerate(config.routes):
        if route.broker not in config.brokers:
            problems.append(f"routes[{i}].broker: no broker {route.broker!r} (there are: {names})")
    seen: dict[str, int] = {}
    for i, subscription in enumerate(config.subscriptions):
        path = f"subscriptions[{i}]"
        if subscription.name in seen:
            first = seen[subscription.name]
            problems.append(f"{path}.name: {subscription.name!r} is subscriptions[{first}] already")
        seen.setdefault(subscription.name, i)
        for key, broker in (
            ("broker", subscription.broker),
            ("dead_letter.broker", subscription.dead_letter.broker),
        ):
            if broker is not None and broker not in config.brokers:
                problems.append(f"{path}.{key}: no broker {broker!r} (there are: {names})")
    for table, settings in (("grpc", config.grpc), ("http", config.http)):
        if settings.address and not is_loopback(settings.address):
            problems.append(
                f"{table}.address: {settings.address!r} is not a loopback address, and this door has "
                "neither TLS nor a token: use 127.0.0.1 or the Unix socket"
            )
    for name, broker_settings in config.brokers.items():
        if isinstance(broker_settings, JetStream):
            problems.extend(_stream_problems(f"brokers.{name}", broker_settings))
        if isinstance(broker_settings, NatsConnection):
            problems.extend(_secret_problems(f"brokers.{name}", broker_settings))
    return problems


def _stream_problems(path: str, settings: JetStream) -> list[str]:
    names = [stream.name for stream in settings.streams]
    return [
        f"{path}.streams[{i}].name: {name!r} is declared twice"
        for i, name in enumerate(names)
        if name in names[:i]
    ]


def _secret_problems(path: str, settings: NatsConnection) -> list[str]:
    problems = []
    for field in ("password", "token"):
        value: SecretStr = getattr(settings, field)
        file: str = getattr(settings, f"{field}_file")
        if value.get_secret_value() and file:
            problems.append(f"{path}.{field}: set it or {field}_file, not both")
        if file and not os.access(file, os.R_OK):
            problems.append(f"{path}.{field}_file: cannot read {file!r}")
    return problems


# -- from pydantic's words to ours

_ACCEPTED = {
    "extra_forbidden": "unknown key",
    "missing": "is required",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "list_type": "must be an array",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
}


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        loc, kind, context = item["loc"], item["type"], item.get("ctx", {})
        path = _dotted(_path(loc))
        if kind == "extra_forbidden":
            accepted = ", ".join(_accepted_keys(loc))
            lines.append(f"{path}: unknown key; accepted here: {accepted}")
        elif kind in {"union_tag_invalid", "union_tag_not_found"}:
            tags = context.get("expected_tags", "'memory', 'nats', 'jetstream'")
            lines.append(f"{path}.type: must be one of {tags}")
        elif kind == "literal_error":
            lines.append(f"{path}: must be {context['expected']}")
        elif kind == "value_error":
            lines.append(f"{path}: {context['error']}" if path else str(context["error"]))
        else:
            text = _ACCEPTED.get(kind) or item["msg"].replace("Input should be", "must be")
            lines.append(f"{path}: {text}")
    return lines


def _string_expected(error: ValidationError) -> list[tuple[int | str, ...]]:
    return [item["loc"] for item in error.errors() if item["type"] == "string_type"]


def _path(loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """The key path without the union tag that pydantic puts behind a broker's name."""
    parts = list(loc)
    if len(parts) > 2 and parts[0] == "brokers" and parts[2] in {"memory", "nats", "jetstream"}:  # noqa: PLR2004
        del parts[2]
    return tuple(f"[{p}]" if isinstance(p, int) else p for p in parts)


def _dotted(path: tuple[str, ...]) -> str:
    return "".join(p if p.startswith("[") else f".{p}" for p in path).removeprefix(".")


def _accepted_keys(loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the table in which the unknown one stands."""
    model: Any = Config
    tags = {"memory": Memory, "nats": Nats, "jetstream": JetStream}
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        if model is None:  # a broker's name was just passed: the tag says which
            model = tags.get(part)
            continue
        field = model.model_fields.get(part)
        if field is None:
            return []
        if part == "brokers":
            model = None
            continue
        annotation = field.annotation
        args = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)]
        model = args[0] if args else annotation
    return sorted(model.model_fields) if model is not None else []


# -- the environment


def _lay_over(data: dict[str, Any], environment: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    raw = {}
    for name, value in sorted(environment.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in {"SIDECAR_CONFIG", "SIDECAR_SOCKET"}:
            continue
        path = tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value
        _put(data, path, parsed)
        raw[path] = value
    return raw


def _put(data: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for part in path[:-1]:
        inner = data.setdefault(part, {})
        if not isinstance(inner, dict):
            return
        data = inner
    data[path[-1]] = value
