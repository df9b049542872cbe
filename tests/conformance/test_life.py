"""The connection: a server may be absent, die and come back; everything resumes by itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from sidecar.broker import Failures, Start
from sidecar.errors import BrokerUnavailable, SidecarError
from tests.conformance.acting import event, events, ids, interest, numbers, publish, take
from tests.conformance.harness import CONNECT_SECONDS
from tests.support.waiting import until

if TYPE_CHECKING:
    from sidecar.broker import Broker, BrokerState
    from tests.conformance.conftest import World

# A Kafka node takes three seconds to come back, on a quiet machine.
pytestmark = pytest.mark.timeout(120)


async def test_connecting_tells_the_state_and_closing_too(world: World) -> None:
    states: list[BrokerState] = []
    broker = world.unconnected()
    broker.on_state = states.append
    await broker.connect()
    connected = [state.connected for state in states]
    await broker.close()

    assert connected == [True]
    assert [state.connected for state in states] == [True, False]


@pytest.mark.needs("server")
@pytest.mark.parametrize("how", ["absent", "silent"])
async def test_connecting_to_nothing_fails_in_time_and_works_when_it_is_there(
    world: World, topic: str, how: str
) -> None:
    """Refused at once, and a server that does not answer within the time-out; then as ever."""
    broker = world.unconnected()
    if how == "absent":
        world.harness.kill()
    else:
        world.harness.pause()
    loop = asyncio.get_running_loop()
    start = loop.time()
    with pytest.raises(BrokerUnavailable):
        await broker.connect()
    took = loop.time() - start
    world.harness.start()
    await broker.connect()

    assert took < CONNECT_SECONDS + (1 if how == "silent" else 0)
    assert len(await publish(broker, topic, events(range(3)))) == 3


@pytest.mark.needs("server")
async def test_everything_resumes_by_itself_when_the_server_was_killed(
    world: World, topic: str
) -> None:
    """Publishing and fetching go on, on a source that waited and one that was opened before."""
    states: list[BrokerState] = []
    broker = await world.sidecar()
    broker.on_state = states.append
    wanted = interest(topic, start=Start(latest=True))
    source = await broker.subscribe(wanted)
    idle = await broker.subscribe(interest(topic, start=Start(latest=True)))
    async with asyncio.timeout(40), asyncio.TaskGroup() as tasks:
        fetching = tasks.create_task(take(source, 20))
        await asyncio.sleep(0)
        world.harness.kill()
        await until(lambda: bool(states))
        waiting = broker.publish(topic, events(range(10)))
        world.harness.start()
        early = await waiting
        late = await publish(broker, topic, events(range(10, 20)))
        taken = await fetching
    idle_taken = await take(idle, 20)

    assert [state.connected for state in states] == [False, True]
    assert all(state.detail for state in states)
    assert not [outcome for outcome in early if isinstance(outcome, SidecarError)]
    assert len(late) == 10
    assert ids(taken) == ids(idle_taken) == numbers(20)


@pytest.mark.needs("server")
async def test_it_resumes_again_and_again(world: World, topic: str) -> None:
    """Five restarts. What the server had no time to note of acks comes twice, and nothing is lost."""
    states: list[BrokerState] = []
    broker = await world.sidecar()
    broker.on_state = states.append
    source = await broker.subscribe(interest(topic))
    heard: list[str] = []
    for round_ in range(5):
        world.harness.kill()
        await until(lambda: bool(states) and not states[-1].connected)
        world.harness.start()
        await publish(broker, topic, [event(str(round_))])
        while str(round_) not in heard:
            heard += ids(await take(source, 1, ack=True))

    assert list(dict.fromkeys(heard)) == numbers(5)
    assert [state.connected for state in states] == [False, True] * 5


@pytest.mark.needs("server", "redelivers")
async def test_an_ack_while_the_server_is_away_is_sent_when_it_is_back(
    world: World, topic: str
) -> None:
    broker = await world.sidecar()
    states: list[BrokerState] = []
    broker.on_state = states.append
    wanted = interest(topic)
    await publish(broker, topic, events(range(10)))
    source = await broker.subscribe(wanted)
    taken = await take(source, 10)
    world.harness.stop()  # a killed nats-server may forget what it had handed out
    await until(lambda: bool(states))
    source.ack([i.handle for i in taken[:6]])
    source.release([i.handle for i in taken[6:]])
    world.harness.start()
    again = await take(source, 4, ack=True)
    await publish(broker, topic, [event("next")])
    last = await take(source, 1)

    assert sorted(ids(again)) == numbers(4, first=6)
    assert ids(last) == ["next"]


@pytest.mark.needs("server")
async def test_a_broker_that_cannot_reach_its_server_says_so(world: World, topic: str) -> None:
    """Looking up lag or moving a subscription is refused at once; closing takes no longer than 2 s."""
    broker = await world.sidecar()
    states: list[BrokerState] = []
    broker.on_state = states.append
    source = await broker.subscribe(interest(topic))
    world.harness.kill()
    await until(lambda: bool(states))
    if broker.capabilities.lag:
        with pytest.raises(BrokerUnavailable):
            await source.lag()
    if broker.capabilities.seeks:
        with pytest.raises(BrokerUnavailable):
            await broker.seek(interest(topic), Start())
    async with asyncio.timeout(2):
        await source.close()


@pytest.mark.needs("server")
async def test_closing_is_bounded_when_the_server_hangs(world: World, topic: str) -> None:
    """Also when there is something to give back: events that were fetched, and that were not."""
    broker = await world.sidecar()
    source = await broker.subscribe(interest(topic))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):  # asks for ten, and takes none
            await source.fetch(10)
    await publish(broker, topic, events(range(10)))
    taken = await take(source, 3)
    source.failed(taken[0].handle, Failures(1))
    source.release([i.handle for i in taken])
    world.harness.pause()
    async with asyncio.timeout(2.5):
        await source.close()
    async with asyncio.timeout(2.5):
        await broker.close()


async def test_closing_twice_and_settling_after_is_harmless(broker: Broker, topic: str) -> None:
    source = await broker.subscribe(interest(topic))
    await publish(broker, topic, events(range(3)))
    taken = await take(source, 3)
    for _ in range(2):
        await source.close()
    for settle in (source.ack, source.release, source.hold):
        settle([i.handle for i in taken])
    for _ in range(2):
        await broker.close()
