"""Pulls, subscriptions that apps describe, several sidecars, and the drain."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.config import Memory
from sidecar.config import Subscription as Settings
from sidecar.delivery.hub import CROWDED_IDLE_SECONDS, DESCRIBED_IDLE_SECONDS, MAX_DESCRIBED, Hub
from sidecar.errors import (
    AlreadySettled,
    BadToken,
    Draining,
    InvalidRequest,
    NoRoute,
    SubscriptionConflict,
    SubscriptionMissing,
)
from sidecar.event import Verdict
from tests.delivery.stage import (
    AT_ONCE,
    Away,
    Moody,
    Sidecar,
    Slow,
    ids,
    memory,
    numbers,
    running,
    stored,
)
from tests.delivery.stage import event as make
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sidecar.broker import Broker
    from sidecar.delivery.consumers import Delivery

BILLING: dict[str, Any] = {"name": "billing", "topic": "orders.>"}


async def pull(sidecar: Sidecar, count: int = 10, wait: float = 5.0) -> Sequence[Delivery]:
    return await sidecar.hub.pull(sidecar.subscription(), count, wait)


# -- pull


async def test_a_pull_takes_what_is_there_up_to_its_number() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", *(make(i) for i in numbers(0, 5)))
        first, second = await pull(sidecar, 3), await pull(sidecar, 3)

    assert ids(first) == numbers(0, 3)
    assert ids(second) == numbers(3, 5)


async def test_a_pull_that_gets_nothing_is_empty_after_its_wait() -> None:
    async with running() as sidecar:
        clock = asyncio.get_running_loop().time
        started = clock()
        nothing = await pull(sidecar, wait=0.15)
        waited = clock() - started

    assert list(nothing) == []
    assert 0.14 < waited < 2
    assert not sidecar.subscription().consumers


async def test_a_pull_takes_what_comes_while_it_waits() -> None:
    async with running() as sidecar:
        pulling = asyncio.create_task(pull(sidecar))
        await until(lambda: bool(sidecar.hub.all() and sidecar.subscription().consumers))
        await sidecar.publish("orders.new", make("1"))
        taken = await pulling

    assert ids(taken) == ["1"]


async def test_a_pull_that_does_not_wait_still_asks_the_broker() -> None:
    """Who polls now and then must get what is there, though nothing is fetched in between."""
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        taken = await pull(sidecar, wait=0.0)

    assert ids(taken) == ["1"]


async def test_what_was_pulled_is_settled_by_token_and_else_its_lease_ends() -> None:
    async with running() as sidecar:
        sidecar.subscription(lease_seconds=0.1, retry=AT_ONCE)
        await sidecar.publish("orders.new", make("1"), make("2"))
        subscription = sidecar.hub.get("billing")
        one, two = await sidecar.hub.pull(subscription, 2, 5.0)
        settled = sidecar.settle(one.token)
        (again,) = await sidecar.hub.pull(subscription, 2, 5.0)

    assert settled is None
    assert again.event == two.event
    assert again.attempt == 2


@pytest.mark.parametrize("turns", range(8))
async def test_a_cancelled_pull_loses_nothing(turns: int) -> None:
    """Wherever it is cancelled: what it was given as its caller left is had by the next."""
    async with running() as sidecar:
        await pull(sidecar, wait=0.0)
        await sidecar.publish("orders.new", *(make(i) for i in numbers(0, 3)))
        pulling = asyncio.create_task(pull(sidecar))
        for _ in range(turns):
            await asyncio.sleep(0)
        got: list[Delivery] = []
        pulling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            got += await pulling
        if not got:
            got += await pull(sidecar)

    assert [(d.event.id, d.attempt) for d in got] == [("0", 1), ("1", 1), ("2", 1)]


async def test_a_pull_whose_time_is_up_as_it_is_given_something_has_it() -> None:
    """Many pulls that just do not wait long enough: each event is had once, at its first try."""
    async with running() as sidecar:
        had: list[Delivery] = []
        subscription = sidecar.subscription()

        async def keep_pulling() -> None:
            while len(had) < 60:
                had.extend(await sidecar.hub.pull(subscription, 1, 0.0))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(7):
                tasks.create_task(keep_pulling())
            for number in numbers(0, 60):
                await sidecar.publish("orders.new", make(number))
                await asyncio.sleep(0.007)

    assert sorted(ids(had), key=int) == numbers(0, 60)
    assert {delivery.attempt for delivery in had} == {1}


# -- finding and describing


async def test_an_unknown_subscription_is_told() -> None:
    async with running() as sidecar:
        with pytest.raises(SubscriptionMissing, match="'billing'"):
            sidecar.hub.get("billing")


async def test_what_is_said_of_a_long_name_is_short() -> None:
    async with running() as sidecar:
        with pytest.raises(SubscriptionMissing) as missing:
            sidecar.hub.get("n" * 5000)
        with pytest.raises(InvalidRequest, match="at most 128") as too_long:
            sidecar.hub.describe(BILLING | {"name": "n" * 5000})
        with pytest.raises(InvalidRequest, match="no broker") as no_broker:
            sidecar.hub.describe(BILLING | {"broker": "n" * 5000})

    for caught in (missing, too_long, no_broker):
        assert len(str(caught.value)) < 400


async def test_described_again_and_equal_it_is_the_same() -> None:
    async with running() as sidecar:
        first = sidecar.hub.describe(BILLING | {"max_in_flight": 5})
        first_app = sidecar.app(first)
        again = sidecar.hub.describe(BILLING | {"max_in_flight": 5, "retry": {}})

    assert again is first
    assert first_app.why is not None


async def test_in_use_it_cannot_be_described_otherwise() -> None:
    async with running() as sidecar:
        sidecar.app(sidecar.hub.describe(BILLING))
        with pytest.raises(SubscriptionConflict, match="max_in_flight, lease_seconds"):
            sidecar.hub.describe(BILLING | {"lease_seconds": 7.0, "max_in_flight": 5})


async def test_with_deliveries_out_it_is_in_use() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        await pull(sidecar)
        with pytest.raises(SubscriptionConflict):
            sidecar.hub.describe(BILLING | {"max_in_flight": 5})


async def test_out_of_use_it_can_be_described_anew() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"), make("2"))
        (one,) = await sidecar.hub.pull(sidecar.hub.describe(BILLING), 1, 5.0)
        sidecar.settle(one.token)
        other = sidecar.hub.describe(BILLING | {"max_in_flight": 5})
        rest = await sidecar.hub.pull(other, 5, 5.0)

    assert ids(rest) == ["2"]
    assert sidecar.hub.get("billing") is other


async def test_it_can_be_described_anew_before_anything_runs() -> None:
    sidecar = Sidecar(memory())
    first = sidecar.hub.describe(BILLING)

    assert sidecar.hub.describe(BILLING | {"max_in_flight": 5}) is not first


async def test_a_declared_subscription_is_never_described_otherwise() -> None:
    async with running() as sidecar:
        declared = sidecar.hub.declare(Settings(name="billing", topic="orders.>"))
        with pytest.raises(SubscriptionConflict):
            sidecar.hub.describe(BILLING | {"max_in_flight": 5})

        assert sidecar.hub.describe(BILLING) is declared


@pytest.mark.parametrize(
    ("described", "error", "says"),
    [
        ({"name": "a b"}, InvalidRequest, "name"),
        ({"lease_seconds": 0.0, "max_in_flight": 0}, InvalidRequest, "lease_seconds.*; |max_in"),
        ({"broker": "nobody"}, InvalidRequest, "no broker 'nobody'"),
        ({"dead_letter": {"broker": "nobody"}}, InvalidRequest, "no broker 'nobody'"),
        ({"unknown": 1}, InvalidRequest, "unknown"),
    ],
)
async def test_a_bad_description_says_what_is_wrong(
    described: dict[str, Any], error: type[Exception], says: str
) -> None:
    async with running() as sidecar:
        with pytest.raises(error, match=says):
            sidecar.hub.describe(BILLING | described)

        assert sidecar.hub.all() == []


@pytest.mark.parametrize(
    ("topic", "template", "broker"),
    [
        ("orders.new", "{topic}", None),
        ("orders.>", "{topic}", None),
        ("orders.>", "orders.dead", "memory"),
        (">", "dlq.{topic}", None),
    ],
)
async def test_dead_letters_cannot_come_back_to_their_subscription(
    topic: str, template: str, broker: str | None
) -> None:
    """Each would be delivered, fail, and be stored again."""
    where = {"topic": template, "broker": broker}
    async with running() as sidecar:
        with pytest.raises(InvalidRequest, match="gets its own dead letters"):
            sidecar.hub.describe(BILLING | {"topic": topic, "dead_letter": where})

        assert sidecar.hub.all() == []


async def test_on_another_broker_dead_letters_may_have_the_topic_of_the_events() -> None:
    where = {"topic": "{topic}", "broker": "letters"}
    async with running(memory("work"), memory("letters")) as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(sidecar.subscription(dead_letter=where))
        app.reject(await app.one())
        (letter,) = await stored(sidecar.brokers["letters"], "orders.new", 1)

    assert letter.event is not None
    assert letter.event.id == "1"


async def test_a_subscription_without_a_route_says_so() -> None:
    sidecar = Sidecar(memory())
    sidecar.publisher.routes.routes = ()
    with pytest.raises(NoRoute):
        sidecar.hub.describe(BILLING)


async def test_a_declared_subscription_is_known_to_its_broker_before_anybody_consumes() -> None:
    """It gets what is published from then on, though it starts at the latest."""
    sidecar = Sidecar(memory())
    declared = sidecar.hub.declare(Settings(name="billing", topic="orders.>", start="latest"))
    hub = asyncio.create_task(sidecar.hub.run())
    await until(lambda: declared.detail == "")
    await sidecar.publish("orders.new", make("1"))
    delivery = await sidecar.app(declared).one()
    await sidecar.hub.drain(0)
    await hub

    assert delivery.event.id == "1"


# -- described subscriptions that nobody uses


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(Sidecar):
    """A sidecar whose hub has a clock of its own."""

    def __init__(self, *brokers: Broker) -> None:
        super().__init__(*brokers)
        self.clock = Clock()
        self.hub = Hub(self.brokers, self.publisher, facts=self.heard, clock=self.clock)

    def names_after(self, seconds: float) -> list[str]:
        """The subscriptions that are left when so much time has passed, and it was swept."""
        self.clock.now += seconds
        self.hub.sweep()
        return [s.settings.name for s in self.hub.all()]


@contextlib.asynccontextmanager
async def timed() -> AsyncIterator[Timed]:
    sidecar = Timed(memory())
    hub = asyncio.create_task(sidecar.hub.run())
    await asyncio.sleep(0)
    try:
        yield sidecar
    finally:
        await sidecar.hub.drain(0)
        await hub


async def test_a_described_subscription_that_nobody_uses_is_dropped_after_a_while() -> None:
    """A declared one stays, and so does a name that was asked for in between."""
    async with timed() as sidecar:
        sidecar.hub.declare(Settings(name="declared", topic="orders.>"))
        for name in ("unused", "asked-for"):
            sidecar.subscription(name)
        early = sidecar.names_after(DESCRIBED_IDLE_SECONDS - 1)
        sidecar.hub.get("asked-for")
        late = sidecar.names_after(1)
        with pytest.raises(SubscriptionMissing):
            sidecar.hub.get("unused")

    assert early == ["declared", "unused", "asked-for"]
    assert late == ["declared", "asked-for"]


async def test_what_is_consumed_or_paused_or_has_deliveries_out_is_never_dropped() -> None:
    async with timed() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        sidecar.app(sidecar.subscription("consumed"))
        sidecar.subscription("paused").pause()
        (out,) = await sidecar.hub.pull(sidecar.subscription("pulled"), 1, 5.0)
        kept = sidecar.names_after(DESCRIBED_IDLE_SECONDS)
        settled = sidecar.settle(out.token)
        kept_on = sidecar.names_after(DESCRIBED_IDLE_SECONDS - 1)
        left = sidecar.names_after(1)

    assert kept == kept_on == ["consumed", "paused", "pulled"]
    assert settled is None
    assert left == ["consumed", "paused"]


async def test_dropped_and_described_again_it_goes_on_where_it_was() -> None:
    """What the broker keeps of it is durable. Tokens of before are over."""
    async with timed() as sidecar:
        await sidecar.publish("orders.new", make("1"), make("2"))
        (one,) = await sidecar.hub.pull(sidecar.subscription(), 1, 5.0)
        sidecar.settle(one.token)
        await until(lambda: not len(sidecar.subscription().window), what="at rest")
        dropped = sidecar.names_after(DESCRIBED_IDLE_SECONDS)
        gone = sidecar.settle(one.token)
        rest = await sidecar.hub.pull(sidecar.subscription(), 5, 5.0)
        void = sidecar.settle(one.token)

    assert dropped == []
    assert ids(rest) == ["2"]
    assert isinstance(gone, BadToken)
    assert isinstance(void, BadToken)


async def test_who_found_it_before_it_was_dropped_cannot_consume_from_it() -> None:
    """It runs no more: such a consumer would wait for ever."""
    async with timed() as sidecar:
        found = sidecar.subscription()
        sidecar.names_after(DESCRIBED_IDLE_SECONDS)
        with pytest.raises(Draining):
            sidecar.app(found)

        assert sidecar.app(sidecar.subscription()).why is None


async def test_when_there_is_no_room_the_unused_go_early_and_the_used_stay() -> None:
    async with timed() as sidecar:
        used = sidecar.app(sidecar.subscription("used"))
        for number in range(MAX_DESCRIBED - 1):
            sidecar.subscription(f"once-{number}")
        with pytest.raises(InvalidRequest, match="described 1000 subscriptions, and all are in"):
            sidecar.subscription("one-more")
        sidecar.clock.now += CROWDED_IDLE_SECONDS
        sidecar.subscription("one-more")
        names = [s.settings.name for s in sidecar.hub.all()]

    assert names == ["used", "one-more"]
    assert isinstance(used.why, Draining)


# -- several sidecars


async def test_sidecars_share_a_subscription_and_none_gets_what_another_has() -> None:
    broker = memory()
    async with running(broker) as one, running(broker) as other:
        apps = [
            one.app(one.subscription(max_in_flight=4)),
            other.app(other.subscription(max_in_flight=4)),
        ]
        await one.publish("orders.new", *(make(i) for i in numbers(0, 40)))
        taken: list[Delivery] = []
        while len(taken) < 40:
            await until(lambda: any(app.waiting for app in apps))
            for app in apps:
                batch = await app.take(len(app.waiting))
                app.ack(*batch)
                taken += batch

    assert sorted(ids(taken), key=int) == numbers(0, 40)
    assert min(app.given for app in apps) >= 4


async def test_a_sidecar_that_nobody_consumes_from_gives_back_what_it_holds() -> None:
    broker = memory()
    async with running(broker) as idle, running(broker) as busy:
        await idle.publish("orders.new", *(make(i) for i in numbers(0, 5)))
        leaver = idle.app(credit=1)
        leaver.ack(await leaver.one())
        leaver.leave()
        taken = await busy.app().take(4)

    assert ids(taken) == numbers(1, 5)
    assert len(idle.subscription().window) == 0


async def test_what_was_given_back_untouched_is_no_attempt_when_it_comes_again() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"), make("2"))
        leaver = sidecar.app(credit=1)
        leaver.ack(await leaver.one())
        leaver.leave()
        window = leaver.subscription.window
        await until(lambda: not len(window), seconds=4)
        again = await sidecar.app().one()

    assert (again.event.id, again.attempt) == ("2", 1)


async def test_the_wait_for_a_retry_goes_on_when_an_event_given_back_comes_again() -> None:
    async with running() as sidecar:
        events = [make("1", key="a"), make("2", key="a"), make("3", key="b")]
        await sidecar.publish("orders.new", *events)
        leaver = sidecar.app(credit=1)
        clock = asyncio.get_running_loop().time
        leaver.nack(await leaver.one(), delay=1.5)
        started = clock()
        leaver.leave()
        window = leaver.subscription.window
        await until(lambda: not len(window), what="at rest")
        app = sidecar.app()
        had = []
        for _ in range(3):
            had.append(await app.one())
            app.ack(had[-1])
        waited = clock() - started

    assert [(d.event.id, d.attempt) for d in had] == [("3", 1), ("1", 2), ("2", 1)]
    assert waited >= 1.49


async def test_an_idle_sidecar_does_not_keep_what_cannot_be_a_dead_letter() -> None:
    work, letters = memory("work"), Moody("letters", Memory(type="memory"))
    where = {"broker": "letters"}
    letters.refuses = True
    async with running(work, letters) as idle, running(work, letters) as busy:
        await idle.publish("orders.new", make("1", key="k"), make("2", key="k"))
        leaver = idle.app(idle.subscription(dead_letter=where))
        leaver.reject(await leaver.one())
        leaver.leave()
        app = busy.app(busy.subscription(dead_letter=where))
        taken = []
        for _ in range(2):
            taken.append(await app.one())
            app.ack(taken[-1])

    assert ids(taken) == ["1", "2"]


async def test_a_paused_sidecar_gives_back_what_it_holds() -> None:
    broker = memory()
    async with running(broker) as paused, running(broker) as busy:
        app = paused.app(credit=1)
        await paused.publish("orders.new", make("1"), make("2"), make("3"))
        out = await app.one()
        app.subscription.pause()
        app.ack(out)
        app.subscription.credit(app, 10)
        taken = await busy.app().take(2)

    assert ids(taken) == ["2", "3"]
    assert app.given == 1


# -- drain


async def test_a_drain_gives_back_what_waits_at_once_and_lets_the_rest_be_settled() -> None:
    broker = memory()
    async with running(broker) as leaving, running(broker) as staying:
        await leaving.publish("orders.new", *(make(i) for i in numbers(0, 3)))
        app = leaving.app(credit=2)
        acked, left = await app.take(2)
        draining = asyncio.create_task(leaving.hub.drain(0.3))
        waiting = await staying.app(credit=1).one()
        app.ack(acked)
        unsettled = await draining
        after = await staying.app().one()

    assert waiting.event.id == "2"
    assert unsettled == 1
    assert after.event.id == left.event.id
    assert leaving.heard.results == {"ack": 1, "released": 1}
    assert isinstance(app.why, Draining)


async def test_a_drain_ends_as_soon_as_everything_is_settled() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"), make("2"))
        app = sidecar.app()
        one, two = await app.take(2)
        draining = asyncio.create_task(sidecar.hub.drain(60))
        await until(lambda: sidecar.hub.draining)
        app.ack(one)
        app.nack(two, delay=60.0)

        assert await draining == 0


async def test_a_drain_does_not_wait_for_an_app_that_is_gone() -> None:
    """A lease that ends during the drain is noticed."""
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(sidecar.subscription(lease_seconds=0.1))
        await app.one()

        assert await sidecar.hub.drain(60) == 0
    assert sidecar.heard.results == {"expired": 1}


async def test_a_drain_waits_for_a_dead_letter_that_is_being_stored() -> None:
    """Else the event would be delivered once more than max_attempts, elsewhere."""
    work, letters = memory("work"), Slow("letters", Memory(type="memory"))
    where = {"broker": "letters"}
    async with running(work, letters) as leaving, running(work, letters) as staying:
        await leaving.publish("orders.new", make("1"))
        app = leaving.app(leaving.subscription(dead_letter=where))
        app.reject(await app.one())
        await until(lambda: letters.tries == 1)
        draining = asyncio.create_task(leaving.hub.drain(60))
        other = staying.app(staying.subscription(dead_letter=where))
        await staying.publish("orders.new", make("2"))
        next_one = await other.one()
        drained_early = draining.done()
        letters.may_answer.set()
        await draining

    assert not drained_early
    assert next_one.event.id == "2"
    assert other.given == 1
    assert len(leaving.heard.dead) == 1


async def test_a_drain_leaves_with_the_broker_what_cannot_be_a_dead_letter_now() -> None:
    work, letters = memory("work"), Moody("letters", Memory(type="memory"))
    where = {"broker": "letters"}
    letters.refuses = True
    async with running(work, letters) as leaving, running(work, letters) as staying:
        await leaving.publish("orders.new", make("1"))
        app = leaving.app(leaving.subscription(dead_letter=where))
        app.reject(await app.one())
        await until(lambda: letters.tries >= 1)
        out = await leaving.hub.drain(60)
        again = await staying.app(staying.subscription(dead_letter=where)).one()

    assert out == 0
    assert again.event.id == "1"


async def test_a_waiting_pull_ends_when_the_drain_begins() -> None:
    """However long it would wait, and whatever others still have to settle."""
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(credit=1)
        delivery = await app.one()
        pulling = asyncio.create_task(pull(sidecar, wait=300.0))
        await until(lambda: len(app.subscription.consumers) == 2)
        draining = asyncio.create_task(sidecar.hub.drain(60))
        with pytest.raises(Draining):
            await pulling
        app.ack(delivery)

        assert await draining == 0


async def test_while_draining_nothing_new_begins() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(credit=1)
        delivery = await app.one()
        draining = asyncio.create_task(sidecar.hub.drain(60))
        await until(lambda: sidecar.hub.draining)
        with pytest.raises(Draining):
            sidecar.app(app.subscription)
        with pytest.raises(Draining):
            await pull(sidecar)
        with pytest.raises(Draining):
            sidecar.hub.describe({"name": "other", "topic": "orders.>"})
        await sidecar.publish("orders.new", make("2"))
        sidecar.subscription().credit(app, 10)
        app.ack(delivery)
        await draining

    assert app.given == 1


async def test_after_the_drain_tokens_are_void() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app()
        delivery = await app.one()
        await sidecar.hub.drain(0)
        error = app.settle(delivery.token, Verdict.ACK)

    assert isinstance(error, AlreadySettled)


async def test_a_drain_does_not_wait_for_a_broker_that_is_away() -> None:
    sidecar = Sidecar(Away("memory", Memory(type="memory")))
    hub = asyncio.create_task(sidecar.hub.run())
    app = sidecar.app()
    await until(lambda: "not today" in app.subscription.detail)
    async with asyncio.timeout(1):
        await sidecar.hub.drain(60)
        await hub

    assert isinstance(app.why, Draining)
