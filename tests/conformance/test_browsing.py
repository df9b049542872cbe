"""Browsing: what is stored can be read without a subscription, and deleted where that is promised."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from sidecar.errors import BrokerUnavailable
from sidecar.wire.timestamps import now_ns
from tests.conformance.acting import (
    DEADLINE_SECONDS,
    event,
    events,
    handles,
    ids,
    interest,
    numbers,
    publish,
    take,
)
from tests.conformance.harness import fresh
from tests.support.waiting import until

if TYPE_CHECKING:
    from sidecar.broker import Broker, Log, StoredEvent
    from tests.conformance.conftest import World
    from tests.conformance.harness import Harness

pytestmark = pytest.mark.needs("browses")

PAGE_BYTES = 8 * 1024 * 1024


async def pages(broker: Broker, log: Log, limit: int = 100) -> list[list[StoredEvent]]:
    """All pages of a log, forward; each is what the contract says of a page."""
    found: list[list[StoredEvent]] = []
    at = 0
    async with asyncio.timeout(DEADLINE_SECONDS):
        while page := list(await broker.read(log, at, limit)):
            assert len(page) <= limit
            found.append(page)
            at = page[-1].number + 1
    read = [stored.number for page in found for stored in page]
    assert read == sorted(set(read))
    assert not read or log.first <= read[0] <= read[-1] < log.end
    return found


async def read_all(broker: Broker, pattern: str, limit: int = 100) -> list[StoredEvent]:
    return [
        stored
        for log in await broker.logs(pattern)
        for page in await pages(broker, log, limit)
        for stored in page
    ]


async def only_log(broker: Broker, topic: str) -> Log:
    """The topic's log; topics of this suite have one partition."""
    (log,) = await broker.logs(topic)
    return log


def ids_of(stored: list[StoredEvent]) -> list[str]:
    return [one.event.id if one.event else "?" for one in stored]


# -- reading


@pytest.mark.parametrize("limit", [1, 7, 100])
async def test_pages_give_each_event_once_in_order(broker: Broker, topic: str, limit: int) -> None:
    """With its topic, its number as in the receipt, and when it was stored."""
    before = now_ns()
    batch = [event(str(n), data=b"event %d" % n, key=f"k{n % 3}") for n in range(25)]
    receipts = await publish(broker, topic, batch)
    stored = await read_all(broker, topic, limit)
    after = now_ns()

    assert [one.event for one in stored] == batch
    assert {one.topic for one in stored} == {topic}
    positions = [receipt.position for receipt in receipts]
    assert [one.number for one in stored] == [
        at and (at.sequence if at.partition is None else at.offset) for at in positions
    ]
    # To the millisecond, and the server's clock is this machine's.
    assert all(before - 10**6 <= one.stored_ns <= after + 10**6 for one in stored)


async def test_a_log_says_what_it_is(broker: Broker, topic: str) -> None:
    """A stream or a partition; the same, with the same incarnation, when it is asked for again."""
    (receipt,) = await publish(broker, topic, [event()])
    one, same = await only_log(broker, topic), await only_log(broker, topic)

    assert one == same
    assert receipt.position is not None
    assert (one.partition, one.stream) == (receipt.position.partition, receipt.position.stream)
    assert one.topic == topic


async def test_a_pattern_gives_the_events_of_its_topics_and_no_others(
    harness: Harness, broker: Broker
) -> None:
    """Also those in between, of other topics in the same stream."""
    first = fresh("topic")
    wanted = [f"{first}.eu.created", f"{first}.us.created"]
    others = [f"{first}.eu.gone", f"{first}.created", fresh("topic")]
    for name in (*wanted, *others):
        harness.make_topic(name)
    for n in range(5):
        for name in (*wanted, *others):
            await publish(broker, name, [event(f"{name} {n}")])
    stored = await read_all(broker, f"{first}.*.created", limit=3)
    rest = await read_all(broker, f"{first}.>")

    assert sorted(ids_of(stored)) == sorted(f"{name} {n}" for name in wanted for n in range(5))
    for name in wanted:
        of_topic = [one for one in stored if one.topic == name]
        assert ids_of(of_topic) == [f"{name} {n}" for n in range(5)]
    assert len(rest) == 20


async def test_a_pattern_gives_dead_letters_too(harness: Harness, broker: Broker) -> None:
    """Where a subscription to it would not get them: who browses wants to see what is there."""
    first = fresh("topic")
    for name in (f"{first}.created", f"{first}.created.dlq"):
        harness.make_topic(name)
        await publish(broker, name, [event(name)])
    stored = await read_all(broker, f"{first}.>")

    assert sorted(ids_of(stored)) == [f"{first}.created", f"{first}.created.dlq"]


async def test_a_logs_end_is_fixed_when_it_is_asked_for(broker: Broker, topic: str) -> None:
    """What is stored later is not read through it, and is at its end or above."""
    await publish(broker, topic, events(range(10)))
    log = await only_log(broker, topic)
    (page,) = await pages(broker, log)
    await publish(broker, topic, events(range(10, 15)))
    (same,) = await pages(broker, log)
    (later,) = await pages(broker, await only_log(broker, topic))

    assert ids_of(page) == ids_of(same) == numbers(10)
    assert ids_of(later) == numbers(15)
    assert later[10].number >= log.end


async def test_reading_from_the_end_or_beyond_gives_none(broker: Broker, topic: str) -> None:
    await publish(broker, topic, events(range(3)))
    log = await only_log(broker, topic)

    assert list(await broker.read(log, log.end, 10)) == []
    assert list(await broker.read(log, log.end + 1000, 10)) == []


async def test_reading_from_below_the_first_begins_at_the_first(broker: Broker, topic: str) -> None:
    await publish(broker, topic, events(range(3)))
    log = await only_log(broker, topic)
    page = list(await broker.read(log, 0, 10))

    assert ids_of(page) == numbers(3)


async def test_reading_begins_where_it_is_told(broker: Broker, topic: str) -> None:
    """In any order: a reader that goes backwards asks for what is before."""
    await publish(broker, topic, events(range(30)))
    log = await only_log(broker, topic)
    (page,) = await pages(broker, log)
    late = list(await broker.read(log, page[20].number, 5))
    early = list(await broker.read(log, page[3].number, 5))

    assert ids_of(late) == numbers(5, first=20)
    assert ids_of(early) == numbers(5, first=3)


async def test_pages_are_bounded_in_bytes_too(broker: Broker, topic: str) -> None:
    """Twelve MB are more than one page, whatever the limit; nothing is left out."""
    size = 500_000
    batch = [event(str(n), data=bytes([n]) * size) for n in range(24)]
    await publish(broker, topic, batch)
    found = await pages(broker, await only_log(broker, topic), limit=1000)

    assert max(len(page) for page in found) * size <= PAGE_BYTES + 2 * size
    assert [one.event for page in found for one in page] == batch


async def test_reading_does_not_disturb_a_subscription(world: World, topic: str) -> None:
    """What is out stays out, what waits comes, what is acked stays so; all are read all the same."""
    broker = await world.sidecar()
    await publish(broker, topic, events(range(10)))
    source = await broker.subscribe(interest(topic))
    taken = await take(source, 4)
    source.ack(handles(taken[:2]))
    stored = await read_all(broker, topic)
    more = await take(source, 6)
    source.release(handles(taken[2:]))
    again = await take(source, 2)

    assert ids_of(stored) == numbers(10)
    assert ids(more) == numbers(6, first=4)
    assert ids(again) == numbers(2, first=2)


@pytest.mark.needs("topics")
async def test_a_topic_that_is_not_there_or_empty_has_nothing(broker: Broker) -> None:
    missing = await read_all(broker, fresh("missing"))
    none_matches = await read_all(broker, f"{fresh('missing')}.>")

    assert missing == none_matches == []


async def test_what_other_sidecars_publish_is_read(world: World, topic: str) -> None:
    one, other = await world.sidecar(), await world.sidecar()
    await publish(one, topic, events(range(5)))
    await publish(other, topic, events(range(5, 10)))
    stored = await read_all(one, topic)

    assert ids_of(stored) == numbers(10)


@pytest.mark.needs("foreign")
async def test_bytes_that_are_no_event_are_told(
    broker: Broker, harness: Harness, topic: str
) -> None:
    """They have their place and no event, and what is around them is read."""
    await publish(broker, topic, [event("before")])
    await harness.publish_foreign(
        topic, b"{no json", {"Content-Type": "application/cloudevents+json"}
    )
    await publish(broker, topic, [event("after")])
    stored = await read_all(broker, topic)

    assert ids_of(stored) == ["before", "?", "after"]


@pytest.mark.needs("removable")
async def test_a_topic_that_is_made_anew_is_another_incarnation(
    world: World, harness: Harness, topic: str
) -> None:
    """It counts from its first number again, and those are other events; for all who look."""
    broker, other = await world.sidecar(), await world.sidecar()
    await publish(broker, topic, events(range(3)))
    before = await only_log(broker, topic)
    await harness.remove_topic(topic)
    await publish(await world.sidecar(), topic, [event("new")])
    after, elsewhere = await only_log(broker, topic), await only_log(other, topic)
    stored = await read_all(broker, topic)

    assert before.incarnation
    assert after.incarnation
    assert before.incarnation != after.incarnation == elsewhere.incarnation
    assert ids_of(stored) == ["new"]


# -- deleting


@pytest.mark.needs("deletes")
async def test_what_is_deleted_is_not_read_any_more(world: World, topic: str) -> None:
    """Here and elsewhere, also through a log that was asked for before; the others are."""
    broker, other = await world.sidecar(), await world.sidecar()
    await publish(broker, topic, events(range(10)))
    log = await only_log(broker, topic)
    (page,) = await pages(broker, log)
    await broker.delete(log, [one.number for one in page[1::2]])
    left = [one for page in await pages(broker, log) for one in page]
    elsewhere = await read_all(other, topic)

    assert ids_of(left) == ids_of(elsewhere) == numbers(10)[::2]
    assert [one.number for one in left] == [one.number for one in page[::2]]


@pytest.mark.needs("deletes")
async def test_deleting_again_is_no_error(broker: Broker, topic: str) -> None:
    await publish(broker, topic, events(range(3)))
    log = await only_log(broker, topic)
    (page,) = await pages(broker, log)
    for _ in range(2):
        await broker.delete(log, [page[1].number])
    await broker.delete(log, [log.end + 1000, page[1].number, page[2].number])

    assert ids_of(await read_all(broker, topic)) == ["0"]


@pytest.mark.needs("deletes")
async def test_all_can_be_deleted_and_new_ones_come_behind(broker: Broker, topic: str) -> None:
    await publish(broker, topic, events(range(5)))
    log = await only_log(broker, topic)
    (page,) = await pages(broker, log)
    await broker.delete(log, [one.number for one in page])
    none = await read_all(broker, topic)
    await publish(broker, topic, [event("new")])
    new = await read_all(broker, topic)

    assert none == []
    assert ids_of(new) == ["new"]
    assert new[0].number > page[-1].number


@pytest.mark.needs("deletes")
async def test_what_is_deleted_does_not_come_to_a_subscription(broker: Broker, topic: str) -> None:
    await publish(broker, topic, events(range(5)))
    log = await only_log(broker, topic)
    (page,) = await pages(broker, log)
    await broker.delete(log, [one.number for one in page[:3]])
    taken = await take(await broker.subscribe(interest(topic)), 2)

    assert ids(taken) == numbers(2, first=3)


# -- the broker away


@pytest.mark.needs("server")
@pytest.mark.timeout(120)
async def test_while_the_server_is_away_it_is_said_and_after_it_is_read(
    world: World, topic: str
) -> None:
    """Within a bounded time; the log that was asked for before is good after."""
    broker = await world.sidecar()
    states: list[object] = []
    broker.on_state = states.append
    await publish(broker, topic, events(range(3)))
    log = await only_log(broker, topic)
    world.harness.stop()
    await until(lambda: bool(states))
    async with asyncio.timeout(DEADLINE_SECONDS):
        with pytest.raises(BrokerUnavailable):
            await broker.logs(topic)
        with pytest.raises(BrokerUnavailable):
            await broker.read(log, log.first, 10)
    world.harness.start()
    await until(lambda: len(states) >= 2)
    (page,) = await pages(broker, log)

    assert ids_of(page) == numbers(3)


# -- a topic that is kept


@pytest.mark.needs("topics")
async def test_what_is_kept_is_in_one_log_and_in_order(world: World) -> None:
    """Also when two see to it at the same time, and again later."""
    one, other = await world.sidecar(), await world.sidecar()
    topic = fresh("kept")
    await asyncio.gather(one.keep(topic), other.keep(topic))
    for n in range(20):
        await publish((one, other)[n % 2], topic, [event(str(n), key="k")])
    await one.keep(topic)
    stored = await read_all(other, topic)

    assert ids_of(stored) == numbers(20)
