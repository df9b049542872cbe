"""The feed of a JetStream subscription: what its pull consumers send, and the answers to that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from sidecar.broker import NO_FAILURES, Failures, Incoming, Interest, Source
from sidecar.brokers.nats.pins import GROUP, LOOK_SECONDS, Frame, Pin, place_of, split_header
from sidecar.brokers.nats.pulls import Asked, Pulls, Slot
from sidecar.brokers.nats.stored import event_of
from sidecar.errors import (
    BrokerRefused,
    BrokerUnavailable,
    SidecarError,
    SourceLost,
)
from sidecar.event import Position

if TYPE_CHECKING:
    from collections.abc import Hashable

    from sidecar.brokers.nats.attempts import Attempts
    from sidecar.brokers.nats.connection import Connection, OnMessage

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5
"""The server says that a pull is alive this often; two missed ones and we ask again."""
LOOK_PAUSE_SECONDS = 0.5

_CLOSE_SECONDS = 0.45
"""For each of the four steps of an end: two seconds together at most."""
_NO_WAIT_SECONDS = 30
_NOT_FOUND = 404
_ADVISORY = "$JS.EVENT.ADVISORY"

_TOO_LARGE = "Message Size Exceeds MaxBytes"
_ACK, _NAK = b"+ACK", b"-NAK"
_TAKEN = "taken"
"""In the reply subject by which a consumer says that it took our answers."""
_TAKEN_SECONDS = 2.0
"""Not answered for so long, it is asked again."""
_V1_TOKENS = 9
"""Tokens of `$JS.ACK.<stream>.<consumer>.…`; since v2 a domain and an account hash come first."""


More = Callable[[Collection[str]], Awaitable[Sequence["Feed"]]]
"""Feeds of the streams that a subscription touches, other than the named ones."""


class Feed:
    """One consumer of one stream, and what was asked of it."""

    __slots__ = ("ack_wait", "asked", "consumer", "created", "life", "pin", "stream", "subject")

    def __init__(
        self, stream: str, consumer: str, created: str, ack_wait: float, pin: Pin | None
    ) -> None:
        """
        *created* tells this consumer from a later one of its name; *ack_wait* is in seconds.

        Without a *pin* its events are dealt out to all sidecars.
        """
        self.pin = pin
        self.stream = stream
        self.consumer = consumer
        self.created = created
        self.life = "".join(c for c in created if c.isalnum())
        """The same as one token of a subject."""
        self.ack_wait = ack_wait
        self.subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self.asked = Asked([])


class StreamSource(Source):
    """
    Pulls from the consumers of a subscription, one for each stream that its topic touches.

    Acks are written, not awaited: one that is lost with its connection comes back as a redelivery,
    which the delivery layer knows again by its identity.
    """

    def __init__(
        self,
        connection: Connection,
        interest: Interest,
        feeds: Sequence[Feed],
        *,
        attempts: Attempts,
        more: More | None,
    ) -> None:
        """*more*: asked when a stream was made, for a topic that may touch it."""
        self._attempts = attempts
        self._connection = connection
        self._interest = interest
        self._feeds = list(feeds)
        self._more = more
        self._buffer: deque[Frame] = deque()
        self._buffered_bytes = 0
        self._pulls = Pulls(
            interest.max_in_flight, interest.max_in_flight_bytes, lambda: connection.max_payload
        )
        self._by_stream = {feed.stream.encode(): feed for feed in feeds}
        self._arrived = asyncio.Event()
        self._lost: SidecarError | None = None
        self._unsent: list[bytes] = []
        self._unread: list[bytes] = []
        """Answers that were written, and that the consumer may not have taken."""
        self._taken = 0
        """How many of all answers were taken: those before the first of `_unread`."""
        self._asked_at: float | None = None
        """When the consumer was asked what it took; None: not since it last said so."""
        self._life = 0
        """Which connection: what was taken from an old one says nothing of this."""
        self._last_heard = 0.0
        self._doubtful = True
        """Whether our consumers are still there, and all of them, is to be looked up."""
        self._kept: list[Hashable] | None = None
        """Since it was stopped: to be given back at the end, all together and in order."""
        self._inbox = connection.new_inbox()
        self._keys: list[str] = []

    async def open(self) -> None:
        """Raises BrokerUnavailable."""
        connection, name = self._connection, self._interest.name
        connection.on_live.append(self._on_live)
        connection.on_lost.append(self._pulls.forget)
        connection.on_closed.append(self._on_closed)
        subjects: dict[str, OnMessage] = {
            f"{self._inbox}.{_TAKEN}.*": self._on_taken,
            # Non-obvious: a pull says that its consumer was deleted, but only while one is open, and
            # handles of the old consumer mean other events to a new one of its name.
            f"{_ADVISORY}.CONSUMER.DELETED.*.{name}": self._on_consumer_deleted,
        }
        if self._interest.ordered:
            subjects[f"{_ADVISORY}.CONSUMER.UNPINNED.*.{name}"] = self._on_unpinned
        if self._more is not None:
            subjects[f"{_ADVISORY}.STREAM.CREATED.*"] = self._on_stream_created
        try:
            for subject, handler in subjects.items():
                self._keys.append(await connection.subscribe(subject, handler))
            for feed in self._feeds:
                await self._attach(feed)
        except BaseException:
            await self.close()
            raise

    async def _attach(self, feed: Feed) -> None:
        """Raises BrokerUnavailable."""
        asked = self._pulls.new()
        for slot in asked.slots:
            subject = f"{self._inbox}.{slot.number}.*"
            handler = partial(self._on_frame, (feed, slot))
            self._keys.append(await self._connection.subscribe(subject, handler))
        feed.asked = asked
        self._pulls.add(asked)

    @property
    def hold_seconds(self) -> float | None:
        return min((feed.ack_wait for feed in self._feeds), default=_NO_WAIT_SECONDS) / 3

    # -- receiving

    async def fetch(self, limit: int) -> Sequence[Incoming]:
        while True:
            await self._wait_for_events(limit)
            taken = self._take(limit)
            if len(taken) < limit:
                self._ask(limit - len(taken))
            incoming = [
                self._incoming(topic, reply, headers, data)
                for _, topic, reply, headers, data in taken
            ]
            if not any(one.failures.attempts for one in incoming):
                return incoming
            try:
                return await self._with_attempts(incoming)
            except BaseException as error:  # the next fetch has them
                self._buffer.extendleft(reversed(taken))
                self._buffered_bytes += sum(size for size, *_ in taken)
                if not isinstance(error, BrokerUnavailable):
                    raise
            await self._arrival(LOOK_PAUSE_SECONDS)

    def _take(self, limit: int) -> list[Frame]:
        """From the buffer, no more bytes than the bound, but for one event."""
        taken: list[Frame] = []
        left = self._interest.max_in_flight_bytes
        while self._buffer and len(taken) < limit and left > 0:
            taken.append(self._buffer.popleft())
            left -= taken[-1][0]
        self._buffered_bytes -= self._interest.max_in_flight_bytes - left
        return taken

    async def _wait_for_events(self, limit: int) -> None:
        """Return when the buffer has some. Raises why there will be none."""
        loop = asyncio.get_running_loop()
        self._last_heard = max(self._last_heard, loop.time())
        while True:
            if self._lost is not None:
                raise self._lost
            if any(feed.pin is not None and not feed.pin.settled for feed in self._feeds):
                await self._see_to_pins()
            if self._buffer:
                return
            if self._doubtful and self._connection.live:
                await self._look()
                continue
            self._ask(limit)
            contends = any(feed.pin and not feed.pin.settled for feed in self._feeds)
            if not await self._arrival(LOOK_SECONDS if contends else 2 * HEARTBEAT_SECONDS):
                self._check_silence(loop.time())

    async def _see_to_pins(self) -> None:
        """Take over what has come to be ours, and look after what is not."""
        try:
            for feed in self._feeds:
                pin = feed.pin
                if pin is None or not self._connection.live:
                    continue
                if pin.unsure and await pin.is_anothers():
                    self._lose(
                        f"another sidecar has the events of subscription {self._interest.name!r}"
                    )
                    return
                if pin.taking_over:
                    feed.asked.careful = True
                    for frame in await pin.take_over():
                        self._put(frame)
                elif not pin.settled:
                    await pin.contend(asyncio.get_running_loop().time())
        except BrokerUnavailable:
            await self._arrival(LOOK_PAUSE_SECONDS)

    async def _with_attempts(self, incoming: Sequence[Incoming]) -> list[Incoming]:
        """
        What is recorded of those that may have failed before. Raises BrokerUnavailable.

        The server's delivery count says which to look up, and no more: it also counts what was
        fetched and given back unseen.
        """
        again = {
            one.handle: self._key_of(_place_of(one.handle))
            for one in incoming
            if one.failures.attempts
        }
        found = await self._attempts.look_up(list(again.values()))
        return [
            msgspec.structs.replace(one, failures=found[again[one.handle]])
            if one.handle in again
            else one
            for one in incoming
        ]

    def _key_of(self, place: tuple[str, int]) -> str:
        stream, sequence = place
        feed = self._by_stream[stream.encode()]
        return f"{stream}.{feed.consumer}.{feed.life}.{sequence}"

    async def _arrival(self, seconds: float) -> bool:
        """Wait for anything that happens, for so long at most."""
        self._arrived.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            return False
        return True

    def _ask(self, room: int) -> None:
        """Ask for what there is room for, so many events at most."""
        if not self._connection.live:
            return
        room -= len(self._buffer) + self._pulls.owed
        now = asyncio.get_running_loop().time()
        frames = []
        for feed in self._feeds:
            if feed.pin is not None:
                feed.asked.most = feed.pin.most
        for pull in self._pulls.wanted(room, self._buffered_bytes, now):
            request: dict[str, object] = {
                "batch": pull.events,
                "expires": pull.seconds * 1_000_000_000,
                # The server takes half the time of the request at most.
                "idle_heartbeat": min(HEARTBEAT_SECONDS, pull.seconds // 2) * 1_000_000_000,
            }
            if pull.max_bytes:
                request["max_bytes"] = pull.max_bytes
            (feed,) = (feed for feed in self._feeds if feed.asked is pull.asked)
            if feed.pin is not None:
                request |= {"group": GROUP} | ({"id": feed.pin.id} if feed.pin.id else {})
                if not feed.pin.id:  # should another be the first, it is not to stay open
                    request |= {"expires": 5_000_000_000, "idle_heartbeat": 2_000_000_000}
            body = json.dumps(request)
            reply = f"{self._inbox}.{pull.slot.number}.{pull.slot.serial}"
            frames.append(f"PUB {feed.subject} {reply} {len(body)}\r\n{body}\r\n")
        if frames:
            self._connection.write("".join(frames).encode())

    def _on_frame(
        self,
        pulled: tuple[Feed, Slot],
        subject: bytes,
        reply: bytes,
        headers: bytes | None,
        data: bytes,
    ) -> None:
        feed, slot = pulled
        if reply.startswith(b"$JS.ACK."):
            pin = ""
            if feed.pin is not None:
                pin, headers = split_header(headers)
            # As the server counts them.
            size = len(subject) + len(reply) + len(data) + (len(headers) if headers else 0)
            frame = size, subject, reply, headers, data
            if feed.pin is None:
                self._put(frame)
            else:
                for ready in feed.pin.came(pin, frame, again=_again(reply)):
                    self._put(ready)
            if feed.asked.careful and not _again(reply):  # the others are delivered first
                feed.asked.careful = False
            self._pulls.arrived(slot, size)
            self._arrived.set()
            return
        self._last_heard = asyncio.get_running_loop().time()
        if headers is not None and int(subject.rpartition(b".")[2]) == slot.serial:
            self._on_status(feed, slot, headers)

    def _put(self, frame: Frame) -> None:
        self._buffer.append(frame)
        self._buffered_bytes += frame[0]

    def _on_status(self, feed: Feed, slot: Slot, headers: bytes) -> None:
        """A pull ended: it expired, or its consumer did something. "100" only says it lives."""
        status = headers[9:12]
        if status == b"100":
            return
        why = headers[13 : headers.find(b"\r")].decode(errors="replace")
        if status == b"423" and feed.pin is not None:  # another has it, or the server forgot
            self._pulls.end_all(feed.asked)
            feed.pin.unsure = bool(feed.pin.id)
            self._arrived.set()
        elif b"\r\nnats-pending-messages:" in headers.lower():
            self._pulls.ended(feed.asked, slot, too_large=why == _TOO_LARGE)
            self._arrived.set()
        elif status == b"503":  # it has no leader right now, or is gone
            asyncio.get_running_loop().call_later(LOOK_PAUSE_SECONDS, self._doubt)
        else:  # the consumer ended all of its pulls, or never took this one
            self._pulls.end_all(feed.asked)
            self._pulls_ended(why)

    def _doubt(self) -> None:
        self._pulls.forget()
        self._doubtful = True
        self._arrived.set()

    def _pulls_ended(self, why: str) -> None:
        name = self._interest.name
        if why == "Consumer Deleted":
            self._lose(f"the consumer of subscription {name!r} was deleted or moved")
        elif why != "Leadership Change":  # its settings do not allow our pulls: say so, do not spin
            self._lost = BrokerRefused(
                f"the consumer of subscription {name!r} refuses to be read: {why}",
                subscription=name,
            )
        self._arrived.set()

    def _on_consumer_deleted(
        self, subject: bytes, _reply: bytes, _headers: bytes | None, _data: bytes
    ) -> None:
        if subject.split(b".")[-2] in self._by_stream:
            self._lose(f"the consumer of subscription {self._interest.name!r} was deleted or moved")

    def _on_unpinned(
        self, subject: bytes, _reply: bytes, _headers: bytes | None, _data: bytes
    ) -> None:
        feed = self._by_stream.get(subject.split(b".")[-2])
        if feed is not None and feed.pin is not None and not feed.pin.id:
            feed.pin.look()
            self._arrived.set()

    def _on_stream_created(
        self, _subject: bytes, _reply: bytes, _headers: bytes | None, _data: bytes
    ) -> None:
        self._doubtful = True
        self._arrived.set()

    def _lose(self, why: str) -> None:
        self._lost = SourceLost(why, subscription=self._interest.name)
        self._arrived.set()

    def _check_silence(self, now: float) -> None:
        """No event and no heartbeat though we asked: the server forgot us, so ask anew."""
        if not self._connection.live or not self._feeds:
            return
        if not self._pulls.owed:  # as one that stands by, which asks for nothing
            self._last_heard = now
            return
        if now - self._last_heard >= 2 * HEARTBEAT_SECONDS:
            log.warning("subscription %s: no sign of its pulls, asking again", self._interest.name)
            self._doubt()

    async def _look(self) -> None:
        """Are our consumers still those that we know, and are there more? Else lost."""
        self._doubtful = False
        try:
            for feed in self._feeds:
                info = await self._info(feed)
                missing = info.get("error", {}).get("code") == _NOT_FOUND
                if missing or info.get("created", feed.created) != feed.created:
                    self._lose(
                        f"the consumer of subscription {self._interest.name!r} was deleted or moved"
                    )
                    return
            if self._more is not None:
                for feed in await self._more({feed.stream for feed in self._feeds}):
                    await self._attach(feed)
                    self._feeds.append(feed)
                    self._by_stream[feed.stream.encode()] = feed
        except BrokerUnavailable:
            self._doubtful = True
            if self._lost is None:
                await self._arrival(LOOK_PAUSE_SECONDS)
        except BaseException:
            self._doubtful = True
            raise

    async def _info(self, feed: Feed) -> dict[str, Any]:
        subject = f"$JS.API.CONSUMER.INFO.{feed.stream}.{feed.consumer}"
        return await self._connection.call(subject, seconds=2)

    def _on_live(self) -> None:
        unsent = [*self._unread, *self._unsent]
        self._unread, self._unsent = [], []
        self._asked_at = None
        self._life += 1
        if unsent:
            self._connection.write(b"".join(unsent))
        self._doubt()

    def _on_closed(self) -> None:
        self._lose("the broker was closed")

    def _incoming(
        self, subject: bytes, reply: bytes, headers: bytes | None, data: bytes
    ) -> Incoming:
        tokens = reply.split(b".")
        first = 2 if len(tokens) == _V1_TOKENS else 4
        stream = tokens[first].decode()
        sequence = int(tokens[first + 3])
        topic = subject.decode(errors="replace")
        place, time_ns = (stream, sequence), int(tokens[first + 5])
        event, problem = event_of(place, topic, time_ns, headers, data)
        return Incoming(
            topic=topic,
            handle=reply,
            identity=place,
            event=event,
            position=Position(stream, sequence),
            failures=_delivered(int(tokens[first + 2]) - 1),
            problem=problem,
            raw=b"" if event is not None else data,
        )

    # -- settling

    def ack(self, handles: Sequence[Hashable]) -> None:
        self._answer(handles, _ACK)

    def failed(self, handle: Hashable, failures: Failures) -> asyncio.Future[None]:
        key = self._key_of(_place_of(handle))
        recorded: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def stored() -> None:
            if not recorded.done():
                recorded.set_result(None)

        self._attempts.record(key, failures)
        self._attempts.when_stored(key, stored)
        return recorded

    def release(self, handles: Sequence[Hashable]) -> None:
        if self._kept is not None:
            self._kept.extend(handles)
            return
        now = list(handles)
        for feed in self._feeds:
            feed.asked.careful = True
            if feed.pin is not None:
                feed.pin.released()
        if self._attempts.waiting:
            # Whoever gets an event next is to see how often it failed.
            keys = {handle: self._key_of(_place_of(handle)) for handle in handles}
            now = [handle for handle, key in keys.items() if key not in self._attempts.waiting]
            for handle in keys.keys() - set(now):
                release = partial(self._release_late, handle, self._life)
                self._attempts.when_stored(keys[handle], release)
        self._answer(now, _NAK)

    def _release_late(self, handle: Hashable, life: int) -> None:
        if life == self._life:  # else it may be another's by now
            self._answer([handle], _NAK)

    def hold(self, handles: Sequence[Hashable]) -> None:
        if self._connection.live:
            pins = [feed.pin for feed in self._feeds if feed.pin is not None]
            early = [frame[2] for pin in pins for frame in pin.early.values()]
            # What nobody fetched yet would be handed to others as well.
            unfetched = (frame[2] for frame in self._buffer)
            self._answer([*handles, *unfetched, *early, *(self._kept or ())], b"+WPI")

    def _answer(self, handles: Sequence[Hashable], verb: bytes) -> None:
        # Handles are the reply subjects that came with the events.
        frames = [b"PUB %b 4\r\n%b\r\n" % (handle, verb) for handle in handles]  # type: ignore[str-format]
        if not frames:
            return
        plain = b"".join(frames)
        now = asyncio.get_running_loop().time()
        # Non-obvious: it says nothing of an answer whose delivery it forgot when it was killed.
        silent = self._asked_at is None or now - self._asked_at > _TAKEN_SECONDS
        if silent and len(self._feeds) == 1:
            # Non-obvious: a consumer takes its answers one after the other, so its reply to the
            # last one says that it took them all. A PONG would only say that they were read.
            count = self._taken + len(self._unread) + 1
            reply = f"{self._inbox}.{_TAKEN}.{self._life}-{count}".encode()
            self._asked_at = now
            frames[-1] = b"PUB %b %b 4\r\n%b\r\n" % (handles[-1], reply, verb)  # type: ignore[str-format]
        if not self._connection.write(b"".join(frames)):
            # Bounded by what the subscription holds: each event is answered once.
            self._unsent.append(plain)
            return
        if len(self._feeds) == 1:
            # Only an ack is good at any time: a release that comes late takes the event from the
            # one who has it by then.
            self._unread.append(plain if verb == _ACK else b"")

    def _on_taken(
        self, subject: bytes, _reply: bytes, _headers: bytes | None, _data: bytes
    ) -> None:
        """The consumer took the first answers of `_unread`; they need not be written again."""
        self._last_heard = asyncio.get_running_loop().time()
        life, _, count = subject.rpartition(b".")[2].partition(b"-")
        newly = int(count) - self._taken
        if int(life) == self._life and newly > 0:
            del self._unread[:newly]
            self._taken += newly
            self._asked_at = None

    async def lag(self) -> int | None:
        lag = len(self._buffer)
        for feed in self._feeds:
            info = await self._info(feed)
            if "error" in info:
                return None
            lag += info["num_pending"]
        return lag

    @property
    def standby(self) -> bool:
        pins = [feed.pin for feed in self._feeds]
        return bool(pins) and all(pin is not None and pin.standby for pin in pins)

    async def due(self) -> int | None:
        return 0 if self.standby else await self.lag()

    async def stop(self, give_back: Sequence[Hashable]) -> None:
        keys, self._keys = self._keys, []
        if keys:
            # What the server sends until it knows is still buffered.
            async with asyncio.TaskGroup() as tasks:
                for key in keys:
                    unsubscribed = self._connection.unsubscribe(key, seconds=_CLOSE_SECONDS)
                    tasks.create_task(unsubscribed)
        left = [*give_back, *(frame[2] for frame in self._buffer)]
        self._buffer.clear()
        self._buffered_bytes = 0
        if self._interest.ordered:
            # Non-obvious: another sidecar would get these before what is still out at the app, and
            # so would the next start. While the consumer is ours nobody waits for them.
            pins = [feed.pin for feed in self._feeds if feed.pin is not None]
            early = [frame[2] for pin in pins for frame in pin.early.values()]
            self._kept = [*(self._kept or ()), *left, *early]
            return
        await self._give_back(left)

    async def _give_back(self, left: Sequence[Hashable]) -> None:
        try:
            if left:
                await self._end_pulls(left[0])
        finally:
            self.release(left[1:])

    async def _end_pulls(self, first: Hashable) -> None:
        """
        Give back the first event, and wait until its consumer has tried to send it to us.

        Non-obvious: only then the server notices that our pulls have no listener, and puts the
        event behind all that are given back. So it must be the only one.
        """
        self.release([first])
        with contextlib.suppress(BrokerUnavailable, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                for feed in self._feeds:
                    await self._info(feed)

    async def close(self) -> None:
        connection = self._connection
        if self._on_live in connection.on_live:
            connection.on_live.remove(self._on_live)
            connection.on_lost.remove(self._pulls.forget)
            connection.on_closed.remove(self._on_closed)
        self._lose("closed")
        await self.stop(())
        await self._attempts.stored(_CLOSE_SECONDS)
        if self._kept is not None:
            kept, self._kept = self._kept, None
            await self._give_back(sorted(set(kept), key=_place_of))
            for feed in self._feeds:
                if feed.pin is not None:
                    await feed.pin.close()
        await connection.flushed(_CLOSE_SECONDS)


def _place_of(handle: Hashable) -> tuple[str, int]:
    assert isinstance(handle, bytes)
    return place_of(handle)


def _again(handle: bytes) -> bool:
    """Whether it was delivered before."""
    tokens = handle.split(b".")
    return tokens[4 if len(tokens) == _V1_TOKENS else 6] != b"1"


def _delivered(times: int) -> Failures:
    """Delivered before, so it may have failed: to be looked up."""
    return Failures(times) if times else NO_FAILURES
