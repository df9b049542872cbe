"""The feed of a JetStream subscription: pull consumers, asked for as much as there is room for."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from typing import TYPE_CHECKING

from sidecar.broker import Incoming, Interest, Source
from sidecar.errors import BrokerUnavailable, InvalidEvent, SidecarError, SourceLost
from sidecar.event import Position
from sidecar.wire import nats as binding
from sidecar.wire.cloudevents import Defaults

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from sidecar.brokers.nats.connection import Connection

log = logging.getLogger(__name__)

PULL_SECONDS = 30
HEARTBEAT_SECONDS = 5
"""The server says that a pull is alive this often; two missed ones and we ask again."""

_V1_TOKENS = 9
"""Tokens of `$JS.ACK.<stream>.<consumer>.…`; since v2 a domain and an account hash come first."""


class Feed:
    """One consumer of one stream: what was asked of it, and what it still owes."""

    __slots__ = ("consumer", "owed", "stream", "subject")

    def __init__(self, stream: str, consumer: str) -> None:
        self.stream = stream
        self.consumer = consumer
        self.subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self.owed = 0


class StreamSource(Source):
    """
    Pulls from the consumers of a subscription, one for each stream that its topic touches.

    Acks are written, not awaited: one that is lost with its connection comes back as a redelivery,
    which the delivery layer knows again by its identity.
    """

    def __init__(
        self, connection: Connection, interest: Interest, feeds: Sequence[Feed], *, ack_wait: float
    ) -> None:
        self._connection = connection
        self._interest = interest
        self._feeds = feeds
        self._hold_seconds = ack_wait / 3
        self._buffer: deque[tuple[bytes, bytes, bytes | None, bytes]] = deque()
        self._by_stream = {feed.stream.encode(): feed for feed in feeds}
        self._arrived = asyncio.Event()
        self._lost: SidecarError | None = None
        self._unsent: list[bytes] = []
        self._last_heard = 0.0
        self._generation = 0
        self._inbox = connection.new_inbox()
        self._key = ""

    async def open(self) -> None:
        self._key = await self._connection.subscribe(self._inbox + ".*", self._on_frame)
        self._connection.on_live.append(self._on_live)
        self._connection.on_lost.append(self._on_lost)

    @property
    def hold_seconds(self) -> float | None:
        return self._hold_seconds

    # -- receiving

    async def fetch(self, limit: int) -> Sequence[Incoming]:
        loop = asyncio.get_running_loop()
        self._last_heard = max(self._last_heard, loop.time())
        while not self._buffer:
            if self._lost is not None:
                raise self._lost
            self._ask(limit)
            self._arrived.clear()
            try:
                async with asyncio.timeout(2 * HEARTBEAT_SECONDS):
                    await self._arrived.wait()
            except TimeoutError:
                await self._check_silence(loop.time())
        count = min(limit, len(self._buffer))
        taken = [self._buffer.popleft() for _ in range(count)]
        self._ask(limit - count)
        return [self._incoming(*frame) for frame in taken]

    def _ask(self, room: int) -> None:
        """Ask for what there is room for, in few requests: a quarter of the window at a time."""
        if not self._connection.live:
            return
        room -= len(self._buffer) + sum(feed.owed for feed in self._feeds)
        if room <= 0:
            return
        quarter = max(1, self._interest.max_in_flight // 4)
        share, rest = divmod(room, len(self._feeds))
        frames = []
        for index, feed in enumerate(self._feeds):
            # Every feed is owed at least one: a stream must not starve behind a busy neighbour.
            batch = max(share + (index < rest), 1 if not feed.owed else 0)
            if batch <= 0 or (feed.owed and batch < quarter):
                continue
            feed.owed += batch
            body = json.dumps(
                {
                    "batch": batch,
                    "expires": PULL_SECONDS * 1_000_000_000,
                    "idle_heartbeat": HEARTBEAT_SECONDS * 1_000_000_000,
                }
            )
            reply = f"{self._inbox}.{self._generation}-{index}"
            frames.append(f"PUB {feed.subject} {reply} {len(body)}\r\n{body}\r\n")
        if frames:
            self._connection.write("".join(frames).encode())

    def _on_frame(self, subject: bytes, reply: bytes, headers: bytes | None, data: bytes) -> None:
        if reply.startswith(b"$JS.ACK."):
            self._buffer.append((subject, reply, headers, data))
            tokens = reply.split(b".", 5)
            feed = self._by_stream.get(tokens[2]) or self._by_stream.get(tokens[4])
            if feed is not None and feed.owed:
                feed.owed -= 1
            self._arrived.set()
            return
        self._last_heard = asyncio.get_running_loop().time()
        if headers is not None:
            self._on_status(subject, headers)

    def _on_status(self, subject: bytes, headers: bytes) -> None:
        """A pull ended: it expired, or its consumer did something. "100" only says it lives."""
        status = headers[9:12]
        if status == b"100":
            return
        generation, _, index = subject.rpartition(b".")[2].partition(b"-")
        if int(generation) != self._generation:  # of a pull that we gave up
            return
        feed = self._feeds[int(index)]
        feed.owed = max(0, feed.owed - _pending_messages(headers))
        if status == b"409" and b"Consumer Deleted" in headers:
            self._lost = SourceLost(
                f"the consumer of subscription {self._interest.name!r} was deleted or moved",
                subscription=self._interest.name,
            )
        elif status == b"503":
            self._lost = SourceLost(
                f"the consumer of subscription {self._interest.name!r} is not there",
                subscription=self._interest.name,
            )
        self._arrived.set()

    async def _check_silence(self, now: float) -> None:
        """No event and no heartbeat though we asked: the server forgot us, so ask anew."""
        if not self._connection.live or now - self._last_heard < 2 * HEARTBEAT_SECONDS:
            return
        for feed in self._feeds:
            try:
                answer = await self._connection.call(
                    f"$JS.API.CONSUMER.INFO.{feed.stream}.{feed.consumer}", None
                )
            except BrokerUnavailable:
                return
            if "error" in answer:
                raise SourceLost(
                    f"the consumer of subscription {self._interest.name!r} is gone: "
                    f"{answer['error'].get('description', '')}",
                    subscription=self._interest.name,
                )
        log.warning("subscription %s: no sign of its pulls, asking again", self._interest.name)
        self._forget_pulls()

    def _forget_pulls(self) -> None:
        self._generation += 1
        for feed in self._feeds:
            feed.owed = 0

    def _on_live(self) -> None:
        self._forget_pulls()
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            self._connection.write(b"".join(unsent))
        self._arrived.set()

    def _on_lost(self) -> None:
        self._forget_pulls()

    def _incoming(
        self, subject: bytes, reply: bytes, headers: bytes | None, data: bytes
    ) -> Incoming:
        tokens = reply.split(b".")
        first = 2 if len(tokens) == _V1_TOKENS else 4
        stream = tokens[first].decode()
        sequence = int(tokens[first + 3])
        topic = subject.decode()
        event, problem = None, ""
        defaults = Defaults(
            source=f"/{stream}",
            type=topic,
            id=f"{stream}-{sequence}",
            time_ns=int(tokens[first + 5]),
        )
        try:
            event = binding.decode(headers, data, defaults)
        except InvalidEvent as error:
            problem = error.message
        return Incoming(
            topic=topic,
            handle=reply,
            identity=(stream, sequence),
            event=event,
            position=Position(stream, sequence),
            delivered=int(tokens[first + 2]),
            problem=problem,
            raw=b"" if event is not None else data,
        )

    # -- settling

    def ack(self, handles: Sequence[Hashable]) -> None:
        self._answer(handles, b"+ACK")

    def release(self, handles: Sequence[Hashable]) -> None:
        self._answer(handles, b"-NAK")

    def hold(self, handles: Sequence[Hashable]) -> None:
        if self._connection.live:
            self._answer(handles, b"+WPI")

    def _answer(self, handles: Sequence[Hashable], verb: bytes) -> None:
        # Handles are the reply subjects that came with the events.
        frames = b"".join([b"PUB %b 4\r\n%b\r\n" % (handle, verb) for handle in handles])  # type: ignore[str-format]
        if not self._connection.write(frames):
            # Bounded by what the subscription holds: each event is answered once.
            self._unsent.append(frames)

    async def lag(self) -> int | None:
        lag = 0
        for feed in self._feeds:
            info = await self._connection.call(
                f"$JS.API.CONSUMER.INFO.{feed.stream}.{feed.consumer}", None, timeout=2
            )
            if "error" in info:
                return None
            lag += info["num_pending"]
        return lag

    async def close(self) -> None:
        if self._on_live in self._connection.on_live:
            self._connection.on_live.remove(self._on_live)
            self._connection.on_lost.remove(self._on_lost)
        self.release([frame[1] for frame in self._buffer])
        self._buffer.clear()
        self._lost = SourceLost("closed")
        self._arrived.set()
        await self._connection.unsubscribe(self._key)
        await self._connection.flushed(2)


def _pending_messages(headers: bytes) -> int:
    """How many events of an ended pull will not come, from its status headers."""
    for line in headers.split(b"\r\n"):
        if line.lower().startswith(b"nats-pending-messages:"):
            return int(line.partition(b":")[2])
    return 0
