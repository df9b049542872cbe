"""Consuming: what is not acked comes again, what is acked does not, and each goes to one."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest

from sidecar.broker import NO_FAILURES, Failures, Incoming, Start
from sidecar.errors import SourceLost
from sidecar.wire.timestamps import now_ns
from tests.conformance.acting import (
    event,
    events,
    handles,
    ids,
    interest,
    numbers,
    publish,
    take,
)
from tests.conformance.harness import ACK_WAIT_SECONDS
from tests.support.waiting import until

if TYPE_CHECKING:
    from sidecar.broker import Broker, Source
    from tests.conformance.conftest import World


# -- acked, released, held, left


@pytest.mark.needs("redelivers")
async def test_what_is_not_acked_comes_again_after_the_source_is_closed(
    world: World, topic: str
) -> None:
    """Here and on another sidecar, with a count of how often; what was acked does not."""
    broker = await world.sidecar(ack_wait_seconds=ACK_WAIT_SECONDS)
    other = await world.sidecar(ack_wait_seconds=ACK_WAIT_SECONDS)
    wanted = interest(topic)
    await publish(broker, topic, events(range(10)))
    source = await broker.subscribe(wanted)
    first = await take(source, 10)
    source.ack(handles(first[::2]))
    await source.close()
    second = await take(elsewhere := await other.subscribe(wanted), 5)
    await elsewhere.close()
    third = await take(source := await broker.subscribe(wanted), 5, ack=True)
    await publish(broker, topic, [event("end")])
    last = await take(source, 1)

    assert sorted(ids(second)) == sorted(ids(third)) == ["1", "3", "5", "7", "9"]
    assert {i.failures.attempts for taken in (first, second, third) for i in taken} == {0}
    assert {i.identity for i in second} == {i.identity for i in first[1::2]}
    assert ids(last) == ["end"]


@pytest.mark.needs("redelivers")
async def test_what_is_acked_does_not_come_again(world: World, topic: str) -> None:
    """Also when the sidecar ends right after the ack, and another one takes over."""
    broker = await world.sidecar(ack_wait_seconds=ACK_WAIT_SECONDS)
    wanted = interest(topic)
    await publish(broker, topic, events(range(100)))
    source = await broker.subscribe(wanted)
    await take(source, 100, ack=True)
    await source.close()
    await publish(broker, topic, [event("next")])
    other = await world.sidecar()
    again = await other.subscribe(wanted)
    taken = await take(again, 1, ack=True)
    lag = await again.lag()

    assert ids(taken) == ["next"]
    assert lag == 0


@pytest.mark.needs("redelivers")
async def test_what_is_released_comes_again_at_once(world: World, topic: str) -> None:
    """The claim would last for a minute: nobody waits for it."""
    broker, other = await world.sidecar(), await world.sidecar()
    wanted = interest(topic)
    await publish(broker, topic, events(range(10)))
    source = await broker.subscribe(wanted)
    first = await take(source, 10)
    source.release(handles(first[3:6]))
    here = await take(source, 3)
    source.ack(handles(first[:3] + first[6:]))
    source.release(handles(here))
    await source.close()
    there = await take(await other.subscribe(wanted), 3)

    assert sorted(ids(here)) == sorted(ids(there)) == ["3", "4", "5"]


@pytest.mark.needs("redelivers")
async def test_what_was_not_fetched_is_free_when_the_source_is_closed(
    world: World, topic: str
) -> None:
    """Prefetched events are given back: another sidecar has them at once."""
    broker, other = await world.sidecar(), await world.sidecar()
    wanted = interest(topic)
    source = await broker.subscribe(wanted)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):  # asks for all of them, and takes none
            await source.fetch(100)
    await publish(broker, topic, events(range(100)))
    fetched = await take(source, 1, ack=True)
    await source.close()
    rest = await take(await other.subscribe(wanted), 99)

    assert ids(fetched) == ["0"]
    assert sorted(ids(rest), key=int) == numbers(99, first=1)


@pytest.mark.needs("redelivers")
async def test_hold_keeps_the_claim_beyond_the_ack_wait(world: World, topic: str) -> None:
    """
    While it is held nobody else gets it; when that ends, somebody does.

    What was prefetched and not asked for yet is held as well: event 1 is fetched only at the end.
    """
    broker = await world.sidecar(ack_wait_seconds=ACK_WAIT_SECONDS)
    other = await world.sidecar(ack_wait_seconds=ACK_WAIT_SECONDS)
    wanted = interest(topic)
    source = await broker.subscribe(wanted)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):  # asks for two, and takes none
            await source.fetch(2)
    await publish(broker, topic, events(range(2)))
    held = await take(source, 1)
    if source.hold_seconds is None:
        pytest.skip("nothing to hold")
    async with asyncio.TaskGroup() as tasks:
        elsewhere = await other.subscribe(wanted)
        fetching = tasks.create_task(elsewhere.fetch(2))
        loop = asyncio.get_running_loop()
        end = loop.time() + 2.5 * ACK_WAIT_SECONDS
        while loop.time() < end:
            source.hold(handles(held))
            await asyncio.sleep(source.hold_seconds)
        got_while_held = fetching.done()
        held += await take(source, 1)
        source.ack(handles(held[1:]))
        async with asyncio.timeout(5):
            after = await fetching

    assert not got_while_held
    assert ids(held) == ["0", "1"]
    assert ids(after) == ["0"]
    assert [i.failures.attempts for i in after] == [0]


@pytest.mark.needs("redelivers")
async def test_failed_deliveries_are_known_to_another_sidecar(world: World, topic: str) -> None:
    """Counted is what failed, not what was fetched: one that fails knows it, its neighbour not."""
    broker, other = await world.sidecar(), await world.sidecar()
    wanted = interest(topic)
    await publish(broker, topic, events(range(2)))
    source = await broker.subscribe(wanted)
    failing, untouched = await take(source, 2)
    # In whole seconds: finer than that a broker need not keep it.
    twice = Failures(2, 1, 1_700_000_001_000_000_000)
    source.failed(failing.handle, Failures(1, 0, twice.first_ns))
    source.failed(failing.handle, twice)
    source.release([failing.handle, untouched.handle])
    await source.close()
    elsewhere = await other.subscribe(wanted)
    again = await take(elsewhere, 2, ack=True)

    assert {i.identity: i.failures for i in again} == {
        failing.identity: twice,
        untouched.identity: NO_FAILURES,
    }


# -- fetching


async def test_a_cancelled_fetch_loses_nothing(broker: Broker, topic: str) -> None:
    """Cancelled while idle, and again and again while events come."""
    source = await broker.subscribe(interest(topic))
    taken: list[Incoming] = []

    async def fetch_impatiently() -> None:
        seconds = 0.0
        while len(taken) < 500:
            seconds = (seconds + 0.0007) % 0.01
            try:
                async with asyncio.timeout(seconds):
                    batch = await source.fetch(7)
            except TimeoutError:
                continue
            source.ack(handles(batch))
            taken.extend(batch)

    async with asyncio.timeout(15), asyncio.TaskGroup() as tasks:
        tasks.create_task(fetch_impatiently())
        for first in range(0, 500, 10):
            await publish(broker, topic, events(range(first, first + 10)))

    assert ids(taken) == numbers(500)


async def test_fetch_returns_at_least_one_and_at_most_the_limit(broker: Broker, topic: str) -> None:
    source = await broker.subscribe(interest(topic))
    await publish(broker, topic, events(range(50)))
    sizes = []
    taken: list[Incoming] = []
    async with asyncio.timeout(10):
        for limit in [1, 3, 7, 50, 2] * 10:
            if len(taken) == 50:
                break
            batch = await source.fetch(limit)
            sizes.append((len(batch), limit))
            taken += batch

    assert all(1 <= size <= limit for size, limit in sizes), sizes
    assert ids(taken) == numbers(50)


@pytest.mark.needs("redelivers", "deals")
async def test_a_source_takes_no_more_than_it_has_room_for(world: World, topic: str) -> None:
    """One sidecar holds its ten and asks for no more; all the others are free for the next."""
    broker, other = await world.sidecar(), await world.sidecar()
    wanted = interest(topic, max_in_flight=10)
    await publish(broker, topic, events(range(100)))
    mine = await take(await broker.subscribe(wanted), 10)
    theirs = await take(await other.subscribe(wanted), 90)

    assert ids(mine) == numbers(10)
    assert ids(theirs) == numbers(90, first=10)


async def test_two_sidecars_share_a_subscription(world: World, topic: str) -> None:
    """Each event goes to exactly one of three sources on two sidecars."""
    broker, other = await world.sidecar(), await world.sidecar()
    wanted = interest(topic, max_in_flight=20)
    sources = [await one.subscribe(wanted) for one in (broker, broker, other)]
    taken: list[list[Incoming]] = [[], [], []]

    async def consume(source: Source, into: list[Incoming]) -> None:
        while True:
            batch = await source.fetch(20)
            source.ack(handles(batch))
            into.extend(batch)

    async with asyncio.TaskGroup() as tasks:
        consuming = [
            tasks.create_task(consume(source, into))
            for source, into in zip(sources, taken, strict=True)
        ]
        for first in range(0, 300, 20):
            await publish(broker, topic, events(range(first, first + 20)))
        await until(lambda: sum(map(len, taken)) >= 300)
        await publish(broker, topic, [event("300")])
        await until(lambda: sum(map(len, taken)) >= 301)
        for task in consuming:
            task.cancel()

    assert sorted(ids(itertools.chain(*taken)), key=int) == numbers(301)


async def test_two_subscriptions_of_a_topic_get_every_event_each(
    broker: Broker, topic: str
) -> None:
    one = await broker.subscribe(interest(topic))
    other = await broker.subscribe(interest(topic))
    await publish(broker, topic, events(range(20)))

    assert ids(await take(one, 20)) == numbers(20)
    assert ids(await take(other, 20)) == numbers(20)


@pytest.mark.needs("topics")
async def test_a_pattern_gets_the_topics_that_match_and_no_others(
    broker: Broker, topic: str
) -> None:
    """ "*" is one token, ">" is one or more at the end. Topics come in no order among them."""
    first = topic.partition(".")[0]
    topics = [first, f"{first}.a", f"{first}.a.b", f"{first}.a.b.c", f"{first}x.a"]
    wanted = {
        f"{first}.*": [f"{first}.a"],
        f"{first}.>": [f"{first}.a", f"{first}.a.b", f"{first}.a.b.c"],
        f"{first}.*.b": [f"{first}.a.b"],
        first: [first],
    }
    sources = {pattern: await broker.subscribe(interest(pattern)) for pattern in wanted}
    for one in topics:
        await publish(broker, one, [event(one)])
    found = {
        pattern: sorted(i.topic for i in await take(sources[pattern], len(matching)))
        for pattern, matching in wanted.items()
    }
    end = f"{first}.z.b"
    await publish(broker, end, [event(end)])
    last = await take(sources[f"{first}.*.b"], 1)

    assert found == wanted
    assert [i.topic for i in last] == [end]


# -- where it starts, and where it is moved


@pytest.mark.needs("seeks")
async def test_a_new_subscription_starts_where_it_is_told(broker: Broker, topic: str) -> None:
    receipts = await publish(broker, topic, events(range(5)))
    between = now_ns()
    receipts += await publish(broker, topic, events(range(5, 10)))
    starts = {
        "earliest": Start(),
        "latest": Start(latest=True),
        "time": Start(time_ns=between),
        "position": Start(position=receipts[7].position),
    }
    sources = {name: await broker.subscribe(interest(topic, start=s)) for name, s in starts.items()}
    await publish(broker, topic, [event("10")])
    counts = {"earliest": 11, "latest": 1, "time": 6, "position": 4}
    taken = {name: ids(await take(sources[name], count)) for name, count in counts.items()}

    assert taken == {
        "earliest": numbers(11),
        "latest": ["10"],
        "time": numbers(6, first=5),
        "position": numbers(4, first=7),
    }


@pytest.mark.needs("redelivers")
async def test_a_subscription_that_exists_goes_on_where_it_was(world: World, topic: str) -> None:
    """Its start is for the first time only."""
    broker = await world.sidecar()
    await publish(broker, topic, events(range(10)))
    wanted = interest(topic)
    source = await broker.subscribe(wanted)
    await take(source, 6, ack=True)
    await source.close()
    anew = interest(topic, start=Start(latest=True))
    renamed = type(wanted)(wanted.name, topic, 256, anew.start)
    taken = await take(await broker.subscribe(renamed), 4)

    assert ids(taken) == numbers(4, first=6)


@pytest.mark.needs("seeks")
@pytest.mark.parametrize("to", ["earliest", "latest", "time", "position"])
async def test_seek_moves_everyone_who_shares_the_subscription(
    world: World, topic: str, to: str
) -> None:
    """
    Each open source is lost, one that waits in fetch and one that does not; then it begins there.

    What was taken and not acked before is void: its handles settle nothing of what comes after.
    """
    broker, other = await world.sidecar(), await world.sidecar()
    receipts = await publish(broker, topic, events(range(5)))
    between = now_ns()
    receipts += await publish(broker, topic, events(range(5, 10)))
    wanted = interest(topic, max_in_flight=10)
    idle = await broker.subscribe(wanted)
    before = await take(idle, 10)
    waiting = await other.subscribe(wanted)
    places = {
        "earliest": (Start(), 0),
        "latest": (Start(latest=True), 10),
        "time": (Start(time_ns=between), 5),
        "position": (Start(position=receipts[8].position), 8),
    }
    place, first = places[to]
    async with asyncio.timeout(5):
        async with asyncio.TaskGroup() as tasks:
            fetching = tasks.create_task(lost(waiting))
            await asyncio.sleep(0)
            await broker.seek(wanted, place)
        await lost(idle)
    idle.ack(handles(before))
    await idle.close()
    await publish(broker, topic, [event("10")])
    after = await take(await other.subscribe(wanted), 11 - first)

    assert fetching.done()
    assert ids(after) == numbers(11 - first, first=first)


async def lost(source: Source) -> None:
    with pytest.raises(SourceLost):
        await source.fetch(10)


@pytest.mark.needs("lag")
async def test_lag_is_what_nobody_fetched(world: World, topic: str) -> None:
    """Exactly, acked or not; what was just published is counted a moment later."""
    broker = await world.sidecar()
    await publish(broker, topic, events(range(10)))
    source = await broker.subscribe(interest(topic))
    lags = [await source.lag()]
    taken = await take(source, 4)
    lags.append(await source.lag())
    source.ack(handles(taken))
    lags.append(await source.lag())
    await publish(broker, topic, events(range(10, 15)))

    async def is_eleven() -> bool:
        return await source.lag() == 11

    await until(is_eleven)
    await take(source, 11, ack=True)
    lags.append(await source.lag())

    assert lags == [10, 6, 6, 0]


async def test_a_broker_that_closes_ends_its_sources(world: World, topic: str) -> None:
    """Those that wait as well as those that come later."""
    broker = await world.sidecar()
    waiting, idle = [await broker.subscribe(interest(topic)) for _ in range(2)]
    async with asyncio.timeout(5):
        async with asyncio.TaskGroup() as tasks:
            fetching = tasks.create_task(lost(waiting))
            await asyncio.sleep(0)
            await broker.close()
        await lost(idle)
        await idle.close()

    assert fetching.done()
