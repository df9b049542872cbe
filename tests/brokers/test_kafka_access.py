"""Getting in at Kafka: TLS and SASL, on a cluster that demands them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.brokers.kafka.broker import KafkaBroker
from sidecar.config import Kafka
from sidecar.errors import BrokerRefused, BrokerUnavailable, ConfigInvalid
from tests.conformance.acting import events, ids, interest, numbers, publish, take
from tests.conformance.harness import fresh
from tests.support.kafka import KafkaCluster, require
from tests.support.kafka_jars.settings import PASSWORD, USER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.support.kafka_jars.settings import Listener


@pytest.fixture(scope="module")
def cluster() -> Iterator[KafkaCluster]:
    require()
    with KafkaCluster(listeners=["SSL", "SASL_PLAINTEXT", "SASL_SSL"]) as running:
        yield running


def secured(cluster: KafkaCluster, listener: Listener, **settings: Any) -> dict[str, Any]:
    table: dict[str, Any] = {"bootstrap_servers": cluster.bootstrap(listener).split(",")}
    if listener in {"SSL", "SASL_SSL"}:
        table |= {"tls": True, "tls_ca_file": str(cluster.ca_file)}
    if listener.startswith("SASL"):
        table |= {"sasl_mechanism": "SCRAM-SHA-512", "user": USER, "password": PASSWORD}
        if settings.get("sasl_mechanism") == "OAUTHBEARER":
            table["oauth_token_url"] = cluster.token_url
    return table | settings


@asynccontextmanager
async def broker_with(settings: dict[str, Any]) -> AsyncIterator[KafkaBroker]:
    """Not connected."""
    table = {"type": "kafka", "auto_create_topics": True, "connect_timeout_seconds": 5}
    broker = KafkaBroker(
        "log",
        Kafka.model_validate(table | settings),
        client_name="test",
        max_event_bytes=1 << 20,
        max_pending=(1000, 1 << 24),
        timeout_seconds=10,
    )
    try:
        yield broker
    finally:
        await broker.close()


@pytest.mark.parametrize(
    ("listener", "mechanism"),
    [
        ("SSL", ""),
        ("SASL_PLAINTEXT", "SCRAM-SHA-512"),
        ("SASL_SSL", "SCRAM-SHA-512"),
        ("SASL_SSL", "PLAIN"),
        ("SASL_SSL", "OAUTHBEARER"),
    ],
)
async def test_producer_consumer_and_the_making_of_topics_get_in(
    cluster: KafkaCluster, listener: Listener, mechanism: str
) -> None:
    topic = fresh("secured")
    settings = secured(cluster, listener, sasl_mechanism=mechanism)
    async with broker_with(settings) as broker:
        await broker.connect()
        await publish(broker, topic, events(range(5)))
        source = await broker.subscribe(interest(topic))
        taken = await take(source, 5, ack=True)
        lag = await source.lag()

    assert ids(taken) == numbers(5)
    assert lag == 0


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN", "OAUTHBEARER"])
async def test_a_wrong_password_is_refused_and_never_shown(
    cluster: KafkaCluster, mechanism: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, and it may be tried again: it is right some day."""
    settings = secured(cluster, "SASL_SSL", sasl_mechanism=mechanism) | {"password": "hunter2"}
    said = []
    async with broker_with(settings) as broker:
        for _ in range(2):
            async with asyncio.timeout(8):
                with pytest.raises(BrokerRefused, match="refused us") as caught:
                    await broker.connect()
            said.append(caught.value.message)

    assert "hunter2" not in "".join(said)
    assert "hunter2" not in caplog.text


async def test_a_node_whose_authority_is_not_trusted_is_not_talked_to(
    cluster: KafkaCluster,
) -> None:
    settings = secured(cluster, "SASL_SSL")
    del settings["tls_ca_file"]
    async with broker_with(settings) as broker:
        with pytest.raises((BrokerRefused, BrokerUnavailable), match=r"(?i)ssl|certificate"):
            await broker.connect()


async def test_the_password_is_read_from_its_file(cluster: KafkaCluster, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n", encoding="utf-8")
    settings = secured(cluster, "SASL_SSL", password_file=str(file))
    del settings["password"]
    async with broker_with(settings) as broker:
        await broker.connect()

    assert PASSWORD not in repr(settings["password_file"])


async def test_a_password_file_that_is_gone_is_told_by_its_key(
    cluster: KafkaCluster, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(PASSWORD, encoding="utf-8")
    settings = secured(cluster, "SASL_SSL", password_file=str(file))
    del settings["password"]
    async with broker_with(settings) as broker:
        file.unlink()
        with pytest.raises(ConfigInvalid, match="password_file: cannot read"):
            await broker.connect()
        file.write_text(PASSWORD, encoding="utf-8")
        await broker.connect()
