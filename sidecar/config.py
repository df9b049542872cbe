"""Every setting, in the order of config.example.toml: read, check, and say all that is wrong at once."""

from __future__ import annotations

import datetime as dt
import difflib
import ipaddress
import os
import re
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from sidecar.errors import ConfigInvalid, InvalidTopic
from sidecar.event import (
    check_pattern,
    check_topic,
    check_type_pattern,
    pattern_covers,
    pattern_matcher,
    patterns_overlap,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic_core import ErrorDetails

ENVIRONMENT_PREFIX = "SIDECAR_"
MIB = 1024 * 1024
MAX_NAME_LENGTH = 128
"""Names are parts of what drivers send: with a topic they stay within NATS' line of 4096 bytes."""
SHOWN_LENGTH = 100
"""What an error shows of a longer value."""
MAX_EVENT_TYPES = 200
"""Metrics have a series for each, with every topic and result."""
MAX_SOCKET_PATH_BYTES = 107
"""What fits into Linux' sockaddr_un, without the closing NUL."""

_Number = TypeVar("_Number", int, float)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


# -- single values: each function returns what it was given, or raises ValueError with the way out


def shown(value: str) -> str:
    """*value* in quotes for an error's text, clipped when it is long."""
    return repr(_clipped(value))


def _clipped(value: str) -> str:
    return value if len(value) <= SHOWN_LENGTH else f"{value[:SHOWN_LENGTH]}…"


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", value):
        raise ValueError('is not a name; use letters, digits, "-" and "_"')
    if len(value) > MAX_NAME_LENGTH:
        raise ValueError(
            f"{shown(value)} has {len(value)} characters; use at most {MAX_NAME_LENGTH}"
        )
    return value


def _pattern(value: str) -> str:
    try:
        check_pattern(value)
    except InvalidTopic as error:
        raise ValueError(error.message) from None
    return value


def _type_pattern(value: str) -> str:
    try:
        check_type_pattern(value)
    except InvalidTopic as error:
        raise ValueError(error.message) from None
    return value


def _dead_letter_topic(value: str) -> str:
    try:
        check_topic(value.replace("{topic}", "topic"))
    except InvalidTopic as error:
        raise ValueError(f'{error.message}; "{{topic}}" stands for the event\'s topic') from None
    return value


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" as a pair; brackets around an IPv6 host are taken off. Raises ValueError."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", address)
    if not found or int(found[3]) > 65535:  # noqa: PLR2004
        raise ValueError('is not an address; one looks like "127.0.0.1:7400", and "" turns it off')
    return found[1] or found[2], int(found[3])


def is_loopback(address: str) -> bool:
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(value: str) -> str:
    if value:
        split_address(value)
    return value


def _loopback_address(value: str) -> str:
    if _address(value) and not is_loopback(value):
        raise ValueError(
            f"{shown(value)} is not a loopback address, and this door has neither TLS nor a token; "
            "use 127.0.0.1, or the Unix socket"
        )
    return value


def _socket_path(value: str) -> str:
    size = len(os.fsencode(value))
    if size > MAX_SOCKET_PATH_BYTES:
        raise ValueError(
            f"{shown(value)} has {size} bytes; a Unix socket's path has at most "
            f'{MAX_SOCKET_PATH_BYTES}: name a shorter one, as "/run/sidecar/grpc.sock"'
        )
    if "\0" in value:
        raise ValueError("holds a NUL character; name a path")
    return value


def _server(value: str) -> str:
    try:
        url = urlsplit(value)
        complete = url.scheme in {"nats", "tls"} and url.hostname and url.port != 0
    except ValueError:
        url, complete = None, False
    if url is None or not complete or url.path.strip("/"):
        raise ValueError('is not a server; one looks like "nats://host:4222" or "tls://host:4222"')
    if "@" in url.netloc:
        raise ValueError("holds credentials; they belong into user and password, or into token")
    return value


def _bootstrap_server(value: str) -> str:
    try:
        _, port = split_address(value)
    except ValueError:
        port = 0
    if not port:
        raise ValueError('is not a server of Kafka; one looks like "kafka:9092"')
    return value


def _start(value: object) -> object:
    if isinstance(value, dt.date):  # TOML has times of its own
        value = value.isoformat()
    if isinstance(value, str) and value not in {"earliest", "latest"}:
        _moment(value)
    return value


def _moment(value: str) -> dt.datetime:
    try:
        moment = dt.datetime.fromisoformat(value)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None or moment < _EPOCH:
        raise ValueError(
            'is not a start; use "earliest", "latest" or a time since 1970 with its zone, '
            'as "2026-01-31T12:00:00Z"'
        )
    return moment


def _limit(value: int) -> int:
    if value == 0:  # the server takes 0 for "no limit", and then says -1
        raise ValueError("must not be 0; use -1 for no limit")
    return value


def _copies(value: int) -> int:
    if value == 0:
        raise ValueError("must not be 0; use -1 for what the broker is set to")
    return value


def _at_least(other: str, value: _Number, info: ValidationInfo) -> _Number:
    least = info.data.get(other)
    if least is not None and value < least:
        raise ValueError(f"{value} is less than {other}; use at least {least}")
    return value


_KAFKA_KEYS = {
    "bootstrap.servers": "bootstrap_servers",
    "metadata.broker.list": "bootstrap_servers",
    "client.id": "app.name",
    "security.protocol": "tls and sasl_mechanism",
    "ssl.ca.location": "tls_ca_file",
    "ssl.certificate.location": "tls_certificate_file",
    "ssl.key.location": "tls_key_file",
    "sasl.mechanism": "sasl_mechanism",
    "sasl.mechanisms": "sasl_mechanism",
    "sasl.username": "user",
    "sasl.password": "password",
    "sasl.oauthbearer.client.id": "user",
    "sasl.oauthbearer.client.secret": "password",
    "sasl.oauthbearer.token.endpoint.url": "oauth_token_url",
    "sasl.oauthbearer.scope": "oauth_scope",
    "compression.type": "compression",
    "compression.codec": "compression",
    "linger.ms": "linger_seconds",
    "queue.buffering.max.ms": "linger_seconds",
    "message.max.bytes": "limits.max_event_bytes",
    "message.timeout.ms": "publishing.timeout_seconds",
    "delivery.timeout.ms": "publishing.timeout_seconds",
    "queue.buffering.max.messages": "publishing.max_pending_events",
    "queue.buffering.max.kbytes": "publishing.max_pending_bytes",
    "group.id": "the subscription's name",
    "group.protocol": "group_protocol",
    "session.timeout.ms": "session_timeout_seconds",
    "auto.offset.reset": "the subscription's start",
    "allow.auto.create.topics": "auto_create_topics",
}
"""Settings of librdkafka that have a key of ours."""
_KAFKA_PROMISES = {
    "acks": "a receipt says that the event is stored on all replicas that are in sync",
    "request.required.acks": "a receipt says that the event is stored on all replicas in sync",
    "enable.idempotence": "events are stored once and in order, also when a request is repeated",
    "max.in.flight": "events are stored in order, which needs few requests under way",
    "max.in.flight.requests.per.connection": "events are stored in order",
    "enable.auto.commit": "an event is done when the app acked it, not before",
    "auto.commit.interval.ms": "an event is done when the app acked it, not before",
    "enable.auto.offset.store": "an event is done when the app acked it, not before",
    "offset.store.method": "an event is done when the app acked it, not before",
    "partition.assignment.strategy": "sidecars share a subscription by cooperative rebalancing",
    "group.instance.id": "each sidecar is a member of its own",
    "transactional.id": "publishing is not transactional",
    "enable.partition.eof": "what is fetched are events",
    "delivery.report.only.error": "each event gets its receipt",
    "on_commit": "callbacks are the sidecar's own",
    "on_delivery": "callbacks are the sidecar's own",
    "logger": "what librdkafka says goes to the sidecar's log",
    "default.topic.config": "name each setting by itself",
}
"""Settings of librdkafka that would break a promise, and which."""


def _scalars(table: dict[str, object]) -> dict[str, object]:
    for name, value in table.items():
        if not isinstance(value, str | int | float | bool):
            raise ValueError(  # noqa: TRY004 - pydantic takes it for what it is
                f"{shown(name)} must be a string, a number, true or false"
            )
    return table


_PARTITIONERS = frozenset(
    {"consistent", "consistent_random", "murmur2", "murmur2_random", "fnv1a", "fnv1a_random"}
)
"""Those by which a key has one partition."""


def _kafka_options(options: dict[str, object]) -> dict[str, object]:
    problems = []
    for name, value in options.items():
        if name == "partitioner" and value not in _PARTITIONERS:
            problems.append(
                f"{name!r} must be one of {_list(sorted(_PARTITIONERS))}: an event's key decides "
                "its partition"
            )
        elif name in _KAFKA_KEYS:
            problems.append(f"{name!r} is set by {_KAFKA_KEYS[name]}; use that")
        elif name in _KAFKA_PROMISES or name.endswith("_cb"):
            why = _KAFKA_PROMISES.get(name, "callbacks are the sidecar's own")
            problems.append(f"{name!r} is the sidecar's own: {why}; leave it out")
    if problems:
        raise ValueError("; ".join(problems))
    return options


def _read_secret(path: str) -> str:
    """The secret in a file, without the white space around it. Never part of an error."""
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"cannot read {path!r} ({error.strerror}); name another") from error
    except UnicodeDecodeError:  # from None: this error holds the file's bytes
        raise ValueError(f"{path!r} is not text; the secret is to be UTF-8") from None
    if not secret:
        raise ValueError(f"{path!r} is empty; it is to hold the secret")
    return secret


_DAY = 86400
Name = Annotated[str, AfterValidator(_name)]
Pattern = Annotated[str, AfterValidator(_pattern)]
TypePattern = Annotated[str, AfterValidator(_type_pattern)]
Address = Annotated[str, AfterValidator(_address)]
LoopbackAddress = Annotated[str, AfterValidator(_loopback_address)]
SocketPath = Annotated[str, AfterValidator(_socket_path)]
Server = Annotated[str, AfterValidator(_server)]
Seconds = Annotated[float, Field(gt=0, le=365 * _DAY)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Bytes = Annotated[int, Field(ge=1024, le=2**40)]
Limit = Annotated[int, Field(ge=-1, lt=2**63), AfterValidator(_limit)]
Scalars = Annotated[dict[str, object], AfterValidator(_scalars)]
BootstrapServer = Annotated[str, AfterValidator(_bootstrap_server)]


# -- the tables


class Settings(BaseModel):
    """
    A table of the configuration: unknown keys and wrong types are errors, values are frozen.

    A rule between two keys of a table stands in a validator of the later one: a validator of the
    whole table would not run, and its problem not be reported, while any key is wrong.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


class App(Settings):
    name: Name = "app"


class Grpc(Settings):
    address: LoopbackAddress = "127.0.0.1:7400"
    unix_socket: SocketPath = ""


class Http(Settings):
    address: LoopbackAddress = ""
    unix_socket: SocketPath = ""


class Admin(Settings):
    address: Address = "127.0.0.1:7402"


class Log(Settings):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class Metrics(Settings):
    event_types: Annotated[list[TypePattern], Field(max_length=MAX_EVENT_TYPES)] = []


class Limits(Settings):
    max_event_bytes: Annotated[int, Field(ge=1024, le=512 * MIB)] = MIB
    max_batch_events: Count = 10_000
    max_batch_bytes: Annotated[int, Field(ge=1024, le=1024 * MIB)] = 16 * MIB
    max_streams: Count = 1000
    open_timeout_seconds: Seconds = 10

    @field_validator("max_batch_bytes")
    @classmethod
    def _batch_holds_an_event(cls, value: int, info: ValidationInfo) -> int:
        return _at_least("max_event_bytes", value, info)


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


class Secrets(Settings):
    """A table with secrets, each given as itself or as `<name>_file`."""

    @field_validator("password_file", "token_file", check_fields=False)
    @classmethod
    def _one_readable_secret(cls, path: str, info: ValidationInfo) -> str:
        field = (info.field_name or "").removesuffix("_file")
        if path and info.data.get(field):
            raise ValueError(f"{field} is set as well; keep one of them")
        if path:
            _read_secret(path)
        return path

    def secret(self, field: Literal["password", "token"]) -> str:
        """The secret's value; from a file, what the file holds now. Raises ConfigInvalid."""
        path: str = getattr(self, f"{field}_file")
        if not path:
            value: SecretStr = getattr(self, field)
            return value.get_secret_value()
        try:
            return _read_secret(path)
        except ValueError as error:
            raise ConfigInvalid([f"{field}_file: {error}"]) from error


class NatsConnection(Secrets):
    """What both NATS drivers need to connect."""

    servers: Annotated[list[Server], Field(max_length=100)] = []
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

    @field_validator("embedded")
    @classmethod
    def _somewhere_to_connect(cls, embedded: bool, info: ValidationInfo) -> bool:  # noqa: FBT001
        servers = info.data.get("servers")
        if embedded and servers:
            raise ValueError("brings a server of its own; leave out servers, or embedded")
        if not embedded and servers == []:
            raise ValueError(
                'there is no server; set this to true, or name servers, as ["nats://host:4222"]'
            )
        return embedded


class Nats(NatsConnection):
    type: Literal["nats"]
    max_waiting_events: Count = 10_000


class Stream(Settings):
    name: Name
    subjects: Annotated[list[Pattern], Field(min_length=1)]
    storage: Literal["file", "memory"] = "file"
    retention: Literal["limits", "interest", "workqueue"] = "limits"
    max_age_seconds: Annotated[float, Field(ge=0, le=36500 * _DAY)] = 0
    max_bytes: Limit = -1
    max_events: Limit = -1
    replicas: Annotated[int, Field(ge=1, le=5)] = 1
    duplicate_window_seconds: Seconds = 120

    @field_validator("duplicate_window_seconds")
    @classmethod
    def _window_within_the_age(cls, value: float, info: ValidationInfo) -> float:
        age = info.data.get("max_age_seconds")
        if age and value > age:
            raise ValueError(f"{value:g} is more than max_age_seconds; use at most {age:g}")
        return value


class JetStream(NatsConnection):
    type: Literal["jetstream"]
    auto_create_streams: bool = False
    ack_wait_seconds: Annotated[float, Field(ge=1, le=_DAY)] = 30
    streams: list[Stream] = []


class Kafka(Secrets):
    type: Literal["kafka"]
    bootstrap_servers: Annotated[list[BootstrapServer], Field(min_length=1, max_length=100)]
    tls: bool = False
    tls_ca_file: str = ""
    tls_certificate_file: str = ""
    tls_key_file: str = ""
    sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = ""
    user: str = ""
    password: SecretStr = SecretStr("")
    password_file: str = ""
    oauth_token_url: str = ""
    oauth_scope: str = ""
    connect_timeout_seconds: Seconds = 5
    content_mode: Literal["binary", "structured"] = "binary"
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "lz4"
    linger_seconds: Annotated[float, Field(ge=0, le=10)] = 0.001
    auto_create_topics: bool = False
    topic_partitions: Annotated[int, Field(ge=-1, le=100_000), AfterValidator(_copies)] = -1
    topic_replication: Annotated[int, Field(ge=-1, le=100), AfterValidator(_copies)] = -1
    topic_settings: Scalars = {}
    new_topics_seconds: Annotated[float, Field(ge=0.1, le=_DAY)] = 10
    group_protocol: Literal["auto", "classic", "consumer"] = "auto"
    session_timeout_seconds: Annotated[float, Field(ge=1, le=1800)] = 10
    options: Annotated[Scalars, AfterValidator(_kafka_options)] = {}

    @field_validator("tls_ca_file", "tls_certificate_file", "tls_key_file")
    @classmethod
    def _is_for_tls(cls, path: str, info: ValidationInfo) -> str:
        if path and not info.data.get("tls", True):
            raise ValueError("tls is false, so it would not be used; set tls = true")
        if path and not Path(path).is_file():
            raise ValueError(f"there is no file {shown(path)}; name one")
        return path

    @field_validator("tls_key_file")
    @classmethod
    def _key_of_a_certificate(cls, path: str, info: ValidationInfo) -> str:
        if bool(path) != bool(info.data.get("tls_certificate_file", path)):
            raise ValueError("a certificate and its key belong together; set both, or none")
        return path

    @field_validator("user")
    @classmethod
    def _somebody(cls, user: str, info: ValidationInfo) -> str:
        mechanism = info.data.get("sasl_mechanism")
        if mechanism and not user:
            raise ValueError(f"{mechanism} needs one; set it, or leave out sasl_mechanism")
        if user and mechanism == "":
            raise ValueError("sasl_mechanism is not set, so it would not be used; set both")
        return user

    @field_validator("oauth_token_url")
    @classmethod
    def _where_tokens_are(cls, url: str, info: ValidationInfo) -> str:
        if bool(url) != (info.data.get("sasl_mechanism") == "OAUTHBEARER"):
            raise ValueError('goes with sasl_mechanism = "OAUTHBEARER"; set both, or none')
        return url


BrokerSettings = Annotated[Memory | Nats | JetStream | Kafka, Field(discriminator="type")]
_BROKER_TYPES: dict[object, type[Settings]] = {
    "memory": Memory,
    "nats": Nats,
    "jetstream": JetStream,
    "kafka": Kafka,
}
STORING_TYPES = frozenset({"memory", "jetstream", "kafka"})


class Route(Settings):
    topic: Pattern | None = None
    event_type: TypePattern | None = None
    broker: str

    @field_validator("event_type")
    @classmethod
    def _matches_something(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("topic", "broken") is None:
            raise ValueError('the route matches nothing; set it, or topic, as topic = ">"')
        return value


class Retry(Settings):
    max_attempts: Annotated[int, Field(ge=1, le=1000)] = 5
    initial_seconds: Annotated[float, Field(ge=0, le=_DAY)] = 0.2
    max_seconds: Annotated[float, Field(ge=0, le=_DAY)] = 30
    multiplier: Annotated[float, Field(ge=1, le=100)] = 2
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.2
    total_seconds: Annotated[float, Field(ge=0, le=36500 * _DAY)] = 0

    @field_validator("max_seconds")
    @classmethod
    def _grows(cls, value: float, info: ValidationInfo) -> float:
        return _at_least("initial_seconds", value, info)


class DeadLetter(Settings):
    topic: Annotated[str, AfterValidator(_dead_letter_topic)] | None = None
    broker: str | None = None


class Subscription(Settings):
    name: Name
    topic: Pattern
    broker: str | None = None
    ordering: Literal["key", "none"] = "key"
    max_in_flight: Annotated[int, Field(ge=1, le=100_000)] = 256
    lease_seconds: Annotated[float, Field(ge=0.1, le=_DAY)] = 30
    start: Annotated[str, BeforeValidator(_start)] = "earliest"
    event_types: list[TypePattern] = []
    retry: Retry = Retry()
    dead_letter: DeadLetter = DeadLetter()


class Config(Settings):
    """The whole configuration, checked. Broker names, routes and subscriptions agree."""

    app: App = App()
    grpc: Grpc = Grpc()
    http: Http = Http()
    admin: Admin = Admin()
    log: Log = Log()
    metrics: Metrics = Metrics()
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
    TOML, or a bare string; an array is set as a whole. Raises ConfigInvalid with every problem.
    """
    data = {} if path is None else _read(path)
    overlay, problems = _lay_over(data, environment)
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
    return (_moment(start) - _EPOCH) // dt.timedelta(microseconds=1) * 1000


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
            _socket_path(path)
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


# -- reading and checking, with every problem in one go

KeyPath: TypeAlias = tuple[str | int, ...]


class _Problem(NamedTuple):
    path: KeyPath
    text: str
    """What is wrong; what is accepted."""


class _Variable(NamedTuple):
    name: str
    value: str


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid([f"cannot read {path}: {error.strerror}"]) from error
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, numbers and depths without end
        raise ConfigInvalid([f"{path} is not TOML: {error}"]) from None


def _checked(
    data: dict[str, Any], overlay: Mapping[KeyPath, _Variable], problems: list[_Problem]
) -> Config:
    config, wrong = _validate(data, overlay)
    problems = [*problems, *wrong, *_cross_checks(data)]
    if config is None or problems:
        tables = list(Config.model_fields)
        problems.sort(key=lambda p: tables.index(t) if (t := _first(p.path)) in tables else -1)
        raise ConfigInvalid([_line(problem, data, overlay) for problem in problems])
    return _with_defaults(config)


def _validate(
    data: dict[str, Any], overlay: Mapping[KeyPath, _Variable]
) -> tuple[Config | None, list[_Problem]]:
    try:
        return Config.model_validate(data), []
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
    not_text = [_key_path(item["loc"]) for item in wrong if item["type"] == "string_type"]
    spelled = [path for path in not_text if path in overlay]
    if not spelled:
        return None, [_problem(item) for item in wrong]
    for path in spelled:  # a variable whose text looks like a number, a date, …: it was text
        _put(data, path, overlay[path].value)
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


def _line(problem: _Problem, data: object, overlay: Mapping[KeyPath, _Variable]) -> str:
    path, text = problem
    line = f"{_dotted(path)}: {text}" if path else text
    # Above or below: SIDECAR_GPRC__ADDRESS sets gprc.address, and gprc is what is unknown.
    there = _existing(data, path)
    sources = [v.name for set_, v in overlay.items() if set_[: len(there)] == there[: len(set_)]]
    return f"{line} (see {_list(sources)})" if there and sources else line


def _existing(data: object, path: KeyPath) -> KeyPath:
    """The part of *path* that is there: of a key that is missing, the table that misses it."""
    for i, part in enumerate(path):
        items = enumerate(data) if isinstance(data, list) else _table(data).items()
        inside: dict[object, object] = dict(items)
        if part not in inside:
            return path[:i]
        data = inside[part]
    return path


def _dotted(path: KeyPath) -> str:
    """A key path as in TOML, with [0] for the first of an array."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{_key(part)}" for part in path]
    return "".join(parts).removeprefix(".")


def _key(key: str) -> str:
    return _clipped(key) if _is_bare(key) else f'"{_clipped(key)}"'


def _is_bare(key: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-]+", key) is not None


def _first(path: KeyPath) -> str:
    return str(path[0]) if path else ""


# -- between tables: on the data as it is read, because a table with a problem is no model


def _cross_checks(data: Mapping[str, object]) -> Iterator[_Problem]:
    """What no single table can know. Unreadable parts are skipped: they have their own problem."""
    yield from _shared_places(data)
    yield from _pending_holds_an_event(data)
    routes, subscriptions = _tables(data.get("routes")), _tables(data.get("subscriptions"))
    yield from _repeated_names(("subscriptions",), subscriptions)
    brokers = data.get("brokers", {})
    if not isinstance(brokers, dict):
        return
    for name, broker in brokers.items():
        streams = _tables(_table(broker).get("streams"))
        yield from _repeated_names(("brokers", name, "streams"), streams)
        yield from _lingers_too_long(name, _table(broker), _table(data.get("publishing")))
    types = {name: _table(b).get("type") for name, b in brokers.items()}
    types = types or {EMBEDDED_BROKER: "jetstream"}
    yield from _unknown_brokers(routes, subscriptions, types)
    if not data.get("routes"):
        if len(types) > 1:
            yield _Problem(
                ("routes",), f'no topic has a broker; add topic = ">" for one of: {_list(types)}'
            )
            return
        routes = [{"topic": ">", "broker": next(iter(types))}]
    for i, subscription in enumerate(subscriptions):
        for path, text in _subscription_problems(subscription, routes, types):
            yield _Problem(("subscriptions", i, *path), text)


def _shared_places(data: Mapping[str, object]) -> Iterator[_Problem]:
    doors: dict[str, Settings] = {"grpc": Grpc(), "http": Http(), "admin": Admin()}
    taken: dict[str, str] = {}
    for door, defaults in doors.items():
        for key, default in defaults:
            place = _table(data.get(door)).get(key, default)
            if not isinstance(place, str) or not place or place.endswith(":0"):
                continue
            if place in taken:
                yield _Problem((door, key), f"is {taken[place]} already; give each its own")
            taken.setdefault(place, f"{door}.{key}")


def _pending_holds_an_event(data: Mapping[str, object]) -> Iterator[_Problem]:
    limits, publishing = _table(data.get("limits")), _table(data.get("publishing"))
    event = limits.get("max_event_bytes", Limits().max_event_bytes)
    pending = publishing.get("max_pending_bytes", Publishing().max_pending_bytes)
    if isinstance(event, int) and isinstance(pending, int) and pending < event:
        path = ("publishing", "max_pending_bytes")
        yield _Problem(path, f"{pending} is less than limits.max_event_bytes; use at least {event}")


def _lingers_too_long(
    name: str, broker: dict[str, object], publishing: dict[str, object]
) -> Iterator[_Problem]:
    linger = broker.get("linger_seconds")
    timeout = publishing.get("timeout_seconds", Publishing().timeout_seconds)
    if isinstance(linger, int | float) and isinstance(timeout, int | float) and linger >= timeout:
        path = ("brokers", name, "linger_seconds")
        yield _Problem(path, f"{linger:g} is not less than publishing.timeout_seconds, {timeout:g}")


def _repeated_names(path: KeyPath, tables: list[dict[str, object]]) -> Iterator[_Problem]:
    seen: dict[str, int] = {}
    for i, table in enumerate(tables):
        name = table.get("name")
        if isinstance(name, str) and seen.setdefault(name, i) != i:
            first = _dotted((*path, seen[name]))
            yield _Problem((*path, i, "name"), f"{shown(name)} is {first} already; choose another")


def _unknown_brokers(
    routes: list[dict[str, object]],
    subscriptions: list[dict[str, object]],
    known: Mapping[str, object],
) -> Iterator[_Problem]:
    named: list[tuple[KeyPath, object]] = []
    for i, route in enumerate(routes):
        named.append((("routes", i, "broker"), route.get("broker")))
    for i, subscription in enumerate(subscriptions):
        named.append((("subscriptions", i, "broker"), subscription.get("broker")))
        dead_letter = _table(subscription.get("dead_letter"))
        named.append((("subscriptions", i, "dead_letter", "broker"), dead_letter.get("broker")))
    for path, name in named:
        if isinstance(name, str) and name not in known:
            meant = _did_you_mean(name, known)
            yield _Problem(path, f"no broker {shown(name)}; {meant}there are: {_list(known)}")


def _subscription_problems(
    subscription: dict[str, object],
    routes: list[dict[str, object]],
    types: Mapping[str, object],
) -> Iterator[_Problem]:
    topic, dead_letter = subscription.get("topic"), _table(subscription.get("dead_letter"))
    if not isinstance(topic, str):
        return
    if "broker" not in subscription and not any(_may_match(route, topic) for route in routes):
        yield _Problem(("topic",), f"no route has {topic!r}; add one, or name a broker here")
    named = [table["broker"] for table in (dead_letter, subscription) if "broker" in table]
    broker = named[0] if named else _routed(topic, routes)
    if isinstance(broker, str) and types.get(broker) == "nats":
        storing = [name for name, type_ in types.items() if type_ in STORING_TYPES]
        way_out = f"use {_list(storing)}" if storing else "add one, of type jetstream or kafka"
        yield _Problem(
            ("dead_letter", "broker"),
            f"dead letters need a broker that stores, and {broker!r} is core NATS; {way_out}",
        )
    template = dead_letter.get("topic")
    elsewhere = dead_letter.get("broker") not in (None, subscription.get("broker"))
    if isinstance(template, str) and not elsewhere and comes_back(topic, template):
        yield _Problem(
            ("dead_letter", "topic"),
            own_dead_letters(topic, template),
        )


def _routed(topic: str, routes: list[dict[str, object]]) -> object:
    """The broker of a subscription to *topic*. None: unknown, or decided when it runs."""
    first = next((route for route in routes if _may_match(route, topic)), None)
    pattern = first and first.get("topic")
    covered = isinstance(pattern, str) and pattern_covers(pattern, topic)
    return first.get("broker") if first and covered else None


def _may_match(route: dict[str, object], topic: str) -> bool:
    """A route that asks for an event type says nothing of subscriptions."""
    pattern = route.get("topic", ">")
    return "event_type" not in route and (
        not isinstance(pattern, str) or patterns_overlap(pattern, topic)
    )


def own_dead_letters(topic: str, template: str) -> str:
    return (
        f"{template!r} is part of {topic!r}, so that the subscription gets its own dead letters; "
        'use a topic outside of it, as "dlq.{topic}", or another dead_letter.broker'
    )


def comes_back(topic: str, template: str) -> bool:
    """Dead letters on *template* are part of *topic*, which may be a pattern."""
    some = topic.replace("*", "any").replace(">", "any")
    return pattern_matcher(topic).fullmatch(template.replace("{topic}", some)) is not None


def _table(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _tables(value: object) -> list[dict[str, object]]:
    return [_table(item) for item in value] if isinstance(value, list) else []


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


# -- from pydantic's words to ours

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


def _problem(item: ErrorDetails, root: type[Settings] = Config) -> _Problem:
    kind, path, context = item["type"], _key_path(item["loc"]), item.get("ctx", {})
    if kind == "extra_forbidden":
        return _Problem(path, _unknown_key(item["loc"], root))
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        return _Problem((*path, "type"), f"must be one of {_list(map(repr, _BROKER_TYPES))}")
    if kind == "literal_error":
        return _Problem(path, f"must be {context['expected']}")
    if kind == "value_error":
        return _Problem(path, str(context["error"]))
    text = re.sub("^(Input|List) should", "must", item["msg"]).replace(" after validation", "")
    return _Problem(path, _TEXTS.get(kind) or text)


def _key_path(loc: KeyPath) -> KeyPath:
    """Where it is in the file: pydantic puts the broker's type, or "[key]", behind its name."""
    return (*loc[:2], *loc[3:]) if loc[:1] == ("brokers",) else loc


def _unknown_key(loc: KeyPath, root: type[Settings]) -> str:
    accepted = _table_at(loc[:-1], root).model_fields
    return f"unknown key; {_did_you_mean(str(loc[-1]), accepted)}accepted here: {_list(accepted)}"


def _did_you_mean(key: str, accepted: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, accepted, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _table_at(loc: KeyPath, table: type[Settings]) -> type[Settings]:
    if loc[:1] == ("brokers",):
        table, loc = _BROKER_TYPES[loc[2]], loc[3:]
    for part in loc:
        if isinstance(part, str):
            annotation = table.model_fields[part].annotation
            inner = [annotation, *get_args(annotation)]  # a table, or an array of them
            table = next(t for t in inner if isinstance(t, type) and issubclass(t, Settings))
    return table


# -- the environment

_OF_THE_COMMAND_LINE = {"SIDECAR_CONFIG", "SIDECAR_SOCKET"}
_SERVICE_LINK = re.compile(
    r"(\w+_)?(SERVICE_(HOST|PORT)\w*=|PORT\w*=(tcp|udp|sctp)://|PORT_\d+_(TCP|UDP|SCTP)_\w+=)"
)
"""Kubernetes puts these into every pod beside a Service called "sidecar" or "sidecar-…"."""


def _lay_over(
    data: dict[str, Any], environment: Mapping[str, str]
) -> tuple[dict[KeyPath, _Variable], list[_Problem]]:
    """Set in *data* what the environment says; returns who said what, and what has no place."""
    overlay: dict[KeyPath, _Variable] = {}
    problems = []
    for name, value in sorted(environment.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in _OF_THE_COMMAND_LINE:
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX)
        if "__" not in key and _SERVICE_LINK.match(f"{key}={value}"):
            continue
        path = _spelled_path(data, key.lower().split("__"))
        overlay[path] = _Variable(name, value)
        if not _put(data, path, _parsed(value)):
            problems.append(_Problem(path, "is not in a table; set the array or value as a whole"))
    return overlay, problems


def _spelled_path(data: dict[str, Any], parts: list[str]) -> KeyPath:
    """As the file spells it: names of variables tell neither case nor, mostly, "-" from "_"."""
    path: list[str] = []
    table: dict[str, Any] = data
    for part in parts:
        plain = part.replace("-", "_")
        same = [key for key in table if key.lower().replace("-", "_") == plain]
        path.append(part if part in table or not same else same[0])
        table = _table(table.get(path[-1]))
    return tuple(path)


def _parsed(value: str) -> object:
    try:
        document = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return value
    return document["value"] if len(document) == 1 else value


def _put(data: dict[Any, Any], path: KeyPath, value: object) -> bool:
    for part in path[:-1]:
        inner = data.setdefault(part, {})
        if not isinstance(inner, dict):
            return False
        data = inner
    data[path[-1]] = value
    return True
