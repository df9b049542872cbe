"""What the suite needs to know of each driver: one harness per kind of broker."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import nats
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from sidecar.brokers.kafka.broker import KafkaBroker
from sidecar.brokers.memory import MemoryBroker
from sidecar.brokers.nats.core import NatsBroker
from sidecar.brokers.nats.jetstream import JetStreamBroker
from sidecar.config import JetStream, Kafka, Memory, Nats
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sidecar.broker import Broker, Capabilities
    from tests.support.kafka import KafkaCluster
    from tests.support.kafka_mock import MockCluster
    from tests.support.nats_server import NatsServer

CONNECT_SECONDS = 1.0
ACK_WAIT_SECONDS = 1.0
"""The shortest claim on an event that is not held."""
LONG_SECONDS = 60.0
"""A claim that does not run out within a test: what comes again came by a release."""

_numbers = itertools.count(1)


def fresh(prefix: str) -> str:
    """A name that no other test of this run uses."""
    return f"{prefix}-{os.getpid()}-{next(_numbers)}"


def wait_until_stopped(pid: int) -> None:
    """After SIGSTOP: a thread on another core may answer for a moment longer."""
    deadline = time.monotonic() + 5
    while any(
        "T" not in status.read_text().rpartition(")")[2].split()[0]
        for status in Path(f"/proc/{pid}/task").glob("*/stat")
    ):
        assert time.monotonic() < deadline, "the server does not stop"


class Harness(ABC):
    """
    One kind of broker. Every instance that *make* gives is on the same server.

    *features* are for the marker `needs`, beside the names of Capabilities: "topics" are made
    when they are first used, "server" can be stopped and paused, "foreign" takes messages from other clients, "frames" is spoken in the lines
    of NATS, "bare-json" takes structured events that no header announces, "removable" topics can be removed.
    """

    capabilities: ClassVar[Capabilities]
    features: ClassVar[frozenset[str]] = frozenset()
    server_fixture: ClassVar[str] = ""
    """The fixture of the server that all tests share, if there is one."""

    def __init__(self, server: Any) -> None:
        self.server = server

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the server, for a client of one's own."""
        raise NotImplementedError

    def make_topic(self, topic: str) -> None:  # noqa: B027 - brokers make their own
        """Before a test's topic is used."""

    @abstractmethod
    def make(self, *, ack_wait_seconds: float = LONG_SECONDS) -> Broker:
        """A new instance, not connected: a sidecar of its own."""

    async def remove_topic(self, topic: str) -> None:
        """With all that is stored there. Returns when it is gone, and can be made anew."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the server in order: it keeps all that it knows."""
        self.kill()

    def kill(self) -> None:
        """The server dies, as by SIGKILL."""
        raise NotImplementedError

    def start(self) -> None:  # noqa: B027 - most often there is nothing to do
        """The server is back, where it was, and answers."""

    def pause(self) -> None:
        """The server answers no more; connections stay open. *start* ends it."""
        raise NotImplementedError

    async def publish_foreign(
        self, topic: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        """Publish as a client that knows nothing of us. Attributes of CloudEvents begin with ce-."""
        raise NotImplementedError


class MemoryHarness(Harness):
    """Its server is the process: another sidecar is the same instance."""

    capabilities = MemoryBroker.capabilities
    features = frozenset({"topics"})

    def __init__(self, server: None) -> None:
        super().__init__(server)
        self._broker = MemoryBroker("memory", Memory(type="memory"))

    def make(self, *, ack_wait_seconds: float = LONG_SECONDS) -> Broker:
        return self._broker


class NatsHarness(Harness):
    capabilities = NatsBroker.capabilities
    features = frozenset({"topics", "server", "foreign", "frames", "bare-json"})
    server_fixture = "shared_nats_server"
    server: NatsServer

    def make(self, *, ack_wait_seconds: float = LONG_SECONDS) -> Broker:
        settings = Nats(
            type="nats",
            servers=[self.server.url],
            connect_timeout_seconds=CONNECT_SECONDS,
            reconnect_seconds=0.05,
        )
        return NatsBroker("nats", settings, client_name="conformance")

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.server.port

    def stop(self) -> None:
        self.server.stop()

    def kill(self) -> None:
        self.server.kill()

    def start(self) -> None:
        if self.server.alive:
            self.server.resume()
        else:
            self.server.start()

    def pause(self) -> None:
        self.server.pause()
        wait_until_stopped(self.server.pid)

    async def publish_foreign(
        self, topic: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        client = await nats.connect(self.server.url)
        await client.publish(topic, data, headers=dict(headers) if headers else None)
        # Twice: nats-py's flush writes its PING ahead of what it has queued.
        await client.flush()
        await client.flush()
        await client.close()


class JetStreamHarness(NatsHarness):
    capabilities = JetStreamBroker.capabilities
    features = NatsHarness.features | {"removable"}

    def make(self, *, ack_wait_seconds: float = LONG_SECONDS) -> Broker:
        settings = JetStream(
            type="jetstream",
            servers=[self.server.url],
            connect_timeout_seconds=CONNECT_SECONDS,
            reconnect_seconds=0.05,
            auto_create_streams=True,
            ack_wait_seconds=ack_wait_seconds,
        )
        return JetStreamBroker("jetstream", settings, client_name="conformance")

    async def remove_topic(self, topic: str) -> None:
        client = await nats.connect(self.server.url)
        await client.jetstream().delete_stream(topic.partition(".")[0])
        await client.close()


class KafkaHarness(Harness):
    """Topics have one partition: what one sidecar has of it, another has not."""

    capabilities = KafkaBroker.capabilities
    features = frozenset({"topics", "server", "foreign", "removable"})
    server_fixture = "shared_kafka"
    server: KafkaCluster

    def make(self, *, ack_wait_seconds: float = LONG_SECONDS) -> Broker:
        settings = Kafka(
            type="kafka",
            bootstrap_servers=self.server.bootstrap_servers.split(","),
            connect_timeout_seconds=CONNECT_SECONDS,
            auto_create_topics=True,
            topic_partitions=1,
            new_topics_seconds=0.2,
        )
        return KafkaBroker(
            "kafka",
            settings,
            client_name="conformance",
            max_event_bytes=1024 * 1024,
            max_pending=(20_000, 32 * 1024 * 1024),
            timeout_seconds=10,
        )

    async def remove_topic(self, topic: str) -> None:
        admin = AdminClient({"bootstrap.servers": self.server.bootstrap_servers, "log_level": 0})
        await asyncio.to_thread(admin.delete_topics([topic])[topic].result, 10)

        async def is_gone() -> bool:
            known = await asyncio.to_thread(admin.list_topics, timeout=10)
            return topic not in known.topics

        await until(is_gone)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.server.bootstrap_servers.partition(":")
        return host, int(port)

    def stop(self) -> None:
        self.server.stop()

    def kill(self) -> None:
        self.server.kill()

    def start(self) -> None:
        self.server.resume()
        if not self.server.alive:
            self.server.restart()
            self.server.wait_ready()

    def pause(self) -> None:
        self.server.pause()
        wait_until_stopped(self.server.pid())

    async def publish_foreign(
        self, topic: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        producer = Producer({"bootstrap.servers": self.server.bootstrap_servers, "log_level": 0})
        named = {name.replace("ce-", "ce_"): value for name, value in (headers or {}).items()}
        producer.produce(topic, data, headers=named)
        assert await asyncio.to_thread(producer.flush, 10) == 0


class KafkaMockHarness(KafkaHarness):
    """Where there is no Java: librdkafka's mock, which does not die, and makes no topics on request."""

    capabilities = msgspec.structs.replace(KafkaBroker.capabilities, lag=False, seeks=False)
    features = frozenset({"foreign"})
    server: MockCluster  # type: ignore[assignment]

    def make_topic(self, topic: str) -> None:
        self.server.create_topic(topic)

    def start(self) -> None:
        """It always runs."""
