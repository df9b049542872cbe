"""The values that cross every layer: events, receipts, positions, and the rules of their names."""

from __future__ import annotations

import enum
import re
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from sidecar.errors import InvalidTopic, SidecarError

if TYPE_CHECKING:
    from collections.abc import Mapping

NOTHING: Mapping[str, str] = MappingProxyType({})


class Event(msgspec.Struct, frozen=True, gc=False):
    """
    A CloudEvents 1.0 event, plus a key for order and the headers that travel beside it.

    Checked and normalised where it enters (sidecar.wire), so everything behind trusts it: id,
    source and type are not empty, `time_ns` is set (ns since 1970, UTC). An empty string means
    that an attribute is absent; `data` is None for an event without data.
    """

    id: str
    source: str
    type: str
    time_ns: int
    data: bytes | None = None
    key: str = ""
    content_type: str = ""
    subject: str = ""
    schema: str = ""
    extensions: Mapping[str, str] = NOTHING
    headers: Mapping[str, str] = NOTHING
    """Transport headers: traceparent, tracestate, baggage, sidecar-dead-letter-…; lower case."""

    @property
    def size(self) -> int:
        """Bytes the event takes at most in any binding, roughly: data, attributes, headers."""
        size = (
            len(self.id) + len(self.source) + len(self.type) + len(self.subject) + len(self.schema)
        )
        size += len(self.content_type) + len(self.key) + 120
        if self.data is not None:
            size += len(self.data)
        for attributes in (self.extensions, self.headers):
            if attributes:
                size += sum(len(name) + len(value) + 8 for name, value in attributes.items())
        return size


class Durability(enum.IntEnum):
    """How safe a published event is; a higher value is safer. Numbers as in the protobuf enum."""

    SENT = 1
    SPOOLED = 2
    STORED = 3


class Position(msgspec.Struct, frozen=True, gc=False):
    """Where an event is at its broker: stream and sequence, or partition and offset."""

    stream: str = ""
    sequence: int = 0
    partition: int | None = None
    offset: int | None = None


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The answer to one published event: the durability it names has been reached."""

    event_id: str
    broker: str
    topic: str
    durability: Durability
    position: Position | None = None
    duplicate: bool = False


Outcome = Receipt | SidecarError
"""What became of one published event."""


class Verdict(enum.IntEnum):
    """What the app says of a delivery. Numbers as in the protobuf enum."""

    ACK = 1
    NACK = 2
    REJECT = 3
    EXTEND = 4


class Settlement(msgspec.Struct, frozen=True, gc=False):
    """One settlement: which delivery, and what the app says of it. Delays are seconds."""

    token: str
    verdict: Verdict
    delay: float | None = None
    reason: str = ""
    uncounted: bool = False


# -- topics: tokens joined by dots, on every broker (NATS subjects; a subset of Kafka's names)

_TOPIC = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_PATTERN = re.compile(r"([A-Za-z0-9_-]+|\*)(\.([A-Za-z0-9_-]+|\*))*(\.>)?|>")
MAX_TOPIC_LENGTH = 249
"""Kafka's limit for a topic name."""


def check_topic(topic: str) -> None:
    """Raise InvalidTopic unless one can publish to *topic*."""
    if len(topic) > MAX_TOPIC_LENGTH or not _TOPIC.fullmatch(topic):
        raise InvalidTopic(
            f"topic {topic[:MAX_TOPIC_LENGTH]!r} is not valid: use up to {MAX_TOPIC_LENGTH} "
            'letters, digits, "-" and "_", in tokens joined by dots, as "orders.created"',
            field="topic",
        )
    _check_not_reserved(topic)


def check_pattern(pattern: str) -> None:
    """Raise InvalidTopic unless *pattern* is a topic, or one with NATS-style wildcards."""
    check_type_pattern(pattern)
    _check_not_reserved(pattern)


def check_type_pattern(pattern: str) -> None:
    """The same for types of events: of their names, none is reserved."""
    if len(pattern) > MAX_TOPIC_LENGTH or not _PATTERN.fullmatch(pattern):
        raise InvalidTopic(
            f"{pattern[:MAX_TOPIC_LENGTH]!r} is not a topic pattern: use tokens joined by dots, "
            '"*" for any one token, ">" at the end for one or more, as "orders.*" or "orders.>"',
            field="topic",
        )


def _check_not_reserved(topic: str) -> None:
    """
    Raise InvalidTopic for the brokers' own topics: NATS' replies are on _INBOX.….

    A stream over those would store what the brokers say to each other, and hand it out as events.
    """
    if topic.startswith("_"):
        raise InvalidTopic(
            f'{topic!r} is reserved: topics that begin with "_" are the brokers\' own, as '
            '_INBOX; begin with a letter or a digit, as "orders.created"',
            field="topic",
        )


def has_wildcard(pattern: str) -> bool:
    return "*" in pattern or ">" in pattern


def pattern_matcher(pattern: str) -> re.Pattern[str]:
    """
    A regular expression for a pattern: its `fullmatch` tells whether a topic (or type) matches.

    NATS semantics: "*" is exactly one token, ">" is one or more tokens at the end.
    """
    parts = []
    for token in pattern.split("."):
        if token == "*":
            parts.append(r"[^.]+")
        elif token == ">":
            parts.append(r".+")
        else:
            parts.append(re.escape(token))
    return re.compile(r"\.".join(parts))


def pattern_covers(pattern: str, other: str) -> bool:
    """Every topic of *other*, itself a topic or a pattern, is one of *pattern*."""
    open_end = other.endswith(">") and not pattern.endswith(">")
    return not open_end and pattern_matcher(pattern).fullmatch(other) is not None


def patterns_overlap(one: str, other: str) -> bool:
    """There is a topic that both patterns match."""
    left, right = one.split("."), other.split(".")
    for pair in zip(left, right, strict=False):
        if ">" in pair:
            return True
        if pair[0] != pair[1] and "*" not in pair:
            return False
    return len(left) == len(right)
