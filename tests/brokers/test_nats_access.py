"""Credentials of NATS servers: wrong ones, ones that stop working, ones that change."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.brokers.nats.core import NatsBroker
from sidecar.brokers.nats.jetstream import JetStreamBroker
from sidecar.config import JetStream, Nats
from sidecar.errors import BrokerRefused
from tests.conformance.acting import events, ids, interest, numbers, publish, receipt, take
from tests.conformance.harness import fresh
from tests.support.nats_server import NatsServer

if TYPE_CHECKING:
    from pathlib import Path

    from sidecar.broker import Broker

TYPES = ["nats", "jetstream"]


def broker_of(type_: str, server: NatsServer, **settings: Any) -> Broker:
    common = {"servers": [server.url], "reconnect_seconds": 0.05, **settings}
    if type_ == "nats":
        return NatsBroker(type_, Nats(type="nats", **common), client_name="test")
    jetstream = JetStream(type="jetstream", auto_create_streams=True, **common)
    return JetStreamBroker(type_, jetstream, client_name="test")


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"token": "guessed"}, {"token": "s3cret"}),
        ({}, {"token": "s3cret"}),
        ({"user": "app", "password": "guessed"}, {"user": "app", "password": "s3cret"}),
    ],
)
async def test_wrong_credentials_are_refused_and_right_ones_are_not(
    type_: str, wrong: dict[str, Any], right: dict[str, Any]
) -> None:
    """The error names the server and never a secret."""
    with NatsServer(**right) as server:
        broker = broker_of(type_, server, **wrong)
        with pytest.raises(BrokerRefused, match="refused the credentials") as refused:
            await broker.connect()
        allowed = broker_of(type_, server, **right)
        await allowed.connect()
        receipts = await publish(allowed, fresh("topic"), events(range(3)))
        await allowed.close()
        await broker.close()

    assert f"127.0.0.1:{server.port}" in str(refused.value)
    assert "guessed" not in str(refused.value)
    assert len(receipts) == 3


@pytest.mark.parametrize("type_", TYPES)
async def test_credentials_that_stop_working_end_it_and_the_next_connect_resumes(
    type_: str, tmp_path: Path
) -> None:
    """The server comes back with another token; the file has it later; nothing is opened anew."""
    secret = tmp_path / "token"
    secret.write_text("first\n")
    access = {"token": "first"}
    with NatsServer(config={"authorization": access}) as server:
        broker = broker_of(type_, server, token_file=str(secret))
        await broker.connect()
        topic = fresh("topic")
        source = await broker.subscribe(interest(topic))
        access["token"] = "second"  # noqa: S105 - no secret
        server.restart()
        async with asyncio.timeout(10):
            await broker.ended()
        waiting = broker.publish(topic, events(range(5)))
        with pytest.raises(BrokerRefused):
            await broker.connect()
        secret.write_text("second\n")
        await broker.connect()
        late = await publish(broker, topic, events(range(5, 10)))
        async with asyncio.timeout(5):
            early = [receipt(outcome) for outcome in await waiting]
        taken = await take(source, 10)
        await broker.close()

    assert [r.event_id for r in early + late] == numbers(10)
    assert ids(taken) == numbers(10)


async def test_a_secret_whose_file_is_gone_is_refused_until_it_is_there(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cret")
    with NatsServer(token="s3cret") as server:  # noqa: S106 - made up
        broker = broker_of("nats", server, token_file=str(secret))
        secret.unlink()
        with pytest.raises(BrokerRefused, match="token_file"):
            await broker.connect()
        secret.write_text("s3cret")
        await broker.connect()
        await broker.close()


async def test_the_embedded_server_s_address_and_token_are_used() -> None:
    """Whatever the settings say of servers: there are none in them."""
    with NatsServer(token="minted") as server:  # noqa: S106 - made up
        settings = JetStream(type="jetstream", embedded=True, auto_create_streams=True)
        own = (server.url, "minted")
        broker = JetStreamBroker("embedded", settings, client_name="test", embedded=own)
        await broker.connect()
        receipts = await publish(broker, fresh("topic"), events(range(2)))
        await broker.close()

    assert len(receipts) == 2


async def test_of_several_servers_one_that_answers_will_do() -> None:
    with NatsServer() as gone, NatsServer() as server:
        gone.kill()
        for servers in ([gone.url, server.url], [server.url, gone.url]):
            broker = NatsBroker("nats", Nats(type="nats", servers=servers), client_name="test")
            async with asyncio.timeout(2):
                await broker.connect()
            await broker.close()
