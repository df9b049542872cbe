"""The core NATS driver: at most once, and it says so."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, ClassVar

from sidecar.broker import Broker, Capabilities, Incoming, Interest, Source
from sidecar.brokers.nats.connection import Connection
from sidecar.brokers.nats.publisher import too_large
from sidecar.errors import (
    BrokerUnavailable,
    InvalidEvent,
    NotSupported,
    OutcomeUnknown,
    SidecarError,
    SourceLost,
)
from sidecar.event import Durability, Event, Outcome, Receipt
from sidecar.wire import nats as binding
from sidecar.wire.cloudevents import Defaults

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from sidecar.config import Nats as Settings


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
        self._waiting: deque[_Sending] = deque()
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
        sending = _Sending(self._encode(topic, events))
        if self._connection.live and not self._waiting:
            self._send(sending)
        else:
            self._waiting.append(sending)
            sending.future.add_done_callback(lambda _done: self._forget(sending))
        return sending.future

    def _encode(self, topic: str, events: Sequence[Event]) -> tuple[bytes, list[Outcome]]:
        frames, outcomes = [], list[Outcome]()
        limit = self._connection.max_payload
        for event in events:
            headers, payload = binding.encode(event, structured=self._structured)
            size = len(headers) + len(payload)
            if size > limit:
                outcomes.append(too_large(size, limit, self.name))
                continue
            frames.append(
                b"HPUB %b %d %d\r\n%b%b\r\n"
                % (topic.encode(), len(headers), size, headers, payload)
            )
            outcomes.append(Receipt(event.id, self.name, topic, Durability.SENT))
        return b"".join(frames), outcomes

    def _send(self, sending: _Sending) -> None:
        if not self._connection.write(sending.frames):
            self._waiting.append(sending)
            return
        self._unconfirmed.append(sending)
        if not self._ping_due:
            # One PING confirms all that is written in this turn of the loop.
            self._ping_due = True
            asyncio.get_running_loop().call_soon(self._ping)

    def _ping(self) -> None:
        self._ping_due = False
        confirmed = len(self._unconfirmed)
        if confirmed and self._connection.live:
            last = self._unconfirmed[-1]
            self._connection.confirm(lambda: self._confirmed(last))

    def _confirmed(self, last: _Sending) -> None:
        if last not in self._unconfirmed:
            return
        while self._unconfirmed:
            sending = self._unconfirmed.popleft()
            sending.finish()
            if sending is last:
                return

    def _send_waiting(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for sending in waiting:
            if not sending.future.cancelled():
                self._send(sending)

    def _forget(self, sending: _Sending) -> None:
        if sending.future.cancelled() and sending in self._waiting:
            self._waiting.remove(sending)

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
        source = NatsSource(self._connection, interest, self._settings.max_waiting_events)
        await source.open()
        return source

    async def close(self) -> None:
        self._fail_unconfirmed()
        while self._waiting:
            self._waiting.popleft().fail(BrokerUnavailable(f"broker {self.name!r} was closed"))
        await self._connection.close()


class _Sending:
    """One publish call: its frames, and what becomes of its events once the server read them."""

    __slots__ = ("frames", "future", "outcomes")

    def __init__(self, encoded: tuple[bytes, list[Outcome]]) -> None:
        self.frames, self.outcomes = encoded
        self.future: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()

    def finish(self) -> None:
        if not self.future.done():
            self.future.set_result(self.outcomes)

    def fail(self, error: SidecarError) -> None:
        if not self.future.done():
            self.future.set_result([error if isinstance(o, Receipt) else o for o in self.outcomes])


class NatsSource(Source):
    """A queue group's messages. What overflows the buffer is lost, and counted."""

    def __init__(self, connection: Connection, interest: Interest, capacity: int) -> None:
        self._connection = connection
        self._interest = interest
        self._capacity = capacity
        self._buffer: deque[Incoming | tuple[bytes, bytes | None, bytes]] = deque()
        self._arrived = asyncio.Event()
        self._closed = False
        self._numbers = 0
        self._held: dict[Hashable, Incoming] = {}
        self._key = ""
        self._dropped = 0

    async def open(self) -> None:
        self._key = await self._connection.subscribe(
            self._interest.topic, self._on_frame, queue=self._interest.name
        )

    @property
    def dropped(self) -> int:
        return self._dropped

    def _on_frame(self, subject: bytes, _reply: bytes, headers: bytes | None, data: bytes) -> None:
        if len(self._buffer) >= self._capacity:
            self._dropped += 1
            return
        self._buffer.append((subject, headers, data))
        self._arrived.set()

    async def fetch(self, limit: int) -> Sequence[Incoming]:
        while not self._buffer:
            if self._closed:
                raise SourceLost("closed")
            self._arrived.clear()
            await self._arrived.wait()
        taken = []
        for _ in range(min(limit, len(self._buffer))):
            item = self._buffer.popleft()
            incoming = item if isinstance(item, Incoming) else self._incoming(*item)
            self._held[incoming.handle] = incoming
            taken.append(incoming)
        return taken

    def _incoming(self, subject: bytes, headers: bytes | None, data: bytes) -> Incoming:
        self._numbers += 1
        topic = subject.decode()
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

    async def close(self) -> None:
        self._closed = True
        self._arrived.set()
        await self._connection.unsubscribe(self._key)
