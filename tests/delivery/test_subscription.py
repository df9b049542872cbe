"""What an app sees of a subscription: deliveries, settling, leases, attempts, dead letters."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from sidecar.broker import Start
from sidecar.config import Memory
from sidecar.errors import AlreadySettled, BadToken, LeaseExpired
from sidecar.event import Position, Verdict
from sidecar.wire.timestamps import now_ns, parse_rfc3339
from tests.delivery.stage import (
    AT_ONCE,
    App,
    Garbling,
    Moody,
    Parting,
    Small,
    ids,
    memory,
    numbers,
    running,
    stored,
)
from tests.delivery.stage import event as make
from tests.support.waiting import until

MEMORY = Memory(type="memory")


# -- settling


async def test_what_is_acked_does_not_come_again() -> None:
    broker = memory()
    async with running(broker) as first:
        await first.publish("orders.new", *(make(i) for i in numbers(0, 3)))
        app = first.app()
        taken = await app.take(3)
        app.ack(taken[0], taken[2])
    async with running(broker) as second:
        left = await second.app().one()

    assert ids(taken) == numbers(0, 3)
    assert left.event.id == "1"
    assert first.heard.results == {"ack": 2, "released": 1}


async def test_a_delivery_says_what_it_delivers() -> None:
    async with running() as sidecar:
        event = make("7", key="k", data=b"\xff\x00", headers={"traceparent": "00-1"})
        await sidecar.publish("orders.new", event)
        delivery = await sidecar.app().one()

    assert delivery.event == event
    assert delivery.topic == "orders.new"
    assert delivery.attempt == 1
    assert delivery.position == Position("memory", 1)


async def test_a_nack_brings_the_event_again_after_its_delay() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app()
        clock = asyncio.get_running_loop().time
        app.nack(await app.one(), delay=0.15)
        started = clock()
        again = await app.one()
        waited = clock() - started

    assert again.attempt == 2
    assert 0.14 < waited < 2
    assert sidecar.heard.results["nack"] == 1


async def test_a_nack_without_a_delay_waits_as_the_policy_says() -> None:
    policy = {"initial_seconds": 0.05, "max_seconds": 1.0, "multiplier": 3, "jitter": 0.0}
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(sidecar.subscription(retry=policy))
        clock = asyncio.get_running_loop().time
        waits = []
        for _ in range(2):
            app.nack(await app.one(), delay=None)
            started = clock()
            app.waiting = await app.take(1)
            waits.append(clock() - started)

    assert waits[0] >= 0.045
    assert waits[1] >= 0.145


async def test_an_uncounted_nack_is_no_attempt() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(sidecar.subscription(retry={"max_attempts": 1, **AT_ONCE}))
        attempts = []
        for _ in range(5):
            delivery = await app.one()
            attempts.append(delivery.attempt)
            app.nack(delivery, uncounted=True)

    assert attempts == [1] * 5
    assert sidecar.heard.dead == []


async def test_a_rejected_event_is_a_dead_letter_at_once() -> None:
    broker = memory()
    async with running(broker) as sidecar:
        await sidecar.publish("orders.new", make("1", data=b"{"))
        app = sidecar.app()
        app.reject(await app.one(), reason="no such\ncustomer: M\u00fcller")
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    assert letter.event is not None
    assert letter.event.data == b"{"
    assert letter.event.headers["sidecar-dead-letter-reason"] == "rejected"
    assert letter.event.headers["sidecar-dead-letter-error"] == r"no such customer: M\xfcller"
    assert sidecar.heard.results["reject"] == 1


async def test_extending_keeps_a_delivery_beyond_its_lease() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(sidecar.subscription(lease_seconds=0.1, retry=AT_ONCE))
        clock = asyncio.get_running_loop().time
        started = clock()
        delivery = await app.one()
        assert app.settle(delivery.token, Verdict.EXTEND, delay=0.3) is None
        again = await app.one()
        waited = clock() - started
        assert app.settle(again.token, Verdict.EXTEND) is None
        app.ack(again)

    assert again.attempt == 2
    assert waited >= 0.29


async def test_a_lease_that_ends_is_a_failed_attempt_and_settling_is_too_late() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(sidecar.subscription(lease_seconds=0.1, retry=AT_ONCE))
        first = await app.one()
        second = await app.one()
        late = app.settle(first.token, Verdict.ACK)
        app.ack(second)

    assert (first.attempt, second.attempt) == (1, 2)
    assert isinstance(late, LeaseExpired)
    assert sidecar.heard.results == {"expired": 1, "ack": 1}


@pytest.mark.parametrize("verdict", Verdict)
async def test_settling_twice_is_told(verdict: Verdict) -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app()
        delivery = await app.one()
        app.ack(delivery)
        error = app.settle(delivery.token, verdict)

    assert isinstance(error, AlreadySettled)


@pytest.mark.parametrize(
    "token", ["", ".", "billing", "billing.", "nobody.0a1b.1", "billing.0a1b2c3d.1", "\0" * 10_000]
)
async def test_what_is_no_token_is_told_through_every_door(token: str) -> None:
    async with running() as sidecar:
        app = sidecar.app()
        by_stream, by_call = app.settle(token, Verdict.ACK), sidecar.settle(token)

    assert isinstance(by_stream, BadToken)
    assert isinstance(by_call, BadToken)
    assert len(by_call.metadata["token"]) <= 100


async def test_a_stream_settles_only_what_is_of_its_subscription() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        billing = sidecar.app(sidecar.subscription("billing"))
        mailing = sidecar.app(sidecar.subscription("mailing"))
        delivery = await billing.one()
        refused = mailing.settle(delivery.token, Verdict.ACK)
        by_call = sidecar.settle(delivery.token)

    assert isinstance(refused, BadToken)
    assert by_call is None


async def test_each_settlement_of_a_call_is_answered_in_its_place() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"), make("2"))
        app = sidecar.app()
        one, two = await app.take(2)
        errors = [sidecar.settle(token) for token in (one.token, "x", one.token, two.token)]

    assert [type(error) for error in errors] == [type(None), BadToken, AlreadySettled, type(None)]


# -- attempts and dead letters


def _fail_by(how: str, app: App, token: str) -> None:
    if how == "nack":
        app.settle(token, Verdict.NACK, delay=0.0, reason="no money")
    elif how == "crash":
        app.leave(clean=False)
        app.subscription.attach(app)


@pytest.mark.parametrize(
    ("how", "reason", "error"),
    [
        ("nack", "attempts_exhausted", "no money"),
        ("lease", "lease_expired", "the lease ended unsettled"),
        ("crash", "app_crash", "the consumer's stream broke"),
    ],
)
async def test_max_attempts_are_exact_and_then_there_is_one_dead_letter(
    how: str, reason: str, error: str
) -> None:
    broker = memory()
    policy = {"max_attempts": 3, **AT_ONCE}
    before = now_ns()
    async with running(broker) as sidecar:
        await sidecar.publish("orders.new", make("1", key="k", data=b"data"), make("2", key="k"))
        app = sidecar.app(sidecar.subscription(lease_seconds=0.1, retry=policy))
        attempts = []
        for _ in range(3):
            delivery = await app.one()
            attempts.append((delivery.event.id, delivery.attempt))
            _fail_by(how, app, delivery.token)
        after = await app.one()
        app.ack(after)
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    assert attempts == [("1", 1), ("1", 2), ("1", 3)]
    assert (after.event.id, after.attempt) == ("2", 1)
    assert app.given == 4
    assert letter.event is not None
    assert (letter.event.id, letter.event.key, letter.event.data) == ("1", "k", b"data")
    headers = dict(letter.event.headers)
    first, last = (
        headers.pop("sidecar-dead-letter-first-failed"),
        headers.pop("sidecar-dead-letter-time"),
    )
    assert before <= parse_rfc3339(first) < parse_rfc3339(last) <= now_ns()
    assert headers == {
        "sidecar-dead-letter-generation": "1",
        "sidecar-dead-letter-reason": reason,
        "sidecar-dead-letter-error": error,
        "sidecar-dead-letter-topic": "orders.new",
        "sidecar-dead-letter-broker": "memory",
        "sidecar-dead-letter-subscription": "billing",
        "sidecar-dead-letter-attempts": "3",
        "sidecar-dead-letter-stream": "memory",
        "sidecar-dead-letter-sequence": "1",
    }
    assert [fact.reason for fact in sidecar.heard.dead] == [reason]


async def test_an_event_that_fails_for_too_long_is_a_dead_letter_before_its_attempts_are_used() -> (
    None
):
    policy = {"max_attempts": 1000, "total_seconds": 0.2, **AT_ONCE}
    broker = memory()
    async with running(broker) as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(sidecar.subscription(retry=policy))
        while not sidecar.heard.dead:
            if app.waiting:
                app.nack(await app.one(), delay=0.05)
            await asyncio.sleep(0.005)
        await stored(broker, "dlq.orders.new", 1)

    assert 3 <= app.given <= 6


async def test_dead_letters_go_where_the_subscription_says() -> None:
    work, letters = memory("work"), memory("letters")
    async with running(work, letters) as sidecar:
        await sidecar.publish("orders.new", make("1"))
        where = {"broker": "letters", "topic": "graveyard.{topic}"}
        app = sidecar.app(sidecar.subscription(dead_letter=where))
        app.reject(await app.one())

        assert len(await stored(letters, "graveyard.orders.new", 1)) == 1
    assert sidecar.heard.answered[-1].topic == "graveyard.{topic}"


async def test_the_event_stays_while_its_dead_letter_cannot_be_stored() -> None:
    """Its key waits, others go on, and it is stored once that is possible: once, then acked."""
    work, letters = memory("work"), Moody("letters", MEMORY)
    letters.refuses = True
    async with running(work, letters) as sidecar:
        events = [make("1", key="bad"), make("2", key="bad"), make("3", key="good")]
        await sidecar.publish("orders.new", *events)
        subscription = sidecar.subscription(dead_letter={"broker": "letters"})
        app = sidecar.app(subscription)
        bad, good = await app.take(2)
        app.reject(bad)
        app.ack(good)
        await until(lambda: letters.tries >= 2)
        held, said = list(app.waiting), subscription.detail
        letters.refuses = False
        after = await app.one()
        app.ack(after)
        await stored(letters, "dlq.orders.new", 1)

    assert (bad.event.id, good.event.id) == ("1", "3")
    assert held == []
    assert "a dead letter cannot be stored" in said
    assert "not today" in said
    assert after.event.id == "2"
    assert subscription.detail == ""
    assert len(sidecar.heard.dead) == 1


async def test_what_could_not_be_stored_is_not_acked_either() -> None:
    work, letters = memory("work"), Moody("letters", MEMORY)
    letters.refuses = True
    async with running(work, letters) as first:
        await first.publish("orders.new", make("1"))
        app = first.app(first.subscription(dead_letter={"broker": "letters"}))
        app.reject(await app.one())
        await until(lambda: letters.tries >= 2)
    async with running(work, letters) as second:
        again = await second.app(second.subscription(dead_letter={"broker": "letters"})).one()

    assert again.event.id == "1"


async def test_what_is_no_event_is_a_dead_letter_with_its_bytes() -> None:
    broker = Garbling("memory", MEMORY)
    async with running(broker) as sidecar:
        await sidecar.publish(
            "orders.new", make("1"), make("2", type="garbage", data=b"\x00{\xff"), make("3")
        )
        app = sidecar.app()
        taken = await app.take(2)
        app.ack(*taken)
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    assert ids(taken) == ["1", "3"]
    assert letter.event is not None
    assert letter.event.data == b"\x00{\xff"
    assert letter.event.headers["sidecar-dead-letter-reason"] == "undecodable"
    assert letter.event.headers["sidecar-dead-letter-error"] == "not an event: no id"
    assert letter.event.headers["sidecar-dead-letter-attempts"] == "0"


# -- consumers


async def test_what_is_no_event_and_too_large_for_one_is_kept_in_part_and_says_so() -> None:
    broker, small = Garbling("memory", Memory(type="memory")), Small("small", Memory(type="memory"))
    data = b"x" * (2 * 1024 * 1024)
    async with running(broker, small) as sidecar:
        await broker.publish("orders.new", [make("1", type="garbage", data=data)])
        sidecar.app(sidecar.subscription(dead_letter={"broker": "small"}))
        (letter,) = await stored(small, "dlq.orders.new", 1)

    assert letter.event is not None
    assert letter.event.data == data[: 512 * 1024]
    assert letter.event.headers["sidecar-dead-letter-cut-from-bytes"] == str(len(data))


async def test_what_a_clean_leaver_had_is_had_by_the_next_as_if_it_were_the_first() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", *(make(i) for i in numbers(0, 3)))
        leaver = sidecar.app()
        had = await leaver.take(3)
        leaver.leave()
        taken = await sidecar.app().take(3)
        late = leaver.settle(had[0].token, Verdict.ACK)

    assert [(d.event.id, d.attempt) for d in taken] == [("0", 1), ("1", 1), ("2", 1)]
    assert isinstance(late, AlreadySettled)
    assert leaver.given == 3


async def test_what_a_broken_consumer_had_was_an_attempt() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"), make("2"))
        broken = sidecar.app(sidecar.subscription(retry={"initial_seconds": 5.0}))
        broken.ack((await broken.take(2))[0])
        broken.leave(clean=False)
        again = await sidecar.app(broken.subscription).one()

    assert (again.event.id, again.attempt) == ("2", 2)


async def test_credit_is_never_exceeded() -> None:
    async with running() as sidecar:
        app = sidecar.app(credit=0, max_batch=4)
        await sidecar.publish("orders.new", *(make(i) for i in numbers(0, 50)))
        given = []
        for credit in (1, 3, 7, 0, 20):
            app.subscription.credit(app, credit)
            taken = await app.take(credit)
            given.append(app.given)
            app.ack(*taken)

    assert given == [1, 4, 11, 11, 31]
    assert app.given == 31
    assert max(app.batches) == 4
    assert app.credit == 0


async def test_consumers_share_a_subscription_by_their_credit() -> None:
    async with running() as sidecar:
        subscription = sidecar.subscription()
        some, more = App(subscription, credit=10), App(subscription, credit=30)
        subscription.attach(some)
        subscription.attach(more)
        await sidecar.publish("orders.new", *(make(i) for i in numbers(0, 50)))
        taken = [*await some.take(10), *await more.take(30)]
        rest = await sidecar.app(subscription).take(10)

    assert (some.given, more.given) == (10, 30)
    assert sorted(ids([*taken, *rest]), key=int) == numbers(0, 50)


async def test_a_burst_is_shared_evenly_among_those_who_have_credit_for_all_of_it() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", *(make(i) for i in numbers(0, 100)))
        subscription = sidecar.subscription()
        apps = [App(subscription), App(subscription)]
        for app in apps:
            subscription.attach(app)
        await until(lambda: sum(app.given for app in apps) == 100)

    assert [app.given for app in apps] == [50, 50]


async def test_none_of_two_hungry_consumers_starves() -> None:
    async with running() as sidecar:
        subscription = sidecar.subscription()
        apps = [App(subscription), App(subscription)]
        for app in apps:
            subscription.attach(app)
        for batch in range(20):
            await sidecar.publish(
                "orders.new", *(make(i) for i in numbers(10 * batch, 10 * batch + 10))
            )
        await until(lambda: sum(app.given for app in apps) == 200)

    assert min(app.given for app in apps) >= 50


async def test_no_more_than_max_in_flight_are_here() -> None:
    async with running() as sidecar:
        app = sidecar.app(sidecar.subscription(max_in_flight=8))
        await sidecar.publish("orders.new", *(make(i) for i in numbers(0, 20)))
        first = await app.take(8)
        here = len(app.subscription.window)
        app.ack(*first)
        second = await app.take(8)

    assert here == 8
    assert ids(second) == numbers(8, 16)
    assert app.given == 16


# -- order


async def test_a_failing_key_holds_back_only_itself() -> None:
    """Also when its backlog would fill the window several times over."""
    async with running() as sidecar:
        failing = [make(f"failing {n}", key="failing") for n in range(40)]
        others = [make(str(n), key=f"other {n % 5}") for n in range(40)]
        await sidecar.publish("orders.new", *failing, *others)
        app = sidecar.app(sidecar.subscription(max_in_flight=16))
        app.nack(await app.one(), delay=60.0)
        taken = []
        for _ in range(40):
            taken.append(await app.one())
            app.ack(taken[-1])

    assert sorted(ids(taken), key=int) == numbers(0, 40)


async def test_order_per_key_is_kept_through_whatever_the_app_answers() -> None:
    chance = random.Random(7)
    async with running() as sidecar:
        events = [make(str(n), key=f"key {chance.randrange(12)}") for n in range(300)]
        await sidecar.publish("orders.new", *events)
        policy = {"max_attempts": 1000, **AT_ONCE}
        app = sidecar.app(sidecar.subscription(max_in_flight=20, retry=policy))
        acked: list[Any] = []
        out: dict[str, str] = {}
        while len(acked) < 300:
            delivery = await app.one()
            assert delivery.event.key not in out.values()
            out[delivery.token] = delivery.event.key
            if chance.random() < 0.3:
                del out[delivery.token]
                app.nack(
                    delivery, delay=chance.choice([0.0, 0.002]), uncounted=chance.random() < 0.3
                )
            else:
                del out[delivery.token]
                app.ack(delivery)
                acked.append(delivery.event)
        window = app.subscription.window

    by_key = {key: [e.id for e in events if e.key == key] for key in {e.key for e in events}}
    assert by_key == {key: [e.id for e in acked if e.key == key] for key in by_key}
    assert (len(window), window.lanes, window.out) == (0, 0, 0)


async def test_without_ordering_a_key_is_worked_on_in_parallel() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1", key="k"), make("2", key="k"))
        taken = await sidecar.app(sidecar.subscription(ordering="none")).take(2)

    assert ids(taken) == ["1", "2"]


# -- what is wanted


async def test_only_the_asked_types_come_and_the_others_are_done_with() -> None:
    broker = memory()
    async with running(broker) as first:
        await first.publish(
            "orders.new",
            make("1", type="order.created"),
            make("2", type="stock.low"),
            make("3", type="order.paid.late"),
        )
        app = first.app(first.subscription(event_types=["order.>"]))
        taken = await app.take(2)
        app.ack(*taken)
    async with running(broker) as second:
        await second.publish("orders.new", make("4"))
        after = await second.app().one()

    assert ids(taken) == ["1", "3"]
    assert after.event.id == "4"


async def test_a_subscription_to_everything_does_not_get_its_own_dead_letters() -> None:
    broker = memory()
    async with running(broker) as sidecar:
        await sidecar.publish("orders.new", make("1"))
        app = sidecar.app(sidecar.subscription(topic=">"))
        app.reject(await app.one())
        await stored(broker, "dlq.orders.new", 1)
        await sidecar.publish("orders.new", make("2"))
        after = await app.one()

    assert after.event.id == "2"


async def test_start_latest_is_what_comes_from_now_on() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"))
        subscription = sidecar.subscription(start="latest")
        app = sidecar.app(subscription)
        await until(lambda: subscription.detail == "")
        await sidecar.publish("orders.new", make("2"))
        delivery = await app.one()

    assert delivery.event.id == "2"


# -- operators


async def test_a_paused_subscription_hands_nothing_over_until_it_is_resumed() -> None:
    async with running() as sidecar:
        app = sidecar.app()
        app.subscription.pause()
        await sidecar.publish("orders.new", make("1"))
        other = sidecar.app(sidecar.subscription("other"))
        await other.one()
        while_paused = app.given
        app.subscription.resume()
        delivery = await app.one()

    assert while_paused == 0
    assert (delivery.event.id, delivery.attempt) == ("1", 1)


async def test_what_is_out_can_be_settled_while_paused() -> None:
    broker = memory()
    async with running(broker) as sidecar:
        await sidecar.publish("orders.new", make("1"), make("2"))
        app = sidecar.app(credit=1)
        delivery = await app.one()
        app.subscription.pause()
        app.ack(delivery)
    async with running(broker) as other:
        left = await other.app().one()

    assert left.event.id == "2"


async def test_a_move_makes_deliveries_void_and_begins_anew() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", *(make(i) for i in numbers(0, 3)))
        app = sidecar.app()
        first, second, third = await app.take(3)
        app.ack(first)
        app.nack(second, delay=60.0)
        await app.subscription.seek(Start())
        void = app.settle(third.token, Verdict.ACK)
        again = await app.take(3)
        app.ack(*again)

    assert isinstance(void, AlreadySettled)
    assert [(d.event.id, d.attempt) for d in again] == [("0", 1), ("1", 1), ("2", 1)]


async def test_a_move_skips_what_it_passes_over() -> None:
    async with running() as sidecar:
        await sidecar.publish("orders.new", *(make(i) for i in numbers(0, 5)))
        app = sidecar.app(credit=1)
        await app.one()
        await app.subscription.seek(Start(position=Position("memory", 4)))
        app.subscription.credit(app, 10)
        rest = await app.take(2)

    assert ids(rest) == ["3", "4"]


async def test_a_move_while_nobody_consumes_brings_acked_events_again() -> None:
    """They are not taken for events whose ack was lost."""
    async with running() as sidecar:
        await sidecar.publish("orders.new", make("1"), make("2"))
        app = sidecar.app()
        app.ack(*await app.take(2))
        app.leave()
        await app.subscription.seek(Start())
        again = await sidecar.app(app.subscription).take(2)

    assert [(d.event.id, d.attempt) for d in again] == [("1", 1), ("2", 1)]


async def test_a_move_by_another_sidecar_while_nobody_consumes_here_is_no_lost_ack() -> None:
    broker = memory()
    async with running(broker) as one, running(broker) as other:
        await one.publish("orders.new", make("1"), make("2"))
        app = one.app()
        app.ack(*await app.take(2))
        app.leave()
        await until(lambda: not app.subscription.window.was_acked(1), what="at rest")
        await other.subscription().seek(Start())
        again = await one.app(app.subscription).take(2)

    assert ids(again) == ["1", "2"]


async def test_a_subscription_that_lost_its_source_subscribes_again() -> None:
    """Here because another sidecar moved it."""
    broker = memory()
    async with running(broker) as one, running(broker) as other:
        await one.publish("orders.new", make("1"), make("2"))
        app = one.app()
        first = await app.take(2)
        app.ack(first[0])
        await other.subscription().seek(Start())
        again = await app.take(2)

    assert ids(again) == ["1", "2"]


# -- events that are to be another sidecar's


async def test_what_is_to_leave_waits_for_the_app_to_settle_what_it_has() -> None:
    """An ack, a nack and a reject: each is an answer. What the app has not is not handed out."""
    broker = Parting("memory", Memory(type="memory"))
    async with running(broker) as sidecar:
        app = sidecar.app(credit=3)
        await sidecar.publish("orders.x", *(make(str(n)) for n in range(6)))
        first, second, third = await app.take(3)
        identities = [held.incoming.identity for held in app.subscription.window.held(1 << 60)]
        done = broker.source.on_leaving(identities)
        assert done is not None
        sidecar_has = len(app.subscription.window)
        app.subscription.credit(app, 100)
        app.ack(first)
        app.nack(second, 0.0)
        await asyncio.sleep(0.01)
        waited = not done.done()
        app.reject(third)
        async with asyncio.timeout(1):
            await done
        left = len(app.subscription.window)

    assert len(identities) == 6
    assert (sidecar_has, waited, left) == (3, True, 0)
    assert app.given == 3


async def test_what_is_to_leave_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.delivery.parting.PARTING_SECONDS", 0.05)
    broker = Parting("memory", Memory(type="memory"))
    async with running(broker) as sidecar:
        app = sidecar.app()
        await sidecar.publish("orders.x", make("1"))
        delivery = await app.one()
        (held,) = app.subscription.window.held(1 << 60)
        done = broker.source.on_leaving([held.incoming.identity])
        assert done is not None
        async with asyncio.timeout(5):
            await done
        broker.source.on_revoked([held.incoming.identity])
        late = app.settle(delivery.token, Verdict.ACK)

    assert isinstance(late, AlreadySettled)


async def test_nothing_waits_when_the_app_has_nothing() -> None:
    broker = Parting("memory", Memory(type="memory"))
    async with running(broker) as sidecar:
        app = sidecar.app(credit=0)
        await sidecar.publish("orders.x", make("1"))
        await until(lambda: len(app.subscription.window) == 1)
        (held,) = app.subscription.window.held(1 << 60)

        assert broker.source.on_leaving([held.incoming.identity]) is None
        assert len(app.subscription.window) == 0


async def test_a_retry_waits_until_the_broker_knows_of_the_failure() -> None:
    """Else the one who goes on after a crash would count one delivery less."""
    broker = Parting("memory", Memory(type="memory"))
    async with running(broker) as sidecar:
        app = sidecar.app()
        await sidecar.publish("orders.x", make("1"), make("2"))
        first, second = await app.take(2)
        recorded = broker.source.recorded = asyncio.get_running_loop().create_future()
        app.nack(first, 0.0)
        broker.source.recorded = None
        app.nack(second, 0.0)
        quick = await app.one()
        given = app.given
        recorded.set_result(None)
        slow = await app.one()

    assert (quick.event.id, quick.attempt) == ("2", 2)
    assert given == 3
    assert (slow.event.id, slow.attempt) == ("1", 2)
