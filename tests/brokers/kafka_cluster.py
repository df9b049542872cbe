"""What tests of the Kafka driver do: brokers on a real cluster, and looks past them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from sidecar.brokers.kafka.broker import KafkaBroker
from sidecar.config import Kafka

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from confluent_kafka import Message

    from tests.support.kafka import KafkaCluster

SECONDS = 10.0


def make(cluster: KafkaCluster, *, max_event_bytes: int = 1 << 20, **settings: Any) -> KafkaBroker:
    """A sidecar's broker, not connected; it creates topics with one partition unless told otherwise."""
    table = {
        "type": "kafka",
        "bootstrap_servers": cluster.bootstrap_servers.split(","),
        "auto_create_topics": True,
        "topic_partitions": 1,
        "new_topics_seconds": 0.2,
        "connect_timeout_seconds": 5,
    }
    return KafkaBroker(
        "log",
        Kafka.model_validate(table | settings),
        client_name="test",
        max_event_bytes=max_event_bytes,
        max_pending=(20_000, 64 << 20),
        timeout_seconds=10,
    )


@asynccontextmanager
async def broker_on(
    cluster: KafkaCluster, *, max_event_bytes: int = 1 << 20, **settings: Any
) -> AsyncIterator[KafkaBroker]:
    broker = make(cluster, max_event_bytes=max_event_bytes, **settings)
    try:
        await broker.connect()
        yield broker
    finally:
        await broker.close()


def admin(cluster: KafkaCluster) -> AdminClient:
    return AdminClient({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0})


async def committed(cluster: KafkaCluster, group: str, topic: str, partition: int = 0) -> Any:
    """The group's position as the cluster has it: a TopicPartition with offset and metadata."""
    return await asyncio.to_thread(_committed, cluster, group, TopicPartition(topic, partition))


def _committed(cluster: KafkaCluster, group: str, place: TopicPartition) -> Any:
    # Not by the admin client, which can end the process: see Groups._committed.
    consumer = Consumer(
        {"bootstrap.servers": cluster.bootstrap_servers, "group.id": group, "log_level": 0}
    )
    try:
        (found,) = consumer.committed([place], SECONDS)
        return found
    finally:
        consumer.close()


async def records(cluster: KafkaCluster, topic: str, count: int) -> Sequence[Message]:
    """The first *count* records of a topic, as any client reads them."""
    return await asyncio.to_thread(_records, cluster, topic, count)


def _records(cluster: KafkaCluster, topic: str, count: int) -> list[Message]:
    consumer = Consumer(
        {
            "bootstrap.servers": cluster.bootstrap_servers,
            "group.id": f"reader-{topic}",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "log_level": 0,
        }
    )
    try:
        consumer.subscribe([topic])
        found: list[Message] = consumer.consume(count, SECONDS)
        assert [record.error() for record in found] == [None] * count
        return found
    finally:
        consumer.close()


async def produce(cluster: KafkaCluster, topic: str, *values: bytes | None, **more: Any) -> None:
    """Publish as a client that knows nothing of us."""
    producer = Producer({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0})
    for value in values:
        producer.produce(topic, value, **more)
    assert await asyncio.to_thread(producer.flush, SECONDS) == 0
