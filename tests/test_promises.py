"""Promises that need the whole sidecar and a real JetStream: order, attempts, slow readers."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

import pytest

from sidecar.v1 import admin_pb2 as admin
from sidecar.v1 import pubsub_pb2 as pb
from tests.support.app import Client, patiently, spec_of
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ON_A_SERVER = """
drain = {{ timeout_seconds = 3 }}

[brokers.work]
type = "jetstream"
servers = ["{url}"]
auto_create_streams = true
ack_wait_seconds = 3
"""


@pytest.fixture
async def client(mine: SidecarProcess) -> AsyncIterator[Client]:
    async with Client(mine) as connected:
        yield connected


@pytest.fixture(scope="module")
def mine() -> Iterator[SidecarProcess]:
    with SidecarProcess() as running:
        yield running


@pytest.fixture
def topic() -> str:
    return f"t{uuid.uuid4().hex[:10]}.made"


async def test_order_and_attempts_hold_over_a_pause(
    client: Client, mine: SidecarProcess, topic: str
) -> None:
    """What was fetched goes back, and comes again in its order, as if it had never been here."""
    spec = spec_of(topic)
    await client.publish(topic, range(1))
    stream = await client.subscribe(spec, 1000)
    await stream.take(1)
    await client.admin("PauseSubscription", admin.PauseSubscriptionRequest(subscription=spec.name))
    await client.publish(topic, range(1, 30))
    await until(lambda: mine.metric("sidecar_lanes", subscription=spec.name) == 0)
    await asyncio.sleep(1.5)  # longer than a subscription at rest keeps what it has
    await client.admin(
        "ResumeSubscription", admin.ResumeSubscriptionRequest(subscription=spec.name)
    )
    seen = await stream.take(29)
    await stream.leave()

    assert seen == [(n, 1) for n in range(1, 30)]


async def test_order_and_attempts_hold_when_a_consumer_leaves_and_returns(
    client: Client, mine: SidecarProcess, topic: str
) -> None:
    spec = spec_of(topic)
    await client.publish(topic, range(1))
    stream = await client.subscribe(spec, 1000)
    await stream.take(1)
    await stream.leave()
    for number in range(1, 11):
        await client.publish(topic, range(number, number + 1))
        await asyncio.sleep(0.2)  # so that some come before, and some after, it is at rest
    stream = await client.subscribe(spec, 1000)
    seen = await stream.take(10)
    await stream.leave()

    assert seen == [(n, 1) for n in range(1, 11)]


@pytest.mark.timeout(90)
async def test_an_orderly_stop_counts_nothing_and_a_nack_is_not_forgotten(topic: str) -> None:
    """Delivered and released by two stops, then failed twice with a kill -9 in between."""
    with NatsServer() as server, SidecarProcess(ON_A_SERVER.format(url=server.url)) as sidecar:
        spec = spec_of(topic)
        spec.retry.max_attempts = 3
        spec.retry.initial.FromMilliseconds(1)
        async with Client(sidecar) as client:
            await client.publish(topic, range(1))
        attempts = []
        for end in (sidecar.restart, sidecar.restart):
            async with Client(sidecar) as client:
                [delivery] = await patiently(client, spec)
                attempts.append(delivery.attempt)
            await asyncio.to_thread(end)
        async with Client(sidecar) as client:
            [delivery] = await patiently(client, spec)
            attempts.append(delivery.attempt)
            await client.settle(delivery.token, pb.VERDICT_NACK)
            [delivery] = await patiently(client, spec)
            attempts.append(delivery.attempt)
        await asyncio.to_thread(sidecar.kill)
        await asyncio.to_thread(sidecar.start)
        async with Client(sidecar) as client:
            [delivery] = await patiently(client, spec)
            attempts.append(delivery.attempt)

    # The second attempt was interrupted by the kill, so it is had once more.
    assert attempts == [1, 1, 1, 2, 2]


async def test_a_consumer_that_does_not_read_costs_no_memory_and_few_attempts(
    client: Client, mine: SidecarProcess, topic: str
) -> None:
    """It has credit for all, and reads nothing: only what is under way to it runs out of its lease."""
    spec = spec_of(topic)
    spec.lease.FromMilliseconds(200)
    spec.retry.max_attempts = 2
    spec.retry.initial.FromMilliseconds(1)
    for first in range(0, 3000, 500):
        await client.publish(topic, range(first, first + 500), data=b"x" * 10_000)
    stream = await client.subscribe(spec, 4_000_000_000)
    await asyncio.sleep(3)
    dead = mine.metric("sidecar_dead_letters_total")
    stream.call.cancel()
    await stream.call.code()

    assert dead < 300


async def test_a_delivery_message_fits_what_grpc_clients_take(
    client: Client, mine: SidecarProcess, topic: str
) -> None:
    """100 events of 100 KB are 10 MB; a client takes 4 MiB in a message unless told otherwise."""
    spec = spec_of(topic, ordering=pb.ORDERING_NONE)
    await client.publish(topic, range(100), data=b"x" * 100_000)
    async with Client(mine, largest=4 * 1024 * 1024) as usual:
        stream = await usual.subscribe(spec, 100)
        seen = await stream.take(100)
        await stream.leave()

    assert sorted(seen) == [(n, 1) for n in range(100)]
