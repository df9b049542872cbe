"""What is special to JetStream: streams made and declared, consumers, prefetch, topics without a stream."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import nats
import pytest

from sidecar.broker import Failures, Interest, Start
from sidecar.brokers.nats.jetstream import JetStreamBroker
from sidecar.brokers.nats.source import StreamSource
from sidecar.config import JetStream
from sidecar.errors import (
    BrokerRefused,
    BrokerUnavailable,
    EventTooLarge,
    NotSupported,
    SourceLost,
    TopicMissing,
)
from sidecar.event import Position
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
from tests.support.nats_server import NatsServer
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sidecar.broker import Incoming, Source


def settings_for(server: NatsServer, **settings: object) -> JetStream:
    table = {"type": "jetstream", "servers": [server.url], "reconnect_seconds": 0.05}
    return JetStream.model_validate(table | settings)


@asynccontextmanager
async def broker_on(server: NatsServer, **settings: object) -> AsyncIterator[JetStreamBroker]:
    """A connected broker; streams are made by themselves unless *settings* say otherwise."""
    settings = {"auto_create_streams": True} | settings
    broker = JetStreamBroker("work", settings_for(server, **settings), client_name="test")
    try:
        await broker.connect()
        yield broker
    finally:
        await broker.close()


async def ask(server: NatsServer, subject: str, payload: object = None) -> dict[str, Any]:
    """The server's own answer, past the sidecar."""
    client = await nats.connect(server.url)
    body = json.dumps(payload).encode() if payload is not None else b""
    answer = await client.request(f"$JS.API.{subject}", body, timeout=5)
    await client.close()
    decoded: dict[str, Any] = json.loads(answer.data)
    assert "error" not in decoded, decoded
    return decoded


# -- topics without a stream


async def test_a_topic_without_a_stream_is_missing_at_once_and_the_error_says_what_to_do(
    nats_server: NatsServer,
) -> None:
    """Events of other topics, published before and after, are stored meanwhile."""
    streams = [{"name": "orders", "subjects": ["orders.>"]}]
    async with broker_on(nats_server, auto_create_streams=False, streams=streams) as broker:
        under_way = [
            broker.publish(topic, events(range(first, first + 10)))
            for first, topic in enumerate(["orders.a", "none.a", "orders.b", "none.a", "none.b"])
        ]
        async with asyncio.timeout(2):
            stored, missing, more, *rest = [await one for one in under_way]
        with pytest.raises(TopicMissing, match="auto_create_streams"):
            await broker.subscribe(interest("none.a"))

    assert len([receipt(outcome) for outcome in (*stored, *more)]) == 20
    for outcome in (*missing, *rest[0], *rest[1]):
        assert isinstance(outcome, TopicMissing)
        assert not outcome.retryable
        assert "brokers.work.streams" in outcome.message
        assert "auto_create_streams = true" in outcome.message


async def test_the_stream_of_a_new_topic_is_made_and_its_first_events_keep_their_order(
    nats_server: NatsServer,
) -> None:
    """500 single publishes before the stream is there, 500 while and after it is made."""
    async with broker_on(nats_server) as broker:
        under_way = [broker.publish("orders.created", events([n])) for n in range(500)]
        for n in range(500, 1000):
            under_way.append(broker.publish("orders.created", events([n])))
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            receipts = [receipt((await one)[0]) for one in under_way]
        taken = await take(await broker.subscribe(interest("orders.created")), 1000)
    names = (await ask(nats_server, "STREAM.NAMES"))["streams"]
    config = (await ask(nats_server, "STREAM.INFO.orders"))["config"]

    assert [r.position and r.position.sequence for r in receipts] == list(range(1, 1001))
    assert ids(taken) == numbers(1000)
    assert [name for name in names if not name.startswith("KV_")] == ["orders"]
    assert config["subjects"] == ["orders", "orders.>"]
    assert config["duplicate_window"] == 120 * 10**9


async def test_sidecars_that_make_the_same_stream_at_once_all_succeed(
    nats_server: NatsServer,
) -> None:
    async with (
        broker_on(nats_server) as one,
        broker_on(nats_server) as two,
        broker_on(nats_server) as three,
    ):
        under_way = [
            broker.publish("orders.created", [event(f"{n}-{i}") for i in range(20)])
            for n, broker in enumerate((one, two, three))
        ]
        source = await three.subscribe(interest("orders.*"))
        async with asyncio.timeout(10):
            receipts = [receipt(outcome) for batch in under_way for outcome in await batch]
        taken = await take(source, 60)

    assert not any(r.duplicate for r in receipts)
    assert len(set(ids(taken))) == 60


async def test_a_stream_that_cannot_be_made_is_refused_with_the_server_s_reason(
    nats_server: NatsServer,
) -> None:
    streams = [{"name": "some", "subjects": ["orders.eu.>"]}]
    async with broker_on(nats_server, streams=streams) as broker:
        async with asyncio.timeout(2):
            (outcome,) = await broker.publish("orders.us.created", [event()])
        with pytest.raises(BrokerRefused, match="subjects overlap"):
            await broker.subscribe(interest("orders.us.created"))

    assert isinstance(outcome, BrokerRefused)
    assert "subjects overlap" in outcome.message


async def test_a_stream_that_is_made_while_its_events_wait_is_found(
    nats_server: NatsServer,
) -> None:
    """Deleted under a broker that publishes, and made again: the topic works as before."""
    async with broker_on(nats_server) as broker:
        await publish(broker, "orders.created", [event("1")])
        await ask(nats_server, "STREAM.DELETE.orders")
        again = await publish(broker, "orders.created", [event("2"), event("3")])

    assert [r.position and r.position.sequence for r in again] == [1, 2]


async def test_cancelled_events_of_a_new_topic_hold_up_nobody(nats_server: NatsServer) -> None:
    """The one that asked whether the stream is there is given up before the answer."""
    async with broker_on(nats_server) as broker:
        first = broker.publish("orders.created", [event("1")])
        await asyncio.sleep(0)
        first.cancel()
        receipts = await publish(broker, "orders.created", [event("2")])
        later = await publish(broker, "orders.created", [event("3")])

    assert [r.event_id for r in receipts + later] == ["2", "3"]


async def test_a_server_without_jetstream_is_unavailable_and_the_error_says_why() -> None:
    with NatsServer(jetstream=False) as server:
        broker = JetStreamBroker("work", settings_for(server), client_name="test")
        with pytest.raises(BrokerUnavailable, match="is it enabled"):
            await broker.connect()
        await broker.close()


async def test_what_a_stream_refuses_fails_alone(nats_server: NatsServer) -> None:
    """The stream takes no event of more than 1,000 bytes; the server says so, one by one."""
    config = {"name": "orders", "subjects": ["orders.>"], "max_msg_size": 1000, "storage": "file"}
    await ask(nats_server, "STREAM.CREATE.orders", config)
    async with broker_on(nats_server) as broker:
        batch = [event("1"), event("2", data=b"x" * 2000), event("3")]
        async with asyncio.timeout(5):
            first, refused, last = await broker.publish("orders.created", batch)

    assert isinstance(refused, BrokerRefused)
    assert "message size exceeds maximum allowed" in refused.message
    assert [receipt(first).event_id, receipt(last).event_id] == ["1", "3"]


async def test_the_limit_is_that_of_the_server_that_comes_back() -> None:
    """An event that waits and is now too large fails; it does not break every new connection."""
    with NatsServer(config={"max_payload": 1_000_000}) as server:
        async with broker_on(server) as broker:
            await publish(broker, "orders.created", [event("0")])
            server.kill()
            await until(lambda: not broker._connection.live)
            batch = [event("1"), event("large", data=b"x" * 500_000), event("2")]
            waiting = broker.publish("orders.created", batch)
            server._config["max_payload"] = 100_000
            server.start()
            async with asyncio.timeout(5):
                first, large, last = await waiting

    assert isinstance(large, EventTooLarge)
    assert [receipt(first).event_id, receipt(last).event_id] == ["1", "2"]


# -- declared streams

DECLARED = {
    "name": "orders",
    "subjects": ["orders.>", "returns"],
    "storage": "memory",
    "retention": "workqueue",
    "max_age_seconds": 3600.0,
    "max_bytes": 1_000_000,
    "max_events": 1000,
    "duplicate_window_seconds": 30.0,
}


async def test_a_declared_stream_is_made_as_declared(nats_server: NatsServer) -> None:
    async with broker_on(nats_server, streams=[DECLARED]):
        config = (await ask(nats_server, "STREAM.INFO.orders"))["config"]

    assert {
        key: config[key]
        for key in ("subjects", "storage", "retention", "max_age", "max_bytes", "max_msgs")
    } == {
        "subjects": ["orders.>", "returns"],
        "storage": "memory",
        "retention": "workqueue",
        "max_age": 3600 * 10**9,
        "max_bytes": 1_000_000,
        "max_msgs": 1000,
    }
    assert config["duplicate_window"] == 30 * 10**9
    assert config["allow_direct"] is True


@pytest.mark.parametrize("declared", [DECLARED, {"name": "plain", "subjects": ["a", "b"]}])
async def test_a_stream_that_is_as_declared_is_accepted(
    nats_server: NatsServer, declared: dict[str, Any]
) -> None:
    """By a second sidecar, also when it names the subjects in another order."""
    name = declared["name"]
    async with broker_on(nats_server, streams=[declared]):
        before = await ask(nats_server, f"STREAM.INFO.{name}")
    turned = declared | {"subjects": declared["subjects"][::-1]}
    async with broker_on(nats_server, streams=[turned]):
        after = await ask(nats_server, f"STREAM.INFO.{name}")

    assert after["config"] == before["config"]


async def test_a_stream_that_differs_is_refused_and_never_changed(
    nats_server: NatsServer,
) -> None:
    """Each difference is named; other streams of the broker serve all the same."""
    async with broker_on(nats_server, streams=[DECLARED]):
        before = await ask(nats_server, "STREAM.INFO.orders")
    differing = DECLARED | {"max_events": 7, "storage": "file"}
    streams = [{"name": "other", "subjects": ["other"]}, differing]
    broker = JetStreamBroker("work", settings_for(nats_server, streams=streams), client_name="t")
    with pytest.raises(BrokerRefused) as refused:
        await broker.connect()
    with pytest.raises(BrokerRefused):
        await broker.connect()
    receipts = await publish(broker, "other", [event("1")])
    await broker.close()
    after = await ask(nats_server, "STREAM.INFO.orders")

    assert "max_msgs is 1000, declared 7" in refused.value.message
    assert "storage is 'memory', declared 'file'" in refused.value.message
    assert "max_bytes" not in refused.value.message
    assert after["config"] == before["config"]
    assert len(receipts) == 1


# -- consumers


async def test_what_the_sidecar_holds_never_exceeds_its_room(nats_server: NatsServer) -> None:
    """The server counts what is out and not acked: ten when full, and after acks no more come unasked."""
    async with broker_on(nats_server) as broker:
        await publish(broker, "orders.created", events(range(101)))
        wanted = interest("orders.created", max_in_flight=10)
        source = await broker.subscribe(wanted)

        async def unacked() -> int:
            info = await ask(nats_server, f"CONSUMER.INFO.orders.{wanted.name}")
            count: int = info["num_ack_pending"]
            return count

        async def is_three() -> bool:
            return await unacked() == 3

        full, out = [], handles(await take(source, 3))
        for _ in range(14):
            out += handles(await take(source, 7))
            full.append(await unacked())
            source.ack(out[:7])
            out = out[7:]
            await until(is_three, what="the acks are counted, and nothing was prefetched")

    assert full == [10] * 14


async def test_a_consumer_counts_no_deliveries_and_no_pending(nats_server: NatsServer) -> None:
    """A limit on the server would leave events behind, skipped and silent."""
    async with broker_on(nats_server, ack_wait_seconds=7) as broker:
        wanted = interest("orders.created")
        source = await broker.subscribe(wanted)
        hold = source.hold_seconds
        info = await ask(nats_server, f"CONSUMER.INFO.orders.{wanted.name}")
    config = info["config"]

    assert (config["max_deliver"], config["max_ack_pending"]) == (-1, -1)
    assert (config["ack_policy"], config["ack_wait"]) == ("explicit", 7 * 10**9)
    assert (config["filter_subject"], config["deliver_policy"]) == ("orders.created", "all")
    assert hold == pytest.approx(7 / 3)


async def test_the_claim_is_held_by_what_the_consumer_says(nats_server: NatsServer) -> None:
    """Made by a sidecar with a shorter ack wait than ours: ours would be too late."""
    wanted = interest("orders.created")
    async with broker_on(nats_server, ack_wait_seconds=3) as broker:
        await broker.subscribe(wanted)
    async with broker_on(nats_server, ack_wait_seconds=60) as broker:
        source = await broker.subscribe(wanted)

        assert source.hold_seconds == pytest.approx(1)


async def test_a_consumer_that_is_something_else_is_refused(nats_server: NatsServer) -> None:
    """Another topic under the same name, narrower, wider or several; never changed."""
    async with broker_on(nats_server) as broker:
        await broker.subscribe(Interest("all", "orders.>", 10))
        await broker.subscribe(Interest("one", "orders.created", 10))
        config = {"durable_name": "two", "ack_policy": "explicit", "filter_subjects": ["orders.a"]}
        path = "CONSUMER.DURABLE.CREATE.orders.two"
        await ask(nats_server, path, {"stream_name": "orders", "config": config})
        bare = {"durable_name": "bare", "ack_policy": "explicit"}
        path = "CONSUMER.DURABLE.CREATE.orders.bare"
        await ask(nats_server, path, {"stream_name": "orders", "config": bare})
        for name, topic in (
            ("all", "orders.created"),
            ("one", "orders.>"),
            ("two", "orders.created"),
            ("bare", "orders.created"),
        ):
            with pytest.raises(BrokerRefused, match="name it differently"):
                await broker.subscribe(Interest(name, topic, 10))


MEGABYTE = 1_000_000


@pytest.mark.parametrize("size", [1_000, 50_000, MEGABYTE])
async def test_prefetch_is_bounded_in_bytes_but_for_one_event(
    nats_server: NatsServer, size: int
) -> None:
    """All that is sent for one fetch, before the next, and what one fetch returns."""
    bound, count = 2 * MEGABYTE, 10 * MEGABYTE // size
    wanted = Interest("s", "orders.created", count, max_in_flight_bytes=bound)
    async with broker_on(nats_server) as broker:
        for first in range(0, count, 100):
            numbered = range(first, min(first + 100, count))
            await publish(
                broker, "orders.created", [event(str(n), data=b"x" * size) for n in numbered]
            )
        source = await broker.subscribe(wanted)
        taken: list[Incoming] = []
        sent_at_once = 0
        while len(taken) < count:
            async with asyncio.timeout(10):
                page = await source.fetch(count - len(taken))
            taken += page
            assert len(page) * size <= bound + size
            if len(taken) < count // 2:
                await until(partial(asked_for_no_more, nats_server, wanted))
            info = await ask(nats_server, "CONSUMER.INFO.orders.s")
            sent_at_once = max(sent_at_once, info["num_ack_pending"] - len(taken))

    assert sent_at_once * size <= bound + size
    assert ids(taken) == numbers(count)


async def test_events_larger_than_the_bound_come_all_the_same(nats_server: NatsServer) -> None:
    """In order with small ones, each alone."""
    sizes = [10, MEGABYTE, MEGABYTE, 10, 10, 300_000, 10, MEGABYTE]
    async with broker_on(nats_server) as broker:
        for n, size in enumerate(sizes):
            await publish(broker, "orders.created", [event(str(n), data=b"x" * size)])
        wanted = Interest("s", "orders.created", 1000, max_in_flight_bytes=200_000)
        source = await broker.subscribe(wanted)
        taken = await take(source, len(sizes), ack=True)

    assert ids(taken) == numbers(len(sizes))


@pytest.mark.timeout(120)
async def test_a_window_of_fifty_thousand_events_fills(nats_server: NatsServer) -> None:
    """More than a connection takes at once: they are asked for in parts."""
    count = 50_000
    async with broker_on(nats_server) as broker:
        for first in range(0, count, 1000):
            batch = [event(str(n), data=b"x" * 1024) for n in range(first, first + 1000)]
            await publish(broker, "orders.created", batch)
        wanted = Interest("s", "orders.created", count, max_in_flight_bytes=10**9)
        taken = await take(await broker.subscribe(wanted), count)

    assert ids(taken) == numbers(count)


@pytest.mark.parametrize("waiting", [True, False])
@pytest.mark.parametrize("what", ["CONSUMER.DELETE.orders.{}", "STREAM.DELETE.orders"])
async def test_a_source_whose_consumer_is_deleted_is_lost(
    nats_server: NatsServer, what: str, *, waiting: bool
) -> None:
    """Whether it waits for events just then or not."""
    wanted = interest("orders.created")
    async with broker_on(nats_server) as broker:
        source = await broker.subscribe(wanted)
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            if waiting:
                tasks.create_task(lost(source))
                await until(lambda: asked_for(nats_server, wanted))
            await ask(nats_server, what.format(wanted.name))
            if not waiting:
                await lost(source)


async def lost(source: Source) -> None:
    with pytest.raises(SourceLost, match="deleted or moved"):
        await source.fetch(10)


async def asked_for_no_more(server: NatsServer, wanted: Interest) -> bool:
    return not await asked_for(server, wanted)


async def asked_for(server: NatsServer, wanted: Interest) -> bool:
    info = await ask(server, f"CONSUMER.INFO.orders.{wanted.name}")
    return bool(info["num_waiting"])


async def test_a_consumer_that_was_deleted_while_we_were_away_is_noticed(
    nats_server: NatsServer,
) -> None:
    """
    Moved by another sidecar before we are back: our handles would mean events of the new consumer.

    Ours comes back a second later, and was not told of the deletion.
    """
    wanted = interest("orders.created")
    async with broker_on(nats_server, reconnect_seconds=1) as broker:
        await publish(broker, "orders.created", events(range(5)))
        source = await broker.subscribe(wanted)
        await take(source, 2)
        nats_server.kill()
        await until(lambda: not broker._connection.live)
        nats_server.start()
        async with broker_on(nats_server) as other:
            assert not broker._connection.live
            await other.seek(wanted, Start())
        async with asyncio.timeout(5):
            with pytest.raises(SourceLost):
                await source.fetch(10)
        again = await take(await broker.subscribe(wanted), 5)

    assert ids(again) == numbers(5)


async def test_a_consumer_that_allows_less_than_we_ask_says_so(nats_server: NatsServer) -> None:
    """An operator's limits: an error that tells, not a loop."""
    async with broker_on(nats_server) as broker:
        await publish(broker, "orders.created", [event()])
        config = {
            "durable_name": "small",
            "ack_policy": "explicit",
            "filter_subject": "orders.created",
            "max_batch": 5,
        }
        path = "CONSUMER.DURABLE.CREATE.orders.small"
        await ask(nats_server, path, {"stream_name": "orders", "config": config})
        source = await broker.subscribe(Interest("small", "orders.created", 100))
        async with asyncio.timeout(5):
            with pytest.raises(BrokerRefused, match="Exceeded MaxRequestBatch of 5"):
                await source.fetch(100)


# -- answers


async def test_an_answer_that_the_consumer_does_not_know_ends_no_book_keeping(
    nats_server: NatsServer,
) -> None:
    """
    Killed, a server forgets what it delivered last, and says nothing of acks for it.

    The next answers are confirmed all the same, and what waits for that does not grow for ever.
    """
    async with broker_on(nats_server) as broker:
        await publish(broker, "orders.created", events(range(50)))
        source = await broker.subscribe(interest("orders.created"))
        assert isinstance(source, StreamSource)
        taken = await take(source, 50)
        unknown = re.sub(rb"\.\d+\.\d+\.(\d+)\.(\d+)$", rb".999.999.\1.\2", handles(taken)[0])
        source.ack([unknown])

        def confirmed() -> bool:
            if source._asked_at is not None:
                source.hold(handles(taken))
            return source._asked_at is None

        await until(confirmed, seconds=8)
        source.ack(handles(taken))
        await until(lambda: not source._unread)
        lag = await source.lag()

    assert unknown not in handles(taken)
    assert lag == 0


async def test_a_release_is_not_repeated_after_a_reconnect(nats_server: NatsServer) -> None:
    """By then another sidecar may have the event: it would be taken from it. An ack is."""
    wanted = interest("orders.created")
    async with broker_on(nats_server) as broker, broker_on(nats_server) as other:
        await publish(broker, "orders.created", events(range(2)))
        source = await broker.subscribe(wanted)
        first, second = handles(await take(source, 2))
        nats_server.pause()
        source.release([first])
        source.ack([second])
        assert isinstance(source, StreamSource)
        kept = b"".join(source._unread)
        nats_server.resume()
        again = await take(await other.subscribe(wanted), 1)

    assert second in kept
    assert first not in kept
    assert ids(again) == ["0"]


# -- patterns over several streams


async def test_a_pattern_spans_streams(nats_server: NatsServer) -> None:
    async with broker_on(nats_server) as broker:
        for topic in ("orders.created", "returns.created", "returns.closed"):
            await publish(broker, topic, events(range(20)))
        source = await broker.subscribe(interest("*.created"))
        lags = [await source.lag()]
        taken = await take(source, 40, ack=True)
        lags.append(await source.lag())

    for topic in ("orders.created", "returns.created"):
        assert ids(i for i in taken if i.topic == topic) == numbers(20)
    assert len({i.identity for i in taken}) == 40
    assert lags == [40, 0]


async def test_a_stream_that_is_made_later_is_part_of_the_pattern(
    nats_server: NatsServer,
) -> None:
    """From its first event, while the source waits, and even when there was no stream at all."""
    async with broker_on(nats_server) as broker, broker_on(nats_server) as other:
        source = await broker.subscribe(interest("*.created", start=Start(latest=True)))
        async with asyncio.TaskGroup() as tasks:
            fetching = tasks.create_task(take(source, 30, ack=True))
            await asyncio.sleep(0)
            for number, topic in enumerate(("orders.created", "returns.created", "a.created")):
                await publish(other, topic, events(range(number * 10, number * 10 + 10)))
        taken = fetching.result()

    assert sorted(ids(taken), key=int) == numbers(30)


async def test_what_nats_keeps_for_others_is_not_topics(nats_server: NatsServer) -> None:
    """A key-value bucket is a stream, and so is where failed deliveries are recorded."""
    bucket = {"name": "KV_theirs", "subjects": ["$KV.theirs.>"], "max_msgs_per_subject": 1}
    await ask(nats_server, "STREAM.CREATE.KV_theirs", bucket)
    async with broker_on(nats_server) as broker:
        await publish(broker, "orders.created", events(range(3)))
        source = await broker.subscribe(interest(">"))
        taken = await take(source, 3)
        source.failed(taken[0].handle, Failures(1))
        await publish(broker, "orders.created", [event("3")])
        taken += await take(source, 1)

        async def recorded() -> bool:
            return "KV_sidecar-attempts" in (await ask(nats_server, "STREAM.NAMES"))["streams"]

        await until(recorded)
        await publish(broker, "returns.created", [event("4")])
        taken += await take(source, 1)

    assert ids(taken) == numbers(5)


async def recorded(source: Source, incoming: Incoming, failures: Failures) -> None:
    """Until another sidecar would see it."""
    stored = source.failed(incoming.handle, failures)
    assert stored is not None
    await asyncio.wait_for(stored, 10)


async def test_what_failed_is_told_to_the_sidecar_that_gets_the_event_next(
    nats_server: NatsServer,
) -> None:
    """Attempts, crashes, and to the millisecond when it began; what did not fail, has none."""
    first_ns = 1_767_225_600_123_456_789
    async with broker_on(nats_server) as one, broker_on(nats_server) as other:
        await publish(one, "orders.created", events(range(3)))
        wanted = interest("orders.created")
        source = await one.subscribe(wanted)
        taken = await take(source, 3)
        await recorded(source, taken[0], Failures(5, 2, first_ns))
        await recorded(source, taken[1], Failures(1))
        await source.close()
        source.release(handles(taken))
        again = await take(await other.subscribe(wanted), 3)

    assert {i.event.id: i.failures for i in again if i.event} == {
        "0": Failures(5, 2, first_ns // 10**6 * 10**6),
        "1": Failures(1),
        "2": Failures(),
    }


async def test_attempts_that_were_recorded_alone_are_read(nats_server: NatsServer) -> None:
    """A plain number, as a sidecar of the last version wrote it."""
    async with broker_on(nats_server) as broker:
        await publish(broker, "orders.created", [event()])
        source = await broker.subscribe(interest("orders.created"))
        (taken,) = await take(source, 1)
        await recorded(source, taken, Failures(1))
        client = await nats.connect(nats_server.url)
        stream = client.jetstream()
        record = await stream.get_msg("KV_sidecar-attempts", seq=1)
        assert record.subject is not None
        await stream.publish(record.subject, b"4")
        await client.close()
        source.release([taken.handle])
        (again,) = await take(source, 1)

    assert again.failures == Failures(4)


async def test_with_room_for_one_no_stream_starves(nats_server: NatsServer) -> None:
    """An idle stream is asked as well as a busy one; one event above the room may come for each."""
    async with broker_on(nats_server) as broker:
        for topic in ("busy.created", "idle.created"):
            await publish(broker, topic, [event("0")])
        source = await broker.subscribe(interest("*.created", max_in_flight=1))
        await take_one_by_one(source, 2)
        await publish(broker, "busy.created", events(range(1, 51)))
        busy = await take_one_by_one(source, 50)
        await publish(broker, "idle.created", events([51]))
        idle = await take_one_by_one(source, 1)

    assert busy == numbers(50, first=1)
    assert idle == ["51"]


async def take_one_by_one(source: Source, count: int) -> list[str]:
    return [id_ for _ in range(count) for id_ in ids(await take(source, 1, ack=True))]


async def test_a_position_names_its_stream_when_there_are_several(
    nats_server: NatsServer,
) -> None:
    async with broker_on(nats_server) as broker:
        for topic in ("orders.created", "returns.created"):
            await publish(broker, topic, events(range(5)))
        wanted = interest("*.created")
        source = await broker.subscribe(wanted)
        await take(source, 10, ack=True)
        for wrong in (Position("", 3), Position("elsewhere", 3), Position("orders", 0)):
            with pytest.raises(NotSupported, match="position"):
                await broker.seek(wanted, Start(position=wrong))
        await broker.seek(wanted, Start(position=Position("returns", 4)))
        taken = await take(await broker.subscribe(wanted), 2, ack=True)

    assert [(i.topic, i.position and i.position.sequence) for i in taken] == [
        ("returns.created", 4),
        ("returns.created", 5),
    ]


# -- order per key over several sidecars


def ordered(**settings: Any) -> Interest:
    return msgspec.structs.replace(interest("orders.created", **settings), ordered=True)


class Standing:
    """A sidecar's reading of one subscription in the background: all that it was handed, in order."""

    def __init__(self, source: Source, *, ack: bool = True) -> None:
        self.source = source
        self.taken: list[str] = []
        self.handles: list[Any] = []
        self._ack = ack

    async def read(self) -> None:
        while True:
            batch = await self.source.fetch(20)
            self.taken += ids(batch)
            self.handles += handles(batch)
            if self._ack:
                self.source.ack(handles(batch))


@asynccontextmanager
async def reading(*sources: Standing) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(source.read()) for source in sources]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_one_sidecar_has_all_events_and_the_others_stand_by(nats_server: NatsServer) -> None:
    wanted = ordered()
    async with broker_on(nats_server) as one, broker_on(nats_server) as other:
        first = Standing(await one.subscribe(wanted))
        second = Standing(await other.subscribe(wanted))
        async with reading(first):
            await publish(one, "orders.created", events(range(50)))
            await until(lambda: len(first.taken) == 50)
            async with reading(second):
                await until(lambda: second.source.standby)
                due = await second.source.due()
                await publish(one, "orders.created", events(range(50, 200)))
                await until(lambda: len(first.taken) == 200)

    assert first.taken == numbers(200)
    assert second.taken == []
    assert due == 0
    assert not first.source.standby


@pytest.mark.timeout(60)
@pytest.mark.parametrize("others", [1, 3])
async def test_who_stands_by_takes_over_in_order_what_a_killed_sidecar_had(
    nats_server: NatsServer, others: int
) -> None:
    """Long before its claims on 60 events end, and those come before the 100 that nobody had."""
    wanted = ordered(max_in_flight=100)
    async with AsyncExitStack() as stack:
        one, *rest = [
            await stack.enter_async_context(broker_on(nats_server)) for _ in range(others + 1)
        ]
        await publish(one, "orders.created", events(range(100)))
        source = await one.subscribe(wanted)
        taken = await take(source, 100)
        # Out of order, as the keys of an app are done.
        source.ack(handles(taken[:80:2]))
        await until(partial(pending, nats_server, wanted, 60))
        standing = [Standing(await other.subscribe(wanted), ack=False) for other in rest]
        async with reading(*standing):
            await until(lambda: all(stands.source.standby for stands in standing))
            await publish(rest[0], "orders.created", events(range(100, 200)))
            assert not any(stands.taken for stands in standing)
            cut_off(one)
            await until(lambda: any(len(stands.taken) >= 160 for stands in standing), seconds=15)
    left = [*range(1, 80, 2), *range(80, 200)]

    assert sorted(stands.taken for stands in standing) == [
        *([] for _ in range(others - 1)),
        [str(n) for n in left],
    ]


@pytest.mark.timeout(60)
async def test_each_key_is_in_order_over_a_sidecar_that_is_killed_half_way(
    nats_server: NatsServer,
) -> None:
    """
    200 events of 10 keys; the first sidecar has acked some of each key when it dies.

    What it had and did not ack is handed out once more, and before anything newer of its key.
    """
    wanted = ordered(max_in_flight=40)
    batch = [event(str(n), key=str(n % 10)) for n in range(200)]
    async with broker_on(nats_server) as one, broker_on(nats_server) as other:
        await publish(one, "orders.created", batch)
        source = await one.subscribe(wanted)
        second = Standing(await other.subscribe(wanted))
        handed = ids(
            await take(source, 10, ack=True)
        )  # so it is this one's, and the other stands by
        async with reading(second):
            handed += ids(await take(source, 50, ack=True))
            out = await take(source, 40)
            source.ack(handles(out[5:40:3]))
            await until(partial(pending, nats_server, wanted, 28))
            cut_off(one)
            await until(lambda: "199" in second.taken, seconds=15)
    acked = {int(n) for n in handed} | {int(n) for n in ids(out[5:40:3])}
    again = [str(n) for n in range(200) if n not in acked]

    assert handed + ids(out) == numbers(100)
    assert second.taken == again


async def pending(server: NatsServer, wanted: Interest, count: int) -> bool:
    """So many events are out."""
    info = await ask(server, f"CONSUMER.INFO.orders.{wanted.name}")
    return int(info["num_ack_pending"]) == count


def cut_off(broker: JetStreamBroker) -> None:
    """As `kill -9` of its sidecar: no answer is sent any more, and the server sees the end."""
    client = broker._connection._client
    assert client is not None
    client.options["allow_reconnect"] = False
    client._transport._io_writer.transport.abort()


@pytest.mark.timeout(60)
async def test_a_sidecar_that_leaves_gives_back_all_in_order_at_its_end(
    nats_server: NatsServer,
) -> None:
    """Also what was still out when it stopped: nobody gets what is behind that before."""
    wanted = ordered(max_in_flight=100)
    async with broker_on(nats_server) as one, broker_on(nats_server) as other:
        await publish(one, "orders.created", events(range(200)))
        source = await one.subscribe(wanted)
        taken = await take(source, 100)
        second = Standing(await other.subscribe(wanted), ack=False)
        async with reading(second):
            await until(lambda: second.source.standby)
            await source.stop(handles(taken[20:]))
            source.ack(handles(taken[:10]))
            source.hold(handles(taken[10:20]))
            await until(partial(pending, nats_server, wanted, 90))
            assert second.taken == []
            source.release(handles(taken[10:20]))
            await source.close()
            await until(lambda: len(second.taken) >= 190, seconds=5)

    assert second.taken == numbers(190, first=10)


async def test_a_consumer_that_was_dealt_out_is_changed_and_back(nats_server: NatsServer) -> None:
    """In place: it goes on where it was."""
    shared = interest("orders.created")
    pinned = msgspec.structs.replace(shared, ordered=True)
    async with broker_on(nats_server) as broker:
        await publish(broker, "orders.created", events(range(30)))
        policies = []
        found: list[str] = []
        for wanted in (shared, pinned, shared):
            source = await broker.subscribe(wanted)
            info = await ask(nats_server, f"CONSUMER.INFO.orders.{wanted.name}")
            policies.append(info["config"].get("priority_policy"))
            found += ids(await take(source, 10, ack=True))
            await source.close()

    assert policies == [None, "pinned_client", None]
    assert found == numbers(30)


async def test_a_pinned_subscription_goes_on_over_a_restart_of_the_server(
    nats_server: NatsServer,
) -> None:
    """The server forgot who had it."""
    async with broker_on(nats_server) as broker:
        await publish(broker, "orders.created", events(range(10)))
        source = await broker.subscribe(ordered())
        before = await take(source, 10, ack=True)
        nats_server.kill()
        await until(lambda: not broker._connection.live)
        nats_server.start()
        await until(lambda: broker._connection.live)
        await publish(broker, "orders.created", events(range(10, 20)))
        after: list[str] = []
        async with asyncio.timeout(20):
            while "19" not in after:
                after += ids(await source.fetch(20))

    assert ids(before) == numbers(10)
    assert [id_ for id_ in after if int(id_) >= 10] == numbers(10, first=10)


# -- what is stored


async def test_a_stream_without_direct_access_is_read_one_by_one(nats_server: NatsServer) -> None:
    stream = {"name": "old", "subjects": ["old.>"], "allow_direct": False}
    await ask(nats_server, "STREAM.CREATE.old", stream)
    sent = [event(str(n), data=b"x" * (n + 1), headers={"a": "b"}) for n in range(10)]
    async with broker_on(nats_server) as broker:
        await publish(broker, "old.a", sent)
        await publish(broker, "old.b", [event("other")])
        (log,) = await broker.logs("old.a")
        first = await broker.read(log, 0, 4)
        rest = await broker.read(log, first[-1].number + 1, 100)

    assert [one.event for one in (*first, *rest)] == sent
    assert len(first) == 4


async def test_a_stream_that_denies_deletes_says_so(nats_server: NatsServer) -> None:
    stream = {"name": "kept", "subjects": ["kept.>"], "deny_delete": True}
    await ask(nats_server, "STREAM.CREATE.kept", stream)
    async with broker_on(nats_server) as broker:
        await publish(broker, "kept.a", events(range(2)))
        (log,) = await broker.logs("kept.a")
        with pytest.raises(BrokerRefused, match=r"cannot be deleted.*delete not permitted"):
            await broker.delete(log, [1])

        assert len(await broker.read(log, 0, 10)) == 2


async def test_events_of_others_are_read_as_they_are_delivered(nats_server: NatsServer) -> None:
    """Their id, source and time are made up the same way; a header of theirs that looks like the server's is not believed."""
    async with broker_on(nats_server) as broker:
        source = await broker.subscribe(interest("orders.created"))
        client = await nats.connect(nats_server.url)
        await client.publish("orders.created", b"bare")
        lies = {"Nats-Subject": "orders.elsewhere", "Nats-Stream": "none", "a": "b"}
        await client.publish("orders.created", b"headers", headers=lies)
        await client.close()
        taken = await take(source, 2)
        (log,) = await broker.logs("orders.created")
        stored = await broker.read(log, 0, 10)

    assert [one.event for one in stored] == [incoming.event for incoming in taken]
    assert [(one.topic, one.number) for one in stored] == [
        (incoming.topic, incoming.position and incoming.position.sequence) for incoming in taken
    ]


async def test_what_nats_keeps_for_others_is_not_read(nats_server: NatsServer) -> None:
    bucket = {"name": "KV_theirs", "subjects": ["$KV.theirs.>"], "max_msgs_per_subject": 1}
    await ask(nats_server, "STREAM.CREATE.KV_theirs", bucket)
    async with broker_on(nats_server) as broker:
        await publish(broker, "orders.created", [event()])
        found = await broker.logs(">")

    assert [log.stream for log in found] == ["orders"]


@pytest.mark.parametrize("mode", ["binary", "structured"])
async def test_either_content_mode_comes_out_as_it_went_in(
    nats_server: NatsServer, mode: str
) -> None:
    sent = event("1", data=b"\xff\x00", content_type="application/x", key="k", headers={"a": "b"})
    async with broker_on(nats_server, content_mode=mode) as broker:
        await publish(broker, "orders.created", [sent])
        (taken,) = await take(await broker.subscribe(interest("orders.created")), 1)

    assert taken.event == sent
