"""Reading what topics have, without a group. Blocking."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka import TopicPartition as Partition
from confluent_kafka.admin import OffsetSpec

from sidecar.broker import Log, StoredEvent
from sidecar.brokers.kafka.client import Conf, logged, make_consumer, translate
from sidecar.brokers.kafka.source import event_of
from sidecar.errors import BrokerRefused, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sidecar.brokers.kafka.topics import Topics

CALL_SECONDS = 5.0
AGAIN_SECONDS = 0.1
READ_SECONDS = 10.0
"""Nothing came for so long, though there is something: the cluster is away."""
PAGE_BYTES = 8 * 1024 * 1024
IDLE_SECONDS = 60.0
"""So long the connection of the last read is kept for the next one."""
_POLL_SECONDS = 0.5


class Browser:
    """
    One consumer that is assigned what is to be read; it belongs to no group and commits nothing.

    It stays where the last read ended, so that reading on costs no new connection and no seek. Any
    number of threads may call; reads are one after the other. All raise BrokerUnavailable and
    BrokerRefused.
    """

    def __init__(self, broker: str, topics: Topics, conf: Callable[[], Conf]) -> None:
        self._broker = broker
        self._topics = topics
        self._conf = conf
        self._lock = threading.Lock()
        self._consumer: Any = None
        self._next: tuple[str, int, int] | None = None
        """Topic, partition and offset that the consumer gives next."""
        self._used = 0.0

    def logs(self, pattern: str) -> Sequence[Log]:
        """Dead letters' topics are looked at as all others: who asks for them wants them."""
        found = self._topics.matching(pattern, dead_letters=True)
        partitions = [(topic, number) for topic in sorted(found) for number in found[topic]]
        if not partitions:
            return []
        begins = self._offsets(partitions, OffsetSpec.earliest())
        ends = self._offsets(partitions, OffsetSpec.latest())
        ids = self._ids(sorted(found))
        return [
            Log(topic, number, "", begins[topic, number], ends[topic, number], ids[topic])
            for topic, number in partitions
        ]

    def _offsets(
        self, partitions: Sequence[tuple[str, int]], which: OffsetSpec
    ) -> Mapping[tuple[str, int], int]:
        """A leader may have just been chosen, as for a topic that is new: then once more."""
        deadline = time.monotonic() + CALL_SECONDS
        while True:
            asked = self._topics.admin.list_offsets(
                {Partition(topic, number): which for topic, number in partitions},
                request_timeout=CALL_SECONDS,
            )
            try:
                return {
                    (one.topic, one.partition): self._result(future, one.topic).offset
                    for one, future in asked.items()
                }
            except BrokerUnavailable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(AGAIN_SECONDS)  # noqa: TID251 - in a thread

    def _ids(self, topics: Sequence[str]) -> Mapping[str, str]:
        """What tells a topic from a later one of its name."""
        collection = TopicCollection(list(topics))
        asked = self._topics.admin.describe_topics(collection, request_timeout=CALL_SECONDS)
        ids = {}
        for topic, future in asked.items():
            try:
                ids[topic] = str(self._result(future, topic).topic_id)
            except BrokerRefused:  # not to be described by us, or a cluster that has none
                ids[topic] = ""
        return ids

    def _result(self, future: Any, topic: str) -> Any:
        try:
            return future.result(timeout=2 * CALL_SECONDS)
        except TimeoutError as error:
            raise self._silent() from error
        except KafkaException as error:
            raise translate(error.args[0], broker=self._broker, topic=topic) from error

    def read(self, log: Log, start: int, limit: int) -> Sequence[StoredEvent]:
        start = max(start, log.first)
        if start >= log.end or log.partition is None:
            return []
        with self._lock:
            try:
                return self._read(log.topic, log.partition, start, log.end, limit)
            except KafkaException as error:
                self._drop()
                raise translate(error.args[0], broker=self._broker, topic=log.topic) from error
            except BaseException:
                self._drop()
                raise
            finally:
                self._used = time.monotonic()

    def _read(
        self, topic: str, number: int, start: int, end: int, limit: int
    ) -> Sequence[StoredEvent]:
        consumer = self._consumer_at(topic, number, start)
        taken: list[StoredEvent] = []
        size, ended = 0, False
        deadline = time.monotonic() + READ_SECONDS
        while len(taken) < limit and size < PAGE_BYTES and not ended:
            message = self._next_of(consumer, deadline)
            if message is None:  # behind holes there is nothing more
                break
            offset = message.offset()
            ended = offset >= end - 1
            if start <= offset < end:
                size += len(message)
                taken.append(_stored(topic, number, message))
        if taken and not ended:
            self._next = (topic, number, taken[-1].number + 1)
        return taken

    def _consumer_at(self, topic: str, number: int, start: int) -> Any:
        if self._consumer is None:
            conf = self._conf() | logged(lambda _error: None)
            self._consumer = make_consumer(conf, broker=self._broker)
        if self._next != (topic, number, start):
            self._consumer.assign([Partition(topic, number, start)])
        self._next = None
        return self._consumer

    def _next_of(self, consumer: Any, deadline: float) -> Any:
        """The next record, or None at the end of the partition."""
        while True:
            message = consumer.poll(_POLL_SECONDS)
            error = None if message is None else message.error()
            if message is not None and error is None:
                return message
            if error is not None and error.code() == KafkaError._PARTITION_EOF:
                return None
            if error is not None and not (error.retriable() or error.code() in _PASSING):
                raise KafkaException(error)
            if time.monotonic() > deadline:
                raise self._silent()

    def _silent(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"broker {self._broker!r} does not answer", broker=self._broker)

    def rest(self) -> None:
        """Close the consumer if nobody read for IDLE_SECONDS."""
        with self._lock:
            if time.monotonic() - self._used >= IDLE_SECONDS:
                self._drop()

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        consumer, self._consumer, self._next = self._consumer, None, None
        if consumer is not None:
            consumer.close()


_PASSING = {KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN}
"""librdkafka goes on by itself: what never comes is for the deadline."""


def _stored(topic: str, number: int, message: Any) -> StoredEvent:
    event, _ = event_of(topic, number, message)
    stored_ns = max(0, message.timestamp()[1]) * 1_000_000
    return StoredEvent(topic, message.offset(), stored_ns, event)
