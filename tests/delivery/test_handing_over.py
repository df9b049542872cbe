"""The last look before the app gets an event: crashes, filters, expiry, duplicates, bytes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.broker import Start
from sidecar.event import Verdict
from sidecar.wire.timestamps import format_rfc3339, now_ns
from tests.delivery.stage import AT_ONCE, App, ids, memory, numbers, running, stored
from tests.delivery.stage import event as make

if TYPE_CHECKING:
    from tests.delivery.stage import Sidecar

HOUR = 3600 * 1_000_000_000


def crash(app: App) -> App:
    """The app's stream breaks, and the app is back."""
    app.leave(clean=False)
    again = App(app.subscription)
    app.subscription.attach(again)
    return again


# -- crashes


async def test_an_event_that_crashes_the_app_three_times_is_a_dead_letter_and_its_key_goes_on() -> (
    None
):
    broker = memory()
    async with running(broker) as sidecar:
        await sidecar.publish("orders.new", make("poison", key="k"), make("next", key="k"))
        app = sidecar.app(sidecar.subscription(retry={"max_attempts": 9, **AT_ONCE}))
        attempts = []
        for _ in range(3):
            delivery = await app.one()
            attempts.append((delivery.event.id, delivery.attempt))
            app = crash(app)
        after = await app.one()
        app.ack(after)
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    assert attempts == [("poison", 1), ("poison", 2), ("poison", 3)]
    assert (after.event.id, after.attempt) == ("next", 1)
    assert letter.event is not None
    assert letter.event.id == "poison"
    assert letter.event.headers["sidecar-dead-letter-reason"] == "app_crash"
    assert letter.event.headers["sidecar-dead-letter-attempts"] == "3"


async def test_what_was_near_a_poison_event_is_not_taken_for_one() -> None:
    """Forty events in hand at each crash: only the one that does it ends as a dead letter."""
    broker = memory()
    events = [make(str(n), key=str(n)) for n in range(200)]
    done: list[str] = []
    crashes = 0
    async with running(broker) as sidecar:
        await sidecar.publish("orders.new", *events)
        subscription = sidecar.subscription(retry={"max_attempts": 9, **AT_ONCE})
        app = App(subscription, credit=40, max_batch=40)
        subscription.attach(app)
        while len(done) < 199 or crashes < 3:
            batch = [await app.one(), *app.waiting]
            app.waiting.clear()
            if any(delivery.event.id == "7" for delivery in batch):
                crashes += 1
                app.leave(clean=False)
                app = App(subscription, credit=40, max_batch=40)
                subscription.attach(app)
                continue
            app.ack(*batch)
            done += ids(batch)
            subscription.credit(app, len(batch))
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    assert crashes == 3
    assert sorted(done, key=int) == [n for n in numbers(0, 200) if n != "7"]
    assert letter.event is not None
    assert letter.event.id == "7"


async def test_suspects_are_handed_over_one_at_a_time_and_others_beside_them() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", *[make(n, key=n) for n in numbers(0, 3)])
        app = sidecar.app(sidecar.subscription(retry={"max_crashes": 2, **AT_ONCE}))
        await app.take(3)
        app = crash(app)
        first = await app.one()
        await sidecar.publish("orders.new", make("fresh", key="f"))
        fresh = await app.one()
        app.ack(first)
        second = await app.one()

    assert {first.event.id, second.event.id} < {"0", "1", "2"}
    assert (first.attempt, fresh.event.id, second.attempt) == (2, "fresh", 2)
    assert app.given == 3


async def test_after_one_crash_of_three_all_come_again_at_once() -> None:
    """As after a deployment that did not wait: to go on one by one would be slow, and for nothing."""
    async with running() as sidecar:
        await sidecar.publish("orders.new", *[make(n, key=n) for n in numbers(0, 50)])
        app = sidecar.app(sidecar.subscription(retry=AT_ONCE))
        await app.take(50)
        app = crash(app)
        again = await app.take(50)

    assert sorted(ids(again), key=int) == numbers(0, 50)
    assert {delivery.attempt for delivery in again} == {2}


async def test_what_did_not_reach_the_app_is_uncounted_and_first_again() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1", key="k"), make("2", key="k"))
        app = sidecar.app()
        delivery = await app.one()
        app.subscription.hand_back([delivery.token])
        again = await app.one()

    assert (again.event.id, again.attempt) == ("1", 1)
    assert sidecar.heard.results["released"] == 2  # this one, and at the end


# -- filters


async def test_what_is_filtered_out_is_acked_without_being_handed_over_and_counted() -> None:
    broker = memory()
    async with running(broker) as sidecar:
        wanted = [make(n, extensions={"region": "eu"}) for n in numbers(0, 3)]
        unwanted = [make(n, extensions={"region": "us"}) for n in numbers(3, 8)]
        await sidecar.publish("orders.new", *unwanted, *wanted)
        app = sidecar.app(
            sidecar.subscription(filters=[{"exact": {"region": "eu"}}, {"prefix": {"id": ""}}])
        )
        app.ack(*await app.take(3))
        assert app.subscription.window.out == 0
        again = await sidecar.hub.pull(app.subscription, 10, 0.0)

    assert sidecar.heard.skips == {"filtered": 5}
    assert app.given == 3
    assert not again


# -- expiry


def expiring(id: str, in_ns: int, **more: Any) -> Any:  # noqa: A002
    return make(id, extensions={"expirytime": format_rfc3339(now_ns() + in_ns)}, **more)


async def test_an_expired_event_is_a_dead_letter_that_was_never_handed_over() -> None:
    broker = memory()
    async with running(broker) as sidecar:
        await sidecar.publish(
            "orders.new", expiring("late", -1, key="k"), expiring("1", HOUR, key="k")
        )
        app = sidecar.app()
        delivery = await app.one()
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    assert (delivery.event.id, delivery.attempt, app.given) == ("1", 1, 1)
    assert letter.event is not None
    headers = letter.event.headers
    assert letter.event.id == "late"
    assert headers["sidecar-dead-letter-reason"] == "expired"
    assert headers["sidecar-dead-letter-attempts"] == "0"
    assert "sidecar-dead-letter-first-failed" not in headers


async def test_an_expired_event_is_dropped_where_that_is_asked_for_and_counted() -> None:
    broker = memory()
    async with running(broker) as sidecar:
        await sidecar.publish(
            "orders.new", expiring("late", -1), make("1", extensions={"expirytime": "soon"})
        )
        app = sidecar.app(sidecar.subscription(expired="drop"))
        delivery = await app.one()
        await stored(broker, "dlq.orders.new", 0)

    assert delivery.event.id == "1"
    assert sidecar.heard.skips == {"expired": 1}
    assert sidecar.heard.dead == []


async def test_an_event_that_expires_while_it_waits_for_its_retry_is_not_tried_again() -> None:
    broker = memory()
    async with running(broker) as sidecar:
        await sidecar.publish("orders.new", expiring("1", 150_000_000))
        app = sidecar.app()
        delivery = await app.one()
        app.nack(delivery, 0.2)
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    assert app.given == 1
    assert letter.event is not None
    assert letter.event.headers["sidecar-dead-letter-reason"] == "expired"
    assert letter.event.headers["sidecar-dead-letter-attempts"] == "1"


# -- duplicates


async def publish_copies(sidecar: Sidecar, *ids: str, key: str = "") -> None:
    """Each event twice, as when its publisher had no answer and the broker's window was over."""
    (broker,) = sidecar.brokers.values()
    for topic in ("orders.one", "orders.two"):
        broker_ids = [f"{topic} {one}" for one in ids]
        await broker.publish(topic, [make(one, key=key) for one in ids], broker_ids=broker_ids)


@pytest.mark.parametrize("key", ["", "k"])
@pytest.mark.parametrize("ordering", ["key", "none"])
async def test_an_acked_event_is_not_handed_over_again_within_the_window(
    key: str, ordering: str
) -> None:
    async with running() as sidecar:
        subscription = sidecar.subscription(ordering=ordering, duplicate_window_seconds=60)
        app = sidecar.app(subscription)
        await publish_copies(sidecar, "1", "2", key=key)
        for _ in range(2):
            app.ack(await app.one())
        await sidecar.publish("orders.new", make("last", key=key))
        last = await app.one()
        await asyncio.sleep(0)

    assert last.event.id == "last"
    assert app.given == 3
    assert sidecar.heard.skips == {"duplicate": 2}


async def test_a_copy_waits_until_it_is_known_what_became_of_the_first() -> None:
    """Acked: the copy is not handed over. Dead: the copy is an event of its own."""
    async with running() as sidecar:
        subscription = sidecar.subscription(ordering="none", duplicate_window_seconds=60)
        app = sidecar.app(subscription)
        await publish_copies(sidecar, "1", "2")
        first, second = await app.take(2)
        app.nack(first)
        again = await app.one()
        app.ack(again)
        app.reject(second)
        copy = await app.one()
        app.ack(copy)

    assert ids([first, second, again, copy]) == ["1", "2", "1", "2"]
    assert (again.attempt, copy.attempt) == (2, 1)
    assert again.topic == first.topic
    assert copy.topic != second.topic
    assert sidecar.heard.skips == {"duplicate": 1}


async def test_what_a_move_brings_again_is_meant() -> None:
    async with running() as sidecar:
        app = sidecar.app(sidecar.subscription(duplicate_window_seconds=60))
        await sidecar.publish("orders.new", make("1"))
        app.ack(await app.one())
        await app.subscription.seek(Start())
        again = await app.one()

    assert (again.event.id, again.attempt) == ("1", 1)
    assert sidecar.heard.skips == {}


async def test_without_a_window_every_copy_is_handed_over() -> None:
    async with running() as sidecar:
        app = sidecar.app()
        await publish_copies(sidecar, "1")
        app.ack(*await app.take(2))

    assert sidecar.heard.skips == {}


# -- rules


async def test_a_rule_rejects_what_the_app_calls_hopeless() -> None:
    broker = memory()
    rules = [{"reason": "BAD_*", "action": "reject"}]
    async with running(broker) as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(sidecar.subscription(retry={"rules": rules, **AT_ONCE}))
        delivery = await app.one()
        app.settle(delivery.token, Verdict.NACK, reason="BAD_DATA: no total")
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    assert letter.event is not None
    headers = letter.event.headers
    assert headers["sidecar-dead-letter-reason"] == "rejected"
    assert headers["sidecar-dead-letter-error"] == "BAD_DATA: no total"


async def test_a_rule_says_not_now_and_the_attempt_is_not_counted() -> None:
    rules = [{"reason": "RATE_LIMITED", "action": "retry_uncounted", "delay_seconds": 0.0}]
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(sidecar.subscription(retry={"max_attempts": 2, "rules": rules}))
        attempts = []
        for _ in range(5):
            delivery = await app.one()
            attempts.append(delivery.attempt)
            app.settle(delivery.token, Verdict.NACK, reason="RATE_LIMITED")

    assert attempts == [1, 1, 1, 1, 1]
    assert sidecar.heard.dead == []


# -- bytes


async def test_what_is_here_is_bounded_in_bytes_but_for_one_event() -> None:
    data = b"x" * 100_000
    async with running() as sidecar:
        await sidecar.publish("orders.new", *[make(n, data=data) for n in numbers(0, 30)])
        subscription = sidecar.subscription(max_in_flight_bytes=350_000)
        app = sidecar.app(subscription)
        done, most = 0, 0
        while done < 30:
            delivery = await app.one()
            most = max(most, subscription.window.bytes)
            app.ack(delivery)
            done += 1

    assert app.given == 30
    assert most <= 350_000 + 100_500


async def test_an_event_larger_than_the_bound_comes_alone() -> None:
    async with running() as sidecar:
        data = b"x" * 100_000
        await sidecar.publish("orders.new", *[make(n, data=data) for n in numbers(0, 5)])
        subscription = sidecar.subscription(max_in_flight_bytes=1024)
        app = sidecar.app(subscription)
        for number in range(5):
            delivery = await app.one()
            assert (delivery.event.id, len(subscription.window)) == (str(number), 1)
            app.ack(delivery)
