"""The tables of the configuration, in the order of config.example.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sidecar.config.values import (
    DAY,
    MAX_EVENT_TYPES,
    MIB,
    Address,
    Attributes,
    BootstrapServer,
    Bytes,
    Count,
    Limit,
    LoopbackAddress,
    Name,
    Pattern,
    PushHeaders,
    PushUrl,
    Scalars,
    Seconds,
    Server,
    SocketPath,
    TypePattern,
    at_least,
    copies,
    dead_letter_template,
    kafka_options,
    read_secret,
    shown,
    start_or_time,
)
from sidecar.errors import ConfigInvalid


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
        return at_least("max_event_bytes", value, info)


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
            read_secret(path)
        return path

    def secret(self, field: Literal["password", "token"]) -> str:
        """The secret's value; from a file, what the file holds now. Raises ConfigInvalid."""
        path: str = getattr(self, f"{field}_file")
        if not path:
            value: SecretStr = getattr(self, field)
            return value.get_secret_value()
        try:
            return read_secret(path)
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
    max_waiting_bytes: Bytes = 32 * MIB


class Stream(Settings):
    name: Name
    subjects: Annotated[list[Pattern], Field(min_length=1)]
    storage: Literal["file", "memory"] = "file"
    retention: Literal["limits", "interest", "workqueue"] = "limits"
    max_age_seconds: Annotated[float, Field(ge=0, le=36500 * DAY)] = 0
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
    ack_wait_seconds: Annotated[float, Field(ge=1, le=DAY)] = 30
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
    topic_partitions: Annotated[int, Field(ge=-1, le=100_000), AfterValidator(copies)] = -1
    topic_replication: Annotated[int, Field(ge=-1, le=100), AfterValidator(copies)] = -1
    topic_settings: Scalars = {}
    new_topics_seconds: Annotated[float, Field(ge=0.1, le=DAY)] = 10
    group_protocol: Literal["auto", "classic", "consumer"] = "auto"
    session_timeout_seconds: Annotated[float, Field(ge=1, le=1800)] = 10
    options: Annotated[Scalars, AfterValidator(kafka_options)] = {}

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
BROKER_TYPES: dict[object, type[Settings]] = {
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


class RetryRule(Settings):
    reason: Annotated[str, Field(min_length=1, max_length=200)]
    action: Literal["retry", "reject", "retry_uncounted"]
    delay_seconds: Annotated[float, Field(ge=0, le=DAY)] | None = None


class Retry(Settings):
    max_attempts: Annotated[int, Field(ge=1, le=1000)] = 5
    initial_seconds: Annotated[float, Field(ge=0, le=DAY)] = 0.2
    max_seconds: Annotated[float, Field(ge=0, le=DAY)] = 30
    multiplier: Annotated[float, Field(ge=1, le=100)] = 2
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.2
    total_seconds: Annotated[float, Field(ge=0, le=36500 * DAY)] = 0
    max_crashes: Annotated[int, Field(ge=1, le=15)] = 3
    rules: Annotated[list[RetryRule], Field(max_length=100)] = []

    @field_validator("max_seconds")
    @classmethod
    def _grows(cls, value: float, info: ValidationInfo) -> float:
        return at_least("initial_seconds", value, info)


class DeadLetter(Settings):
    topic: Annotated[str, AfterValidator(dead_letter_template)] | None = None
    broker: str | None = None


class Push(Settings):
    url: PushUrl
    content_mode: Literal["binary", "structured"] = "binary"
    max_batch_events: Annotated[int, Field(ge=1, le=10_000)] = 1
    max_concurrency: Annotated[int, Field(ge=1, le=10_000)] = 64
    timeout_seconds: Annotated[float, Field(ge=0.1, le=3600)] | None = None
    headers: PushHeaders = {}


class Filter(Settings):
    """One dialect of the CloudEvents Subscriptions API: exactly one key is set."""

    exact: Attributes | None = None
    prefix: Attributes | None = None
    suffix: Attributes | None = None
    all: Annotated[list[Filter], Field(min_length=1, max_length=100)] | None = None
    any: Annotated[list[Filter], Field(min_length=1, max_length=100)] | None = None
    not_: Annotated[Filter | None, Field(alias="not")] = None

    @model_validator(mode="after")
    def _one_dialect(self) -> Filter:
        if sum(value is not None for _, value in self) != 1:
            raise ValueError("a filter is one of exact, prefix, suffix, all, any and not")
        return self


class Subscription(Settings):
    name: Name
    topic: Pattern
    broker: str | None = None
    ordering: Literal["key", "key_per_replica", "none"] = "key"
    max_in_flight: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    max_in_flight_bytes: Bytes = 32 * MIB
    lease_seconds: Annotated[float, Field(ge=0.1, le=DAY)] = 30
    start: Annotated[str, BeforeValidator(start_or_time)] = "earliest"
    event_types: list[TypePattern] = []
    filters: Annotated[list[Filter], Field(max_length=100)] = []
    expired: Literal["dead_letter", "drop"] = "dead_letter"
    duplicate_window_seconds: Annotated[float, Field(ge=0, le=7 * DAY)] = 0
    watchdog_seconds: Annotated[float, Field(ge=0, le=DAY)] = 60
    push: Push | None = None
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
