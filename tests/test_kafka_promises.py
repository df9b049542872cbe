"""Promises that need the whole sidecar and a real Kafka: exact attempts, lanes, several brokers."""

from __future__ import annotations

import asyncio
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from sidecar.v1 import event_pb2 as ev
from sidecar.v1 import pubsub_pb2 as pb
from tests.brokers.kafka_cluster import admin, committed, produce, records
from tests.conformance.harness import fresh
from tests.support.app import Client, patiently, spec_of
from tests.support.kafka import KafkaCluster, require
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

README = Path(__file__).parents[1] / "README.md"
ON_KAFKA = """
drain = {{ timeout_seconds = 3 }}

[brokers.log]
type = "kafka"
bootstrap_servers = ["{servers}"]
auto_create_topics = true
topic_partitions = 1
group_protocol = "{protocol}"
session_timeout_seconds = 3
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[KafkaCluster]:
    require()
    with KafkaCluster(config={"group.consumer.session.timeout.ms": "3000"}) as running:
        yield running


@pytest.fixture
def topic() -> str:
    return f"{fresh('promise')}.made"


def event(number: int, **attributes: Any) -> ev.Event:
    return ev.Event(id=str(number), **{"source": "s", "type": "t", **attributes})


# -- attempts


@pytest.mark.timeout(120)
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
async def test_attempts_are_exact_over_kills_and_a_rebalance(
    cluster: KafkaCluster, topic: str, protocol: str
) -> None:
    """Failed here, `kill -9`, failed there, moved by a rebalance, failed: three deliveries, one dead letter."""
    config = ON_KAFKA.format(servers=cluster.bootstrap_servers, protocol=protocol)
    spec = spec_of(topic)
    spec.retry.max_attempts = 3
    attempts: list[int] = []

    async def fail(sidecar: SidecarProcess) -> None:
        async with Client(sidecar) as client:
            [delivery] = await patiently(client, spec)
            attempts.append(delivery.attempt)
            before = (await committed(cluster, spec.name, topic)).metadata
            await client.settle(delivery.token, pb.VERDICT_NACK, delay=0.5)
            if delivery.attempt < 3:
                await until(lambda: is_recorded(before))

    async def is_recorded(before: str) -> bool:
        return (await committed(cluster, spec.name, topic)).metadata not in {"", before}

    with SidecarProcess(config) as a, SidecarProcess(config) as b:
        async with Client(a) as client:
            await client.publish(topic, range(1))
        await fail(a)
        await asyncio.to_thread(a.kill)
        await fail(b)
        await asyncio.to_thread(a.start)
        async with Client(a) as joining, Client(b) as leaving:
            # Both are in the group; then one leaves it, and the other has to take over.
            stream = await joining.subscribe(spec, 0)
            other = await leaving.subscribe(spec, 0)
            await asyncio.to_thread(b.stop)
            assert await other.call.code() is grpc.StatusCode.UNAVAILABLE
            await stream.leave()
        await fail(a)
        letters = await records(cluster, f"{topic}.dlq", 1)
        await until(lambda: is_done(cluster, spec.name, topic))
        async with Client(a) as client:
            await client.publish(topic, range(1, 2))
            [last] = await patiently(client, spec)
        await asyncio.to_thread(b.start)
        end = await asyncio.to_thread(end_of, cluster, f"{topic}.dlq")

    headers = dict(letters[0].headers() or [])
    assert attempts == [1, 2, 3]
    assert (last.event.id, last.attempt) == ("1", 1)
    assert end == 1
    assert headers["sidecar-dead-letter-attempts"] == b"3"
    assert headers["sidecar-dead-letter-reason"] == b"attempts_exhausted"


async def is_done(cluster: KafkaCluster, group: str, topic: str) -> bool:
    """Acked: the position is behind the one event."""
    offset: int = (await committed(cluster, group, topic)).offset
    return offset == 1


def end_of(cluster: KafkaCluster, topic: str) -> int:
    """How many records the topic's only partition has had."""
    from confluent_kafka import Consumer, TopicPartition  # noqa: PLC0415

    consumer = Consumer({"bootstrap.servers": cluster.bootstrap_servers, "group.id": "end"})
    try:
        high: int = consumer.get_watermark_offsets(TopicPartition(topic, 0), 5)[1]
        return high
    finally:
        consumer.close()


# -- topics that are made anew


@pytest.mark.timeout(90)
@pytest.mark.parametrize("protocol", ["classic", "consumer"])
async def test_the_events_of_a_topic_that_is_made_anew_are_handed_over(
    cluster: KafkaCluster, topic: str, protocol: str
) -> None:
    """Their offsets were acked before, for other events. Nobody leaves the subscription meanwhile."""
    config = ON_KAFKA.format(servers=cluster.bootstrap_servers, protocol=protocol)
    cluster.create_topic(topic)
    await produce(cluster, topic, *[b"old"] * 20)
    with SidecarProcess(config) as sidecar:
        async with Client(sidecar) as client:
            stream = await client.subscribe(spec_of(topic), 500)
            await stream.take_data(20)
            await asyncio.to_thread(delete, cluster, topic)
            await asyncio.to_thread(cluster.create_topic, topic)
            await produce(cluster, topic, *[b"%d" % n for n in range(10)])
            anew = await stream.take_data(10)
            await stream.leave()

    assert anew == [b"%d" % n for n in range(10)]


def delete(cluster: KafkaCluster, topic: str) -> None:
    client = admin(cluster)  # dropped before the answer, it would cancel
    client.delete_topics([topic])[topic].result(10)


# -- lanes


@pytest.mark.timeout(90)
async def test_a_failing_key_holds_back_only_itself_within_a_partition(
    cluster: KafkaCluster, topic: str
) -> None:
    """One partition, 100 keys of 30 events; one fails five times, a second apart. The others are done before."""
    config = ON_KAFKA.format(servers=cluster.bootstrap_servers, protocol="auto")
    spec = spec_of(topic)
    spec.retry.max_attempts = 10
    seen: list[tuple[int, int]] = []
    with SidecarProcess(config) as sidecar:
        async with Client(sidecar) as client:
            for first in range(0, 3000, 500):
                numbers = range(first, first + 500)
                await client.publish_events(topic, [event(n, key=str(n % 100)) for n in numbers])
            stream = await client.subscribe(spec, 500)
            async with asyncio.timeout(60):
                while len(seen) < 3005:
                    deliveries = (await stream.call.read()).deliveries
                    seen += [(int(d.event.id), d.attempt) for d in deliveries]
                    await stream.call.write(
                        pb.SubscribeRequest(
                            settlements=[verdict_on(d) for d in deliveries], credit=len(deliveries)
                        )
                    )
            await stream.leave()

    of_the_failing = [one for one in seen if one[0] % 100 == 7]
    sixth = seen.index((7, 6))
    assert Counter(number for number, _ in seen) == Counter(range(3000)) + Counter({7: 5})
    assert of_the_failing == [(7, n) for n in range(1, 7)] + [(n, 1) for n in range(107, 3000, 100)]
    assert {number for number, _ in seen[:sixth]} >= {n for n in range(3000) if n % 100 != 7}


def verdict_on(delivery: pb.Delivery) -> pb.Settlement:
    if delivery.event.id == "7" and delivery.attempt < 6:
        settlement = pb.Settlement(token=delivery.token, verdict=pb.VERDICT_NACK)
        settlement.delay.FromSeconds(1)
        return settlement
    return pb.Settlement(token=delivery.token, verdict=pb.VERDICT_ACK)


# -- several brokers in one sidecar


@pytest.mark.timeout(90)
async def test_the_readme_sends_realtime_types_to_nats_and_all_else_to_kafka(
    cluster: KafkaCluster,
) -> None:
    """The configuration is the one that is printed; metrics tell types, brokers and success apart."""
    printed = re.findall(
        r"^```toml\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )[0]
    tomllib.loads(printed)
    with NatsServer() as server:
        config = printed.replace("nats://nats:4222", server.url)
        config = config.replace("kafka:9092", cluster.bootstrap_servers)
        with SidecarProcess(config) as sidecar:
            async with Client(sidecar) as client:
                ticker = await client.open("ticker", 10)
                billing = await client.open("billing", 10)
                receipts = await client.publish_events(
                    "prices.eur",
                    [event(1, type="realtime.price"), event(2, type="realtime.price.tick")],
                )
                receipts += await client.publish_events(
                    "orders.created",
                    [event(3, type="realtime.price"), event(4, type="order.created", key="c")],
                )
                live = await ticker.take(2)
                orders = await billing.take(1)
                await ticker.leave()
                await billing.leave()

            def published(**labels: str) -> float:
                return sidecar.metric("sidecar_published_events_total", **labels)

            counts = {
                (event_type, broker, result): published(
                    event_type=event_type, broker=broker, result=result
                )
                for event_type in ("realtime.>", "order.created", "other")
                for broker, result in (("realtime", "sent"), ("log", "stored"))
            }
            durations = sidecar.metric(
                "sidecar_publish_duration_seconds_count",
                event_type="order.created",
                broker="log",
                result="stored",
            )

    assert [(r.event_id, r.broker) for r in receipts] == [
        ("1", "realtime"),
        ("2", "realtime"),
        ("3", "realtime"),
        ("4", "log"),
    ]
    assert receipts[3].position.HasField("offset")
    assert (live, orders) == ([(1, 1), (2, 1)], [(4, 1)])
    assert {labels: count for labels, count in counts.items() if count} == {
        ("realtime.>", "realtime", "sent"): 3,
        ("order.created", "log", "stored"): 1,
    }
    assert durations == 1


THREE = """
[brokers.fast]
type = "nats"
servers = ["{nats}"]

[brokers.work]
type = "jetstream"
servers = ["{jetstream}"]
auto_create_streams = true

[brokers.log]
type = "kafka"
bootstrap_servers = ["{kafka}"]
auto_create_topics = true

[[routes]]
event_type = "live.>"
broker = "fast"

[[routes]]
event_type = "job.>"
broker = "work"

[[routes]]
topic = ">"
broker = "log"
"""


@pytest.mark.timeout(90)
async def test_one_call_spans_three_brokers_and_one_app_consumes_from_all(
    cluster: KafkaCluster, topic: str
) -> None:
    """Each event goes to the broker of its type; the receipts, in order, tell which and where."""
    types = ["live.tick", "job.mail", "order.created"] * 4
    batch = [event(number, type=type_) for number, type_ in enumerate(types)]
    # Two servers: a stream takes what is published on its subjects by whomever.
    with NatsServer() as nats, NatsServer() as jetstream:
        config = THREE.format(
            nats=nats.url, jetstream=jetstream.url, kafka=cluster.bootstrap_servers
        )
        with SidecarProcess(config) as sidecar:
            async with Client(sidecar) as client:
                streams = {
                    broker: await client.subscribe(
                        pb.SubscriptionSpec(
                            name=f"{spec_of(topic).name}-{broker}",
                            topic=topic,
                            broker=broker,
                            dead_letter_broker="log",
                        ),
                        100,
                    )
                    for broker in ("fast", "work", "log")
                }
                receipts = await client.publish_events(topic, batch)
                taken = {
                    broker: [number for number, _ in await stream.take(4)]
                    for broker, stream in streams.items()
                }
                for stream in streams.values():
                    await stream.leave()
                status = await client.status()

    assert [r.event_id for r in receipts] == [e.id for e in batch]
    assert [r.broker for r in receipts] == ["fast", "work", "log"] * 4
    assert [r.durability for r in receipts[:3]] == [
        ev.DURABILITY_SENT,
        ev.DURABILITY_STORED,
        ev.DURABILITY_STORED,
    ]
    assert [r.position.offset for r in receipts[2::3]] == [0, 1, 2, 3]
    assert taken == {"fast": [0, 3, 6, 9], "work": [1, 4, 7, 10], "log": [2, 5, 8, 11]}
    assert {(b.name, b.type, b.connected) for b in status.brokers} == {
        ("fast", "nats", True),
        ("work", "jetstream", True),
        ("log", "kafka", True),
    }


async def test_the_status_tells_lag_by_partition(cluster: KafkaCluster, topic: str) -> None:
    cluster.create_topic(topic, 3)
    config = ON_KAFKA.format(servers=cluster.bootstrap_servers, protocol="auto")
    spec = spec_of(topic, max_in_flight=1)
    with SidecarProcess(config) as sidecar:
        async with Client(sidecar) as client:
            stream = await client.subscribe(spec, 1)
            await client.publish_events(topic, [event(n, key=str(n)) for n in range(600)])

            async def lag_is_settled() -> bool:
                return [s.lag_events for s in (await client.status()).subscriptions] == [599]

            await until(lag_is_settled)
            [subscription] = (await client.status()).subscriptions
            stream.call.cancel()
            await stream.call.code()

    assert [(p.topic, p.partition) for p in subscription.partitions] == [
        (topic, number) for number in range(3)
    ]
    assert sum(p.lag_events for p in subscription.partitions) == 599


def test_the_status_says_why_a_broker_is_away_and_the_sidecar_lives(cluster: KafkaCluster) -> None:
    """A broker that is down at the start makes it not ready, not dead."""
    config = ON_KAFKA.format(servers="127.0.0.1:1", protocol="auto")
    with SidecarProcess(config, ready=False) as sidecar:
        status, body = sidecar.admin("readyz")

    assert status == 503
    assert "broker log" in body
