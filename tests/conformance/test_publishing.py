"""Publishing: a receipt is the truth, order holds, and one event is there once."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest

from sidecar.broker import Start
from sidecar.errors import EventTooLarge, SidecarError
from sidecar.event import Receipt
from tests.conformance.acting import (
    event,
    events,
    ids,
    interest,
    numbers,
    publish,
    receipt,
    take,
)
from tests.support.waiting import until

if TYPE_CHECKING:
    from sidecar.broker import Broker, BrokerState
    from tests.conformance.conftest import World


async def test_each_event_has_one_outcome_in_the_order_given(broker: Broker, topic: str) -> None:
    receipts = await publish(broker, topic, events(range(100)))

    assert [r.event_id for r in receipts] == numbers(100)
    assert {(r.broker, r.topic, r.duplicate) for r in receipts} == {(broker.name, topic, False)}
    assert {r.durability for r in receipts} == {broker.capabilities.durability}


async def test_no_events_have_no_outcomes(broker: Broker, topic: str) -> None:
    async with asyncio.timeout(5):
        outcomes = await broker.publish(topic, [])

    assert list(outcomes) == []


@pytest.mark.needs("positions")
async def test_positions_rise(broker: Broker, topic: str) -> None:
    """A position says where the event is: one stream or partition, each later than the last."""
    receipts = await publish(broker, topic, events(range(100)))
    positions = [r.position for r in receipts if r.position is not None]
    places = [p.sequence if p.offset is None else p.offset for p in positions]

    assert len(positions) == 100
    assert len({(p.stream, p.partition) for p in positions}) == 1
    assert all(a < b for a, b in itertools.pairwise(places))


@pytest.mark.needs("positions")
async def test_a_delivery_names_the_position_of_its_receipt(broker: Broker, topic: str) -> None:
    receipts = await publish(broker, topic, events(range(10)))
    taken = await take(await broker.subscribe(interest(topic)), 10)

    assert [i.position for i in taken] == [r.position for r in receipts]


async def test_two_submissions_without_waiting_are_two_batches_in_that_order(
    broker: Broker, topic: str
) -> None:
    """Submission is synchronous: the call has taken its place when it returns."""
    source = await broker.subscribe(interest(topic))
    batches = [broker.publish(topic, events(range(i, i + 7))) for i in range(0, 350, 7)]
    taken = await take(source, 350)
    async with asyncio.timeout(5):
        outcomes = [outcome for batch in batches for outcome in await batch]

    assert ids(taken) == numbers(350)
    assert [receipt(outcome).event_id for outcome in outcomes] == numbers(350)


@pytest.mark.needs("deduplicates", "server")
async def test_order_and_one_copy_hold_when_the_server_restarts_in_the_middle(
    world: World, topic: str
) -> None:
    """2,000 events under way one after the other, the server killed among them and started."""
    broker = await world.sidecar()
    under_way = []
    for batch in range(200):
        under_way.append(broker.publish(topic, events(range(batch * 10, batch * 10 + 10))))
        if batch == 100:
            world.harness.kill()
        if batch == 150:
            world.harness.start()
        await asyncio.sleep(0)
    async with asyncio.timeout(20):
        receipts = [receipt(outcome) for one in under_way for outcome in await one]
    other = await world.sidecar()
    source = await other.subscribe(interest(topic))
    taken = await take(source, 2000, ack=True)
    lag = await source.lag()

    assert [r.event_id for r in receipts] == numbers(2000)
    assert ids(taken) == numbers(2000)
    assert [i.position for i in taken] == [r.position for r in receipts]
    assert lag == 0


async def test_an_event_that_is_too_large_fails_alone(broker: Broker, topic: str) -> None:
    """Its neighbours in the batch are taken, and the connection goes on as if nothing was."""
    limit = broker.max_event_bytes
    if limit is None:
        pytest.skip("takes events of any size")
    states: list[BrokerState] = []
    broker.on_state = states.append
    source = await broker.subscribe(interest(topic))
    batch = [event("a"), event("large", data=b"x" * limit), event("b")]
    async with asyncio.timeout(5):
        first, large, last = await broker.publish(topic, batch)
    await publish(broker, topic, [event("c")])
    taken = await take(source, 3)

    assert isinstance(large, EventTooLarge)
    assert not large.retryable
    assert [receipt(first).event_id, receipt(last).event_id] == ["a", "b"]
    assert ids(taken) == ["a", "b", "c"]
    assert states == []


async def test_the_largest_event_is_exactly_what_the_limit_says(broker: Broker, topic: str) -> None:
    limit = broker.max_event_bytes
    if limit is None:
        pytest.skip("takes events of any size")
    probe = event("1", data=b"x" * limit)
    async with asyncio.timeout(5):
        (refused,) = await broker.publish(topic, [probe])
    assert isinstance(refused, EventTooLarge)
    around = int(refused.metadata["size"]) - limit
    source = await broker.subscribe(interest(topic))
    fits = event("1", time_ns=probe.time_ns, data=b"x" * (limit - around))
    over = event("1", time_ns=probe.time_ns, data=b"x" * (limit - around + 1))
    async with asyncio.timeout(5):
        outcomes = [(await broker.publish(topic, [one]))[0] for one in (over, fits)]
    (taken,) = await take(source, 1)

    assert [type(outcome) for outcome in outcomes] == [EventTooLarge, Receipt]
    assert taken.event == fits


@pytest.mark.needs("deduplicates")
async def test_the_same_event_again_is_a_duplicate_at_the_same_position(
    broker: Broker, topic: str
) -> None:
    first = await publish(broker, topic, [event("1", data=b"once"), event("2")])
    again = await publish(broker, topic, [event("2"), event("1", data=b"twice")])
    elsewhere = await publish(broker, topic, [event("1", source="/other"), event("3")])
    taken = await take(await broker.subscribe(interest(topic)), 4)

    assert [r.duplicate for r in first + again + elsewhere] == [False] * 2 + [True] * 2 + [
        False
    ] * 2
    assert [r.position for r in again] == [r.position for r in reversed(first)]
    assert [(i.event.source, i.event.id) for i in taken if i.event] == [
        ("/shop", "1"),
        ("/shop", "2"),
        ("/other", "1"),
        ("/shop", "3"),
    ]


@pytest.mark.needs("deduplicates")
async def test_broker_ids_stand_in_for_source_and_id(broker: Broker, topic: str) -> None:
    """A redrive publishes the same event under a fresh broker id, and it is stored once more."""
    await publish(broker, topic, [event("1")])
    async with asyncio.timeout(5):
        fresh = await broker.publish(topic, [event("1"), event("1")], broker_ids=["x", "y"])
        known = await broker.publish(topic, [event("2")], broker_ids=["x"])

    assert [receipt(outcome).duplicate for outcome in fresh] == [False, False]
    assert receipt(known[0]).duplicate
    assert receipt(known[0]).position == receipt(fresh[0]).position


async def test_what_is_published_before_the_first_connect_waits_for_it(
    world: World, topic: str
) -> None:
    consumer = await world.sidecar()
    source = await consumer.subscribe(interest(topic))
    broker = world.unconnected()
    early = broker.publish(topic, events(range(50)))
    await broker.connect()
    late = broker.publish(topic, events(range(50, 60)))
    taken = await take(source, 60)
    async with asyncio.timeout(5):
        receipts = [receipt(outcome) for one in (early, late) for outcome in await one]

    assert ids(taken) == numbers(60)
    assert [r.event_id for r in receipts] == numbers(60)


@pytest.mark.needs("server")
async def test_a_publish_that_is_cancelled_while_the_server_is_away_is_not_sent_later(
    world: World, topic: str
) -> None:
    """Cancelled in the middle of those that wait; the others go out in their order."""
    states: list[BrokerState] = []
    broker = await world.sidecar()
    broker.on_state = states.append
    await publish(broker, topic, [event("before")])
    source = await broker.subscribe(interest(topic, start=Start(latest=True)))
    world.harness.kill()
    await until(lambda: bool(states) and not states[-1].connected)
    waiting = [broker.publish(topic, events([number])) for number in range(9)]
    for future in waiting[::2]:
        future.cancel()
    world.harness.start()
    async with asyncio.timeout(20):
        receipts = [receipt((await future)[0]) for future in waiting[1::2]]
    await publish(broker, topic, [event("after")])
    taken = await take(source, 5)

    assert [r.event_id for r in receipts] == ["1", "3", "5", "7"]
    assert ids(taken) == ["1", "3", "5", "7", "after"]


@pytest.mark.needs("server")
async def test_what_is_under_way_when_the_broker_is_closed_fails_retryable(
    world: World, topic: str
) -> None:
    """And at once: nobody waits for an answer that cannot come."""
    broker = await world.sidecar()
    await publish(broker, topic, [event("before")])
    world.harness.pause()
    waiting = [broker.publish(topic, events([1, 2])), broker.publish(topic, events([3]))]
    async with asyncio.timeout(4):
        await broker.close()
        outcomes = [outcome for future in waiting for outcome in await future]

    assert len(outcomes) == 3
    assert all(isinstance(o, SidecarError) and o.retryable for o in outcomes)
