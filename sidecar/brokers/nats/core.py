"""The core NATS driver: at most once, and it says so."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import msgspec

from sidecar.broker import Broker, Capabilities, Incoming, Interest, Source
from sidecar.brokers.nats.connection import Connection
from sidecar.brokers.nats.publisher import too_large
from sidecar.errors import (
    BrokerUnavailable,
    InvalidEvent,
    InvalidTopic,
    NotSupported,
    OutcomeUnknown,
    SidecarError,
    SourceLost,
)
from sidecar.event import Durability, Event, Outcome, Receipt, check_topic, has_wildcard
from sidecar.wire import nats as binding
from sidecar.wire.cloudevents import Defaults

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from sidecar.broker import Failures
    from sidecar.config import Nats as Settings


_FLUSH_SECONDS = 2.0


class NatsBroker(Broker):
    """
    Core NATS. A receipt says `sent`: the server has read the event, nobody stored it.

    Events published while the server is away wait, bounded by the publisher; those under way when
    the connection breaks fail as OUTCOME_UNKNOWN, because sending them again could double them.
    """

    type: ClassVar[str] = "nats"
    capabilities: ClassVar[Capabilities] = Capabilities(
        durability=Durability.SENT,
        positions=False,
        redelivers=False,
        deduplicates=False,
        seeks=False,
        lag=False,
        dead_letters=False,
        deals=True,
    )

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        client_name: str,
        embedded: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(name)
        self._settings = settings
        self._structured = settings.content_mode == "structured"
        self._connection = Connection(settings, client_name=client_name, embedded=embedded)
        self._connection.on_state = lambda state: self.on_state(state)  # noqa: PLW0108 - set later
        self._connection.on_live.append(self._send_waiting)
        self._connection.on_lost.append(self._fail_unconfirmed)
        self._waiting: dict[_Sending, None] = {}
        self._unconfirmed: deque[_Sending] = deque()
        self._ping_due = False

    async def connect(self) -> None:
        await self._connection.connect()

    async def ended(self) -> None:
        await self._connection.ended()

    @property
    def max_event_bytes(self) -> int | None:
        return self._connection.max_payload

    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        sending = _Sending(topic, events)
        if self._connection.live and not self._waiting:
            self._send(sending)
        else:
            self._wait(sending)
        return sending.future

    def _wait(self, sending: _Sending) -> None:
        """Until the connection is back, or the caller gives up."""
        self._waiting[sending] = None
        sending.future.add_done_callback(lambda _done: self._waiting.pop(sending, None))

    def _send(self, sending: _Sending) -> None:
        frames = self._encode(sending)
        if not self._connection.write(frames):
            self._wait(sending)
            return
        self._unconfirmed.append(sending)
        if not self._ping_due:
            # One PING confirms all that is written in this turn of the loop.
            self._ping_due = True
            asyncio.get_running_loop().call_soon(self._ping)

    def _encode(self, sending: _Sending) -> bytes:
        """The frames of those events that the server takes; what is too large has its outcome."""
        frames, outcomes = [], list[Outcome]()
        limit = self._connection.max_payload
        topic = sending.topic.encode()
        for event in sending.events:
            headers, payload = binding.encode(event, structured=self._structured)
            size = len(headers) + len(payload)
            if size > limit:
                outcomes.append(too_large(size, limit, self.name))
                continue
            frames.append(
                b"HPUB %b %d %d\r\n%b%b\r\n" % (topic, len(headers), size, headers, payload)
            )
            outcomes.append(Receipt(event.id, self.name, sending.topic, Durability.SENT))
        sending.outcomes = outcomes
        return b"".join(frames)

    def _ping(self) -> None:
        self._ping_due = False
        if self._unconfirmed:
            last = self._unconfirmed[-1]
            self._connection.confirm(lambda: self._confirmed(last))

    def _confirmed(self, last: _Sending) -> None:
        """The server has read *last* and what was written before. Not called on another connection."""
        while self._unconfirmed:
            sending = self._unconfirmed.popleft()
            sending.finish()
            if sending is last:
                return

    def _send_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for sending in waiting:
            if not sending.future.done():
                self._send(sending)

    def _fail_unconfirmed(self) -> None:
        while self._unconfirmed:
            self._unconfirmed.popleft().fail(
                OutcomeUnknown(
                    "the connection to NATS broke before the server had read the event",
                    broker=self.name,
                )
            )

    async def subscribe(self, interest: Interest) -> Source:
        if interest.start.time_ns is not None or interest.start.position is not None:
            raise NotSupported(
                f"broker {self.name!r} is core NATS: it keeps no events to start from",
                broker=self.name,
                subscription=interest.name,
            )
        source = NatsSource(
            self._connection,
            interest,
            max_events=self._settings.max_waiting_events,
            max_bytes=self._settings.max_waiting_bytes,
        )
        await source.open()
        return source

    async def close(self) -> None:
        self._fail_unconfirmed()
        for sending in list(self._waiting):
            sending.fail(BrokerUnavailable(f"broker {self.name!r} was closed", broker=self.name))
        await self._connection.close()


class _Sending:
    """One publish call: its events, and what becomes of them once the server read them."""

    __slots__ = ("events", "future", "outcomes", "topic")

    def __init__(self, topic: str, events: Sequence[Event]) -> None:
        self.topic = topic
        self.events = events
        self.outcomes: list[Outcome] = []
        self.future: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()

    def finish(self) -> None:
        if not self.future.done():
            self.future.set_result(self.outcomes)

    def fail(self, error: SidecarError) -> None:
        """All that was not refused before fails with *error*."""
        refused = {i: o for i, o in enumerate(self.outcomes) if isinstance(o, SidecarError)}
        if not self.future.done():
            self.future.set_result([refused.get(i, error) for i in range(len(self.events))])


@lru_cache(maxsize=4096)
def _is_topic(subject: bytes) -> bool:
    try:
        check_topic(subject.decode(errors="replace"))
    except InvalidTopic:
        return False
    return True


class NatsSource(Source):
    """A queue group's messages. What overflows the buffer is lost, and counted."""

    def __init__(
        self, connection: Connection, interest: Interest, *, max_events: int, max_bytes: int
    ) -> None:
        self._connection = connection
        self._interest = interest
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._bytes = 0
        """Of the frames in the buffer; what was given back is bounded by what was fetched."""
        self._buffer: deque[Incoming | tuple[bytes, bytes | None, bytes]] = deque()
        self._arrived = asyncio.Event()
        self._closed = False
        self._numbers = 0
        self._held: dict[Hashable, Incoming] = {}
        self._key = ""
        self._dropped = 0

    async def open(self) -> None:
        self._connection.on_closed.append(self._end)
        self._key = await self._connection.subscribe(
            self._interest.topic,
            self._on_any_frame if has_wildcard(self._interest.topic) else self._on_frame,
            queue=self._interest.name,
        )
        # Who publishes on another connection from now on is to be heard.
        await self._connection.flushed(_FLUSH_SECONDS)

    @property
    def dropped(self) -> int:
        return self._dropped

    def _on_any_frame(
        self, subject: bytes, reply: bytes, headers: bytes | None, data: bytes
    ) -> None:
        """A pattern matches more than topics: what NATS says to itself is no event of ours."""
        if _is_topic(subject):
            self._on_frame(subject, reply, headers, data)

    def _on_frame(self, subject: bytes, _reply: bytes, headers: bytes | None, data: bytes) -> None:
        size = len(data) + len(headers or b"")
        if len(self._buffer) >= self._max_events or self._bytes + size > self._max_bytes:
            self._dropped += 1
            return
        self._bytes += size
        self._buffer.append((subject, headers, data))
        self._arrived.set()

    async def fetch(self, limit: int) -> Sequence[Incoming]:
        while True:
            if self._closed:
                raise SourceLost("closed", subscription=self._interest.name)
            if self._buffer:
                break
            self._arrived.clear()
            await self._arrived.wait()
        taken: list[Incoming] = []
        room = self._interest.max_in_flight_bytes
        while self._buffer and len(taken) < limit and (room > 0 or not taken):
            item = self._buffer.popleft()
            if isinstance(item, Incoming):
                incoming = item
                room -= incoming.event.size if incoming.event is not None else len(incoming.raw)
            else:
                size = len(item[2]) + len(item[1] or b"")
                self._bytes -= size
                room -= size
                incoming = self._incoming(*item)
            self._held[incoming.handle] = incoming
            taken.append(incoming)
        return taken

    def _incoming(self, subject: bytes, headers: bytes | None, data: bytes) -> Incoming:
        self._numbers += 1
        topic = subject.decode(errors="replace")
        event, problem = None, ""
        try:
            event = binding.decode(headers, data, Defaults(source=f"/{topic}", type=topic))
        except InvalidEvent as error:
            problem = error.message
        return Incoming(
            topic=topic,
            handle=self._numbers,
            identity=None,
            event=event,
            problem=problem,
            raw=b"" if event is not None else data,
        )

    def ack(self, handles: Sequence[Hashable]) -> None:
        for handle in handles:
            self._held.pop(handle, None)

    def failed(self, handle: Hashable, failures: Failures) -> None:
        """Known in this process only; it is the only one that has the event."""
        incoming = self._held.get(handle)
        if incoming is not None:
            self._held[handle] = msgspec.structs.replace(incoming, failures=failures)

    def release(self, handles: Sequence[Hashable]) -> None:
        """Back into our own buffer: there is no other place."""
        back = [self._held.pop(h) for h in handles if h in self._held]
        self._buffer.extendleft(reversed(back))
        if back:
            self._arrived.set()

    def hold(self, handles: Sequence[Hashable]) -> None:
        """Nobody else could get them."""

    async def lag(self) -> int | None:
        return None

    def _end(self) -> None:
        self._closed = True
        self._arrived.set()

    async def close(self) -> None:
        self._end()
        if self._end in self._connection.on_closed:
            self._connection.on_closed.remove(self._end)
        await self._connection.unsubscribe(self._key, seconds=0)
