"""What is special to Kafka: topics, partitions, sizes, positions that survive, groups that move."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import confluent_kafka
import pytest
from confluent_kafka import KafkaError, TopicPartition

from sidecar.broker import Failures, Interest, Start
from sidecar.brokers.kafka.source import KafkaSource
from sidecar.errors import (
    BrokerRefused,
    EventTooLarge,
    NotSupported,
    SourceLost,
    TopicMissing,
)
from sidecar.event import Position
from tests.brokers.kafka_cluster import (
    admin,
    broker_on,
    committed,
    make,
    produce,
    records,
)
from tests.conformance.acting import (
    event,
    events,
    handles,
    ids,
    interest,
    numbers,
    publish,
    receipt,
    take,
)
from tests.conformance.harness import fresh
from tests.support.kafka import KafkaCluster, require
from tests.support.kafka_mock import handle_of, librdkafka
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Hashable, Iterator, Sequence

    from sidecar.broker import Incoming
    from sidecar.brokers.kafka.broker import KafkaBroker

BOTH_PROTOCOLS = pytest.mark.parametrize("protocol", ["classic", "consumer"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[KafkaCluster]:
    """It would create topics by itself, as Kafka does by default."""
    require()
    with KafkaCluster(config={"auto.create.topics.enable": "true"}) as running:
        yield running


@pytest.fixture
async def broker(cluster: KafkaCluster) -> AsyncIterator[KafkaBroker]:
    async with broker_on(cluster) as connected:
        yield connected


@pytest.fixture
def topic() -> str:
    return f"{fresh('topic')}.created"


# -- topics


@pytest.mark.parametrize("how", ["publish", "subscribe"])
async def test_a_topic_that_does_not_exist_is_missing_at_once_and_not_made(
    cluster: KafkaCluster, topic: str, how: str
) -> None:
    """Though the cluster would make it: a typing error is no topic. The error says what to do."""
    async with asyncio.timeout(5), broker_on(cluster, auto_create_topics=False) as broker:
        if how == "publish":
            outcomes = await broker.publish(topic, events([1, 2]))
            error = outcomes[1]
        else:
            with pytest.raises(TopicMissing) as caught:
                await broker.subscribe(interest(topic))
            error = caught.value
    topics = admin(cluster).list_topics(timeout=5).topics

    assert isinstance(error, TopicMissing)
    assert error.message == (
        f"topic {topic!r} does not exist on broker 'log': create it, or set "
        "brokers.log.auto_create_topics = true"
    )
    assert topic not in topics


async def test_a_topic_is_created_as_configured(cluster: KafkaCluster, topic: str) -> None:
    """And so that it takes the largest event."""
    settings: dict[str, Any] = {
        "topic_partitions": 3,
        "topic_settings": {"retention.ms": 60_000, "preallocate": False},
    }
    async with broker_on(cluster, **settings) as broker:
        await publish(broker, topic, [event("1")])
        size = broker.max_event_bytes
    client = admin(cluster)
    partitions = client.list_topics(topic, timeout=5).topics[topic].partitions
    resource = confluent_kafka.admin.ConfigResource("topic", topic)
    found = client.describe_configs([resource])[resource].result(5)

    assert len(partitions) == 3
    assert (found["retention.ms"].value, found["preallocate"].value) == ("60000", "false")
    assert int(found["max.message.bytes"].value) > (size or 0)


async def test_a_topic_that_was_deleted_is_missing_again(cluster: KafkaCluster, topic: str) -> None:
    async with broker_on(cluster, auto_create_topics=False) as broker:
        cluster.create_topic(topic)
        await publish(broker, topic, [event("1")])
        client = admin(cluster)
        client.delete_topics([topic])[topic].result(5)

        async def is_missing() -> bool:
            return isinstance((await broker.publish(topic, [event("2")]))[0], TopicMissing)

        await until(is_missing, seconds=20)


async def test_a_topic_that_was_deleted_is_made_again_where_that_is_wanted(
    cluster: KafkaCluster, broker: KafkaBroker, topic: str
) -> None:
    """By the next publish; librdkafka would say for seconds that it is not there."""
    await publish(broker, topic, [event("old")])
    client = admin(cluster)
    client.delete_topics([topic])[topic].result(5)
    under_way = []
    for number in range(50):
        under_way.append(broker.publish(topic, events(range(number * 2, number * 2 + 2))))
        await asyncio.sleep(0.01)
    async with asyncio.timeout(20):
        receipts = [receipt(outcome) for one in under_way for outcome in await one]
    taken = await take(await broker.subscribe(interest(topic)), 1)

    assert [r.event_id for r in receipts] == numbers(100)
    assert taken


async def test_wildcards_match_no_dead_letters_unless_they_name_them(
    broker: KafkaBroker, topic: str
) -> None:
    """They lie beside their topics: else one would get the dead letters of all others."""
    first = topic.partition(".")[0]
    for one in (topic, f"{topic}.dlq"):
        await publish(broker, one, [event(one)])
    everything = await take(await broker.subscribe(interest(f"{first}.>")), 1)
    letters = await take(await broker.subscribe(interest(f"{first}.*.dlq")), 1)
    by_pattern = await broker.subscribe(interest(f"{first}.*"))
    await publish(broker, f"{first}.last", [event("last")])
    others = await take(by_pattern, 2)

    assert [i.topic for i in everything] == [topic]
    assert [i.topic for i in letters] == [f"{topic}.dlq"]
    assert sorted(i.topic for i in others) == [topic, f"{first}.last"]


@pytest.mark.parametrize(
    ("pattern", "expected"), [("orders.>", SourceLost), ("orders.made", TopicMissing)]
)
async def test_one_topic_that_goes_does_not_end_a_wildcard(
    pattern: str, expected: type[Exception]
) -> None:
    """The subscription begins again with those that are there; its consumers need not know."""
    source = KafkaSource(
        "log", interest(pattern), connected=bool, lag=no_lag, use_classic=lambda: False
    )
    source.on_failure(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART))
    with pytest.raises(expected):
        await source.fetch(1)


async def no_lag(_: object) -> dict[tuple[str, int], int]:
    return {}


@pytest.mark.parametrize("start", [Start(), Start(latest=True)], ids=["earliest", "latest"])
async def test_partitions_that_come_later_are_read_from_their_first_event(
    cluster: KafkaCluster, topic: str, start: Start
) -> None:
    """Also by a subscription that began at the latest: what is there came after that."""
    async with broker_on(cluster, options={"topic.metadata.refresh.interval.ms": 300}) as broker:
        await publish(broker, topic, [event("old")])
        source = await broker.subscribe(interest(topic, start=start))
        more = confluent_kafka.admin.NewPartitions(topic, 4)
        client = admin(cluster)
        client.create_partitions([more])[topic].result(5)
        for partition in range(1, 4):
            await produce(cluster, topic, b"%d" % partition, partition=partition)
        count = 3 + (not start.latest)
        taken = await take(source, count)

    assert sorted(i.position.partition or 0 for i in taken if i.position) == [
        *([0] * (not start.latest)),
        1,
        2,
        3,
    ]


# -- publishing


def murmur2_partition(key: bytes, partitions: int) -> int:
    """As Kafka's Java client has it (Utils.murmur2 and BuiltInPartitioner)."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    h = (0x9747B28C ^ len(key)) & mask
    whole = len(key) // 4 * 4
    for at in range(0, whole, 4):
        k = int.from_bytes(key[at : at + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = h * m & mask ^ k
    if rest := key[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return ((h ^ h >> 15) & 0x7FFFFFFF) % partitions


async def test_a_key_has_the_partition_that_javas_client_gives_it(
    cluster: KafkaCluster, topic: str
) -> None:
    """So an app may publish beside the sidecar, and order per key holds."""
    keys = [f"customer-{number}" for number in range(50)]
    async with broker_on(cluster, topic_partitions=7) as broker:
        receipts = await publish(broker, topic, [event(key, key=key) for key in keys])
    found = [r.position.partition for r in receipts if r.position]

    assert found == [murmur2_partition(key.encode(), 7) for key in keys]


@pytest.mark.parametrize("compression", ["none", "gzip", "snappy", "lz4", "zstd"])
async def test_every_compression_is_there(
    cluster: KafkaCluster, topic: str, compression: str
) -> None:
    async with broker_on(cluster, compression=compression) as broker:
        await publish(broker, topic, [event("1", data=b"x" * 10_000)])
        (taken,) = await take(await broker.subscribe(interest(topic)), 1)

    assert taken.event
    assert taken.event.data == b"x" * 10_000


async def test_events_of_ten_mebibytes_pass_when_configured(
    cluster: KafkaCluster, topic: str
) -> None:
    """Through the producer, the topic that is made for them, and the consumer."""
    size = 10 << 20
    batch = [event(str(n), data=bytes([n]) * size) for n in range(3)]
    async with broker_on(cluster, max_event_bytes=size, compression="none") as broker:
        await publish(broker, topic, batch)
        taken = await take(await broker.subscribe(interest(topic)), 3)

    assert [i.event and i.event.data for i in taken] == [e.data for e in batch]


async def test_large_events_wait_at_the_broker_and_not_here(
    cluster: KafkaCluster, broker: KafkaBroker, topic: str
) -> None:
    """What is fetched for a window that is full is bounded in bytes too, and goes on when it is not."""
    cluster.create_topic(topic, 2)
    for number in range(64):
        await produce(cluster, topic, b"x" * 900_000, partition=number % 2)
    source = await broker.subscribe(interest(topic, max_in_flight=256))
    first = await take(source, 1, ack=True)
    assert isinstance(source, KafkaSource)
    await until(is_paused(source))
    waiting = sum(len(message) for one in source._assigned.values() for message in one.buffer)
    rest = await take(source, 63, ack=True)

    assert len(first) == 1
    assert 16 << 20 <= waiting <= 32 << 20
    assert len(rest) == 63


def is_paused(source: KafkaSource) -> Any:
    async def condition() -> bool:
        return source.member is not None and source.member._paused

    return condition


async def test_a_topic_that_takes_less_than_we_do_refuses_that_event_alone(
    cluster: KafkaCluster, topic: str
) -> None:
    cluster.create_topic(topic, config={"max.message.bytes": "2000"})
    async with broker_on(cluster, compression="none", linger_seconds=0) as broker:
        first = (await broker.publish(topic, [event("1")]))[0]
        large = (await broker.publish(topic, [event("2", data=b"x" * 5000)]))[0]
        last = (await broker.publish(topic, [event("3")]))[0]

    assert isinstance(large, EventTooLarge)
    assert "raise the topic's max.message.bytes" in large.message
    assert [receipt(outcome).event_id for outcome in (first, last)] == ["1", "3"]


async def test_a_setting_that_librdkafka_does_not_know_is_refused_by_its_name(
    cluster: KafkaCluster,
) -> None:
    broker = make(cluster, options={"socket.nagle": True})
    with pytest.raises(BrokerRefused, match=r'No such configuration property: "socket\.nagle"'):
        await broker.connect()
    await broker.close()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"options": {"fetch.min.bytes": 0}}, "fetch.min.bytes"),
        ({"options": {"max.poll.interval.ms": 9000}, "group_protocol": "classic"}, "max.poll"),
        ({"options": {"heartbeat.interval.ms": 1000}, "group_protocol": "consumer"}, "heartbeat"),
    ],
    ids=["value", "pair", "protocol"],
)
@pytest.mark.parametrize("pattern", ["", ".>"], ids=["topic", "wildcard"])
async def test_a_setting_that_no_consumer_takes_refuses_the_subscription(
    cluster: KafkaCluster, topic: str, settings: dict[str, Any], why: str, pattern: str
) -> None:
    """A producer takes no notice of it, so the broker is connected."""
    async with broker_on(cluster, **settings) as broker:
        with pytest.raises(BrokerRefused, match=why):
            await broker.subscribe(interest(f"{topic}{pattern}"))


async def test_a_session_may_last_longer_than_librdkafka_lets_polls_take(
    cluster: KafkaCluster, topic: str
) -> None:
    async with broker_on(cluster, group_protocol="classic", session_timeout_seconds=1000) as broker:
        await publish(broker, topic, [event("1")])
        taken = await take(await broker.subscribe(interest(topic)), 1)

    assert ids(taken) == ["1"]


def fail_for_good(producer: Any) -> None:
    """librdkafka's own way to test it, on the real producer."""
    out_of_order = 45
    librdkafka().rd_kafka_test_fatal_error(handle_of(producer), out_of_order, b"a test")


async def test_a_producer_that_failed_for_good_is_replaced_and_nothing_is_lost(
    cluster: KafkaCluster, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Three times, with batches queued, on their way and coming; in their order."""
    async with broker_on(cluster) as broker:
        publisher = broker._publisher
        under_way = []
        for number in range(300):
            under_way.append(broker.publish(topic, events(range(number * 10, number * 10 + 10))))
            if number in {50, 150, 250}:
                fail_for_good(publisher._producer)
            await asyncio.sleep(0)
        async with asyncio.timeout(30):
            receipts = [receipt(outcome) for one in under_way for outcome in await one]
        taken = await take(await broker.subscribe(interest(topic)), 3000, ack=True)

    first_time = list(dict.fromkeys(ids(taken)))
    assert [r.event_id for r in receipts] == numbers(3000)
    assert first_time == numbers(3000)
    assert "another one goes on" in caplog.text


async def test_what_was_given_up_is_not_published_again_by_another_producer(
    cluster: KafkaCluster, topic: str
) -> None:
    """Whoever gave it up may have published it again by then."""
    async with broker_on(cluster, linger_seconds=0.5) as broker:
        await publish(broker, topic, [event("first")])
        given_up = broker.publish(topic, [event("given up")])
        fail_for_good(broker._publisher._producer)
        given_up.cancel()
        await publish(broker, topic, [event("last")])
        taken = await take(await broker.subscribe(interest(topic)), 2)

    assert ids(taken) == ["first", "last"]


# -- events of others, and tombstones


async def test_an_event_without_data_is_a_tombstone_both_ways(
    broker: KafkaBroker, cluster: KafkaCluster, topic: str
) -> None:
    await publish(broker, topic, [event("1", key="k"), event("2", key="k", data=b"")])
    await produce(cluster, topic, None, key="k")
    found = await records(cluster, topic, 3)
    taken = await take(await broker.subscribe(interest(topic)), 3)

    assert [record.value() for record in found] == [None, b"", None]
    assert [(i.event.data, i.event.key) for i in taken if i.event] == [
        (None, "k"),
        (b"", "k"),
        (None, "k"),
    ]


async def test_structured_events_are_written_on_request_and_both_are_read(
    cluster: KafkaCluster, topic: str
) -> None:
    async with (
        broker_on(cluster, content_mode="structured") as structured,
        broker_on(cluster) as binary,
    ):
        one = event("1", data=b'{"a": 1}', content_type="application/json")
        other = event("2", data=b"\xff", key="k")
        await publish(structured, topic, [one])
        await publish(binary, topic, [other])
        (record, _) = await records(cluster, topic, 2)
        taken = await take(await structured.subscribe(interest(topic)), 2)

    assert dict(record.headers() or [])["content-type"].startswith(b"application/cloudevents+json")
    assert [i.event and i.event.id for i in taken] == ["1", "2"]
    assert taken[1].event == other


async def test_a_header_whose_name_is_not_text_makes_a_dead_letter_and_holds_up_nothing(
    broker: KafkaBroker, cluster: KafkaCluster, topic: str
) -> None:
    """confluent-kafka writes no such name, so a record with a header's value that is null instead."""
    cluster.create_topic(topic)
    await produce(cluster, topic, b"x", headers=[("ce_specversion", None), ("ce_id", b"\xff")])
    await publish(broker, topic, [event("good")])
    bad, good = await take(await broker.subscribe(interest(topic)), 2)

    assert bad.event is None
    assert (bad.problem != "", bad.raw) == (True, b"x")
    assert good.event
    assert good.event.id == "good"


# -- positions that survive


@BOTH_PROTOCOLS
async def test_acks_out_of_order_and_attempts_survive_a_change_of_owner(
    cluster: KafkaCluster, topic: str, protocol: str
) -> None:
    """They travel in the commit's metadata: another sidecar gets what was not acked, and only that."""
    wanted = interest(topic)
    async with broker_on(cluster, group_protocol=protocol) as broker:
        await publish(broker, topic, events(range(10)))
        source = await broker.subscribe(wanted)
        taken = await take(source, 10)
        source.ack(handles(taken[1::2]))
        for attempts in (1, 2):
            recorded = source.failed(taken[4].handle, Failures(attempts))
            assert recorded is not None
            async with asyncio.timeout(5):
                await recorded
        stored = await committed(cluster, wanted.name, topic)
    async with broker_on(cluster, group_protocol=protocol) as other:
        again = await take(await other.subscribe(wanted), 5)

    assert stored.offset == 0
    assert stored.metadata.startswith("sc1:")
    assert {i.event.id: i.failures.attempts for i in again if i.event} == {
        "0": 0,
        "2": 0,
        "4": 2,
        "6": 0,
        "8": 0,
    }


async def test_fetching_stops_when_the_gap_grows_too_wide_and_goes_on_when_it_closes(
    broker: KafkaBroker, cluster: KafkaCluster, topic: str
) -> None:
    """
    Every second event is acked, and all the others have failed as often as can be: so the metadata
    is as long as it may be, and the broker takes it.
    """
    wanted = interest(topic, max_in_flight=10_000)
    await publish(broker, topic, events(range(8000)))
    source = await broker.subscribe(wanted)
    taken: list[Incoming] = []
    left: list[Incoming] = []

    async def take_and_ack_every_second() -> None:
        while True:
            batch = await source.fetch(100)
            source.ack(handles(batch[::2]))
            taken.extend(batch)
            left.extend(batch[1::2])

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3):
            await take_and_ack_every_second()
    stopped_at = len(taken)
    recorded = [source.failed(incoming.handle, Failures(1000, 15)) for incoming in left]
    async with asyncio.timeout(5):
        await asyncio.gather(*filter(None, recorded))
    stored = await committed(cluster, wanted.name, topic)
    source.ack(handles(left))
    rest = await take(source, 8000 - stopped_at, ack=True)

    assert 1000 < stopped_at < 8000
    assert 3000 < len(stored.metadata) <= 4096
    assert ids(taken) + ids(rest) == numbers(8000)


async def test_a_position_that_retention_took_is_told_and_the_rest_goes_on(
    broker: KafkaBroker, cluster: KafkaCluster, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = interest(topic)
    await publish(broker, topic, events(range(10)))
    source = await broker.subscribe(wanted)
    await take(source, 3, ack=True)
    await source.close()
    before = TopicPartition(topic, 0, 7)
    client = admin(cluster)
    client.delete_records([before])[before].result(5)
    source = await broker.subscribe(wanted)
    taken = await take(source, 3, ack=True)
    await publish(broker, topic, [event("next")])
    last = await take(source, 1)

    assert ids(taken) == ["7", "8", "9"]
    assert ids(last) == ["next"]
    assert "position 3" in caplog.text
    assert "going on at 7" in caplog.text


async def test_lag_is_told_by_partition(cluster: KafkaCluster, topic: str) -> None:
    async with broker_on(cluster, topic_partitions=3) as broker:
        cluster.create_topic(topic, 3)
        for partition, count in enumerate((5, 0, 2)):
            await produce(cluster, topic, *[b"x"] * count, partition=partition)
        source = await broker.subscribe(interest(topic))
        before = await source.lag_by_partition()
        taken = await take(source, 4)
        after = sum((await source.lag_by_partition()).values())
        source.release(handles(taken))
        released = await source.lag()

    assert before == {(topic, 0): 5, (topic, 1): 0, (topic, 2): 2}
    assert (after, released) == (3, 7)


# -- groups that change


@BOTH_PROTOCOLS
async def test_a_partition_waits_for_what_the_app_has_in_hand_before_it_moves(
    cluster: KafkaCluster, topic: str, protocol: str
) -> None:
    """What is settled meanwhile counts: the next owner gets what was not, and nothing twice."""
    cluster.create_topic(topic, 2)
    wanted = interest(topic)
    async with (
        broker_on(cluster, group_protocol=protocol) as broker,
        broker_on(cluster, group_protocol=protocol) as other,
    ):
        for partition in (0, 1):
            await produce(cluster, topic, *[b"x"] * 4, partition=partition)
        source = await broker.subscribe(wanted)
        taken = await take(source, 8)
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        leaving: list[Hashable] = []
        revoked: list[Hashable] = []

        def on_leaving(identities: Sequence[Hashable]) -> asyncio.Future[None]:
            leaving.extend(identities)
            return settled

        source.on_leaving = on_leaving
        source.on_revoked = revoked.extend
        elsewhere = await other.subscribe(wanted)
        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(take(elsewhere, 1))
            await until(lambda: bool(leaving))
            source.ack([i.handle for i in taken if i.identity in leaving[:3]])
            settled.set_result(None)
        (left,) = taking.result()
        assert left.position
        assert left.position.partition is not None
        lag = (await elsewhere.lag_by_partition())[left.topic, left.position.partition]

    assert len(leaving) == 4
    assert left.identity == leaving[3]
    assert revoked == [leaving[3]]
    assert lag == 0


@BOTH_PROTOCOLS
async def test_a_partition_that_goes_while_paused_is_fetched_when_it_comes_again(
    cluster: KafkaCluster, topic: str, protocol: str
) -> None:
    """librdkafka keeps the pause over a rebalance, and nobody would end it."""
    cluster.create_topic(topic, 2)
    wanted = interest(topic, max_in_flight=10)
    async with (
        broker_on(cluster, group_protocol=protocol) as broker,
        broker_on(cluster, group_protocol=protocol) as other,
    ):
        for partition in (0, 1):
            await produce(cluster, topic, *[b"x"] * 100, partition=partition)
        source = await broker.subscribe(wanted)
        taken = await take(source, 1)
        member = source.member  # type: ignore[attr-defined]
        await until(lambda: bool(member._paused))
        visitor = await other.subscribe(wanted)
        [there] = await take(visitor, 1)
        visitor.release([there.handle])
        await visitor.close()
        source.release(handles(taken))
        seen = {i.identity for i in await take(source, 200, ack=True)}

    assert len(seen) == 200


async def _members(cluster: KafkaCluster, group: str) -> int:
    client = admin(cluster)
    try:
        described = await asyncio.wrap_future(client.describe_consumer_groups([group])[group])
    except confluent_kafka.KafkaException:  # there is no such group
        return 0
    return len(described.members)


async def test_a_sidecar_whose_app_is_away_does_not_join(
    cluster: KafkaCluster, broker: KafkaBroker, topic: str
) -> None:
    """It would take partitions for nobody, and leaving at once it would not be heard."""
    cluster.create_topic(topic)
    wanted = interest(topic)
    source = await broker.subscribe(wanted)
    before = await _members(cluster, wanted.name)
    async with asyncio.TaskGroup() as tasks:
        fetching = tasks.create_task(source.fetch(1))
        await until(lambda: bool(source.member._joined))  # type: ignore[attr-defined]
        during = await _members(cluster, wanted.name)
        fetching.cancel()
    await source.close()
    after = await _members(cluster, wanted.name)

    assert (before, during, after) == (0, 1, 0)


@BOTH_PROTOCOLS
async def test_nothing_old_is_committed_after_a_move(
    cluster: KafkaCluster, topic: str, protocol: str
) -> None:
    """
    Another sidecar acks and commits all the while. Moved to the start, all comes again, once.

    Every commit that it makes without knowing of the move would take events away from it.
    """
    wanted = interest(topic, max_in_flight=50)
    async with (
        broker_on(cluster, group_protocol=protocol) as broker,
        broker_on(cluster, group_protocol=protocol) as other,
    ):
        await publish(broker, topic, events(range(3000)))
        source = await other.subscribe(wanted)
        seen: list[str] = []

        async def consume() -> None:
            while True:
                batch = await source.fetch(5)
                seen.extend(ids(batch))
                for incoming in batch:
                    source.failed(incoming.handle, Failures(1))
                source.ack(handles(batch))
                await asyncio.sleep(0.001)

        async with asyncio.TaskGroup() as tasks:
            consuming = tasks.create_task(swallow(consume()))
            await until(lambda: len(seen) > 200)
            async with asyncio.timeout(20):
                await broker.seek(wanted, Start())
            await consuming
        await source.close()
        again = await take(await broker.subscribe(wanted), 3000, ack=True)

    assert ids(again) == numbers(3000)
    assert {i.failures.attempts for i in again} == {0}


@BOTH_PROTOCOLS
@pytest.mark.timeout(90)
async def test_two_who_move_a_group_at_once_do_not_wait_for_each_other(
    cluster: KafkaCluster, topic: str, protocol: str
) -> None:
    """Neither consumes, so both have to be members for a moment; one move then stands for both."""
    wanted = interest(topic)
    async with (
        broker_on(cluster, group_protocol=protocol) as one,
        broker_on(cluster, group_protocol=protocol) as two,
        broker_on(cluster, group_protocol=protocol) as consuming,
    ):
        await publish(consuming, topic, events(range(100)))
        source = await consuming.subscribe(wanted)
        await take(source, 100, ack=True)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            tasks.create_task(swallow(take(source, 1)))
            tasks.create_task(one.seek(wanted, Start()))
            tasks.create_task(two.seek(wanted, Start()))
        await source.close()
        again = await take(await consuming.subscribe(wanted), 100, ack=True)

    assert ids(again) == numbers(100)


async def swallow(consuming: Any) -> None:
    with pytest.raises(SourceLost, match="was moved"):
        await consuming


async def test_a_group_without_members_is_moved_too(broker: KafkaBroker, topic: str) -> None:
    wanted = interest(topic)
    await publish(broker, topic, events(range(5)))
    source = await broker.subscribe(wanted)
    await take(source, 5, ack=True)
    await source.close()
    await broker.seek(wanted, Start(position=Position(partition=0, offset=3)))
    taken = await take(await broker.subscribe(wanted), 2)

    assert ids(taken) == ["3", "4"]


async def test_an_offset_names_one_partition_and_moves_only_that(
    cluster: KafkaCluster, topic: str
) -> None:
    cluster.create_topic(topic, 2)
    wanted = interest(topic)
    async with broker_on(cluster) as broker:
        for partition in (0, 1):
            await produce(cluster, topic, *[b"x"] * 3, partition=partition)
        source = await broker.subscribe(wanted)
        await take(source, 6, ack=True)
        await until(is_committed(cluster, wanted.name, topic, 3))
        await broker.seek(wanted, Start(position=Position(partition=1, offset=1)))
        await source.close()
        again = await take(await broker.subscribe(wanted), 2)
        with pytest.raises(NotSupported, match="name a partition that there is"):
            await broker.seek(wanted, Start(position=Position(partition=2, offset=1)))

    assert [i.position for i in again] == [Position(partition=1, offset=n) for n in (1, 2)]


def is_committed(cluster: KafkaCluster, group: str, topic: str, offset: int) -> Any:
    async def condition() -> bool:
        return all(
            [(await committed(cluster, group, topic, number)).offset == offset for number in (0, 1)]
        )

    return condition


async def test_an_offset_beyond_the_end_moves_nothing(
    cluster: KafkaCluster, broker: KafkaBroker, topic: str
) -> None:
    """Nothing is there to be fetched, so librdkafka would begin at the earliest again."""
    wanted = interest(topic)
    await publish(broker, topic, events(range(3)))
    with pytest.raises(NotSupported, match="ends at 3"):
        await broker.subscribe(interest(topic, start=at(4)))
    source = await broker.subscribe(wanted)
    await take(source, 3, ack=True)
    with pytest.raises(NotSupported, match="ends at 3"):
        await broker.seek(wanted, at(4))
    await broker.seek(wanted, at(3))
    await source.close()
    await publish(broker, topic, [event("3")])
    taken = await take(await broker.subscribe(wanted), 1)

    assert ids(taken) == ["3"]


def at(offset: int) -> Start:
    return Start(position=Position(partition=0, offset=offset))


async def test_members_that_are_no_sidecars_are_named_as_the_reason(
    cluster: KafkaCluster, broker: KafkaBroker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not follow a move, so it is refused; nobody is left hanging."""
    monkeypatch.setattr("sidecar.brokers.kafka.groups.MOVE_SECONDS", 3.0)
    await publish(broker, topic, events(range(3)))
    wanted = interest(topic)
    foreign = confluent_kafka.Consumer(
        {
            "bootstrap.servers": cluster.bootstrap_servers,
            "group.id": wanted.name,
            "auto.offset.reset": "earliest",
            "partition.assignment.strategy": "cooperative-sticky",
        }
    )
    try:
        foreign.subscribe([topic])
        assert await asyncio.to_thread(foreign.poll, 10) is not None
        with pytest.raises(BrokerRefused, match="members that do not follow"):
            await broker.seek(wanted, Start())
    finally:
        await asyncio.to_thread(foreign.close)


async def test_a_cluster_without_the_new_group_protocol_is_used_with_the_old_one() -> None:
    """The choice is "auto" unless configured; it is found out by the first subscription."""
    require()
    config = {"group.coordinator.rebalance.protocols": "classic"}
    with KafkaCluster(config=config) as old:
        async with broker_on(old) as broker:
            await publish(broker, "orders", events(range(3)))
            wanted = interest("orders")
            source = await broker.subscribe(wanted)
            with pytest.raises(SourceLost, match="'classic'"):
                await take(source, 3)
            await source.close()
            taken = await take(await broker.subscribe(wanted), 3)

    assert ids(taken) == numbers(3)


# -- what a source may get


async def test_what_is_due_is_of_our_partitions_only(cluster: KafkaCluster, topic: str) -> None:
    """Two members share two partitions; of what the other does not read, this one could get nothing."""
    cluster.create_topic(topic, 2)
    async with broker_on(cluster) as broker, broker_on(cluster) as other:
        wanted = interest(topic)
        ours, theirs = await broker.subscribe(wanted), await other.subscribe(wanted)
        batch = [event(str(n), key=str(n)) for n in range(100)]
        receipts = await publish(broker, topic, batch)
        counts = Counter(receipt.position and receipt.position.partition for receipt in receipts)

        async def shared() -> bool:
            """Each has one of them: fetched, and given back so that it stays due."""
            for source in (ours, theirs):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        source.release([one.handle for one in await source.fetch(1)])
            found = [await ours.due(), await theirs.due()]
            return sorted(one or 0 for one in found) == sorted(counts.values())

        await until(shared, seconds=30)
        total = await ours.lag()
        await ours.close()
        await theirs.close()

    assert total == 100
    assert len(counts) == 2


async def test_a_fetch_is_bounded_in_bytes_but_for_one_event(
    broker: KafkaBroker, topic: str
) -> None:
    data = b"x" * 1_000_000
    for number in range(20):
        await publish(broker, topic, [event(str(number), data=data)])
    source = await broker.subscribe(
        Interest(fresh("name"), topic, 100, Start(), max_in_flight_bytes=2_500_000)
    )
    batches: list[list[Incoming]] = []
    async with asyncio.timeout(30):
        while sum(len(batch) for batch in batches) < 20:
            batches.append(list(await source.fetch(100)))
            source.ack([one.handle for one in batches[-1]])
    await source.close()

    assert [i.event.id for batch in batches for i in batch if i.event] == numbers(20)
    assert max(len(batch) for batch in batches) <= 3
