"""Pull and Settle at the doors of a running sidecar: tokens, callers that go, answers that are large."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.v1 import event_pb2 as ev
from sidecar.v1 import pubsub_pb2 as pb
from tests.support.app import Client, spec_of
from tests.support.http import HttpConnection
from tests.support.sidecar_process import SidecarProcess
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CONFIG = """
drain = { timeout_seconds = 3 }

[brokers.memory]
type = "memory"
"""

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def sidecar() -> Iterator[SidecarProcess]:
    with SidecarProcess(CONFIG) as process:
        yield process


@pytest.fixture
async def client(sidecar: SidecarProcess) -> AsyncIterator[Client]:
    async with Client(sidecar) as connected:
        yield connected


@asynccontextmanager
async def http(sidecar: SidecarProcess) -> AsyncIterator[HttpConnection]:
    reader, writer = await asyncio.open_unix_connection(sidecar.http_socket, limit=2**24)
    try:
        yield HttpConnection(reader, writer)
    finally:
        writer.close()


async def call(connection: HttpConnection, method: str, **request: object) -> Any:
    path = f"/sidecar.v1.PubSub/{method}"
    reply = await connection.ask("POST", path, json.dumps(request).encode(), JSON)
    assert reply.status == 200, reply.body
    return reply.json()


async def settle(connection: HttpConnection, *tokens: str) -> list[str]:
    """The reason why each ack did not count, or nothing."""
    settlements = [{"token": token, "verdict": "VERDICT_ACK"} for token in tokens]
    results = (await call(connection, "Settle", settlements=settlements))["results"]
    return [result.get("failure", {}).get("reason", "") for result in results]


def described(topic: str, **more: object) -> dict[str, object]:
    return {"name": topic.replace(".", "-"), "topic": topic, **more}


async def in_flight(client: Client, name: str) -> int:
    [found] = [s for s in (await client.status()).subscriptions if s.name == name]
    return found.in_flight_events


async def consumers(client: Client, name: str) -> int:
    """How many consume now."""
    found = [s.consumers for s in (await client.status()).subscriptions if s.name == name]
    return found[0] if found else 0


# -- tokens


async def test_a_token_survives_a_reconnect_of_its_caller(
    sidecar: SidecarProcess, client: Client
) -> None:
    """Pulled on one connection and settled on another, by HTTP and by gRPC."""
    await client.publish("reconnect.made", range(2))
    async with http(sidecar) as connection:
        spec = described("reconnect.made", ordering="ORDERING_NONE")
        pulled = await call(connection, "Pull", spec=spec, maxEvents=2, wait="10s")
        first, second = [delivery["token"] for delivery in pulled["deliveries"]]
    async with http(sidecar) as other:
        assert await settle(other, first) == [""]
    async with Client(sidecar) as other_client:
        await other_client.settle(second, pb.VERDICT_ACK)
    assert await in_flight(client, "reconnect-made") == 0


async def test_a_token_counts_once_whatever_door_it_comes_by(
    sidecar: SidecarProcess, client: Client
) -> None:
    await client.publish("twice.made", range(10, 11))
    [delivery] = await client.pull(spec_of("twice.made"), 1)
    async with http(sidecar) as connection:
        assert await settle(connection, delivery.token, delivery.token) == ["", "ALREADY_SETTLED"]
        assert await settle(connection, delivery.token) == ["ALREADY_SETTLED"]


async def test_a_token_of_another_sidecar_is_none_here(
    sidecar: SidecarProcess, client: Client
) -> None:
    """Also of a subscription that has the same name, and a delivery of the same number."""
    await client.publish("shared.made", range(20, 21))
    [ours] = await client.pull(spec_of("shared.made"), 1)
    with SidecarProcess(CONFIG) as process:
        async with Client(process) as other:
            await other.publish("shared.made", range(20, 21))
            [theirs] = await other.pull(spec_of("shared.made"), 1)
        async with http(sidecar) as connection:
            assert await settle(connection, theirs.token, ours.token) == ["TOKEN_INVALID", ""]


# -- callers that go


async def test_a_pull_whose_caller_goes_takes_nothing_along(
    sidecar: SidecarProcess, client: Client
) -> None:
    """By HTTP: what comes then is another's at once, in its first attempt."""
    spec = described("gone.made")
    async with http(sidecar) as connection:
        pulling = asyncio.create_task(call(connection, "Pull", spec=spec, wait="60s"))
        await until(lambda: _is(consumers(client, "gone-made"), 1))
        connection.writer.transport.abort()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await pulling
    await until(lambda: _is(consumers(client, "gone-made"), 0))
    await client.publish("gone.made", range(30, 31))
    [delivery] = await client.pull(spec_of("gone.made"), 1)

    assert delivery.attempt == 1


async def test_a_pull_that_is_cancelled_takes_nothing_along(client: Client) -> None:
    """The same by gRPC."""
    pulling = asyncio.create_task(client.pull(spec_of("left.made"), 1))
    await until(lambda: _is(consumers(client, "left-made"), 1))
    pulling.cancel()
    await until(lambda: _is(consumers(client, "left-made"), 0))
    await client.publish("left.made", range(40, 41))
    [delivery] = await client.pull(spec_of("left.made"), 1)

    assert delivery.attempt == 1


async def _is(found: Any, wanted: int) -> bool:
    return bool(await found == wanted)


# -- large answers


async def test_a_pull_of_large_events_fits_a_message_of_grpc(sidecar: SidecarProcess) -> None:
    """gRPC clients take 4 MiB: what does not fit is left, in its order, and no attempt is counted."""
    spec = spec_of("large.made", ordering=pb.ORDERING_NONE)
    async with Client(sidecar, largest=4 * 1024 * 1024) as client:
        events = [
            ev.Event(id=str(n), type="t", source="s", data=bytes(700_000)) for n in range(100, 120)
        ]
        await client.publish_events("large.made", events)
        got: list[tuple[str, int]] = []
        while len(got) < 20:
            deliveries = await client.pull(spec, 20)
            assert deliveries
            for delivery in deliveries:
                got.append((delivery.event.id, delivery.attempt))
                await client.settle(delivery.token, pb.VERDICT_ACK)

    assert got == [(str(n), 1) for n in range(100, 120)]
