"""What is special to core NATS: at most once, counted where it can be."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import nats
import pytest

from sidecar.broker import Interest, Start
from sidecar.brokers.nats.core import NatsBroker
from sidecar.config import MAX_NAME_LENGTH, Nats
from sidecar.errors import BrokerUnavailable, EventTooLarge, NotSupported, OutcomeUnknown
from sidecar.event import MAX_TOPIC_LENGTH, Position, Receipt
from tests.conformance.acting import event, events, ids, interest, numbers, publish, receipt, take
from tests.conformance.harness import fresh
from tests.support.nats_server import NatsServer
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def broker_on(server: NatsServer, **settings: object) -> AsyncIterator[NatsBroker]:
    table = {"type": "nats", "servers": [server.url], "reconnect_seconds": 0.05, **settings}
    broker = NatsBroker("nats", Nats.model_validate(table), client_name="test")
    await broker.connect()
    yield broker
    await broker.close()


async def test_what_overflows_the_buffer_is_lost_and_counted(nats_server: NatsServer) -> None:
    """The oldest stay; what there was no place for is counted exactly."""
    topic = fresh("topic")
    async with broker_on(nats_server, max_waiting_events=10) as broker:
        source = await broker.subscribe(interest(topic))
        await publish(broker, topic, events(range(25)))
        await until(lambda: source.dropped == 15)
        first = await take(source, 10)
        await publish(broker, topic, [event("25")])
        last = await take(source, 1)

    assert ids(first) == numbers(10)
    assert ids(last) == ["25"]
    assert source.dropped == 15


async def test_the_buffer_is_bounded_in_bytes_too(nats_server: NatsServer) -> None:
    """Ten of 100 kB fit into a mebibyte, with their headers; what is fetched makes room again."""
    topic = fresh("topic")
    large = [event(str(n), data=b"x" * 100_000) for n in range(25)]
    async with broker_on(nats_server, max_waiting_bytes=1024 * 1024) as broker:
        source = await broker.subscribe(
            Interest(fresh("name"), topic, 100, Start(), max_in_flight_bytes=250_000)
        )
        await publish(broker, topic, large)
        await until(lambda: source.dropped == 15)
        batches = [list(await source.fetch(100)) for _ in range(3)]
        await publish(broker, topic, large[:9])
        rest = await take(source, 10)

    assert [ids(batch) for batch in batches] == [numbers(3), ["3", "4", "5"], ["6", "7", "8"]]
    assert ids(rest) == ["9", *numbers(9)]
    assert source.dropped == 15


async def test_what_is_released_comes_first_again(nats_server: NatsServer) -> None:
    """Into our own buffer, in the order it had."""
    topic = fresh("topic")
    async with broker_on(nats_server) as broker:
        source = await broker.subscribe(interest(topic))
        await publish(broker, topic, events(range(6)))
        taken = await take(source, 4)
        source.ack([taken[0].handle])
        source.release([i.handle for i in taken[1:]])
        again = await take(source, 5)

    assert ids(again) == numbers(5, first=1)


async def test_what_was_on_its_way_when_the_connection_broke_is_unknown(
    nats_server: NatsServer,
) -> None:
    """Sent again it could be doubled; what was refused before stays refused."""
    topic = fresh("topic")
    async with broker_on(nats_server) as broker:
        nats_server.pause()
        too_large = event("large", data=b"x" * 2_000_000)
        on_its_way = broker.publish(topic, [event("1"), too_large, event("2")])
        nats_server.kill()
        async with asyncio.timeout(5):
            first, refused, last = await on_its_way
        waiting = broker.publish(topic, [event("3")])
        nats_server.start()
        async with asyncio.timeout(5):
            (later,) = await waiting

    assert isinstance(first, OutcomeUnknown)
    assert isinstance(last, OutcomeUnknown)
    assert first.retryable
    assert isinstance(refused, EventTooLarge)
    assert isinstance(later, Receipt)


async def test_what_waits_when_the_broker_is_closed_was_not_published(
    nats_server: NatsServer,
) -> None:
    async with broker_on(nats_server) as broker:
        nats_server.kill()
        await until(lambda: not broker._connection.live)
        waiting = broker.publish(fresh("topic"), events(range(2)))
        await broker.close()
        outcomes = await waiting

    assert [type(outcome) for outcome in outcomes] == [BrokerUnavailable] * 2


async def test_the_limit_is_that_of_the_server_the_event_goes_to() -> None:
    """What waited for a server that takes less than the last one is measured by the new one."""
    settings: dict[str, object] = {"max_payload": 1_000_000}
    with NatsServer(config=settings) as server:
        async with broker_on(server) as broker:
            server.kill()
            await until(lambda: not broker._connection.live)
            batch = [event("1"), event("large", data=b"x" * 500_000), event("2")]
            waiting = broker.publish(fresh("topic"), batch)
            server._config["max_payload"] = 100_000
            server.start()
            async with asyncio.timeout(5):
                first, large, last = await waiting

    assert isinstance(large, EventTooLarge)
    assert [receipt(first).event_id, receipt(last).event_id] == ["1", "2"]


@pytest.mark.parametrize("start", [Start(time_ns=1), Start(position=Position("s", 1))])
async def test_nothing_is_kept_to_start_from(nats_server: NatsServer, start: Start) -> None:
    async with broker_on(nats_server) as broker:
        with pytest.raises(NotSupported, match="core NATS"):
            await broker.subscribe(interest("topic", start=start))


async def test_a_pattern_of_everything_leaves_out_what_nats_says_to_itself(
    nats_server: NatsServer,
) -> None:
    """Requests to JetStream, their answers and acknowledgements are messages of the account, too."""
    async with broker_on(nats_server) as broker:
        source = await broker.subscribe(interest(">"))
        client = await nats.connect(nats_server.url)
        await client.jetstream().add_stream(name="orders", subjects=["orders.>"])
        await client.jetstream().publish("orders.created", b"theirs")
        await client.close()
        await publish(broker, "orders.created", [event("ours")])
        taken = await take(source, 2)

    assert [i.topic for i in taken] == ["orders.created"] * 2


@pytest.mark.parametrize("mode", ["binary", "structured"])
async def test_either_content_mode_comes_out_as_it_went_in(
    nats_server: NatsServer, mode: str
) -> None:
    topic = fresh("topic")
    sent = event("1", data=b"\xff\x00", content_type="application/x", key="k", headers={"a": "b"})
    async with broker_on(nats_server, content_mode=mode) as broker:
        source = await broker.subscribe(interest(topic))
        await publish(broker, topic, [sent])
        (taken,) = await take(source, 1)

    assert taken.event == sent


@pytest.mark.parametrize("pattern", [">", "*.*", "orders.>"])
async def test_what_is_no_topic_is_no_event_and_not_lost_either(
    nats_server: NatsServer, pattern: str
) -> None:
    """NATS' own subjects match wildcards, too; they take no place and count as nothing."""
    async with broker_on(nats_server, max_waiting_events=2) as broker:
        source = await broker.subscribe(interest(pattern))
        other = await nats.connect(nats_server.url)
        for subject in ("_INBOX.x", "_sys.x", "$own.x", "orders.$x", "orders.a:b"):
            await other.publish(subject, b"not for us")
        await other.flush()
        await publish(broker, "orders.new", [event("1")])
        taken = await take(source, 1)
        await other.close()

    assert ids(taken) == ["1"]
    assert source.dropped == 0


async def test_the_longest_topic_and_name_fit_into_a_line_of_nats(nats_server: NatsServer) -> None:
    """A longer line ends the connection, which all subscriptions share."""
    topic = fresh("topic").ljust(MAX_TOPIC_LENGTH, "t")
    async with broker_on(nats_server) as broker:
        wanted = Interest("n" * MAX_NAME_LENGTH, topic, 10, Start())
        source = await broker.subscribe(wanted)
        await publish(broker, topic, [event("1")])
        taken = await take(source, 1)

    assert ids(taken) == ["1"]
