"""What the tests of the suite do all the time: make events, publish them, take them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sidecar.broker import Incoming, Interest, Source, Start
from sidecar.event import Event, Receipt
from sidecar.wire.timestamps import now_ns
from tests.conformance.harness import fresh

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sidecar.broker import Broker
    from sidecar.event import Outcome

DEADLINE_SECONDS = 20.0
"""Far more than anything takes, also on a machine that is busy with other tests."""


def event(id: str = "1", **attributes: Any) -> Event:  # noqa: A002 - as CloudEvents calls it
    values: dict[str, Any] = {"source": "/shop", "type": "order.created", "time_ns": now_ns()}
    return Event(id=id, **values | attributes)


def events(numbers: Iterable[int]) -> list[Event]:
    return [event(str(number), data=b"event %d" % number) for number in numbers]


def interest(topic: str, *, max_in_flight: int = 256, start: Start | None = None) -> Interest:
    """A new subscription."""
    return Interest(fresh("subscription"), topic, max_in_flight, start or Start())


def receipt(outcome: Outcome) -> Receipt:
    assert isinstance(outcome, Receipt), outcome
    return outcome


async def publish(broker: Broker, topic: str, batch: Sequence[Event]) -> list[Receipt]:
    """Publish, and see that every event is taken."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return [receipt(outcome) for outcome in await broker.publish(topic, batch)]


async def take(source: Source, count: int, *, ack: bool = False) -> list[Incoming]:
    """Exactly *count* deliveries, in the order in which they come."""
    taken: list[Incoming] = []
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len(taken) < count:
                batch = await source.fetch(count - len(taken))
                if ack:
                    source.ack([incoming.handle for incoming in batch])
                taken += batch
    except TimeoutError:
        raise AssertionError(f"{len(taken)} of {count} came: {ids(taken)}") from None
    return taken


def ids(taken: Iterable[Incoming]) -> list[str]:
    return [incoming.event.id if incoming.event else "?" for incoming in taken]


def handles(taken: Iterable[Incoming]) -> list[Any]:
    return [incoming.handle for incoming in taken]


def numbers(count: int, first: int = 0) -> list[str]:
    """The ids of `events(range(first, first + count))`."""
    return [str(number) for number in range(first, first + count)]
