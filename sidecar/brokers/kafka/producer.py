"""Publishing to Kafka: an idempotent producer that the event loop polls."""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException, Producer

from sidecar.broker import BrokerState
from sidecar.brokers.kafka.client import (
    FRAMING_BYTES,
    Conf,
    common,
    is_missing,
    is_refusal,
    logged,
    options,
    refusal,
    translate,
)
from sidecar.errors import (
    BrokerRefused,
    BrokerUnavailable,
    EventTooLarge,
    Internal,
    OutcomeUnknown,
    QueueFull,
    SidecarError,
)
from sidecar.event import Durability, Event, Outcome, Position, Receipt
from sidecar.wire import kafka as binding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from confluent_kafka import Message

    from sidecar.brokers.kafka.topics import Topics
    from sidecar.config import Kafka as Settings

log = logging.getLogger(__name__)

BUSY_POLL_SECONDS = 0.001
IDLE_POLL_SECONDS = 0.1
"""How often answers are asked for, with and without events under way."""
PROBE_SECONDS = 2.0
PAUSE_SECONDS = 0.1
"""Between two looks whether the cluster is back, or at a topic that could not be looked up."""
FLUSH_SECONDS = 1.5
REPLACE_SECONDS = 10.0
"""So long a producer that failed for good may take to give its last answers."""
SMALL_BYTES = 64 * 1024
"""Headers and key are smaller, so only larger data is worth a measurement."""

_AGAIN = {KafkaError._FATAL, KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}
"""Answers of a producer that failed for good: the next one publishes these events."""


class _Batch:
    """One publish call: where its outcomes gather."""

    __slots__ = ("events", "future", "missing", "outcomes", "remaining", "topic")

    def __init__(
        self, topic: str, events: Sequence[Event], future: asyncio.Future[Sequence[Outcome]]
    ) -> None:
        self.topic = topic
        self.events = events
        self.future = future
        self.outcomes: list[Outcome | None] = [None] * len(events)
        self.remaining = len(events)
        self.missing: list[int] = []
        """Those that librdkafka gave back, because their topic was gone."""

    def put(self, index: int, outcome: Outcome) -> bool:
        """Whether that was the last one."""
        self.outcomes[index] = outcome
        self.remaining -= 1
        if self.remaining:
            return False
        if not self.future.done():
            self.future.set_result(self.outcomes)  # type: ignore[arg-type] # none is None any more
        return True


class KafkaPublisher:
    """
    Hands events to librdkafka, on the loop, and asks it for the answers, on the loop too.

    A batch is *held* by us, in order per topic, while the cluster is away, while its topic is
    looked up, and while a producer that failed for good is replaced: from here it can be taken
    back. Then it is *sent*: librdkafka has it, repeats what is unanswered and keeps the order. It
    gives up after the time-out of a publish.

    Non-obvious: polled from a thread, librdkafka would take the interpreter's lock for each
    answer, and wait up to 5 ms for it each time.
    """

    def __init__(
        self,
        broker: str,
        settings: Settings,
        topics: Topics,
        *,
        client_id: str,
        max_message_bytes: int,
        max_pending: tuple[int, int],
        timeout_seconds: float,
        in_thread: Callable[..., asyncio.Future[Any]],
        on_state: Callable[[BrokerState], None],
    ) -> None:
        """*max_pending*: events and bytes that the owner lets wait here."""
        self._broker = broker
        self._settings = settings
        self._topics = topics
        self._structured = settings.content_mode == "structured"
        self._client_id = client_id
        self._max_message_bytes = max_message_bytes
        self._max_pending = max_pending
        self._timeout_seconds = timeout_seconds
        self._in_thread = in_thread
        self._on_state = on_state
        self._producer: Any = None
        self._known: set[str] = set()
        self._held: dict[str, dict[int, _Batch]] = {}
        """By topic; each in order."""
        self._sent: dict[int, _Batch] = {}
        """In order; those that have answers to come."""
        self._missing: set[str] = set()
        """Topics that were there and of which librdkafka says that they are not; those that were
        sent to them are to be sent again."""
        self._looking: set[str] = set()
        """Topics that are being looked up."""
        self._next = 0
        self._poll_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._replacing = 0.0
        """Loop time until which a failed producer may answer; 0: none has failed."""
        self.connected = False
        self._away = False
        """It was connected, and is looked for."""
        self._idle = True
        self._closed = False
        self._asking: asyncio.Future[Any] | None = None
        """The thread that waits for the cluster to answer; one at a time."""
        self._connecting: asyncio.Future[SidecarError | None] | None = None
        """The `connect` that is under way: why it failed."""
        self._give_up_at = 0.0
        self._why = ""
        self._refused = ""

    # -- life

    async def connect(self, timeout: float) -> None:
        """Raises BrokerUnavailable, or BrokerRefused for credentials and settings."""
        if self._producer is None:
            self._producer = self._make()
            self._poll_soon()
        else:
            self._serve()  # what it had to say of earlier tries
        loop = asyncio.get_running_loop()
        connecting = self._connecting = loop.create_future()
        self._give_up_at = loop.time() + timeout
        self._ask(timeout)
        try:
            error = await connecting
        finally:
            self._connecting = None
        if error is not None:
            raise error

    def _make(self) -> Any:
        events, size = self._max_pending
        conf: Conf = (
            common(self._settings, self._client_id)
            | logged(self._on_error)
            | {
                "compression.type": self._settings.compression,
                # As Kafka's own clients do, so that a key has one partition whoever publishes.
                "partitioner": "murmur2_random",
                "request.timeout.ms": 10_000,
                "topic.metadata.propagation.max.ms": 5000,
            }
            | options(self._settings)
            | {
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": self._settings.linger_seconds * 1000,
                "message.max.bytes": self._max_message_bytes + FRAMING_BYTES,
                "message.timeout.ms": max(1000, int(self._timeout_seconds * 1000)),
                # What was given up here is still there until it times out: twice as much.
                "queue.buffering.max.messages": 2 * events,
                "queue.buffering.max.kbytes": max(2 * size, 4 * self._max_message_bytes) // 1024,
            }
        )
        try:
            return Producer(conf)
        except (KafkaException, TypeError, ValueError) as error:
            raise BrokerRefused(
                f"broker {self._broker!r}: {refusal(error)}", broker=self._broker
            ) from error

    def _ask(self, timeout: float) -> None:
        """Ask the cluster for anything, and wait for its answer, in a thread."""
        if self._asking is None:
            self._asking = self._in_thread(_list_nothing, self._producer, timeout)
            self._asking.add_done_callback(self._asked)

    def _asked(self, done: asyncio.Future[Any]) -> None:
        self._asking = None
        if self._closed:
            done.cancelled() or done.exception()
        elif done.cancelled() or done.exception() is not None:
            left = self._give_up_at - asyncio.get_running_loop().time()
            if self._connecting is not None and left > 0:  # it was that of an earlier try
                self._ask(left)
                return
            self._fail_connecting()
            if self._away:
                self._look_later()
        else:
            self._now_connected()

    def _fail_connecting(self) -> None:
        if self._connecting is None or self._connecting.done():
            return
        servers = ", ".join(self._settings.bootstrap_servers)
        error: SidecarError
        if self._refused:
            error = BrokerRefused(
                f"Kafka at {servers} refused us: {self._refused}", broker=self._broker
            )
        else:
            why = self._why or "no answer in time"
            error = BrokerUnavailable(
                f"cannot connect to Kafka at {servers}: {why}", broker=self._broker
            )
        self._connecting.set_result(error)

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._probe_timer = loop.call_later(PAUSE_SECONDS, self._ask, PROBE_SECONDS)

    def _now_connected(self) -> None:
        self._away = False
        self._why = self._refused = ""
        if not self.connected:
            self.connected = True
            servers = ", ".join(self._settings.bootstrap_servers)
            self._on_state(BrokerState(connected=True, detail=servers))
        if self._connecting is not None and not self._connecting.done():
            self._connecting.set_result(None)
        for topic in {*self._held, *self._missing}:
            self._go_on(topic)

    def _on_error(self, error: KafkaError) -> None:
        """Called by librdkafka within poll."""
        if error.fatal():
            self._begin_replacing(error)
        elif error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._fail_connecting()
            if self.connected and not self._closed:
                # What is published from now on is held, and can be taken back.
                self._away, self.connected = True, False
                servers = ", ".join(self._settings.bootstrap_servers)
                why = self._why or f"no node of {servers} can be reached"
                self._on_state(BrokerState(connected=False, detail=why))
                self._ask(PROBE_SECONDS)
        else:
            self._why = error.str()
            if is_refusal(error):
                self._refused = error.str()

    # -- publishing

    def publish(self, topic: str, events: Sequence[Event]) -> asyncio.Future[Sequence[Outcome]]:
        """See Broker.publish."""
        future: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()
        batch = _Batch(topic, events, future)
        if not events:
            future.set_result([])
        elif topic in self._known and self._takes and topic not in self._held:
            self._send(batch)
        elif self._closed:
            self._close_batch(batch, sent=False)
        else:
            self._hold(batch)
            self._go_on(topic)
        return future

    @property
    def _takes(self) -> bool:
        """Whether events may be handed to librdkafka now."""
        return self.connected and not self._replacing and not self._closed

    def _hold(self, batch: _Batch) -> None:
        number = self._next
        self._next += 1
        held = self._held.setdefault(batch.topic, {})
        held[number] = batch

        def given_up(future: asyncio.Future[Sequence[Outcome]]) -> None:
            if future.cancelled() and held.pop(number, None) is not None and not held:
                self._held.pop(batch.topic, None)

        batch.future.add_done_callback(given_up)

    def _go_on(self, topic: str) -> None:
        """Send what is held of *topic*, or do what must come before."""
        if not self._takes or not (topic in self._held or topic in self._missing):
            return
        if topic not in self._known:
            self._look_up(topic)
            return
        self._send_again(topic)
        if topic not in self._known:
            return  # still missing: what is held stays behind what was sent before
        for batch in self._held.pop(topic, {}).values():
            if not batch.future.cancelled():
                self._send(batch)

    def _send_again(self, topic: str) -> None:
        """What was given back because *topic* was not there."""
        self._missing.discard(topic)
        for number, batch in self._given_back(topic):
            again, batch.missing = sorted(batch.missing), []
            if batch.future.cancelled():
                self._sent.pop(number, None)
            else:
                self._produce(number, batch, again)

    def _given_back(self, topic: str) -> Sequence[tuple[int, _Batch]]:
        return [(n, one) for n, one in self._sent.items() if one.missing and one.topic == topic]

    def _send(self, batch: _Batch) -> None:
        number = self._next
        self._next += 1
        self._sent[number] = batch
        self._produce(number, batch, range(len(batch.events)))
        self._poll_soon()

    def _produce(self, number: int, batch: _Batch, indices: Sequence[int]) -> None:
        produce, structured, topic = self._producer.produce, self._structured, batch.topic
        events = batch.events
        for index in indices:
            event = events[index]
            headers, value, key = binding.encode(event, structured=structured)
            if value is not None and len(value) > SMALL_BYTES:
                refusal = self._too_large(topic, headers, value, key)
                if refusal is not None:
                    self._answer(number, batch, index, refusal)
                    continue
            try:
                produce(
                    topic,
                    value,
                    key,
                    headers=headers,
                    on_delivery=partial(self._answered, number, batch, index),
                )
            except (BufferError, KafkaException) as error:
                self._not_taken(number, batch, index, error)

    def _too_large(
        self, topic: str, headers: binding.SentHeaders, value: bytes, key: bytes | None
    ) -> EventTooLarge | None:
        size = len(value) + len(key or b"")
        size += sum(len(name.encode()) + len(_bytes(text)) for name, text in headers)
        if size <= self._max_message_bytes:
            return None
        return EventTooLarge(
            f"the event takes {size} bytes with its headers, and broker {self._broker!r} takes "
            f"{self._max_message_bytes}: raise limits.max_event_bytes",
            topic=topic,
            broker=self._broker,
            size=size,
            limit=self._max_message_bytes,
        )

    def _not_taken(
        self, number: int, batch: _Batch, index: int, error: BufferError | KafkaException
    ) -> None:
        if isinstance(error, BufferError):
            full = QueueFull(
                f"events of broker {self._broker!r} that were given up still wait for an answer: "
                "publish slower",
                retry_after=1.0,
                broker=self._broker,
            )
            self._answer(number, batch, index, full)
        elif error.args[0].code() == KafkaError._FATAL:
            self._begin_replacing(error.args[0])
        elif is_missing(error.args[0]):
            self._give_back(batch, index)
        else:
            refused = translate(error.args[0], broker=self._broker, topic=batch.topic)
            self._answer(number, batch, index, refused)

    def _give_back(self, batch: _Batch, index: int) -> None:
        """
        The topic was there, and is not: it was deleted, and perhaps made anew.

        librdkafka does not look at once. We do, make it where that is wanted, and send the event
        again, until it is given up.
        """
        topic = batch.topic
        batch.missing.append(index)
        if topic not in self._missing:
            self._missing.add(topic)
            self._known.discard(topic)
            asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._go_on, topic)

    def _answered(
        self, number: int, batch: _Batch, index: int, error: KafkaError | None, message: Message
    ) -> None:
        """Called by librdkafka within poll, once for each event."""
        if error is None:
            outcome: Outcome = Receipt(
                batch.events[index].id,
                self._broker,
                batch.topic,
                Durability.STORED,
                Position(partition=message.partition(), offset=message.offset()),
            )
        elif error.code() in _AGAIN:
            return
        elif is_missing(error):
            self._give_back(batch, index)
            return
        else:
            outcome = translate(error, broker=self._broker, topic=batch.topic)
        if batch.put(index, outcome):
            self._sent.pop(number, None)

    def _answer(self, number: int, batch: _Batch, index: int, outcome: Outcome) -> None:
        if batch.put(index, outcome):
            self._sent.pop(number, None)

    # -- polling

    def _poll_soon(self) -> None:
        """Something is under way: ask for answers often."""
        timer = self._poll_timer
        loop = asyncio.get_running_loop()
        if timer is None or self._idle:
            if timer is not None:
                timer.cancel()
            self._idle = False
            self._poll_timer = loop.call_later(BUSY_POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        self._poll_timer = None
        if self._producer is None:
            return
        loop = asyncio.get_running_loop()
        try:
            self._serve()
            if self._replacing:
                self._try_to_replace(loop.time())
        finally:  # whatever a callback raises: without polling nothing would ever be answered
            self._idle = not (self._sent or self._connecting)
            seconds = IDLE_POLL_SECONDS if self._idle else BUSY_POLL_SECONDS
            self._poll_timer = loop.call_later(seconds, self._poll)

    def _serve(self) -> None:
        """Let librdkafka call back."""
        try:
            self._producer.poll(0)
        except KafkaException as error:  # it failed for good
            self._on_error(error.args[0])

    # -- a producer that failed for good

    def _begin_replacing(self, error: KafkaError) -> None:
        """
        The fatal error of an idempotent producer is for ever: another one goes on.

        First this one gives its last answers. What was under way to the broker may be stored all
        the same, and is then there twice; what had only been queued is not.
        """
        if self._replacing or self._closed:
            return
        log.warning(
            "broker %s: the producer failed for good (%s), another one goes on",
            self._broker,
            error.str(),
        )
        self._replacing = asyncio.get_running_loop().time() + REPLACE_SECONDS
        self._producer.purge(in_flight=False)
        self._poll_soon()

    def _try_to_replace(self, now: float) -> None:
        if len(self._producer) and now < self._replacing:
            return
        try:
            new = self._make()
        except SidecarError as error:  # a file with a secret is gone: it may be back
            log.warning("broker %s: no new producer: %s", self._broker, error.message)
            self._replacing = now + REPLACE_SECONDS
            return
        old, self._producer = self._producer, new
        _end_in_thread(old)
        self._replacing = 0.0
        for number, batch in list(self._sent.items()):
            if batch.future.cancelled():  # given up: whoever did it may have published it again
                del self._sent[number]
                continue
            missing = [index for index, outcome in enumerate(batch.outcomes) if outcome is None]
            batch.missing.clear()
            self._produce(number, batch, missing)
        for topic in {*self._held, *self._missing}:
            self._go_on(topic)

    # -- topics seen for the first time

    def _look_up(self, topic: str) -> None:
        """See first whether the topic is there: librdkafka would only time out."""
        if topic not in self._looking:
            self._looking.add(topic)
            looking = self._in_thread(self._topics.ensure, topic)
            looking.add_done_callback(partial(self._looked_up, topic))

    def _looked_up(self, topic: str, done: asyncio.Future[None]) -> None:
        self._looking.discard(topic)
        error = None if done.cancelled() else done.exception()
        if self._closed:
            return
        if error is None:
            self._known.add(topic)
            self._go_on(topic)
        elif isinstance(error, BrokerUnavailable):
            # The events wait until they are given up, as they would in librdkafka.
            asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._go_on, topic)
        else:
            ours = error if isinstance(error, SidecarError) else Internal(str(error))
            self._missing.discard(topic)
            for number, batch in self._given_back(topic):
                for index in batch.missing:
                    self._answer(number, batch, index, ours)
                batch.missing = []
            for batch in self._held.pop(topic, {}).values():
                if not batch.future.done():
                    batch.future.set_result([ours] * len(batch.events))

    # -- the end

    async def close(self) -> None:
        """Wait FLUSH_SECONDS for answers; what has none then fails. Never raises."""
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + FLUSH_SECONDS
        while self._sent and self._producer is not None and loop.time() < deadline:
            self._serve()
            await asyncio.sleep(BUSY_POLL_SECONDS)
        for timer in (self._poll_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        self._fail_connecting()
        held, self._held = self._held, {}
        for waiting in held.values():
            for batch in waiting.values():
                self._close_batch(batch, sent=False)
        sent, self._sent = self._sent, {}
        for batch in sent.values():
            self._close_batch(batch, sent=True)
        producer, self._producer = self._producer, None
        if producer is not None:
            _end_in_thread(producer)
        self.connected = False
        self._on_state(BrokerState(connected=False, detail="closed"))

    def _close_batch(self, batch: _Batch, *, sent: bool) -> None:
        error: SidecarError
        if sent:
            error = OutcomeUnknown(
                f"broker {self._broker!r} was closed before it answered", broker=self._broker
            )
        else:
            error = BrokerUnavailable(f"broker {self._broker!r} was closed", broker=self._broker)
        if not batch.future.done():
            batch.future.set_result([error if o is None else o for o in batch.outcomes])


def _list_nothing(producer: Any, timeout: float) -> None:
    # A name that is no topic: the answer is short, however many topics there are.
    producer.list_topics("_", timeout=timeout)


def _end_in_thread(producer: Any) -> None:
    """librdkafka ends its threads when the last reference goes, and may wait for a silent node."""
    last = [producer]
    del producer
    threading.Thread(target=last.clear, name="kafka-end", daemon=True).start()


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text
