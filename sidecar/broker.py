"""The contract of a broker driver: all that a driver's author reads."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import msgspec

from sidecar.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from sidecar.event import Durability, Event, Outcome, Position


class Capabilities(msgspec.Struct, frozen=True):
    """What a driver promises; the conformance suite holds it to each."""

    durability: Durability
    """The best a receipt of this broker can name."""
    positions: bool
    """Receipts and deliveries say where the event is."""
    redelivers: bool
    """What is not acked comes again, also after the sidecar's end."""
    deduplicates: bool
    """The same (source, id) published again within the broker's window gives the same position."""
    seeks: bool
    """A subscription can start at, and be moved to, a position or a time."""
    lag: bool
    """How many events a subscription has not fetched is known."""
    dead_letters: bool
    """Keeps dead letters: an event stored with nobody subscribed is still there later."""
    deals: bool
    """Deals the events of a subscription out to sidecars one by one, as each has room; else each
    sidecar has partitions to itself."""
    browses: bool = False
    """What is stored can be read without a subscription: `logs`, `read`."""
    deletes: bool = False
    """What is stored can be deleted, one by one: `delete`."""


class BrokerState(msgspec.Struct, frozen=True):
    """What a driver says of its connection."""

    connected: bool
    detail: str
    """The server, or why there is none."""


class Start(msgspec.Struct, frozen=True):
    """
    Where a new subscription starts, or an old one is moved to.

    At most one of *time_ns* and *position* is set; with neither, *latest* decides: only what
    comes from now on, or everything the broker still has.
    """

    latest: bool = False
    time_ns: int | None = None
    position: Position | None = None


class Failures(msgspec.Struct, frozen=True, gc=False):
    """What is recorded of an event whose deliveries failed, for whoever gets it next."""

    attempts: int = 0
    """Deliveries that failed, or that a crash of the app interrupted."""
    crashes: int = 0
    """Those of them in which the app crashed; at most MAX_CRASHES are told apart."""
    first_ns: int = 0
    """When the first of them failed, ns since 1970; 0: unknown. Kept to the second at least."""


NO_FAILURES = Failures()
MAX_CRASHES = 15


class Log(msgspec.Struct, frozen=True):
    """One sequence of stored events, as it was when it was asked for: a stream, or a partition."""

    topic: str
    """The topic of a partition; of a stream, the pattern that was asked for."""
    partition: int | None
    """None: it is a stream."""
    stream: str
    """Empty: it is a partition."""
    first: int
    """The lowest sequence or offset that may be there."""
    end: int
    """Above the highest one. What is stored later is at this or above."""
    incarnation: str = ""
    """Another one means other events, as of a topic that was deleted and made anew."""
    may_have_gaps: bool = False
    """Events go from its middle too, as those of a work queue when they are acked."""
    duplicate_seconds: float = 0.0
    """For so long the broker knows what it stored, also when it is gone; 0: it does not say."""


class StoredEvent(msgspec.Struct, frozen=True, gc=False):
    """One event of a log, as `Broker.read` gives it."""

    topic: str
    number: int
    """Its sequence or offset in its log."""
    stored_ns: int
    """When the broker stored it, ns since 1970."""
    event: Event | None
    """None: the bytes are not an event."""


class Interest(msgspec.Struct, frozen=True):
    """What a driver needs to know of a subscription."""

    name: str
    """Durable, and shared by all sidecars that use it."""
    topic: str
    """A topic or a pattern."""
    max_in_flight: int
    """Events that the sidecar holds at most: never prefetch more."""
    start: Start = Start()
    max_in_flight_bytes: int = 32 * 1024 * 1024
    """The same in bytes, but for one event; a driver's own prefetch is no more either."""
    ordered: bool = False
    """The events of one key are to be handed out in order, over all sidecars that share it."""


class Incoming(msgspec.Struct, frozen=True):
    """One event as it came from a broker, with what is needed to answer for it."""

    topic: str
    handle: Hashable
    """The driver's own, for ack, release and hold. Good until acked, released or the source ends."""
    identity: Hashable
    """Equal for each delivery of the same stored copy, as its sequence; None where there is none."""
    event: Event | None
    """None: the bytes are not an event, see *problem*."""
    position: Position | None = None
    failures: Failures = NO_FAILURES
    """Of its deliveries so far, here or in another sidecar, as `Source.failed` recorded."""
    problem: str = ""
    raw: bytes = b""
    """The bytes as they came, when they are not an event."""


class Source(ABC):
    """
    The feed of one subscription, from one broker to one sidecar.

    Settling verbs are synchronous: they note or write, and never wait. What they could not get to
    the broker (the connection broke) comes again as a redelivery, or is sent when it is back.
    """

    @abstractmethod
    async def fetch(self, limit: int) -> Sequence[Incoming]:
        """
        Wait for events; return at least one and at most *limit*, in the broker's order.

        Cancelled, it loses nothing: what had arrived is returned by the next call. While the broker
        is away it waits. Raises SourceLost when the feed is gone for good (the consumer was
        deleted), TopicMissing and BrokerRefused when subscribing again will not help either.
        """

    @abstractmethod
    def ack(self, handles: Sequence[Hashable]) -> None:
        """These events are done; the broker need not keep them for this subscription."""

    @abstractmethod
    def failed(self, handle: Hashable, failures: Failures) -> asyncio.Future[None] | None:
        """
        A delivery of this event failed; with it, these have so far. It will be handed out again.

        Recorded where another sidecar that gets the event sees it, if the broker can; never for
        what was only fetched. The future is done when it is recorded, or cannot be any more: the
        app may not get the event again before. None: there is nothing to wait for.
        """

    @abstractmethod
    def release(self, handles: Sequence[Hashable]) -> None:
        """Give these back untouched: the broker hands them out again, here or elsewhere, now."""

    @abstractmethod
    def hold(self, handles: Sequence[Hashable]) -> None:
        """We still have these: keep them from being handed to others. Called every few seconds."""

    on_leaving: Callable[[Sequence[Hashable]], asyncio.Future[None] | None] = staticmethod(
        lambda _identities: None
    )
    """
    Told of events, by identity, that are to be another sidecar's; set by the owner.

    It hands out no more of them, and what the app has of them may be settled until the future is
    done, which is soon. None: the app has none.
    """

    on_revoked: Callable[[Sequence[Hashable]], None] = staticmethod(lambda _identities: None)
    """Told of events, by identity, that are another sidecar's from now on; set by the owner."""

    @property
    def hold_seconds(self) -> float | None:
        """Call hold for what is still here at this interval; None: not needed."""
        return None

    @property
    def rest_seconds(self) -> float:
        """Unused for so long, it is to be closed, so that other sidecars get what it holds."""
        return 1.0

    @property
    def standby(self) -> bool:
        """Another sidecar has all events for now; this one takes over when that one leaves."""
        return False

    @property
    def dropped(self) -> int:
        """Events lost since the source was opened; 0 for ever where the broker redelivers."""
        return 0

    @abstractmethod
    async def lag(self) -> int | None:
        """Events at the broker that were not fetched by anyone, or None. Raises BrokerUnavailable."""

    async def due(self) -> int | None:
        """
        Events that this source could fetch right now, or None where that is unknown.

        The same as lag, but for what the broker has given to others. Raises BrokerUnavailable.
        """
        return await self.lag()

    async def lag_by_partition(self) -> Mapping[tuple[str, int], int]:
        """The same by topic and partition, where the broker has partitions. Raises BrokerUnavailable."""
        return {}

    async def stop(self, give_back: Sequence[Hashable]) -> None:
        """
        Receive no more (fetch is not called again), and give these back, untouched.

        They, and behind them what had arrived and was not fetched, come again in this order. What
        is released while more is being received would come back to where it was, in another
        order. Ack, release and hold are good until close. Never raises; bounded by two seconds.
        """
        self.release(give_back)

    @abstractmethod
    async def close(self) -> None:
        """
        Stop receiving and flush acks. What was fetched and neither acked nor released comes again.

        Never raises; bounded by two seconds when the broker is away.
        """


class Broker(ABC):
    """
    One connection to one broker. Safe to use from many tasks of one event loop.

    Life: made (binds nothing), connect until it succeeds once, then used; the driver reconnects by
    itself, for ever, and says so through *on_state*. Errors leave it as sidecar.errors, raised from
    the client library's.
    """

    type: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    dead_letter_topic: ClassVar[str] = "dlq.{topic}"
    marks_topic: ClassVar[str] = "sidecar-dead-letter-marks"
    """Where it is recorded what was done to dead letters; see `keep`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.on_state: Callable[[BrokerState], None] = lambda _state: None
        """Told of every change of the connection; set by the owner before connect."""

    @abstractmethod
    async def connect(self) -> None:
        """
        Connect, once. Raises BrokerUnavailable when that fails: call again later.

        Raises BrokerRefused when it will fail for ever (credentials, a stream that differs from its
        declaration); it may be called again all the same.
        """

    async def ended(self) -> None:
        """Return when the driver gave up reconnecting (credentials changed): connect again then."""
        await asyncio.get_running_loop().create_future()

    @abstractmethod
    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        """
        Hand *events* over now, in order; the future has one outcome per event, in that order.

        Submission is synchronous: two calls one after the other are two batches in that order, also
        over a reconnect. The future never fails because of one bad event, and each receipt's
        durability has been reached. While the broker is away events wait, so bound them, and cancel
        the future when their time is up: they are then sent no more, but may have arrived before.
        (What a client library has in its hands when the broker goes away may still arrive until
        the configured time-out.)

        *broker_ids* replace (source, id) as what the broker tells duplicates by.
        """

    @abstractmethod
    async def subscribe(self, interest: Interest) -> Source:
        """
        Open the feed of a subscription, making it at the broker if it is new.

        Raises BrokerUnavailable, TopicMissing, NotSupported, BrokerRefused.
        """

    async def seek(self, interest: Interest, to: Start) -> None:
        """
        Move a subscription, for all who share it. Its open sources raise SourceLost from fetch.

        Raises BrokerUnavailable, NotSupported, BrokerRefused.
        """
        raise NotImplementedError

    # -- what is stored, without a subscription (capability `browses`)

    async def logs(self, pattern: str) -> Sequence[Log]:
        """
        The logs that may hold events on topics of *pattern*; empty when there are none.

        Raises BrokerUnavailable, NotSupported, BrokerRefused.
        """
        raise NotSupported(f"broker {self.name!r} keeps no events to look at", broker=self.name)

    async def read(self, log: Log, start: int, limit: int) -> Sequence[StoredEvent]:
        """
        Events of *log* from number *start* on, ascending, up to *limit* and below `log.end`.

        None: there are no more. Fewer than *limit* says nothing: an answer is bounded in bytes too
        (some 8 MiB, but for one event), so ask on above the last one. Of a stream, only what is on
        the log's topics.
        Raises BrokerUnavailable, BrokerRefused.
        """
        raise NotSupported(f"broker {self.name!r} keeps no events to look at", broker=self.name)

    async def keep(self, topic: str) -> None:  # noqa: B027 - most keep everything
        """
        See to it that events on *topic* can be stored, in one order, and stay for ever.

        Makes its place where the settings allow that; what somebody else made is taken as it is.
        Raises TopicMissing, saying what to make; BrokerUnavailable, BrokerRefused.
        """

    async def delete(self, log: Log, numbers: Sequence[int]) -> None:
        """
        Delete these events of *log* (capability `deletes`); one that is not there is no error.

        Raises BrokerUnavailable, NotSupported, BrokerRefused.
        """
        raise NotSupported(f"broker {self.name!r} deletes no single events", broker=self.name)

    @abstractmethod
    async def close(self) -> None:
        """End the connection and every source. Publishes under way fail. Never raises."""

    @property
    def max_event_bytes(self) -> int | None:
        """The largest message the broker takes, all of it, when connected and known."""
        return None
