"""
Each claim on every driver that makes it, on both event loops.

One more broker: a class in harness.py, an entry in HARNESSES, and a fixture that starts its server.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.conformance.harness import (
    LONG_SECONDS,
    Harness,
    JetStreamHarness,
    KafkaHarness,
    KafkaMockHarness,
    MemoryHarness,
    NatsHarness,
    fresh,
)
from tests.support import kafka
from tests.support.kafka_mock import MockCluster
from tests.support.nats_server import NatsServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sidecar.broker import Broker

HARNESSES: dict[str, type[Harness]] = {
    "memory": MemoryHarness,
    "nats": NatsHarness,
    "jetstream": JetStreamHarness,
    "kafka": KafkaHarness if kafka.available() is None or "CI" in os.environ else KafkaMockHarness,
}


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="session")
def shared_nats_server() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture(scope="session")
def shared_kafka() -> Iterator[kafka.KafkaCluster | MockCluster]:
    if HARNESSES["kafka"] is KafkaMockHarness:
        with MockCluster() as mock:
            yield mock
        return
    kafka.require()
    with kafka.KafkaCluster() as cluster:
        yield cluster


@pytest.fixture(params=HARNESSES)
def harness(request: pytest.FixtureRequest) -> Harness:
    kind = HARNESSES[request.param]
    for marker in request.node.iter_markers("needs"):
        for name in marker.args:
            if name not in kind.features and not getattr(kind.capabilities, name, False):
                pytest.skip(f"{request.param}: not promised: {name}")
    server = request.getfixturevalue(kind.server_fixture) if kind.server_fixture else None
    return kind(server)


class World:
    """Sidecars on one server, closed at the end of the test."""

    def __init__(self, harness: Harness, stack: AsyncExitStack) -> None:
        self.harness = harness
        self._stack = stack

    def unconnected(self, *, ack_wait_seconds: float = LONG_SECONDS) -> Broker:
        broker = self.harness.make(ack_wait_seconds=ack_wait_seconds)
        self._stack.push_async_callback(broker.close)
        return broker

    async def sidecar(self, *, ack_wait_seconds: float = LONG_SECONDS) -> Broker:
        """A connected broker of one more sidecar."""
        broker = self.unconnected(ack_wait_seconds=ack_wait_seconds)
        await broker.connect()
        return broker


@pytest.fixture
async def world(harness: Harness) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(harness, stack)
        harness.start()


@pytest.fixture
async def broker(world: World) -> Broker:
    return await world.sidecar()


@pytest.fixture
def topic(harness: Harness) -> str:
    """A topic of its own, with a first token of its own."""
    name = f"{fresh('topic')}.created"
    harness.make_topic(name)
    return name
