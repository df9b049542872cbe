"""Single values: each function returns what it was given, or raises ValueError with the way out."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
)

from sidecar.errors import InvalidTopic
from sidecar.event import (
    check_pattern,
    check_topic,
    check_type_pattern,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


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
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def shown(value: str) -> str:
    """*value* in quotes for an error's text, clipped when it is long."""
    return repr(clipped(value))


def clipped(value: str) -> str:
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


def dead_letter_template(value: str) -> str:
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


def socket_path(value: str) -> str:
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


def push_address(url: str) -> tuple[str, str]:
    """
    Where to push: the path of a Unix socket ("" for TCP), and the URL to POST to.

    "unix:///run/app.sock:/events" is the socket /run/app.sock and the path /events. Raises
    ValueError.
    """
    problem = (
        'is not an address; one looks like "http://127.0.0.1:8080/events", or '
        '"unix:///run/app.sock:/events" for a Unix socket'
    )
    if url.startswith("unix://"):
        socket, _, path = url.removeprefix("unix://").partition(":")
        if not socket.startswith("/") or (path and not path.startswith("/")) or _breaks_line(path):
            raise ValueError(problem)
        return socket_path(socket), f"http://app{path or '/'}"
    try:
        parts = urlsplit(url)
        complete = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")  # as the look-up of its address does
    except ValueError:
        raise ValueError(problem) from None
    if not complete or _breaks_line(url):
        raise ValueError(problem)
    if parts.username or parts.password:
        raise ValueError("holds credentials, which go nowhere; leave them out")
    return "", url


def _breaks_line(text: str) -> bool:
    """It cannot stand in the first line of a request as it is."""
    return not (text.isascii() and text.isprintable()) or " " in text


def _push_url(value: str) -> str:
    push_address(value)
    return value


_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_NOT_TO_BE_SET = re.compile(
    r"ce-.*|sidecar-.*|content-(type|length|encoding)|connection|expect|host|keep-alive|te|trailer"
    r"|transfer-encoding|upgrade|traceparent|tracestate|baggage"
)


def _push_headers(headers: dict[str, str]) -> dict[str, str]:
    problems = []
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name):
            problems.append(
                f'{shown(name)} is not a header\'s name; one looks like "authorization"'
            )
        elif _NOT_TO_BE_SET.fullmatch(name.lower()):
            problems.append(f"{shown(name)} is the sidecar's own; leave it out")
        elif not (value.isascii() and value.isprintable()):  # it may be a secret: never shown
            problems.append(f"the value of {shown(name)} is not printable ASCII; encode it")
    if problems:
        raise ValueError("; ".join(problems))
    return headers


def start_or_time(value: object) -> object:
    if isinstance(value, dt.date):  # TOML has times of its own
        value = value.isoformat()
    if isinstance(value, str) and value not in {"earliest", "latest"}:
        moment_of(value)
    return value


def moment_of(value: str) -> dt.datetime:
    try:
        moment = dt.datetime.fromisoformat(value)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None or moment < EPOCH:
        raise ValueError(
            'is not a start; use "earliest", "latest" or a time since 1970 with its zone, '
            'as "2026-01-31T12:00:00Z"'
        )
    return moment


def _limit(value: int) -> int:
    if value == 0:  # the server takes 0 for "no limit", and then says -1
        raise ValueError("must not be 0; use -1 for no limit")
    return value


def copies(value: int) -> int:
    if value == 0:
        raise ValueError("must not be 0; use -1 for what the broker is set to")
    return value


def at_least(other: str, value: _Number, info: ValidationInfo) -> _Number:
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


def kafka_options(options: dict[str, object]) -> dict[str, object]:
    problems = []
    for name, value in options.items():
        if name == "partitioner" and value not in _PARTITIONERS:
            problems.append(
                f"{name!r} must be one of {listed(sorted(_PARTITIONERS))}: an event's key decides "
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


def read_secret(path: str) -> str:
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


DAY = 86400
Name = Annotated[str, AfterValidator(_name)]
Pattern = Annotated[str, AfterValidator(_pattern)]
TypePattern = Annotated[str, AfterValidator(_type_pattern)]
Address = Annotated[str, AfterValidator(_address)]
LoopbackAddress = Annotated[str, AfterValidator(_loopback_address)]
SocketPath = Annotated[str, AfterValidator(socket_path)]
Server = Annotated[str, AfterValidator(_server)]
Seconds = Annotated[float, Field(gt=0, le=365 * DAY)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Bytes = Annotated[int, Field(ge=1024, le=2**40)]
Limit = Annotated[int, Field(ge=-1, lt=2**63), AfterValidator(_limit)]
Scalars = Annotated[dict[str, object], AfterValidator(_scalars)]
Attributes = Annotated[
    dict[Annotated[str, Field(pattern=r"^[a-z0-9]{1,64}$")], str], Field(min_length=1)
]
PushUrl = Annotated[str, AfterValidator(_push_url)]
PushHeaders = Annotated[dict[str, str], AfterValidator(_push_headers)]
BootstrapServer = Annotated[str, AfterValidator(_bootstrap_server)]


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)
