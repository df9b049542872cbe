"""A publish through routes, room and brokers: one outcome per event, in order, in every case."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.broker import Interest, Start
from sidecar.brokers.memory import MemoryBroker
from sidecar.config import Limits, Memory, Publishing, Route
from sidecar.errors import (
    BrokerUnavailable,
    Draining,
    EventTooLarge,
    Internal,
    InvalidEvent,
    InvalidRequest,
    InvalidTopic,
    NoRoute,
    NotSupported,
    OutcomeUnknown,
    QueueFull,
    SidecarError,
)
from sidecar.event import Durability, Event, Outcome, Position, Receipt
from sidecar.publishing.publisher import Publisher
from sidecar.publishing.routes import Routes
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sidecar.broker import Broker
    from sidecar.telemetry.facts import DeadLettered, Published, Settled

MEMORY = Memory(type="memory")


class Heard:
    def __init__(self) -> None:
        self.facts: list[Published] = []

    def published(self, fact: Published) -> None:
        self.facts.append(fact)

    def settled(self, fact: Settled) -> None: ...

    def dead_lettered(self, fact: DeadLettered) -> None: ...


class Silent(MemoryBroker):
    """A broker that answers only when told to: its futures complete by hand."""

    def __init__(self, name: str) -> None:
        super().__init__(name, MEMORY)
        self.asked: list[tuple[Sequence[Event], asyncio.Future[Sequence[Outcome]]]] = []

    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        future: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()
        self.asked.append((events, future))
        return future

    def answer(self, number: int) -> None:
        events, future = self.asked[number]
        future.set_result([Receipt(e.id, self.name, "t", Durability.STORED) for e in events])


class Raising(MemoryBroker):
    def publish(
        self, topic: str, events: Sequence[Event], *, broker_ids: Sequence[str] | None = None
    ) -> asyncio.Future[Sequence[Outcome]]:
        raise BrokerUnavailable("closed")


class Sending(MemoryBroker):
    """As durable as core NATS."""

    capabilities = MemoryBroker.capabilities.__class__(
        durability=Durability.SENT,
        positions=False,
        redelivers=False,
        deduplicates=False,
        seeks=False,
        lag=False,
        dead_letters=False,
        deals=True,
    )


def event(id: str = "1", **attributes: Any) -> Event:  # noqa: A002 - as CloudEvents calls it
    values: dict[str, Any] = {"source": "/shop", "type": "order.created", "time_ns": 1}
    return Event(id=id, **values | attributes)


def publisher(
    *brokers: Broker,
    routes: Sequence[Route] | None = None,
    limits: Limits | None = None,
    heard: Heard | None = None,
    **settings: Any,
) -> Publisher:
    if routes is None:
        routes = [Route(topic=">", broker=brokers[0].name)]
    return Publisher(
        Routes(routes),
        {broker.name: broker for broker in brokers},
        settings=Publishing(**settings),
        limits=limits or Limits(),
        facts=heard or Heard(),
    )


def room(publishing: Publisher, broker: str = "work") -> tuple[int, int]:
    pending = publishing.pending(broker)
    return pending.events, pending.bytes


async def stored(broker: Broker, topic: str = "orders") -> list[str]:
    """The ids that are in a memory broker, oldest first; at least one."""
    source = await broker.subscribe(Interest("look", topic, 1000, Start()))
    found = [i.event.id for i in await source.fetch(1000) if i.event]
    await source.close()
    return found


# -- outcomes


async def test_each_event_has_its_receipt_in_order() -> None:
    broker = MemoryBroker("work", MEMORY)
    heard = Heard()
    publishing = publisher(broker, heard=heard)
    outcomes = await publishing.publish("orders", [event("a"), event("b"), event("a")])

    assert outcomes == [
        Receipt("a", "work", "orders", Durability.STORED, Position("memory", 1)),
        Receipt("b", "work", "orders", Durability.STORED, Position("memory", 2)),
        Receipt("a", "work", "orders", Durability.STORED, Position("memory", 1), duplicate=True),
    ]
    assert room(publishing) == (0, 0)
    assert [(fact.broker, fact.topic, fact.types, fact.outcomes) for fact in heard.facts] == [
        ("work", ">", ["order.created"] * 3, outcomes)
    ]


async def test_a_bad_event_fails_in_its_place_and_its_neighbours_do_not() -> None:
    bad = InvalidEvent("no type", field="type")
    broker = MemoryBroker("work", MEMORY)
    outcomes = await publisher(broker).publish("orders", [event("a"), bad, event("c"), bad])

    assert [type(outcome) for outcome in outcomes] == [Receipt, InvalidEvent, Receipt, InvalidEvent]
    assert await stored(broker) == ["a", "c"]


async def test_nothing_but_bad_events_is_answered_too() -> None:
    bad = InvalidEvent("no type", field="type")
    heard = Heard()
    publishing = publisher(MemoryBroker("work", MEMORY), heard=heard)

    assert await publishing.publish("orders", [bad, bad]) == [bad, bad]
    assert [(fact.broker, fact.types, len(fact.outcomes)) for fact in heard.facts] == [
        ("", ["", ""], 2)
    ]


async def test_an_event_that_is_too_large_fails_alone() -> None:
    publishing = publisher(MemoryBroker("work", MEMORY), limits=Limits(max_event_bytes=1024))
    fits, too_large = event("a", data=b"x" * 1024), event("b", data=b"x" * 1025)
    outcomes = await publishing.publish("orders", [fits, too_large])

    assert isinstance(outcomes[0], Receipt)
    assert isinstance(outcomes[1], EventTooLarge)
    assert outcomes[1].metadata == {"field": "data", "limit": "1024", "size": "1025"}


@pytest.mark.parametrize(
    ("topic", "count", "error"),
    [("orders", 0, InvalidRequest), ("orders", 11, InvalidRequest), ("orders.>", 1, InvalidTopic),
     ("", 1, InvalidTopic)],
)  # fmt: skip
async def test_a_call_that_makes_no_sense_publishes_nothing(
    topic: str, count: int, error: type[Exception]
) -> None:
    heard = Heard()
    publishing = publisher(
        MemoryBroker("work", MEMORY), limits=Limits(max_batch_events=10), heard=heard
    )
    with pytest.raises(error):
        await publishing.publish(topic, [event(str(i)) for i in range(count)])

    assert heard.facts == []


# -- routes


async def test_one_call_goes_to_several_brokers_by_its_events_types() -> None:
    realtime, work = MemoryBroker("realtime", MEMORY), MemoryBroker("work", MEMORY)
    heard = Heard()
    publishing = publisher(
        realtime,
        work,
        routes=[
            Route(event_type="realtime.>", broker="realtime"),
            Route(topic="orders.>", broker="work"),
        ],
        heard=heard,
    )
    events: list[Event | SidecarError] = [
        event("a", type="realtime.price"),
        event("b"),
        InvalidEvent("no id"),
        event("d", type="realtime.price"),
        event("e"),
    ]
    outcomes = await publishing.publish("orders.new", events)

    assert [o.broker if isinstance(o, Receipt) else type(o) for o in outcomes] == [
        "realtime",
        "work",
        InvalidEvent,
        "realtime",
        "work",
    ]
    assert [o.event_id for o in outcomes if isinstance(o, Receipt)] == ["a", "b", "d", "e"]
    assert await stored(realtime, "orders.new") == ["a", "d"]
    assert await stored(work, "orders.new") == ["b", "e"]
    facts = [(fact.broker, fact.topic, fact.types, len(fact.outcomes)) for fact in heard.facts]
    assert sorted(facts) == [
        ("", "", [""], 1),
        ("realtime", "", ["realtime.price"] * 2, 2),
        ("work", "orders.>", ["order.created"] * 2, 2),
    ]


async def test_events_that_take_several_routes_to_one_broker_stay_in_order() -> None:
    work = MemoryBroker("work", MEMORY)
    publishing = publisher(
        work, routes=[Route(event_type="a", broker="work"), Route(topic=">", broker="work")]
    )
    await publishing.publish("orders", [event(str(i), type="ab"[i % 2]) for i in range(6)])

    assert await stored(work) == ["0", "1", "2", "3", "4", "5"]


async def test_events_without_a_route_fail_one_by_one() -> None:
    publishing = publisher(
        MemoryBroker("work", MEMORY), routes=[Route(event_type="a", broker="work")]
    )
    mixed = await publishing.publish("orders", [event("1", type="a"), event("2", type="b")])
    alike = await publishing.publish("orders", [event("3", type="b"), event("4", type="b")])

    assert [type(outcome) for outcome in [*mixed, *alike]] == [Receipt, NoRoute, NoRoute, NoRoute]


async def test_durability_that_a_broker_cannot_give_is_refused_before_anything_is_sent() -> None:
    realtime, work = Sending("realtime", MEMORY), MemoryBroker("work", MEMORY)
    publishing = publisher(
        realtime,
        work,
        routes=[Route(event_type="realtime.>", broker="realtime"), Route(topic=">", broker="work")],
    )
    both = [event("a", type="realtime.price"), event("b")]
    mixed = await publishing.publish("orders", both, min_durability=Durability.STORED)
    alike = await publishing.publish("orders", both[:1], min_durability=Durability.SPOOLED)
    enough = await publishing.publish("orders", both, min_durability=Durability.SENT)

    assert [type(outcome) for outcome in [*mixed, *alike]] == [NotSupported, Receipt, NotSupported]
    assert [type(outcome) for outcome in enough] == [Receipt, Receipt]
    assert await stored(realtime) == ["a"]


# -- time


async def test_what_is_not_answered_in_time_is_unknown_and_its_room_is_given_back() -> None:
    silent = Silent("work")
    publishing = publisher(silent)
    outcomes = await publishing.publish("orders", [event("a"), event("b")], timeout=0.05)

    assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown, OutcomeUnknown]
    assert silent.asked[0][1].cancelled()
    assert room(publishing) == (0, 0)
    assert publishing.under_way == 0


async def test_the_time_is_as_configured_unless_the_call_says_so() -> None:
    publishing = publisher(Silent("work"), timeout_seconds=0.05)
    (outcome,) = await publishing.publish("orders", [event()])

    assert isinstance(outcome, OutcomeUnknown)
    assert "0.05 s" in outcome.message


async def test_one_broker_that_does_not_answer_leaves_the_others_outcomes_as_they_are() -> None:
    publishing = publisher(
        Silent("silent"),
        MemoryBroker("work", MEMORY),
        routes=[Route(event_type="a", broker="silent"), Route(topic=">", broker="work")],
    )
    outcomes = await publishing.publish(
        "orders", [event("1", type="a"), event("2", type="b")], timeout=0.05
    )

    assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown, Receipt]


async def test_an_answer_in_time_is_not_followed_by_a_timeout() -> None:
    silent = Silent("work")
    publishing = publisher(silent)
    outcomes = await publishing.submit("orders", [event()], timeout=0.1)
    silent.answer(0)

    assert isinstance((await outcomes)[0], Receipt)
    assert room(publishing) == (0, 0)


# -- room


async def test_what_is_under_way_takes_room_until_it_is_answered() -> None:
    silent = Silent("work")
    publishing = publisher(silent)
    one = event("a", data=b"x" * 500)
    outcomes = await publishing.submit("orders", [one, one])
    taken = room(publishing)
    silent.answer(0)
    await outcomes

    assert taken == (2, 2 * one.size)
    assert room(publishing) == (0, 0)


async def test_a_full_queue_refuses_after_its_wait_and_then_nothing_was_published() -> None:
    silent = Silent("work")
    publishing = publisher(silent, max_pending_events=2, full_wait_seconds=0.05)
    first = await publishing.submit("orders", [event("a"), event("b")])
    with pytest.raises(QueueFull) as caught:
        await publishing.publish("orders", [event("c")])
    silent.answer(0)
    await first

    assert caught.value.retry_after == 1.0
    assert len(silent.asked) == 1
    assert room(publishing) == (0, 0)


async def test_a_full_queue_of_one_broker_fails_only_its_part_of_a_call() -> None:
    silent = Silent("silent")
    publishing = publisher(
        silent,
        MemoryBroker("work", MEMORY),
        routes=[Route(event_type="a", broker="silent"), Route(topic=">", broker="work")],
        max_pending_events=1,
        full_wait_seconds=0.05,
    )
    first = await publishing.submit("orders", [event("1", type="a")])
    outcomes = await publishing.publish("orders", [event("2", type="a"), event("3", type="b")])
    silent.answer(0)
    await first

    assert [type(outcome) for outcome in outcomes] == [QueueFull, Receipt]


async def test_a_stream_waits_for_room_as_long_as_it_takes_and_keeps_its_order() -> None:
    silent = Silent("work")
    publishing = publisher(silent, max_pending_events=1, full_wait_seconds=0)
    await publishing.submit("orders", [event("a")], wait=None)
    waiting = [
        asyncio.create_task(publishing.submit("orders", [event(i)], wait=None)) for i in "bc"
    ]
    await until(lambda: publishing.under_way == 3)
    asked_while_full = len(silent.asked)
    for number in range(3):
        await until(lambda number=number: len(silent.asked) > number)  # type: ignore[misc]
        silent.answer(number)
    for task in waiting:
        await (await task)

    assert asked_while_full == 1
    assert [events[0].id for events, _ in silent.asked] == ["a", "b", "c"]
    assert room(publishing) == (0, 0)


async def test_a_caller_that_leaves_does_not_take_its_room_along() -> None:
    """Its events are under way all the same: the room is theirs until they are answered."""
    silent = Silent("work")
    publishing = publisher(silent)
    caller = asyncio.create_task(publishing.publish("orders", [event()]))
    await until(lambda: bool(silent.asked))
    caller.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await caller
    taken = room(publishing)
    silent.answer(0)
    await publishing.flushed()

    assert taken[0] == 1
    assert room(publishing) == (0, 0)


async def test_a_caller_that_leaves_the_queue_was_never_in() -> None:
    silent = Silent("work")
    publishing = publisher(silent, max_pending_events=1)
    first = await publishing.submit("orders", [event("a")])
    caller = asyncio.create_task(publishing.publish("orders", [event("b")], wait=None))
    await until(lambda: publishing.under_way == 2)
    caller.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await caller
    silent.answer(0)
    await first

    assert len(silent.asked) == 1
    assert publishing.under_way == 0
    assert room(publishing) == (0, 0)


async def test_a_driver_that_raises_gives_the_room_back() -> None:
    publishing = publisher(Raising("work", MEMORY))
    with pytest.raises(BrokerUnavailable):
        await publishing.publish("orders", [event()])

    assert room(publishing) == (0, 0)
    assert publishing.under_way == 0


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [(BrokerUnavailable("closed"), BrokerUnavailable), (ValueError("a bug"), Internal)],
)
async def test_a_batch_that_fails_as_a_whole_fails_event_by_event(
    raised: Exception, outcome: type[Exception]
) -> None:
    silent = Silent("work")
    publishing = publisher(silent)
    future = await publishing.submit("orders", [event("a"), event("b")])
    silent.asked[0][1].set_exception(raised)

    assert [type(o) for o in await future] == [outcome, outcome]
    assert room(publishing) == (0, 0)


# -- the sidecar's own, and the end


async def test_dead_letters_go_past_the_routes_under_ids_of_their_own() -> None:
    work = MemoryBroker("work", MEMORY)
    heard = Heard()
    publishing = publisher(work, routes=[], heard=heard)
    outcomes = [
        await publishing.publish_to(
            "work", "dlq.orders", [event("a")], broker_ids=[broker_id], label="dlq.{topic}"
        )
        for broker_id in ("one", "other", "one")
    ]
    receipts = [outcome for (outcome,) in outcomes if isinstance(outcome, Receipt)]

    assert [receipt.duplicate for receipt in receipts] == [False, False, True]
    assert {fact.topic for fact in heard.facts} == {"dlq.{topic}"}


async def test_while_draining_nothing_is_taken_but_what_was_taken_is_finished() -> None:
    silent = Silent("work")
    publishing = publisher(silent, max_pending_events=1)
    first = await publishing.submit("orders", [event("a")])
    queued = asyncio.create_task(publishing.publish("orders", [event("b")], wait=None))
    await until(lambda: publishing.under_way == 2)
    publishing.draining = True
    flushed = asyncio.create_task(publishing.flushed())
    with pytest.raises(Draining):
        await publishing.publish("orders", [event("c")])
    silent.answer(0)
    await first
    await until(lambda: len(silent.asked) == 2)
    flushed_early = flushed.done()
    silent.answer(1)
    await flushed

    assert not flushed_early
    assert isinstance((await queued)[0], Receipt)


async def test_nothing_under_way_is_flushed_already() -> None:
    publishing = publisher(MemoryBroker("work", MEMORY))
    async with asyncio.timeout(1):
        await publishing.flushed()
        await publishing.publish("orders", [event()])
        await publishing.flushed()

    assert publishing.under_way == 0
