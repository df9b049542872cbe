"""The JetStream driver: streams, durable pull consumers, acknowledged publishing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from sidecar.broker import Broker, Capabilities, Interest, Log, Source, Start, StoredEvent
from sidecar.brokers.nats.attempts import Attempts
from sidecar.brokers.nats.connection import Connection
from sidecar.brokers.nats.pins import (
    POLICY,
    TAKE_OVER_ACK_WAIT_NS,
    Pin,
    pinned_config,
    unpinned_config,
)
from sidecar.brokers.nats.publisher import ANSWER_SECONDS, StreamPublisher
from sidecar.brokers.nats.source import Feed, StreamSource
from sidecar.brokers.nats.stored import StoredEvents
from sidecar.errors import (
    BrokerRefused,
    BrokerUnavailable,
    NotSupported,
    OutcomeUnknown,
    SidecarError,
    TopicMissing,
)
from sidecar.event import Durability, Event, Outcome
from sidecar.wire.timestamps import format_rfc3339

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection, Sequence

    from sidecar.brokers.nats.connection import OnAnswer
    from sidecar.brokers.nats.publisher import Resolved
    from sidecar.config import JetStream as Settings
    from sidecar.config import Stream

_SECOND = 1_000_000_000
STREAM_MISSING, STREAM_EXISTS = 10059, 10058
CONSUMER_MISSING, CONSUMER_EXISTS = 10014, 10148
"""JetStream's error codes, as in nats-server's errors.json."""
_NOT_TOPICS = ("KV_", "OBJ_", "$MQTT_")
"""How the streams begin that NATS keeps for others; our attempts are in one."""


class JetStreamBroker(Broker):
    """JetStream over one NATS connection."""

    type: ClassVar[str] = "jetstream"
    capabilities: ClassVar[Capabilities] = Capabilities(
        durability=Durability.STORED,
        positions=True,
        redelivers=True,
        deduplicates=True,
        seeks=True,
        lag=True,
        dead_letters=True,
        deals=True,
        browses=True,
        deletes=True,
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
        self._connection = Connection(settings, client_name=client_name, embedded=embedded)
        self._connection.on_state = lambda state: self.on_state(state)  # noqa: PLW0108 - set later
        self._attempts = Attempts(self._connection)
        self._stored = StoredEvents(name, self._connection)
        self._publisher = StreamPublisher(
            name,
            self._connection,
            structured=settings.content_mode == "structured",
            resolve=self._resolve,
        )

    async def connect(self) -> None:
        await self._publisher.open()
        await self._connection.connect()
        info = await self._call("INFO")
        if "error" in info:
            raise self._refused("JetStream cannot be used", info)
        for stream in self._settings.streams:
            await self._declare(stream)

    async def ended(self) -> None:
        await self._connection.ended()

    @property
    def max_event_bytes(self) -> int | None:
        return self._connection.max_payload

    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        return self._publisher.publish(topic, events, broker_ids)

    async def close(self) -> None:
        self._publisher.fail_all(
            OutcomeUnknown(f"broker {self.name!r} was closed before it answered", broker=self.name)
        )
        await self._connection.close()

    # -- streams

    async def _declare(self, declared: Stream) -> None:
        """Create a declared stream, or hold what is there against its declaration."""
        wanted = stream_config(declared)
        found = await self._call(f"STREAM.INFO.{declared.name}")
        if _error_code(found) == STREAM_MISSING:
            made = await self._call(f"STREAM.CREATE.{declared.name}", wanted)
            if "error" in made and _error_code(made) != STREAM_EXISTS:
                raise self._refused(f"stream {declared.name!r} cannot be created", made)
            return
        if "error" in found:
            raise self._refused(f"stream {declared.name!r} cannot be looked up", found)
        there = found["config"]
        wanted["subjects"], there["subjects"] = (
            sorted(wanted["subjects"]),
            sorted(there["subjects"]),
        )
        differing = [
            f"{key} is {there.get(key)!r}, declared {value!r}"
            for key, value in wanted.items()
            if there.get(key) != value
        ]
        if differing:
            raise BrokerRefused(
                f"stream {declared.name!r} differs from brokers.{self.name}.streams: "
                f"{'; '.join(differing)}. Change one of them: the sidecar never does",
                broker=self.name,
                stream=declared.name,
            )

    def _resolve(self, topic: str, done: Resolved) -> None:
        """
        See to it that *topic* has a stream, without a task: the publisher waits for it.

        First tokens never overlap, so two sidecars that do this at once make the same stream.
        """
        self._look(topic, done, None)

    def _look(self, topic: str, done: Resolved, refusal: SidecarError | None) -> None:
        """*refusal*: why it could not be made; another one may have made it in its own way."""

        def found(answer: dict[str, Any] | SidecarError) -> None:
            if isinstance(answer, SidecarError):
                done(answer)
            elif "error" in answer:
                done(BrokerUnavailable(f"JetStream does not say: {_text(answer)}"))
            elif answer.get("streams"):
                done(None)
            elif self._settings.auto_create_streams and refusal is None:
                self._make(topic, done)
            else:
                done(refusal or self._topic_missing(topic))

        self._ask("STREAM.NAMES", {"subject": topic}, found)

    def _make(self, topic: str, done: Resolved) -> None:
        stream = auto_stream(topic)

        def made(answer: dict[str, Any] | SidecarError) -> None:
            if isinstance(answer, SidecarError):
                done(answer)
            elif "error" not in answer:
                done(None)
            else:
                what = f"stream {stream['name']!r} cannot be created"
                self._look(topic, done, self._refused(what, answer))

        self._ask(f"STREAM.CREATE.{stream['name']}", stream, made)

    def _topic_missing(self, topic: str) -> TopicMissing:
        return TopicMissing(
            f"no stream of broker {self.name!r} has the topic {topic!r}: declare one in "
            f"brokers.{self.name}.streams, or set auto_create_streams = true",
            topic=topic,
            broker=self.name,
        )

    async def _streams_of(self, topic: str) -> list[str]:
        """The streams that hold a topic or pattern, made if there is none and we may."""
        streams = await self._matching_streams(topic)
        if streams:
            return streams
        if not self._settings.auto_create_streams:
            raise self._topic_missing(topic)
        if _spans_streams(topic):  # those that are made later are noticed: see StreamSource
            return []
        stream = auto_stream(topic)
        made = await self._call(f"STREAM.CREATE.{stream['name']}", stream)
        streams = await self._matching_streams(topic)
        if not streams:
            raise self._refused(f"stream {stream['name']!r} cannot be created", made)
        return streams

    async def _matching_streams(self, topic: str) -> list[str]:
        answer = await self._call("STREAM.NAMES", {"subject": topic})
        if "error" in answer:
            raise self._refused("JetStream's streams cannot be looked up", answer)
        return sorted(s for s in answer.get("streams") or [] if not s.startswith(_NOT_TOPICS))

    # -- subscriptions

    async def subscribe(self, interest: Interest) -> Source:
        streams = await self._streams_of(interest.topic)
        await self._attempts.make()
        feeds = [await self._feed(stream, interest) for stream in streams]
        later = msgspec.structs.replace(interest, start=Start())

        async def more(known: Collection[str]) -> list[Feed]:
            # A stream that was made after the subscription: all that it has is new.
            streams = await self._matching_streams(interest.topic)
            return [await self._feed(stream, later) for stream in streams if stream not in known]

        source = StreamSource(
            self._connection,
            interest,
            feeds,
            attempts=self._attempts,
            more=more if _spans_streams(interest.topic) else None,
        )
        await source.open()
        return source

    async def _feed(self, stream: str, interest: Interest) -> Feed:
        """The consumer of a subscription on one stream, made if it is not there."""
        name = interest.name
        info = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        if _error_code(info) == CONSUMER_MISSING:
            info = await self._create_consumer(stream, interest)
            if _error_code(info) == CONSUMER_EXISTS:  # another sidecar was quicker
                info = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        if "error" in info:
            raise self._refused(f"consumer {name!r} of stream {stream!r} cannot be used", info)
        there = info["config"]
        for what, is_, wanted in (
            ("topic", there.get("filter_subject", there.get("filter_subjects")), interest.topic),
            ("ack policy", there.get("ack_policy"), "explicit"),
            ("push subject", there.get("deliver_subject"), None),
        ):
            if is_ != wanted:
                raise BrokerRefused(
                    f"consumer {name!r} of stream {stream!r} has the {what} {is_!r}, the "
                    f"subscription {wanted!r}: name it differently, or delete the consumer",
                    broker=self.name,
                    subscription=name,
                )
        there = await self._agree(stream, interest, there)
        ack_wait = there["ack_wait"] / _SECOND
        pin = Pin(self._connection, stream, name, ack_wait) if interest.ordered else None
        return Feed(stream, name, info["created"], ack_wait, pin)

    async def _agree(
        self, stream: str, interest: Interest, there: dict[str, Any]
    ) -> dict[str, Any]:
        """The configuration of its consumer, changed where it is dealt out in another way."""
        wanted = unpinned_config(there)
        if interest.ordered:
            wanted |= pinned_config()
        if there["ack_wait"] == TAKE_OVER_ACK_WAIT_NS:  # a sidecar died while it took over
            wanted["ack_wait"] = int(self._settings.ack_wait_seconds * _SECOND)
        if wanted == there:
            return there
        answer = await self._create_consumer(stream, interest, update=wanted)
        if "error" in answer:
            other = "key_per_replica" if interest.ordered else "key"
            raise self._refused(
                f"consumer {interest.name!r} of stream {stream!r} cannot be changed: delete it, or "
                f'set ordering = "{other}"',
                answer,
            )
        config: dict[str, Any] = answer["config"]
        if interest.ordered and config.get("priority_policy") != POLICY:
            raise BrokerRefused(
                f'subscription {interest.name!r} has ordering = "key", over all sidecars, which '
                'needs nats-server 2.11 or later: set ordering = "key_per_replica", which keeps the '
                "order within each",
                broker=self.name,
                subscription=interest.name,
            )
        return config

    async def _create_consumer(
        self, stream: str, interest: Interest, *, update: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return await self._call(
            f"CONSUMER.DURABLE.CREATE.{stream}.{interest.name}",
            {
                "stream_name": stream,
                "config": update or self._consumer_config(interest),
                "action": "update" if update else "create",
            },
        )

    def _consumer_config(self, interest: Interest) -> dict[str, Any]:
        start = interest.start
        config: dict[str, Any] = {
            "durable_name": interest.name,
            "filter_subject": interest.topic,
            "ack_policy": "explicit",
            "ack_wait": int(self._settings.ack_wait_seconds * _SECOND),
            # Both unlimited: we count attempts ourselves (a limit here would leave events in the
            # stream, skipped and silent), and bound what we hold ourselves.
            "max_deliver": -1,
            "max_ack_pending": -1,
            "replay_policy": "instant",
            "deliver_policy": "new" if start.latest else "all",
        }
        if interest.ordered:
            config |= pinned_config()
        if start.position is not None:
            config |= {
                "deliver_policy": "by_start_sequence",
                "opt_start_seq": start.position.sequence,
            }
        elif start.time_ns is not None:
            config |= {
                "deliver_policy": "by_start_time",
                "opt_start_time": format_rfc3339(start.time_ns),
            }
        return config

    async def seek(self, interest: Interest, to: Start) -> None:
        streams = await self._streams_of(interest.topic)
        if to.position is not None:
            if to.position.stream not in {"", *streams} or to.position.sequence < 1:
                raise NotSupported(
                    f"position: name a sequence from 1 in stream {' or '.join(streams)}",
                    subscription=interest.name,
                )
            if len(streams) > 1:
                if not to.position.stream:
                    raise NotSupported(
                        f"the topic spans the streams {', '.join(streams)}: name the position's",
                        subscription=interest.name,
                    )
                streams = [to.position.stream]
        moved = msgspec.structs.replace(interest, start=to)
        for stream in streams:
            await self._move(stream, moved)

    async def _move(self, stream: str, interest: Interest) -> None:
        """
        Delete the consumer and make it anew at its new place.

        Another sidecar that subscribes in between makes it at its old start: then once more.
        """
        for _ in range(5):
            gone = await self._call(f"CONSUMER.DELETE.{stream}.{interest.name}")
            if "error" in gone and _error_code(gone) != CONSUMER_MISSING:
                raise self._refused(f"consumer {interest.name!r} cannot be moved", gone)
            made = await self._create_consumer(stream, interest)
            if "error" not in made:
                return
            if _error_code(made) != CONSUMER_EXISTS:
                raise self._refused(f"consumer {interest.name!r} cannot be moved", made)
        raise BrokerUnavailable(
            f"subscription {interest.name!r} could not be moved: others keep making it anew"
        )

    # -- what is stored

    async def logs(self, pattern: str) -> Sequence[Log]:
        streams = await self._matching_streams(pattern)
        found = [await self._stored.log(stream, pattern) for stream in streams]
        return [log for log in found if log is not None]

    async def read(self, log: Log, start: int, limit: int) -> Sequence[StoredEvent]:
        return await self._stored.read(log, start, limit)

    async def delete(self, log: Log, numbers: Sequence[int]) -> None:
        await self._stored.delete(log, numbers)

    async def _call(self, path: str, payload: object = None) -> dict[str, Any]:
        return await self._connection.call(f"$JS.API.{path}", payload)

    def _ask(self, path: str, payload: object, then: OnAnswer) -> None:
        self._connection.ask(f"$JS.API.{path}", payload, then, seconds=ANSWER_SECONDS)

    def _refused(self, what: str, answer: dict[str, Any]) -> BrokerRefused:
        return BrokerRefused(f"broker {self.name!r}: {what}: {_text(answer)}", broker=self.name)


def _spans_streams(topic: str) -> bool:
    """Which streams a pattern touches can change: its first token is a wildcard."""
    return topic[0] in "*>"


def auto_stream(topic: str) -> dict[str, Any]:
    """The stream that is made for a topic by itself: its first token, and all below it."""
    token = topic.partition(".")[0]
    return {
        "name": token,
        "subjects": [token, f"{token}.>"],
        "storage": "file",
        "retention": "limits",
        "allow_direct": True,
        "num_replicas": 1,
        "duplicate_window": 120 * _SECOND,
    }


def stream_config(declared: Stream) -> dict[str, Any]:
    return {
        "name": declared.name,
        "subjects": declared.subjects,
        "storage": declared.storage,
        "retention": declared.retention,
        "max_age": int(declared.max_age_seconds * _SECOND),
        "max_bytes": declared.max_bytes,
        "max_msgs": declared.max_events,
        "num_replicas": declared.replicas,
        "duplicate_window": int(declared.duplicate_window_seconds * _SECOND),
        "allow_direct": True,
    }


def _error_code(answer: dict[str, Any]) -> int:
    code: int = answer.get("error", {}).get("err_code", 0)
    return code


def _text(answer: dict[str, Any]) -> str:
    error = answer.get("error", {})
    return f"{error.get('description', 'no reason given')} ({error.get('err_code', 0)})"
