"""Publishing to JetStream: everything in flight at once, answers matched by number, order kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from sidecar.brokers.nats.connection import NO_RESPONDERS
from sidecar.errors import BrokerRefused, EventTooLarge, SidecarError
from sidecar.event import Durability, Event, Outcome, Position, Receipt
from sidecar.wire import nats as binding

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sidecar.brokers.nats.connection import Connection

PAUSE_SECONDS = 0.1
"""Between two tries of a topic whose stream has no leader right now."""
ANSWER_SECONDS = 2.0
"""What is asked and not answered in this time is asked again."""

Resolved = Callable[[SidecarError | None], None]
Resolve = Callable[[str, Resolved], None]
"""
See to it that a topic has a stream: looks it up, makes it if that is allowed, and says so. The error
is retryable when it could not be found out.
"""


class ApiError(msgspec.Struct, frozen=True):
    code: int = 0
    err_code: int = 0
    description: str = ""


class PubAck(msgspec.Struct, frozen=True):
    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: ApiError | None = None


_decode_ack = msgspec.json.Decoder(PubAck).decode


class _Batch:
    """One publish call: where its outcomes gather."""

    __slots__ = ("events", "future", "outcomes", "remaining", "topic")

    def __init__(
        self, topic: str, events: Sequence[Event], future: asyncio.Future[Sequence[Outcome]]
    ) -> None:
        self.topic = topic
        self.events = events
        self.future = future
        self.outcomes: list[Outcome | None] = [None] * len(events)
        self.remaining = len(events)

    def put(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        self.remaining -= 1
        if not self.remaining and not self.future.done():
            self.future.set_result(self.outcomes)  # type: ignore[arg-type] # none is None any more


class _Hold:
    """
    A topic that waits for its stream; what is published to it meanwhile waits behind.

    looking (for the stream) → asking (what waited is written again) → let go by the first receipt,
    or looking again.
    """

    __slots__ = ("asking", "timer", "written")

    def __init__(self) -> None:
        self.asking = False
        """What waited was written again, and no answer is in yet."""
        self.written = 0
        """Events below this number are on the wire."""
        self.timer: asyncio.TimerHandle | None = None

    def later(self, seconds: float, step: Callable[[], None]) -> None:
        """One step is due at a time."""
        self.stop()
        self.timer = asyncio.get_running_loop().call_later(seconds, step)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class StreamPublisher:
    """
    Writes events and matches the server's acknowledgements by a number in the reply subject.

    What is unanswered stays in `_unacked`, in order. After a reconnect all of it is written again
    in that order under the same Nats-Msg-Id: the server drops what it had, and order holds.
    """

    def __init__(
        self,
        broker: str,
        connection: Connection,
        *,
        structured: bool,
        resolve: Resolve,
    ) -> None:
        self._broker = broker
        self._connection = connection
        self._structured = structured
        self._resolve = resolve
        self._inbox = connection.new_inbox()
        self._prefix = len(self._inbox) + 1
        self._opened = False
        self._next = 0
        self._outbox: list[bytes] = []
        self._unacked: dict[int, tuple[_Batch, int, bytes]] = {}
        self._held: dict[str, _Hold] = {}
        connection.on_live.append(self._send_again)

    @property
    def pending(self) -> int:
        return len(self._unacked)

    async def open(self) -> None:
        """
        Subscribe to the acknowledgements, once for the life of the connection.

        To be done before it connects: what waits is written as soon as it is live.
        """
        if not self._opened:
            self._opened = True
            await self._connection.subscribe(self._inbox + ".*", self._on_ack)

    def publish(
        self, topic: str, events: Sequence[Event], broker_ids: Sequence[str] | None
    ) -> asyncio.Future[Sequence[Outcome]]:
        future: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()
        batch = _Batch(topic, events, future)
        first = number = self._next
        inbox, structured = self._inbox, self._structured
        limit = self._connection.max_payload
        unacked, frames = self._unacked, []
        for index, event in enumerate(events):
            broker_id = broker_ids[index] if broker_ids is not None else binding.msg_id(event)
            headers, payload = binding.encode(
                event, structured=structured, extra=f"Nats-Msg-Id: {broker_id}\r\n".encode()
            )
            header_size = len(headers)
            size = header_size + len(payload)
            if size > limit:
                batch.put(index, too_large(size, limit, self._broker))
                continue
            frame = b"HPUB %b %b.%d %d %d\r\n%b%b\r\n" % (
                topic.encode(),
                inbox.encode(),
                number,
                header_size,
                size,
                headers,
                payload,
            )
            unacked[number] = (batch, index, frame)
            number += 1
            frames.append(frame)
        self._next = number
        if number > first:
            future.add_done_callback(lambda done: self._forget(done, first, number))
        elif not events:
            future.set_result(())
        if topic not in self._held:
            self._write(frames)
        return future

    def _write(self, frames: Iterable[bytes]) -> None:
        """
        Write in this turn of the loop, together with what others publish in it.

        A write costs a system call and many of them one each; 64 callers of one event share it.
        What cannot be written stays unanswered, and is written again with all else.
        """
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.extend(frames)

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if outbox:
            self._connection.write(b"".join(outbox))

    def _forget(self, done: asyncio.Future[Sequence[Outcome]], first: int, end: int) -> None:
        if done.cancelled():
            for number in range(first, end):
                self._unacked.pop(number, None)

    def _on_ack(self, subject: bytes, _reply: bytes, headers: bytes | None, payload: bytes) -> None:
        number = int(subject[self._prefix :])
        entry = self._unacked.get(number)
        if entry is None:  # given up meanwhile, or answered before a reconnect
            return
        batch, index, _frame = entry
        if headers is not None and headers.startswith(NO_RESPONDERS):
            self._stream_missing(batch.topic)
            return
        try:
            ack = _decode_ack(payload)
        except msgspec.DecodeError:
            ack = PubAck(error=ApiError(description="unreadable acknowledgement"))
        del self._unacked[number]
        if self._held:
            self._stream_there(batch.topic)
        if ack.error is not None:
            batch.put(index, self._refused(batch.topic, ack))
            return
        batch.put(
            index,
            Receipt(
                batch.events[index].id,
                self._broker,
                batch.topic,
                Durability.STORED,
                Position(ack.stream, ack.seq),
                ack.duplicate,
            ),
        )

    def _refused(self, topic: str, ack: PubAck) -> SidecarError:
        assert ack.error is not None
        return BrokerRefused(
            f"JetStream refused the event for {topic!r}: {ack.error.description} "
            f"({ack.error.err_code})",
            broker=self._broker,
            topic=topic,
            stream=ack.stream,
        )

    # -- a topic that nobody stores: no leader right now, or no stream

    def _stream_missing(self, topic: str) -> None:
        hold = self._held.get(topic)
        if hold is None:
            hold = self._held[topic] = _Hold()
            self._look(topic, hold)
        elif hold.asking:  # else its neighbour said so already
            hold.asking = False
            hold.later(PAUSE_SECONDS, lambda: self._look(topic, hold))

    def _look(self, topic: str, hold: _Hold) -> None:
        if not self._waiting(topic):
            self._release(topic)
            return
        hold.asking = False
        self._resolve(topic, lambda error: self._resolved(topic, hold, error))

    def _resolved(self, topic: str, hold: _Hold, error: SidecarError | None) -> None:
        if self._held.get(topic) is not hold:
            return
        if error is None:
            hold.asking = True
            hold.written = self._next
            # Non-obvious: its answer may never come, as when the asked event is given up meanwhile.
            hold.later(ANSWER_SECONDS, lambda: self._look(topic, hold))
            self._write(self._waiting(topic))
        elif error.retryable:
            hold.later(PAUSE_SECONDS, lambda: self._look(topic, hold))
        else:
            self._give_up(topic, error)

    def _stream_there(self, topic: str) -> None:
        """An event of the topic was stored: let go what waits behind it, in order."""
        hold = self._held.get(topic)
        if hold is not None:
            self._release(topic)
            first = hold.written if hold.asking else 0
            self._write(self._waiting(topic, first))

    def _waiting(self, topic: str, first: int = 0) -> list[bytes]:
        """The unanswered events of a topic, from a number on, as frames in order."""
        return [
            frame
            for number, (batch, _, frame) in self._unacked.items()
            if number >= first and batch.topic == topic
        ]

    def _release(self, topic: str) -> None:
        hold = self._held.pop(topic, None)
        if hold is not None:
            hold.stop()

    def _give_up(self, topic: str, error: SidecarError) -> None:
        self._release(topic)
        for number, (batch, index, _frame) in list(self._unacked.items()):
            if batch.topic == topic:
                del self._unacked[number]
                batch.put(index, error)

    def _send_again(self) -> None:
        """Connected anew: all that is unanswered, in its first order."""
        for topic in list(self._held):
            self._release(topic)
        limit = self._connection.max_payload
        for number, (batch, index, frame) in list(self._unacked.items()):
            # The server may take less than the last one, or than we thought before the first.
            if (
                len(frame) > limit
                and (size := int(frame[: frame.index(b"\r")].split()[-1])) > limit
            ):
                del self._unacked[number]
                batch.put(index, too_large(size, limit, self._broker))
        self._outbox.clear()  # it is a part of these
        if self._unacked:
            self._connection.write(b"".join(frame for _, _, frame in self._unacked.values()))

    def fail_all(self, error: SidecarError) -> None:
        """The connection ends for good."""
        for topic in list(self._held):
            self._release(topic)
        unacked, self._unacked = self._unacked, {}
        for batch, index, _frame in unacked.values():
            batch.put(index, error)


def too_large(size: int, limit: int, broker: str) -> EventTooLarge:
    return EventTooLarge(
        f"the event takes {size} bytes and broker {broker!r} takes {limit}: raise max_payload of "
        "the NATS server",
        broker=broker,
        limit=limit,
        size=size,
    )
