"""The Kafka driver: an idempotent producer, and a member of a consumer group for each subscription."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from sidecar.broker import (
    Broker,
    Capabilities,
    Interest,
    Log,
    Source,
    Start,
    StoredEvent,
)
from sidecar.brokers.kafka.browsing import IDLE_SECONDS, Browser
from sidecar.brokers.kafka.client import FRAMING_BYTES, Conf, common, options
from sidecar.brokers.kafka.groups import Groups
from sidecar.brokers.kafka.member import MAX_BUFFERED_BYTES, Member, Place
from sidecar.brokers.kafka.producer import KafkaPublisher
from sidecar.brokers.kafka.source import KafkaSource
from sidecar.brokers.kafka.threads import Threads
from sidecar.brokers.kafka.topics import Topics
from sidecar.errors import BrokerUnavailable
from sidecar.event import Durability, Event, Outcome, has_wildcard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sidecar.config import Kafka as Settings

log = logging.getLogger(__name__)

HEADERS_BYTES = 64 * 1024
"""Room for an event's key and headers, beside its data."""
THREADS = 8
MAX_BUFFERED = 2000
"""Events a subscription has fetched for a window that is full, at most."""
FETCHED_KBYTES = 8 * 1024
"""What librdkafka fetches ahead for one subscription."""


class KafkaBroker(Broker):
    """One Kafka cluster."""

    type: ClassVar[str] = "kafka"
    dead_letter_topic: ClassVar[str] = "{topic}.dlq"
    # Named so that a subscription with a wildcard does not get it; see topics.names.
    marks_topic: ClassVar[str] = "sidecar-dead-letter-marks.dlq"
    capabilities: ClassVar[Capabilities] = Capabilities(
        durability=Durability.STORED,
        positions=True,
        redelivers=True,
        deduplicates=False,
        seeks=True,
        lag=True,
        dead_letters=True,
        deals=False,
        browses=True,
    )

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        client_name: str,
        max_event_bytes: int,
        max_pending: tuple[int, int],
        timeout_seconds: float,
    ) -> None:
        """*max_pending*: events and bytes that are published at once; *timeout_seconds*: a publish's."""
        super().__init__(name)
        self._settings = settings
        self._client_name = client_name
        self._max_message_bytes = max_event_bytes + HEADERS_BYTES
        self._classic = settings.group_protocol == "classic"
        self._sources: list[KafkaSource] = []
        self._closed = False
        self._resting: asyncio.TimerHandle | None = None
        self._in_thread = Threads(f"kafka-{name}", THREADS).run
        self._topics = Topics(
            name,
            settings,
            client_id=client_name,
            max_message_bytes=self._max_message_bytes + FRAMING_BYTES,
        )
        self._groups = Groups(name, self._topics, self._consumer_conf)
        self._browser = Browser(name, self._topics, self._browser_conf)
        self._publisher = KafkaPublisher(
            name,
            settings,
            self._topics,
            client_id=client_name,
            max_message_bytes=self._max_message_bytes,
            max_pending=max_pending,
            timeout_seconds=timeout_seconds,
            in_thread=self._in_thread,
            on_state=lambda state: self.on_state(state),  # noqa: PLW0108 - set later
        )

    @property
    def max_event_bytes(self) -> int | None:
        return self._max_message_bytes

    async def connect(self) -> None:
        await self._publisher.connect(self._settings.connect_timeout_seconds)

    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        return self._publisher.publish(topic, events)

    async def keep(self, topic: str) -> None:
        self._check_connected()
        await self._in_thread(partial(self._topics.ensure, topic, kept=True))

    # -- subscriptions

    async def subscribe(self, interest: Interest) -> Source:
        self._check_connected()
        if not has_wildcard(interest.topic):
            await self._in_thread(self._topics.ensure, interest.topic)
        topics, fences = await self._in_thread(self._groups.begin, interest)
        source = KafkaSource(
            self.name,
            interest,
            connected=lambda: self._publisher.connected,
            lag=partial(self._lag, interest),
            use_classic=self._use_classic,
        )
        source.feed_from(self._member(interest, source, topics, fences))
        self._sources = [one for one in self._sources if not one.is_over]
        self._sources.append(source)
        return source

    def _check_connected(self) -> None:
        if not self._publisher.connected:
            raise BrokerUnavailable(
                f"broker {self.name!r} is not connected to Kafka", broker=self.name
            )

    def _member(
        self,
        interest: Interest,
        source: KafkaSource,
        topics: Sequence[str],
        fences: Mapping[Place, str],
    ) -> Member:
        pattern = has_wildcard(interest.topic)
        return Member(
            interest.name,
            self._consumer_conf(interest),
            source,
            broker=self.name,
            call=source.call,
            max_buffered=min(interest.max_in_flight, MAX_BUFFERED),
            max_buffered_bytes=min(interest.max_in_flight_bytes, MAX_BUFFERED_BYTES),
            topics=topics,
            matching=partial(self._topics.matching, interest.topic) if pattern else None,
            matching_seconds=self._settings.new_topics_seconds,
            fences=fences,
        )

    def _use_classic(self) -> bool:
        if self._settings.group_protocol != "auto":
            return False
        if not self._classic:
            log.info("broker %s: no group protocol 'consumer' there, using 'classic'", self.name)
        self._classic = True
        return True

    def _consumer_conf(self, interest: Interest) -> Conf:
        settings = self._settings
        largest = self._max_message_bytes + FRAMING_BYTES
        session_ms = int(settings.session_timeout_seconds * 1000)
        conf: Conf = (
            common(settings, self._client_name)
            | {
                # One event of the largest size fits; the rest is prefetch that costs memory.
                "fetch.message.max.bytes": max(1024 * 1024, largest),
                "fetch.max.bytes": max(8 * 1024 * 1024, largest),
                "receive.message.max.bytes": max(16 * 1024 * 1024, 2 * largest),
                "queued.max.messages.kbytes": max(
                    min(FETCHED_KBYTES, interest.max_in_flight_bytes // 1024), largest // 1024
                ),
                "queued.min.messages": 2 * MAX_BUFFERED,
                # How long a fetch waits for the first event, and others for it: new partitions.
                "fetch.wait.max.ms": 100,
                # librdkafka looks so late (1 s) whether there is room again.
                "fetch.queue.backoff.ms": 10,
                # librdkafka wants no session that is longer than this.
                "max.poll.interval.ms": max(300_000, session_ms),
            }
            | options(settings)
            | {
                "group.id": interest.name,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                # A position that is not in the log any more is for us to see, and to tell.
                "auto.offset.reset": "error",
            }
        )
        if not self._classic:
            return conf | {"group.protocol": "consumer"}
        classic = {
            "group.protocol": "classic",
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": session_ms,
            # Members learn of a rebalance by their heartbeat: often, so that it is over soon.
            "heartbeat.interval.ms": min(1000, session_ms // 4),
        }
        return conf | classic

    async def seek(self, interest: Interest, to: Start) -> None:
        self._check_connected()
        ours = [one for one in self._sources if one.name == interest.name and not one.is_over]
        members = [source.member for source in ours if source.member is not None]
        await self._in_thread(self._groups.move, interest, to, members)

    # -- what is stored

    async def logs(self, pattern: str) -> Sequence[Log]:
        self._check_connected()
        found: Sequence[Log] = await self._in_thread(self._browser.logs, pattern)
        return found

    async def read(self, log: Log, start: int, limit: int) -> Sequence[StoredEvent]:
        self._check_connected()
        found: Sequence[StoredEvent] = await self._in_thread(self._browser.read, log, start, limit)
        if self._resting is not None:
            self._resting.cancel()
        loop = asyncio.get_running_loop()
        self._resting = loop.call_later(IDLE_SECONDS + 1, self._in_thread, self._browser.rest)
        return found

    def _browser_conf(self) -> Conf:
        largest = self._max_message_bytes + FRAMING_BYTES
        return (
            common(self._settings, self._client_name)
            | {
                "fetch.message.max.bytes": max(1024 * 1024, largest),
                "fetch.max.bytes": max(8 * 1024 * 1024, largest),
                "receive.message.max.bytes": max(16 * 1024 * 1024, 2 * largest),
                "queued.max.messages.kbytes": max(FETCHED_KBYTES, largest // 1024),
                "fetch.wait.max.ms": 100,
            }
            | options(self._settings)
            | {
                # librdkafka wants one; it is never joined.
                "group.id": f"{self._client_name}-browses",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
            }
        )

    async def _lag(
        self, interest: Interest, here: Mapping[Place, tuple[int, int]]
    ) -> Mapping[Place, int]:
        lag: Mapping[Place, int] = await self._in_thread(self._groups.lag, interest, here)
        return lag

    # -- the end

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._resting is not None:
            self._resting.cancel()
        self._in_thread(self._browser.close)  # nobody waits for it
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._publisher.close())
            for source in self._sources:
                tasks.create_task(source.close())
