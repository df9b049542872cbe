"""Apps that come, pull, fail, leave and break at random: every event is done, every attempt counted."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from sidecar.event import Verdict
from tests.delivery.stage import AT_ONCE, App, Sidecar, memory, running
from tests.delivery.stage import event as make

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.delivery.consumers import Delivery
    from sidecar.delivery.subscription import Subscription
    from sidecar.event import Event

EVENTS = 120


class Unrest:
    """A subscription, what is known of its events, and things that may happen to it."""

    def __init__(self, sidecar: Sidecar, subscription: Subscription, seed: int) -> None:
        self.sidecar = sidecar
        self.subscription = subscription
        self.chance = random.Random(seed)
        self.counted: Counter[str] = Counter()
        self.acked: list[Event] = []
        self.out: dict[str, Delivery] = {}
        self.apps: list[App] = []

    def seen(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            event = delivery.event
            self.counted[event.id] += 1
            assert delivery.attempt == self.counted[event.id]
            assert event.key not in {other.event.key for other in self.out.values()}
            self.out[delivery.token] = delivery

    def settle(self, delivery: Delivery) -> None:
        del self.out[delivery.token]
        verdict = self.chance.choice([Verdict.ACK, Verdict.ACK, Verdict.NACK])
        uncounted = self.chance.random() < 0.3
        error = self.sidecar.settle(delivery.token, verdict, delay=0.0, uncounted=uncounted)
        assert error is None
        if verdict is Verdict.ACK:
            self.acked.append(delivery.event)
        elif uncounted:
            self.counted[delivery.event.id] -= 1

    async def app_comes(self) -> None:
        if len(self.apps) < 3:
            credit = self.chance.randrange(1, 9)
            self.apps.append(self.sidecar.app(self.subscription, credit=credit))

    async def apps_work(self) -> None:
        await asyncio.sleep(0.001)
        for app in self.apps:
            taken = await app.take(len(app.waiting))
            self.seen(taken)
            for delivery in taken:
                if self.chance.random() < 0.8:
                    self.settle(delivery)
            self.subscription.credit(app, len(taken))

    async def app_goes(self) -> None:
        if not self.apps:
            return
        app = self.apps.pop(self.chance.randrange(len(self.apps)))
        had = {d.token for d in await app.take(len(app.waiting))}
        clean = self.chance.random() < 0.5
        for held in self.subscription.window.out_to(app):
            assert held.token in self.out or held.token in had
            if held.token in self.out:
                del self.out[held.token]
                self.counted[str(held.incoming.event and held.incoming.event.id)] -= clean
            elif not clean:
                self.counted[str(held.incoming.event and held.incoming.event.id)] += 1
        app.leave(clean=clean)

    async def pull(self) -> None:
        count = self.chance.randrange(1, 6)
        taken = await self.sidecar.hub.pull(self.subscription, count, 0.0)
        self.seen(taken)
        for delivery in taken:
            self.settle(delivery)

    async def pull_is_cancelled(self) -> None:
        pulling = asyncio.create_task(self.sidecar.hub.pull(self.subscription, 5, 5.0))
        for _ in range(self.chance.randrange(6)):
            await asyncio.sleep(0)
        pulling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self.seen(await pulling)

    async def late_settling(self) -> None:
        for delivery in list(self.out.values()):
            self.settle(delivery)

    async def go_on(self) -> None:
        things = [
            self.app_comes,
            self.apps_work,
            self.apps_work,
            self.late_settling,
            self.app_goes,
            self.pull,
            self.pull_is_cancelled,
        ]
        while len(self.acked) < EVENTS:
            await self.chance.choice(things)()


@pytest.mark.parametrize("seed", range(3))
async def test_every_event_is_done_once_in_order_and_every_attempt_is_counted(seed: int) -> None:
    chance = random.Random(seed)
    events = [make(str(n), key=f"key {chance.randrange(20)}") for n in range(EVENTS)]
    async with running(memory()) as sidecar:
        await sidecar.publish("orders.new", *events)
        subscription = sidecar.subscription(
            max_in_flight=chance.choice([3, 16, 256]),
            retry={"max_attempts": 1000, "max_crashes": 15, **AT_ONCE},
        )
        unrest = Unrest(sidecar, subscription, seed)
        await unrest.go_on()
        window = subscription.window

    assert Counter(e.id for e in unrest.acked) == Counter(e.id for e in events)
    for key in {event.key for event in events}:
        assert [e.id for e in unrest.acked if e.key == key] == [
            e.id for e in events if e.key == key
        ]
    assert (len(window), window.lanes, window.out, window.retrying) == (0, 0, 0, 0)
    assert sidecar.heard.dead == []
