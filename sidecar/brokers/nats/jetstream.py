"""The JetStream driver: streams, durable pull consumers, acknowledged publishing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from sidecar.broker import Broker, Capabilities, Interest, Source, Start
from sidecar.brokers.nats.connection import Connection
from sidecar.brokers.nats.publisher import StreamPublisher
from sidecar.brokers.nats.source import Feed, StreamSource
from sidecar.errors import (
    BrokerRefused,
    BrokerUnavailable,
    NotSupported,
    SidecarError,
    TopicMissing,
)
from sidecar.event import Durability, Event, Outcome
from sidecar.wire.timestamps import format_rfc3339

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from sidecar.config import JetStream as Settings
    from sidecar.config import Stream

_SECOND = 1_000_000_000
STREAM_MISSING, CONSUMER_MISSING = 10059, 10014
STREAM_EXISTS, SUBJECTS_OVERLAP = 10058, 10065
"""JetStream's error codes, as in nats-server's errors.json."""


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
        self._publisher = StreamPublisher(
            name,
            self._connection,
            structured=settings.content_mode == "structured",
            make_stream=self._make_stream if settings.auto_create_streams else None,
        )
        self._replies: dict[int, Callable[[dict[str, Any]], None]] = {}
        self._reply_inbox = ""

    async def connect(self) -> None:
        await self._connection.connect()
        await self._publisher.open()
        if not self._reply_inbox:
            self._reply_inbox = self._connection.new_inbox()
            await self._connection.subscribe(self._reply_inbox + ".*", self._on_reply)
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
        self._publisher.fail_all(BrokerUnavailable(f"broker {self.name!r} was closed"))
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

    def _make_stream(self, topic: str, done: Callable[[SidecarError | None], None]) -> None:
        """
        Make the stream of a topic's first token, without a task: the publisher waits for it.

        First tokens never overlap, so two sidecars that do this at once make the same stream.
        """
        stream = auto_stream(topic)

        def answered(answer: dict[str, Any]) -> None:
            if "error" in answer and _error_code(answer) not in {STREAM_EXISTS, SUBJECTS_OVERLAP}:
                done(self._refused(f"stream {stream['name']!r} cannot be created", answer))
            else:
                done(None)

        number = len(self._replies)
        while number in self._replies:
            number += 1
        self._replies[number] = answered
        body = json.dumps(stream).encode()
        sent = self._connection.write(
            b"PUB $JS.API.STREAM.CREATE.%b %b.%d %d\r\n%b\r\n"
            % (stream["name"].encode(), self._reply_inbox.encode(), number, len(body), body)
        )
        if not sent:
            del self._replies[number]
            done(BrokerUnavailable("not connected"))

    def _on_reply(self, subject: bytes, _reply: bytes, _headers: bytes | None, data: bytes) -> None:
        handler = self._replies.pop(int(subject.rpartition(b".")[2]), None)
        if handler is not None:
            handler(json.loads(data) if data else {"error": {"description": "no JetStream"}})

    async def _streams_of(self, topic: str) -> list[str]:
        """The streams that hold a topic or pattern, made if there is none and we may."""
        streams = await self._matching_streams(topic)
        if not streams and self._settings.auto_create_streams:
            first = topic.partition(".")[0]
            if first in {"*", ">"}:
                raise TopicMissing(
                    f"no stream of broker {self.name!r} matches {topic!r} yet: publish something, or "
                    "begin the topic with a name",
                    topic=topic,
                    broker=self.name,
                )
            stream = auto_stream(topic)
            made = await self._call(f"STREAM.CREATE.{stream['name']}", stream)
            if "error" in made and _error_code(made) not in {STREAM_EXISTS, SUBJECTS_OVERLAP}:
                raise self._refused(f"stream {stream['name']!r} cannot be created", made)
            streams = await self._matching_streams(topic)
        if not streams:
            raise TopicMissing(
                f"no stream of broker {self.name!r} has the topic {topic!r}: declare one in "
                f"brokers.{self.name}.streams, or set auto_create_streams = true",
                topic=topic,
                broker=self.name,
            )
        return streams

    async def _matching_streams(self, topic: str) -> list[str]:
        answer = await self._call("STREAM.NAMES", {"subject": topic})
        return sorted(answer.get("streams") or [])

    # -- subscriptions

    async def subscribe(self, interest: Interest) -> Source:
        feeds = []
        for stream in await self._streams_of(interest.topic):
            await self._ensure_consumer(stream, interest)
            feeds.append(Feed(stream, interest.name))
        source = StreamSource(
            self._connection, interest, feeds, ack_wait=self._settings.ack_wait_seconds
        )
        await source.open()
        return source

    async def _ensure_consumer(self, stream: str, interest: Interest) -> None:
        found = await self._call(f"CONSUMER.INFO.{stream}.{interest.name}")
        if _error_code(found) == CONSUMER_MISSING:
            await self._create_consumer(stream, interest)
            return
        if "error" in found:
            raise self._refused(f"consumer {interest.name!r} cannot be looked up", found)
        there = found["config"]
        for key, value, meaning in (
            ("filter_subject", interest.topic, "topic"),
            ("ack_policy", "explicit", "ack policy"),
            ("deliver_subject", None, "push subject"),
        ):
            # A stream with one subject needs no filter: the server leaves it out.
            if there.get(key) not in {value, None}:
                raise BrokerRefused(
                    f"consumer {interest.name!r} of stream {stream!r} has the {meaning} "
                    f"{there.get(key)!r}, the subscription {value!r}: name it differently, or "
                    "delete the consumer",
                    broker=self.name,
                    subscription=interest.name,
                )

    async def _create_consumer(self, stream: str, interest: Interest) -> None:
        config = self._consumer_config(interest)
        made = await self._call(
            f"CONSUMER.DURABLE.CREATE.{stream}.{interest.name}",
            {"stream_name": stream, "config": config, "action": "create"},
        )
        if "error" in made and "already" not in made["error"].get("description", ""):
            raise self._refused(f"consumer {interest.name!r} cannot be created", made)

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
        moved = Interest(interest.name, interest.topic, interest.max_in_flight, to)
        for stream in streams:
            await self._move(stream, moved)

    async def _move(self, stream: str, interest: Interest) -> None:
        """
        Delete the consumer and make it anew at its new place.

        Another sidecar that subscribes in between makes it at its old start, so look, and repeat.
        """
        wanted = self._consumer_config(interest)
        for _ in range(5):
            gone = await self._call(f"CONSUMER.DELETE.{stream}.{interest.name}")
            if "error" in gone and _error_code(gone) != CONSUMER_MISSING:
                raise self._refused(f"consumer {interest.name!r} cannot be moved", gone)
            await self._create_consumer(stream, interest)
            made = await self._call(f"CONSUMER.INFO.{stream}.{interest.name}")
            if made.get("config", {}).get("deliver_policy") == wanted["deliver_policy"]:
                return
        raise BrokerUnavailable(
            f"subscription {interest.name!r} could not be moved: others keep making it anew"
        )

    async def _call(self, path: str, payload: object = None) -> dict[str, Any]:
        return await self._connection.call(f"$JS.API.{path}", payload)

    def _refused(self, what: str, answer: dict[str, Any]) -> BrokerRefused:
        error = answer.get("error", {})
        text = f"{error.get('description', 'no reason given')} ({error.get('err_code', 0)})"
        return BrokerRefused(f"broker {self.name!r}: {what}: {text}", broker=self.name)


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
