"""Sidecars' delivery halves on memory brokers, and apps that consume from them."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sidecar.broker import Broker, Failures, Incoming, Interest, Source, Start
from sidecar.brokers.memory import MemoryBroker
from sidecar.config import MIB, Limits, Memory, Publishing, Route
from sidecar.delivery.hub import Hub
from sidecar.errors import BrokerUnavailable, EventTooLarge, SidecarError
from sidecar.event import Event, Outcome, Receipt, Settlement, Verdict
from sidecar.publishing.publisher import Publisher
from sidecar.publishing.routes import Routes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Hashable, Sequence

    from sidecar.delivery.consumers import Delivery
    from sidecar.delivery.subscription import Subscription
    from sidecar.telemetry.facts import (
        DeadLettered,
        Published,
        Pushed,
        Reestablished,
        Settled,
        Skipped,
    )

DEADLINE_SECONDS = 8.0
AT_ONCE = {"initial_seconds": 0.0, "max_seconds": 0.0}
"""A retry policy without delays."""


def event(id: str, **attributes: Any) -> Event:  # noqa: A002 - as CloudEvents calls it
    values: dict[str, Any] = {"source": "/shop", "type": "order.created", "time_ns": 1}
    return Event(id=id, **values | attributes)


def memory(name: str = "memory") -> MemoryBroker:
    return MemoryBroker(name, Memory(type="memory"))


class Moody(MemoryBroker):
    """A broker that refuses to store, for as long as it is told to."""

    refuses = False
    tries = 0

    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        self.tries += 1
        if not self.refuses:
            return super().publish(topic, events, broker_ids=broker_ids)
        refused: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()
        refused.set_result([BrokerUnavailable("not today") for _ in events])
        return refused


class Slow(MemoryBroker):
    """A broker that stores at once, and says so when it is told to."""

    def __init__(self, name: str, settings: Memory) -> None:
        super().__init__(name, settings)
        self.may_answer = asyncio.Event()
        self.tries = 0

    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        self.tries += 1
        outcomes = super().publish(topic, events, broker_ids=broker_ids)

        async def answer() -> Sequence[Outcome]:
            await self.may_answer.wait()
            return await outcomes

        return asyncio.create_task(answer())


class Away(MemoryBroker):
    """A broker that cannot be reached."""

    async def subscribe(self, interest: Interest) -> Source:
        raise BrokerUnavailable("not today")


class Garbling(MemoryBroker):
    """A broker that has bytes which are no event: the data of every event of type "garbage"."""

    async def subscribe(self, interest: Interest) -> Source:
        return _GarblingSource(await super().subscribe(interest))


class Small(MemoryBroker):
    """A broker that takes nothing larger than a mebibyte."""

    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        if all(event.size <= MIB for event in events):
            return super().publish(topic, events, broker_ids=broker_ids)
        refused: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()
        refused.set_result([EventTooLarge("more than a mebibyte") for _ in events])
        return refused


class _GarblingSource(Source):
    def __init__(self, inner: Source) -> None:
        self._inner = inner

    async def fetch(self, limit: int) -> Sequence[Incoming]:
        return [_garbled(incoming) for incoming in await self._inner.fetch(limit)]

    def ack(self, handles: Sequence[Hashable]) -> None:
        self._inner.ack(handles)

    def failed(self, handle: Hashable, failures: Failures) -> asyncio.Future[None] | None:
        return self._inner.failed(handle, failures)

    def release(self, handles: Sequence[Hashable]) -> None:
        self._inner.release(handles)

    def hold(self, handles: Sequence[Hashable]) -> None:
        self._inner.hold(handles)

    async def lag(self) -> int | None:
        return await self._inner.lag()

    async def close(self) -> None:
        await self._inner.close()


class Parting(MemoryBroker):
    """A broker whose sources can be told to lose events to another, and to be slow to record."""

    source: PartingSource

    async def subscribe(self, interest: Interest) -> Source:
        self.source = PartingSource(await super().subscribe(interest))
        return self.source


class PartingSource(_GarblingSource):
    """The tests call *on_leaving* and *on_revoked* on it, as a driver would."""

    recorded: asyncio.Future[None] | None = None
    """What `failed` answers next."""

    async def fetch(self, limit: int) -> Sequence[Incoming]:
        return await self._inner.fetch(limit)

    def failed(self, handle: Hashable, failures: Failures) -> asyncio.Future[None] | None:
        self._inner.failed(handle, failures)
        return self.recorded


def _garbled(incoming: Incoming) -> Incoming:
    if incoming.event is None or incoming.event.type != "garbage":
        return incoming
    return Incoming(
        incoming.topic,
        incoming.handle,
        incoming.identity,
        None,
        incoming.position,
        problem="not an event: no id",
        raw=incoming.event.data or b"",
    )


class Heard:
    """The facts of one sidecar, as they were told."""

    def __init__(self) -> None:
        self.answered: list[Published] = []
        self.results: Counter[str] = Counter()
        self.dead: list[DeadLettered] = []
        self.skips: Counter[str] = Counter()
        self.pushes: Counter[str] = Counter()
        self.reestablishments = 0

    def published(self, fact: Published) -> None:
        self.answered.append(fact)

    def settled(self, fact: Settled) -> None:
        self.results[fact.result] += fact.count

    def skipped(self, fact: Skipped) -> None:
        self.skips[fact.why] += fact.count

    def pushed(self, fact: Pushed) -> None:
        self.pushes[fact.outcome] += 1

    def reestablished(self, fact: Reestablished) -> None:
        self.reestablishments += 1

    def dead_lettered(self, fact: DeadLettered) -> None:
        self.dead.append(fact)


class Sidecar:
    """One sidecar's publisher and hub. Several may share their brokers."""

    def __init__(self, *brokers: Broker) -> None:
        self.brokers = {broker.name: broker for broker in brokers}
        self.heard = Heard()
        self.publisher = Publisher(
            Routes([Route(topic=">", broker=brokers[0].name)]),
            self.brokers,
            settings=Publishing(timeout_seconds=5),
            limits=Limits(),
            facts=self.heard,
        )
        self.hub = Hub(self.brokers, self.publisher, facts=self.heard)

    async def publish(self, topic: str, *events: Event) -> None:
        for outcome in await self.publisher.publish(topic, events):
            assert isinstance(outcome, Receipt), outcome

    def subscription(self, name: str = "billing", **described: Any) -> Subscription:
        return self.hub.describe({"name": name, "topic": "orders.>"} | described)

    def app(self, subscription: Subscription | None = None, **options: Any) -> App:
        """A consumer that is attached."""
        app = App(subscription or self.subscription(), **options)
        app.subscription.attach(app)
        return app

    def settle(
        self, token: str, verdict: Verdict = Verdict.ACK, **more: Any
    ) -> SidecarError | None:
        ((_, error),) = self.hub.settle([Settlement(token, verdict, **more)])
        return error


class App:
    """A consumer that keeps what it was given until the test takes it."""

    def __init__(
        self, subscription: Subscription, *, credit: int = 1000, max_batch: int = 100
    ) -> None:
        self.subscription = subscription
        self.credit = credit
        self.max_batch = max_batch
        self.takes_more = True
        self.batches: list[int] = []
        self.why: Exception | None = None
        self.waiting: list[Delivery] = []
        self._given = asyncio.Event()

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        self.batches.append(len(deliveries))
        self.waiting += deliveries
        self._given.set()

    def closed(self, why: Exception) -> None:
        self.why = why

    @property
    def given(self) -> int:
        """How many deliveries it ever got."""
        return sum(self.batches)

    async def take(self, count: int = 1) -> list[Delivery]:
        """Exactly *count* deliveries."""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while len(self.waiting) < count:
                    self._given.clear()
                    await self._given.wait()
        except TimeoutError:
            raise AssertionError(f"{len(self.waiting)} of {count} came") from None
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    async def one(self) -> Delivery:
        (delivery,) = await self.take(1)
        return delivery

    def settle(self, token: str, verdict: Verdict, **more: Any) -> SidecarError | None:
        (error,) = self.subscription.settle([Settlement(token, verdict, **more)])
        return error

    def ack(self, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            assert self.settle(delivery.token, Verdict.ACK) is None

    def nack(self, delivery: Delivery, delay: float | None = 0.0, **more: Any) -> None:
        assert self.settle(delivery.token, Verdict.NACK, delay=delay, **more) is None

    def reject(self, delivery: Delivery, reason: str = "") -> None:
        assert self.settle(delivery.token, Verdict.REJECT, reason=reason) is None

    def leave(self, *, clean: bool = True) -> None:
        self.subscription.detach(self, clean=clean)


@asynccontextmanager
async def running(*brokers: Broker) -> AsyncIterator[Sidecar]:
    """A sidecar at work; at the end it drains without time."""
    sidecar = Sidecar(*(brokers or (memory(),)))
    hub = asyncio.create_task(sidecar.hub.run())
    await asyncio.sleep(0)
    try:
        yield sidecar
    finally:
        await sidecar.hub.drain(0)
        await hub


async def stored(broker: Broker, topic: str, count: int) -> list[Incoming]:
    """The events that a topic of a broker has: exactly *count* of them."""
    everything = await broker.subscribe(Interest(f"look at {topic}", ">", 1000, Start()))
    found: list[Incoming] = []
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len(found) < count:
                found += [i for i in await everything.fetch(1000) if i.topic == topic]
    except TimeoutError:
        raise AssertionError(f"{len(found)} of {count} are on {topic}") from None
    finally:
        await everything.close()
    assert len(found) == count, f"{len(found)} on {topic}"
    return found


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.event.id for delivery in deliveries]


def numbers(first: int, end: int) -> list[str]:
    return [str(number) for number in range(first, end)]
