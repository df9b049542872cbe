"""Push: what the app gets by HTTP, and what follows from its answers. A real server, a memory broker."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.config import check
from sidecar.delivery.push.circuit import State
from sidecar.wire.cloudevents import Defaults, from_http
from tests.delivery.http_app import Answer, Got, HttpApp
from tests.delivery.stage import AT_ONCE, DEADLINE_SECONDS, memory, numbers, running, stored
from tests.delivery.stage import event as make
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from sidecar.delivery.push.pusher import Pusher
    from sidecar.delivery.subscription import Subscription
    from tests.delivery.stage import Sidecar

WHOLE = make(
    "1",
    source="/shop/ü",
    subject='order "9" 100%',
    key="customer 7",
    content_type="application/json",
    schema="https://schemas.test/order",
    extensions={"region": "eu", "note": "café"},
    headers={"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "host": "evil"},
    data=b'{"total": 1}',
    time_ns=1_700_000_000_000_000_000,
)


def pushing(
    sidecar: Sidecar, app: HttpApp, push: dict[str, Any] | None = None, **more: Any
) -> Subscription:
    """A declared subscription that pushes to *app*."""
    described = {"name": "billing", "topic": "orders.>", "push": {"url": app.url} | (push or {})}
    settings = check(
        {"brokers": {"memory": {"type": "memory"}}, "subscriptions": [described | more]}
    )
    subscription = sidecar.hub.declare(settings.subscriptions[0])
    sidecar.hub._start(subscription)
    return subscription


def pusher(sidecar: Sidecar) -> Pusher:
    found = sidecar.hub.pusher("billing")
    assert found is not None
    return found


async def all_done(sidecar: Sidecar, acked: int) -> None:
    await until(lambda: sidecar.heard.results["ack"] == acked)


# -- requests


async def test_an_event_comes_in_binary_mode_with_all_that_it_is() -> None:
    async with HttpApp() as app, running() as sidecar:
        pushing(sidecar, app, {"headers": {"Authorization": "Bearer t"}})
        await sidecar.publish("orders.new", WHOLE)
        (got,) = await app.take(1)
        await all_done(sidecar, 1)

    headers = {name.encode(): value.encode() for name, value in got.headers.items()}
    (event,) = from_http(headers.items(), got.body, Defaults(source="/s", type="t"))
    expected = {name: v for name, v in WHOLE.headers.items() if name != "host"}
    assert event == type(WHOLE)(
        **{f: getattr(WHOLE, f) for f in WHOLE.__struct_fields__} | {"headers": expected}
    )
    assert got.headers[":method"] == "POST"
    assert got.headers[":path"] == "/events"
    assert got.headers["content-type"] == "application/json"
    assert got.headers["host"].startswith("127.0.0.1:")
    assert got.headers["authorization"] == "Bearer t"
    assert got.headers["sidecar-subscription"] == "billing"
    assert got.headers["sidecar-topic"] == "orders.new"
    assert got.headers["sidecar-attempt"] == "1"
    assert sidecar.heard.results == {"ack": 1}
    assert sidecar.heard.pushes == {"ack": 1}


async def test_an_event_comes_in_structured_mode() -> None:
    async with HttpApp() as app, running() as sidecar:
        pushing(sidecar, app, {"content_mode": "structured"})
        await sidecar.publish("orders.new", WHOLE)
        (got,) = await app.take(1)

    assert got.headers["content-type"].startswith("application/cloudevents+json")
    assert got.headers["traceparent"] == WHOLE.headers["traceparent"]
    document = json.loads(got.body)
    assert (document["id"], document["note"], document["data"]) == ("1", "café", {"total": 1})
    assert document["partitionkey"] == "customer 7"


async def test_a_batch_is_one_request_and_its_answer_is_for_all_of_it() -> None:
    first = asyncio.Event()

    async def answer(_got: Got) -> Answer:
        await first.wait()
        return Answer(202)

    async with HttpApp(answer) as app, running() as sidecar:
        await sidecar.publish("orders.new", *[make(n) for n in numbers(0, 25)])
        pushing(sidecar, app, {"max_batch_events": 10})
        got = await app.take(3)
        first.set()
        await all_done(sidecar, 25)

    assert got[0].headers["content-type"].startswith("application/cloudevents-batch+json")
    batches = [[event["id"] for event in json.loads(one.body)] for one in got]
    assert batches == [numbers(0, 10), numbers(10, 20), numbers(20, 25)]
    assert sidecar.heard.results == {"ack": 25}


async def test_a_unix_socket_is_pushed_to(tmp_path: Path) -> None:
    async with HttpApp(path=tmp_path / "app.sock") as app, running() as sidecar:
        pushing(sidecar, app)
        await sidecar.publish("orders.new", *[make(n) for n in numbers(0, 10)])
        await all_done(sidecar, 10)

    assert [got.id for got in app.got] == numbers(0, 10)


# -- verdicts


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_2xx_acks(status: int) -> None:
    async with HttpApp(lambda _: _said(Answer(status))) as app, running() as sidecar:
        pushing(sidecar, app)
        await sidecar.publish("orders.new", make("1"))
        await app.take(1)
        await all_done(sidecar, 1)

    assert sidecar.heard.results == {"ack": 1}


@pytest.mark.parametrize("status", [408, 425, 429, 500, 501, 502, 503, 504, 599])
async def test_these_are_tried_again_and_counted(status: int) -> None:
    broker = memory()
    body = Answer(status, (("content-type", "text/plain"),), b"no money\nmore")
    async with HttpApp(lambda _: _said(body)) as app, running(broker) as sidecar:
        pushing(sidecar, app, retry={"max_attempts": 3, **AT_ONCE})
        await sidecar.publish("orders.new", make("1"))
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    assert [got.attempt for got in app.got] == [1, 2, 3]
    assert letter.event is not None
    assert letter.event.headers["sidecar-dead-letter-reason"] == "attempts_exhausted"
    assert letter.event.headers["sidecar-dead-letter-error"] == f"{status}: no money"


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404, 409, 413, 422])
async def test_these_are_hopeless(status: int) -> None:
    broker = memory()
    answer = Answer(status, (("location", "/elsewhere"),))
    async with HttpApp(lambda _: _said(answer)) as app, running(broker) as sidecar:
        pushing(sidecar, app)
        await sidecar.publish("orders.new", make("1"))
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    assert len(app.got) == 1
    assert letter.event is not None
    assert letter.event.headers["sidecar-dead-letter-reason"] == "rejected"
    assert letter.event.headers["sidecar-dead-letter-error"].startswith(f"{status}: ")


async def test_a_503_with_retry_after_2_waits_2_seconds() -> None:
    async def answer(got: Got) -> Answer:
        return Answer(503, (("retry-after", "2"),)) if got.attempt == 1 else Answer()

    async with HttpApp(answer) as app, running() as sidecar:
        pushing(sidecar, app)
        await sidecar.publish("orders.new", make("1"))
        first, second = await app.take(2)
        await all_done(sidecar, 1)

    assert (first.attempt, second.attempt) == (1, 2)
    assert 1.99 <= second.at - first.at < 3
    assert sidecar.heard.results == {"nack": 1, "ack": 1}


async def test_a_rule_sees_the_status() -> None:
    rules = [
        {"reason": "429", "action": "retry_uncounted", "delay_seconds": 0.0},
        {"reason": "5??", "action": "reject"},
    ]
    answers = iter([429, 429, 429, 500])

    async def answer(_got: Got) -> Answer:
        return Answer(next(answers))

    broker = memory()
    async with HttpApp(answer) as app, running(broker) as sidecar:
        pushing(sidecar, app, retry={"max_attempts": 2, "rules": rules})
        await sidecar.publish("orders.new", make("1"))
        await stored(broker, "dlq.orders.new", 1)

    assert [got.attempt for got in app.got] == [1, 1, 1, 1]
    assert [fact.reason for fact in sidecar.heard.dead] == ["rejected"]


async def test_an_app_that_does_not_answer_in_time_has_failed_once() -> None:
    never = asyncio.Event()

    async def answer(got: Got) -> Answer:
        if got.attempt == 1:
            await never.wait()
        return Answer()

    async with HttpApp(answer) as app, running() as sidecar:
        pushing(sidecar, app, {"timeout_seconds": 0.2}, retry=AT_ONCE)
        await sidecar.publish("orders.new", make("1"))
        await app.take(2)
        await all_done(sidecar, 1)
        never.set()

    assert [got.attempt for got in app.got] == [1, 2]
    assert sidecar.heard.results == {"nack": 1, "ack": 1}
    assert sidecar.heard.pushes == {"timeout": 1, "ack": 1}


async def test_an_answer_may_take_longer_than_the_lease_when_the_timeout_does() -> None:
    async def answer(_got: Got) -> Answer:
        await asyncio.sleep(0.5)
        return Answer()

    async with HttpApp(answer) as app, running() as sidecar:
        pushing(sidecar, app, {"timeout_seconds": 5}, lease_seconds=0.1)
        await sidecar.publish("orders.new", make("1"))
        await app.take(1)
        await all_done(sidecar, 1)

    assert sidecar.heard.results == {"ack": 1}


async def test_order_per_key_is_kept_and_keys_go_on_beside_each_other() -> None:
    async def answer(got: Got) -> Answer:
        fails = got.headers["ce-partitionkey"] == "bad" and got.attempt < 3
        return Answer(500 if fails else 204)

    async with HttpApp(answer) as app, running() as sidecar:
        keys = ["bad", "a", "b", "c"]
        events = [make(str(n), key=keys[n % 4]) for n in range(100)]
        pushing(sidecar, app, retry={"initial_seconds": 0.01, "max_seconds": 0.01})
        await sidecar.publish("orders.new", *events)
        await all_done(sidecar, 100)

    for key in keys:
        order = list(dict.fromkeys(g.id for g in app.got if g.headers["ce-partitionkey"] == key))
        assert order == [e.id for e in events if e.key == key]
    assert Counter(g.attempt for g in app.got) == {1: 100, 2: 25, 3: 25}


# -- how many at once


async def test_requests_under_way_begin_few_and_never_exceed_the_bound() -> None:
    async def answer(_got: Got) -> Answer:
        await asyncio.sleep(0.01)
        return Answer()

    async with HttpApp(answer) as app, running() as sidecar:
        await sidecar.publish("orders.new", *[make(n) for n in numbers(0, 500)])
        pushing(sidecar, app, {"max_concurrency": 16})
        await app.take(4)
        at_first = app.most_under_way
        await all_done(sidecar, 500)

    assert at_first <= 4
    assert app.most_under_way == 16


async def test_an_app_that_pushes_back_gets_fewer_at_once() -> None:
    """It takes two at once, and says 429 to more: it is found out, and little is refused."""

    async def answer(_got: Got) -> Answer:
        if app.under_way > 2:
            return Answer(429)
        await asyncio.sleep(0.005)
        return Answer()

    async with HttpApp(answer) as app, running() as sidecar:
        await sidecar.publish("orders.new", *[make(n) for n in numbers(0, 300)])
        retry = {"max_attempts": 1000, "initial_seconds": 0.02, "max_seconds": 0.02}
        pushing(sidecar, app, {"max_concurrency": 64}, retry=retry)
        await all_done(sidecar, 300)

    assert sidecar.heard.results["ack"] == 300
    assert sidecar.heard.results["nack"] < 300
    assert app.most_under_way < 20


# -- the app is down


async def test_an_app_that_is_down_costs_no_attempt_and_loses_nothing() -> None:
    app = HttpApp()
    app.reserve()
    async with running() as sidecar:
        await sidecar.publish("orders.new", *[make(n, key=n) for n in numbers(0, 50)])
        subscription = pushing(sidecar, app, retry={"max_attempts": 1})
        await until(lambda: pusher(sidecar).circuit.state is State.OPEN)
        detail = pusher(sidecar).circuit.detail
        await until(lambda: sidecar.heard.pushes["unreachable"] >= 2)
        consumers = len(subscription.consumers)
        await app.start()
        await all_done(sidecar, 50)
        await app.take(50)
        await app.stop()

    assert "refused" in detail.lower()
    assert consumers == 0  # so what is here goes back to the broker
    assert Counter(got.attempt for got in app.got) == {1: 50}
    assert Counter(got.id for got in app.got) == dict.fromkeys(numbers(0, 50), 1)
    assert sidecar.heard.dead == []


async def test_an_app_that_returns_is_tried_with_one_event_first() -> None:
    release = asyncio.Event()

    async def answer(_got: Got) -> Answer:
        await release.wait()
        return Answer()

    app = HttpApp(answer)
    app.reserve()
    async with running() as sidecar:
        await sidecar.publish("orders.new", *[make(n) for n in numbers(0, 50)])
        pushing(sidecar, app)
        await until(lambda: pusher(sidecar).circuit.state is State.OPEN)
        await app.start()
        await app.take(1)
        at_first = (app.under_way, pusher(sidecar).circuit.state, pusher(sidecar).concurrency)
        release.set()
        await all_done(sidecar, 50)
        closed = pusher(sidecar).circuit.state
        await app.stop()

    assert at_first == (1, State.HALF_OPEN, 1)
    assert closed is State.CLOSED


async def test_a_restart_between_requests_costs_no_attempt() -> None:
    async with HttpApp() as app, running() as sidecar:
        pushing(sidecar, app, retry={"max_attempts": 1})
        for round_ in range(3):
            events = [make(f"{round_}-{n}") for n in range(10)]
            await sidecar.publish("orders.new", *events)
            await all_done(sidecar, 10 * (round_ + 1))
            await app.stop()
            await app.start()

    assert Counter(got.attempt for got in app.got) == {1: 30}
    assert sidecar.heard.dead == []
    assert sidecar.heard.results["ack"] == 30


class Dying:
    """An app that closes the connection in place of an answer, as when its process ends."""

    def __init__(self, poison: bytes) -> None:
        self._poison = poison
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(head)
                if b"ce-id: " + self._poison in head:
                    break
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


async def test_a_connection_that_ends_without_an_answer_is_a_crash_of_the_app() -> None:
    broker = memory()
    app = Dying(b"poison")
    server = await asyncio.start_server(app.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, running(broker) as sidecar:
        described = {
            "name": "billing",
            "topic": "orders.>",
            "push": {"url": f"http://127.0.0.1:{port}/"},
            "retry": {"max_attempts": 9, **AT_ONCE},
        }
        settings = check({"brokers": {"m": {"type": "memory"}}, "subscriptions": [described]})
        subscription = sidecar.hub.declare(
            settings.subscriptions[0].model_copy(update={"broker": "memory"})
        )
        sidecar.hub._start(subscription)
        await sidecar.publish("orders.new", make("poison", key="k"), make("next", key="k"))
        await until(lambda: any(b"ce-id: next" in head for head in app.requests))
        await all_done(sidecar, 1)
        (letter,) = await stored(broker, "dlq.orders.new", 1)

    attempts = [h for h in app.requests if b"ce-id: poison" in h]
    assert [h.split(b"sidecar-attempt: ")[1][:1] for h in attempts] == [b"1", b"2", b"3"]
    assert letter.event is not None
    assert letter.event.headers["sidecar-dead-letter-reason"] == "app_crash"


# -- the end


async def test_a_drain_finishes_what_is_under_way_and_starts_nothing() -> None:
    release = asyncio.Event()

    async def answer(_got: Got) -> Answer:
        await release.wait()
        return Answer()

    broker = memory()
    async with HttpApp(answer) as app, running(broker) as sidecar:
        await sidecar.publish("orders.new", *[make(n) for n in numbers(0, 20)])
        pushing(sidecar, app)
        await app.take(4)
        draining = asyncio.create_task(sidecar.hub.drain(DEADLINE_SECONDS))
        await asyncio.sleep(0)
        release.set()
        left = await draining

    assert left == 0
    assert len(app.got) == 4
    assert sidecar.heard.results == {"ack": 4}


async def _said(answer: Answer) -> Answer:
    return answer
