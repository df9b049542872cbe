"""A subscription that should progress and does not is subscribed anew; one that need not, is left."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sidecar.brokers.memory import MemoryBroker
from sidecar.config import Memory
from sidecar.delivery.watchdog import Watchdog
from sidecar.errors import BrokerUnavailable
from tests.delivery.stage import DEADLINE_SECONDS, PartingSource, running
from tests.delivery.stage import event as make

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.broker import Incoming, Interest, Source

LOOKS = st.lists(
    st.tuples(
        st.booleans(),  # asking
        st.integers(0, 2),  # events that came since the last look
        st.sampled_from([None, 0, 1, 1, 1, 50]),  # events the broker has
        st.floats(0.1, 5),  # seconds since the last look
    ),
    max_size=40,
)


@given(LOOKS)
def test_it_barks_when_and_only_when_nothing_came_for_so_long_though_there_was_something(
    looks: list[tuple[bool, int, int | None, float]],
) -> None:
    dog = Watchdog(10)
    now, arrived, since = 100.0, 0, None
    before = -1
    for asking, came, due, seconds in looks:
        now += seconds
        arrived += came
        barks = dog.should_look(asking=asking, arrived=arrived) and dog.is_stuck(
            due, arrived=arrived, now=now
        )
        starving = asking and bool(due)
        if not starving or (arrived != before and since is not None):
            since = None
        if starving and since is None:
            since = now
        before = arrived

        assert barks == (starving and since is not None and now - since >= 10)


def test_what_comes_while_the_broker_is_asked_is_progress() -> None:
    dog = Watchdog(10)
    for now in (0.0, 9.0):
        assert dog.should_look(asking=True, arrived=5)
        assert not dog.is_stuck(7, arrived=5, now=now)
    assert dog.should_look(asking=True, arrived=5)

    assert not dog.is_stuck(7, arrived=6, now=99.0)


class Deaf(MemoryBroker):
    """A broker whose first source lives, and receives nothing: as after some reconnects."""

    away = False
    subscribed = 0

    def __init__(self, name: str, settings: Memory) -> None:
        super().__init__(name, settings)
        self.looked_at_ten_times = asyncio.Event()

    async def subscribe(self, interest: Interest) -> Source:
        self.subscribed += 1
        source = await super().subscribe(interest)
        return _Deaf(source, self) if self.subscribed == 1 else source


class _Deaf(PartingSource):
    def __init__(self, inner: Source, broker: Deaf) -> None:
        super().__init__(inner)
        self._broker = broker
        self._looks = 0

    async def fetch(self, limit: int) -> Sequence[Incoming]:
        await asyncio.get_running_loop().create_future()
        return []

    async def lag(self) -> int | None:
        self._looks += 1
        if self._looks == 10:  # more than twice as often as the watchdog needs
            self._broker.looked_at_ten_times.set()
        if self._broker.away:
            raise BrokerUnavailable("away")
        return await self._inner.lag()


def deaf() -> Deaf:
    return Deaf("memory", Memory(type="memory"))


async def test_a_subscription_that_receives_nothing_is_subscribed_anew_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = deaf()
    async with running(broker) as sidecar:
        await sidecar.publish("orders.new", make("1"), make("2"))
        app = sidecar.app(sidecar.subscription(watchdog_seconds=0.2))
        deliveries = await app.take(2)
        app.ack(*deliveries)

    assert [d.attempt for d in deliveries] == [1, 1]
    assert (broker.subscribed, app.subscription.reestablished) == (2, 1)
    assert sidecar.heard.reestablishments == 1
    (line,) = [r.getMessage() for r in caplog.records if "subscribing anew" in r.getMessage()]
    assert line.startswith(
        "subscription billing: 2 events are at the broker and none came for 0.2 s"
    )


@pytest.mark.parametrize("away", [False, True], ids=["nothing is there", "the broker is away"])
async def test_a_subscription_with_nothing_to_get_is_left_alone(
    away: bool,  # noqa: FBT001
) -> None:
    broker = deaf()
    broker.away = away
    async with running(broker) as sidecar:
        if away:
            await sidecar.publish("orders.new", make("1"))
        subscription = sidecar.subscription(watchdog_seconds=0.04)
        sidecar.app(subscription)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await broker.looked_at_ten_times.wait()

    assert (broker.subscribed, subscription.reestablished) == (1, 0)
