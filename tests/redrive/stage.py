"""Sidecars with a desk on one memory broker, and dead letters that lie there."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sidecar.delivery.redrive.batch import Order, Progress
from sidecar.delivery.redrive.desk import Desk, Found, Page
from sidecar.delivery.redrive.filters import Filter
from sidecar.delivery.redrive.marks import Kind
from sidecar.event import Event
from sidecar.wire.attributes import new_id
from tests.delivery.stage import Sidecar, memory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sidecar.broker import Broker

DEADLINE_SECONDS = 20.0
DLQ = "dlq.orders.created"
FAST = 100_000.0


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def letter(number: int, **said: Any) -> Event:
    """A dead letter as the sidecar stores it; *said*: its headers, and key, type and data."""
    attributes: dict[str, Any] = {
        "key": f"k{number % 3}",
        "data": b"event %d" % number,
        "type": "order.created",
    }
    attributes |= {name: said.pop(name) for name in list(said) if name in attributes}
    headers = {
        "reason": "rejected",
        "error": f"error {number}",
        "topic": "orders.created",
        "broker": "memory",
        "subscription": "billing",
        "attempts": "3",
        "time": "2026-01-31T12:00:01Z",
        "stream": "memory",
        "sequence": str(number + 1),
    }
    headers |= {name.replace("_", "-"): str(value) for name, value in said.items()}
    return Event(
        id=str(number),
        source="/shop",
        time_ns=1,
        headers={
            "traceparent": "00-1-1-01",
            **{f"sidecar-dead-letter-{name}": value for name, value in headers.items()},
        },
        **attributes,
    )


class Desked(Sidecar):
    """A sidecar with a desk, and a subscription "billing" on "orders.>"."""

    def __init__(self, *brokers: Broker) -> None:
        super().__init__(*brokers)
        self.clock = Clock()
        self.desk = Desk(self.brokers, self.publisher, self.hub, clock=self.clock)
        self.subscription()

    async def store(self, *letters: Event, topic: str = DLQ) -> None:
        """As the sidecar does: under broker ids of their own."""
        broker = next(iter(self.brokers.values()))
        await broker.publish(topic, letters, broker_ids=[new_id() for _ in letters])

    async def listed(
        self, wanted: Filter | None = None, *, token: str = "", **options: Any
    ) -> list[Found]:
        """All pages."""
        found: list[Found] = []
        while True:
            page = await self.page(wanted, token=token, **options)
            found += page.letters
            token = page.token
            if not token:
                return found

    async def page(self, wanted: Filter | None = None, **options: Any) -> Page:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self.desk.page(wanted or Filter(), **{"size": 100} | options)

    async def redrive(self, wanted: Filter | None = None, **options: Any) -> Progress:
        return await self.do(Order(Kind.REDRIVE, wanted or Filter(), **{"rate": FAST} | options))

    async def discard(self, wanted: Filter | None = None, **options: Any) -> Progress:
        return await self.do(Order(Kind.DISCARD, wanted or Filter(), **options))

    async def do(self, order: Order) -> Progress:
        async with asyncio.timeout(DEADLINE_SECONDS):
            *_, (progress, finished) = [told async for told in self.desk.run(order)]
        assert finished
        return progress

    async def on(self, topic: str) -> list[Event]:
        """All that is stored on a topic."""
        broker = next(iter(self.brokers.values()))
        found: list[Event] = []
        for log in await broker.logs(topic):
            at = log.first
            while page := await broker.read(log, at, 1000):
                found += [stored.event for stored in page if stored.event]
                at = page[-1].number + 1
        return found


@asynccontextmanager
async def serving(*sidecars: Desked) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(sidecar.desk.serve()) for sidecar in sidecars]
        await asyncio.sleep(0)
        try:
            yield
        finally:
            for task in running:
                task.cancel()


@asynccontextmanager
async def desked(*brokers: Broker) -> AsyncIterator[Desked]:
    sidecar = Desked(*(brokers or (memory(),)))
    async with serving(sidecar):
        yield sidecar


def ids(found: list[Found]) -> list[str]:
    return [one.letter.event.id for one in found]
