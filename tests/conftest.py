"""Fixtures that every test may use: the event loop, a real nats-server, a running sidecar."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Before gRPC is loaded: tests start processes, and gRPC would stop its threads at each fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import pytest

from tests.support import kafka, kafka_mock
from tests.support.nats_server import NatsServer
from tests.support.sidecar_process import SidecarProcess

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say plainly what was not shown; in continuous integration it is a failure instead."""
    reason = kafka.available()
    if reason is not None:
        terminalreporter.section("Kafka", yellow=True)
        terminalreporter.write_line(
            f"{reason}: the driver ran on librdkafka's mock cluster. Not shown: {kafka_mock.NOT_SHOWN}."
        )


@pytest.fixture
def anyio_backend() -> Any:
    """uvloop, as in production; modules that must hold on both loops say so."""
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture(scope="module")
def sidecar() -> Iterator[SidecarProcess]:
    """One sidecar for a module's tests, with the embedded nats-server; use names of your own."""
    with SidecarProcess() as running:
        yield running


@pytest.fixture
def default_sidecar() -> Iterator[SidecarProcess]:
    """A sidecar as a newcomer has it: nothing published yet."""
    with SidecarProcess() as running:
        yield running
