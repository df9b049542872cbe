"""What the client is asked and answers: frozen values, and the error of a whole call."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Literal

import msgspec

from sidecar.event import NOTHING, Event, Position

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

StartAt = Literal["earliest", "latest"] | datetime | Position
"""Where a subscription starts or is moved to. A datetime has a time zone."""


class Failure(msgspec.Struct, frozen=True):
    """Why one event or one settlement of a batch failed. *retry_after* is in seconds."""

    reason: str
    """Stable and meant for programs, as "EVENT_TOO_LARGE"."""
    message: str
    retryable: bool = False
    retry_after: float | None = None
    code: str = "UNKNOWN"
    """The name of the gRPC status that the same failure has when it fails a whole call."""
    metadata: Mapping[str, str] = NOTHING


class PublishFailed(Failure, frozen=True):
    """One event was not published; with OUTCOME_UNKNOWN it may have been."""


class SettleFailed(Failure, frozen=True):
    """One settlement did not count."""

    token: str = ""


class CallFailed(Exception):
    """
    A call failed as a whole.

    *code* is the name of the gRPC status. *reason* is the sidecar's own, as "SUBSCRIPTION_MISSING";
    it is empty when no sidecar answered, as when it is not running (code "UNAVAILABLE").
    """

    def __init__(
        self,
        code: str,
        reason: str,
        message: str,
        *,
        retryable: bool,
        metadata: Mapping[str, str] = NOTHING,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{reason or code}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.retryable = retryable
        self.metadata = metadata
        self.retry_after = retry_after
        """Seconds to wait before the next try, where the sidecar says so."""


class RetryRule(msgspec.Struct, frozen=True):
    """What is done about deliveries that failed for a certain reason; the first that matches decides."""

    reason: str
    """The reason of a nack, as far as its first colon; "*" and "?" as in file names."""
    action: Literal["retry", "reject", "retry_uncounted"]
    delay_seconds: float | None = None
    """Instead of the policy's, unless the nack names one."""


class RetryPolicy(msgspec.Struct, frozen=True):
    """How failed deliveries are tried again. None: the configuration's default."""

    max_attempts: int | None = None
    initial_seconds: float | None = None
    max_seconds: float | None = None
    multiplier: float | None = None
    jitter: float | None = None
    total_seconds: float | None = None
    max_crashes: int | None = None
    """An event that the app had when it crashed so often is a dead letter."""
    rules: Sequence[RetryRule] = ()


class Filter(msgspec.Struct, frozen=True):
    """
    A condition on the attributes and extensions of an event, made by `exact`, `prefix` and `suffix`.

    Several attributes in one of them must all match. Combine them with "&", "|" and "~":

        Filter.exact(type="order.created") & ~Filter.prefix(subject="test/")
    """

    dialect: Literal["exact", "prefix", "suffix", "all", "any", "not"]
    attributes: Mapping[str, str] = NOTHING
    parts: Sequence[Filter] = ()

    @classmethod
    def exact(cls, **attributes: str) -> Filter:
        """Each attribute has this value."""
        return cls("exact", attributes)

    @classmethod
    def prefix(cls, **attributes: str) -> Filter:
        """Each attribute's value begins with this."""
        return cls("prefix", attributes)

    @classmethod
    def suffix(cls, **attributes: str) -> Filter:
        """Each attribute's value ends with this."""
        return cls("suffix", attributes)

    def __and__(self, other: Filter) -> Filter:
        return self._joined("all", other)

    def __or__(self, other: Filter) -> Filter:
        return self._joined("any", other)

    def __invert__(self) -> Filter:
        return Filter("not", parts=(self,))

    def _joined(self, dialect: Literal["all", "any"], other: Filter) -> Filter:
        """In a row, `a & b & c` is one list of three."""
        first = self.parts if self.dialect == dialect else (self,)
        return Filter(dialect, parts=(*first, other))


class SubscriptionSpec(msgspec.Struct, frozen=True):
    """A subscription described by the app; what is left out has the configuration's default."""

    name: str
    """Durable, and shared by all who use it."""
    topic: str
    """A topic, or a pattern with "*" (one token) and ">" (the rest)."""
    broker: str = ""
    ordering: Literal["", "key", "key_per_replica", "none"] = ""
    max_in_flight: int = 0
    lease_seconds: float | None = None
    retry: RetryPolicy | None = None
    dead_letter_topic: str = ""
    dead_letter_broker: str = ""
    start: StartAt | None = None
    """For a new subscription only; one that exists goes on where it was."""
    event_types: Sequence[str] = ()
    max_in_flight_bytes: int = 0
    filters: Sequence[Filter] = ()
    """Only events for which all are true."""
    expired: Literal["", "dead_letter", "drop"] = ""
    """What becomes of an event past its extension `expirytime`."""
    duplicate_window_seconds: float | None = None
    """An event that was acked here is not handed over again within this time."""
    watchdog_seconds: float | None = None
    """Without progress for so long, though there are events, it is subscribed anew; 0: never."""


class Opened(msgspec.Struct, frozen=True):
    """What the sidecar says when a subscription is open."""

    subscription: str
    broker: str
    topic: str
    lease_seconds: float
    """Settle or extend each delivery within this time."""
    max_attempts: int


class Delivery(msgspec.Struct, frozen=True):
    """One attempt (1 for the first) to hand one event to the app. Settle it by its token."""

    token: str
    event: Event
    topic: str
    attempt: int
    position: Position | None


class BrokerStatus(msgspec.Struct, frozen=True):
    name: str
    type: str
    connected: bool
    since: datetime | None
    detail: str
    reconnects: int
    pending_events: int


class RouteStatus(msgspec.Struct, frozen=True):
    topic: str
    event_type: str
    broker: str


class PartitionLag(msgspec.Struct, frozen=True):
    topic: str
    partition: int
    lag_events: int


class PushStatus(msgspec.Struct, frozen=True):
    """*circuit* is closed, open or half_open; *detail* says why it is not closed."""

    url: str
    circuit: str
    detail: str
    concurrency: int
    requests: int


class SubscriptionStatus(msgspec.Struct, frozen=True):
    """*state* is connecting, active, paused or draining; *lag_events* is None where unknown."""

    name: str
    topic: str
    broker: str
    ordering: str
    state: str
    detail: str
    consumers: int
    in_flight_events: int
    waiting_events: int
    retry_waiting_events: int
    lag_events: int | None
    declared: bool
    partitions: Sequence[PartitionLag] = ()
    """*lag_events* by partition, where the broker has partitions."""
    held_bytes: int = 0
    reestablished: int = 0
    """How often the watchdog subscribed it anew."""
    push: PushStatus | None = None
    standby: bool = False
    """Another sidecar has the events; this one takes over when that leaves."""


class Status(msgspec.Struct, frozen=True):
    """What the sidecar is connected to, routes where, and how its subscriptions do."""

    version: str
    app: str
    started_at: datetime | None
    ready: bool
    not_ready: Sequence[str]
    draining: bool
    brokers: Sequence[BrokerStatus]
    routes: Sequence[RouteStatus]
    subscriptions: Sequence[SubscriptionStatus]


class DeadLetterFilter(msgspec.Struct, frozen=True):
    """Which dead letters; all that is set must hold. Datetimes have a time zone."""

    ids: Sequence[str] = ()
    subscription: str = ""
    reasons: Sequence[str] = ()
    after: datetime | None = None
    """Stored at or after."""
    before: datetime | None = None
    """Stored before."""
    event_type: str = ""
    """With wildcards, as in topics; so is *topic*, where the event came from."""
    key: str = ""
    error_contains: str = ""
    topic: str = ""
    dead_letter_broker: str = ""
    dead_letter_topic: str = ""
    """With the broker: look here, instead of where the subscriptions' dead letters go."""


class DeadLetter(msgspec.Struct, frozen=True):
    """An event that could not be delivered. *state* is open, claimed, redriven or discarded."""

    id: str
    event: Event
    """As it was published; without its data in a list, unless that was asked for."""
    subscription: str
    reason: str
    error: str
    broker: str
    """Where it came from, with *topic* and *position*."""
    topic: str
    position: Position | None
    attempts: int
    first_failed_at: datetime | None
    last_failed_at: datetime | None
    generation: int
    """How often it has been a dead letter: 1 for the first time."""
    dead_letter_broker: str
    dead_letter_topic: str
    dead_letter_position: Position
    stored_at: datetime | None
    state: str
    data_bytes: int


class RedriveProgress(msgspec.Struct, frozen=True):
    """How far a redrive or discard is; the last one is *finished*."""

    scanned: int
    """Dead letters looked at, of *total*, as far as that is known."""
    matched: int
    """Of them, those that the filter wants and that are open."""
    done: int
    failed: int
    waiting: int
    """Held by another redrive or discard, of which nothing is heard; it is waited for."""
    total: int
    failure: Failure | None
    """Of the last one that failed."""
    finished: bool


def new_event(
    type: str,  # noqa: A002 - the attribute's name
    data: object = None,
    *,
    id: str = "",  # noqa: A002
    source: str = "",
    key: str = "",
    subject: str = "",
    content_type: str = "",
    time_ns: int = 0,
    extensions: Mapping[str, str] = NOTHING,
    headers: Mapping[str, str] = NOTHING,
) -> Event:
    """
    An event to publish. What is empty is filled in by the sidecar: id, source, time.

    *data*: bytes as they are, None for no data; anything else becomes JSON, with its content type.
    """
    if data is not None and not isinstance(data, bytes):
        data = msgspec.json.encode(data)
        content_type = content_type or "application/json"
    return Event(
        id=id,
        source=source,
        type=type,
        time_ns=time_ns,
        data=data,
        key=key,
        content_type=content_type,
        subject=subject,
        extensions=extensions,
        headers=headers,
    )
