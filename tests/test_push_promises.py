"""Push by a whole sidecar on JetStream, to an app that is a real HTTP server."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from sidecar.v1 import admin_pb2 as admin
from sidecar.v1 import event_pb2 as ev
from tests.delivery.http_app import Answer, Got, HttpApp
from tests.support.app import Client
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOPIC = "orders.new"
MOST = 8
CONFIG = """
drain = {{ timeout_seconds = 15 }}

[[subscriptions]]
name = "billing"
topic = "orders.>"
retry = {{ max_attempts = {attempts}, initial_seconds = 0.05, max_seconds = 0.05 }}
push = {{ url = "{url}", max_concurrency = {most} }}
"""

ON_A_SERVER = """
[brokers.work]
type = "jetstream"
servers = ["{url}"]
auto_create_streams = true
"""

pytestmark = pytest.mark.timeout(120)


@asynccontextmanager
async def pushing(
    app: HttpApp, *, attempts: int = 5, broker: str = ""
) -> AsyncIterator[SidecarProcess]:
    """*broker*: configuration of one; without it the embedded one."""
    config = CONFIG.format(url=app.url, most=MOST, attempts=attempts)
    sidecar = SidecarProcess(config + broker)
    await asyncio.to_thread(sidecar.start)
    try:
        yield sidecar
    finally:
        await asyncio.to_thread(sidecar.close)


def event(name: str) -> ev.Event:
    return ev.Event(id=name, source="/shop", type="order.created")


async def publish(sidecar: SidecarProcess, *names: str) -> None:
    async with Client(sidecar) as client:
        await client.publish_events(TOPIC, [event(name) for name in names])


async def push_status(sidecar: SidecarProcess) -> admin.PushStatus:
    async with Client(sidecar) as client:
        (subscription,) = (await client.status()).subscriptions
        return subscription.push


async def delivered(sidecar: SidecarProcess, result: str) -> int:
    found = await asyncio.to_thread(
        sidecar.metric, "sidecar_delivered_events_total", subscription="billing", result=result
    )
    return int(found)


async def all_acked(sidecar: SidecarProcess, count: int) -> None:
    async def acked() -> bool:
        return await delivered(sidecar, "ack") == count

    await until(acked, seconds=40)


async def until_open(sidecar: SidecarProcess) -> None:
    async def is_open() -> bool:
        return (await push_status(sidecar)).circuit == admin.CIRCUIT_STATE_OPEN

    await until(is_open)


async def test_each_class_of_status_has_its_verdict() -> None:
    """The event's id is what the app answers, at first."""

    async def answer(got: Got) -> Answer:
        return Answer(int(got.id) if got.attempt == 1 else 204)

    good, again, hopeless = ("200", "204"), ("408", "425", "429", "500", "503"), ("301", "404")
    async with HttpApp(answer) as app, pushing(app) as sidecar:
        await publish(sidecar, *good, *again, *hopeless)
        await all_acked(sidecar, len(good) + len(again))

        async def buried() -> bool:
            dead = await asyncio.to_thread(sidecar.metric, "sidecar_dead_letters_total")
            return dead == len(hopeless)

        await until(buried)
        results = [await delivered(sidecar, result) for result in ("nack", "reject")]

    assert results == [len(again), len(hopeless)]
    attempts = Counter(got.id for got in app.got)
    assert attempts == {**dict.fromkeys((*good, *hopeless), 1), **dict.fromkeys(again, 2)}


async def test_a_503_with_retry_after_2_comes_again_after_2_seconds_as_attempt_2() -> None:
    async def answer(got: Got) -> Answer:
        return Answer(503, (("retry-after", "2"),)) if got.attempt == 1 else Answer()

    async with HttpApp(answer) as app, pushing(app) as sidecar:
        await publish(sidecar, "1")
        first, second = await app.take(2)
        await all_acked(sidecar, 1)

    assert (first.attempt, second.attempt) == (1, 2)
    assert 2.0 <= second.at - first.at < 4


async def test_an_app_that_is_away_for_seconds_misses_nothing_and_is_not_flooded() -> None:
    """Down from the start, while events are published; back, it is tried with one request."""
    release = asyncio.Event()

    async def answer(got: Got) -> Answer:
        await release.wait()
        await asyncio.sleep(0.005)
        return Answer()

    app = HttpApp(answer)
    app.reserve()
    names = [str(n) for n in range(400)]
    async with pushing(app, attempts=1) as sidecar:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for n in range(0, len(names), 50):
            await publish(sidecar, *names[n : n + 50])
            # It is published to while it is away; so much is all that is waited.
            await asyncio.sleep(max(0.0, began + (n + 50) / 100 - loop.time()))
        down = await push_status(sidecar)
        gauge_down = await asyncio.to_thread(sidecar.metric, "sidecar_push_circuit_open")
        await app.start()
        await app.take(1)
        trial = await push_status(sidecar)
        gauge_trial = await asyncio.to_thread(sidecar.metric, "sidecar_push_circuit_open")
        at_first = app.under_way
        release.set()
        await all_acked(sidecar, len(names))
        back = await push_status(sidecar)
        await app.stop()

    assert (down.circuit, trial.circuit, back.circuit) == (
        admin.CIRCUIT_STATE_OPEN,
        admin.CIRCUIT_STATE_HALF_OPEN,
        admin.CIRCUIT_STATE_CLOSED,
    )
    assert "refused" in down.detail.lower()
    assert (gauge_down, gauge_trial) == (1, 0)
    assert (at_first, trial.concurrency, trial.requests) == (1, 1, 1)
    assert app.most_under_way <= MOST
    assert Counter(got.attempt for got in app.got) == {1: len(names)}
    assert Counter(got.id for got in app.got) == dict.fromkeys(names, 1)


@pytest.mark.parametrize("ordering", ["key", "none"])
async def test_while_one_app_is_down_its_events_go_to_the_sidecar_whose_app_is_up(
    ordering: str,
) -> None:
    """Each sidecar pushes to the app beside it; only one of the two is there."""
    down = HttpApp()
    down.reserve()
    names = [str(n) for n in range(200)]
    with NatsServer() as server:
        broker = f'ordering = "{ordering}"\n' + ON_A_SERVER.format(url=server.url)
        async with HttpApp() as up, pushing(down, attempts=1, broker=broker) as first:
            await publish(first, *names[:100])
            # All of them are here, or at the broker, before there is another sidecar.
            await until_open(first)
            async with pushing(up, attempts=1, broker=broker) as second:
                await publish(first, *names[100:])
                await all_acked(second, len(names))

    assert Counter(got.id for got in up.got) == dict.fromkeys(names, 1)
    assert Counter(got.attempt for got in up.got) == {1: len(names)}


async def test_a_stop_finishes_the_requests_under_way_and_begins_none() -> None:
    """What the app was not asked yet comes after the restart, as its first attempt."""
    release = asyncio.Event()

    async def answer(_got: Got) -> Answer:
        await release.wait()
        return Answer()

    names = [str(n) for n in range(40)]
    with NatsServer() as server:
        broker = ON_A_SERVER.format(url=server.url)
        async with HttpApp(answer) as app, pushing(app, attempts=1, broker=broker) as sidecar:
            await publish(sidecar, *names)
            await app.take(4)
            stopping = asyncio.create_task(asyncio.to_thread(sidecar.stop))

            def is_draining() -> bool:
                return "draining" in sidecar.log

            await until(is_draining)
            before = len(app.got)
            release.set()
            status = await stopping
            during = len(app.got)
            await asyncio.to_thread(sidecar.start)
            await all_acked(sidecar, len(names) - during)

    assert (status, before, during) == (0, 4, 4)
    assert Counter(got.id for got in app.got) == dict.fromkeys(names, 1)
    assert Counter(got.attempt for got in app.got) == {1: len(names)}
