"""What the nodes of a test's cluster are configured with: server.properties."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from tests.support.kafka_jars.install import STORE_PASSWORD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Listener = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
Mechanism = Literal["SCRAM-SHA-512", "PLAIN", "OAUTHBEARER"]

USER: Final = "app"
PASSWORD: Final = "app-secret"  # noqa: S105 - of a broker that a test makes

LARGEST_BYTES: Final = 12 * 1024 * 1024
"""Of a record, and of a batch of records."""

_LOGIN = "org.apache.kafka.common.security"

_ALWAYS = {
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    "message.max.bytes": f"{LARGEST_BYTES}",
    "replica.fetch.max.bytes": f"{LARGEST_BYTES}",
    # A broker is let in with a heartbeat (default: one in 2 s), so this is a part of every start. And
    # after a kill it is let in again when its old session is over, so that is a part of such a start.
    "broker.heartbeat.interval.ms": "250",
    "broker.session.timeout.ms": "2000",
    # Groups form at once, and tests may choose time-outs that fit them.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "500",
    "group.consumer.min.session.timeout.ms": "1000",
    "group.consumer.session.timeout.ms": "6000",
    "group.consumer.min.heartbeat.interval.ms": "100",
    "group.consumer.heartbeat.interval.ms": "300",
    # Small: the cleaner alone would take 128 MB of the heap, and each partition 20 MB of (sparse) disk.
    "log.cleaner.dedupe.buffer.size": "2097152",
    "log.index.size.max.bytes": "1048576",
    "num.network.threads": "2",
    "num.io.threads": "4",
}


def cluster_settings(
    quorum: Mapping[int, int], listeners: Sequence[Listener], keystore: Path
) -> dict[str, str]:
    """What all nodes share. *quorum*: the controller's port of each node."""
    voters = ",".join(f"{node}@127.0.0.1:{port}" for node, port in quorum.items())
    protocols = ",".join(["CONTROLLER:PLAINTEXT", *(f"{name}:{name}" for name in listeners)])
    return {
        **_ALWAYS,
        **_copies(len(quorum)),
        "controller.quorum.voters": voters,
        "listener.security.protocol.map": protocols,
        **(_tls(keystore) if {"SSL", "SASL_SSL"} & {*listeners} else {}),
        **_sasl([name for name in listeners if name.startswith("SASL")]),
    }


def node_settings(number: int, ports: Mapping[str, int], data: Path) -> dict[str, str]:
    """What is a node's own. *ports*: by listener, the controller's among them."""
    return {
        "node.id": f"{number}",
        "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in ports.items()),
        "log.dirs": f"{data}",
    }


def _copies(nodes: int) -> dict[str, str]:
    """Replicas, and how many must have a record before it is acknowledged: all but one."""
    replicas, enough = f"{nodes}", f"{max(1, nodes - 1)}"
    return {
        "default.replication.factor": replicas,
        "min.insync.replicas": enough,
        "offsets.topic.num.partitions": f"{nodes}",
        "offsets.topic.replication.factor": replicas,
        "transaction.state.log.num.partitions": f"{nodes}",
        "transaction.state.log.replication.factor": replicas,
        "transaction.state.log.min.isr": enough,
        "share.coordinator.state.topic.num.partitions": f"{nodes}",
        "share.coordinator.state.topic.replication.factor": replicas,
        "share.coordinator.state.topic.min.isr": enough,
    }


def _tls(keystore: Path) -> dict[str, str]:
    return {
        "ssl.keystore.type": "PKCS12",
        "ssl.keystore.location": f"{keystore}",
        "ssl.keystore.password": STORE_PASSWORD,
    }


def _sasl(listeners: Sequence[Listener]) -> dict[str, str]:
    """SCRAM's passwords are in the formatted storage, PLAIN's here; a token carries its own name."""
    logins = {
        "scram-sha-512": "scram.ScramLoginModule required",
        "plain": f'plain.PlainLoginModule required user_{USER}="{PASSWORD}"',
        # The claim is for the broker's own token, which it wants at start and never shows to anyone.
        "oauthbearer": 'oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="-"',
    }
    return {
        **({"sasl.enabled.mechanisms": ",".join(logins).upper()} if listeners else {}),
        **{
            f"listener.name.{name.lower()}.{mechanism}.sasl.jaas.config": f"{_LOGIN}.{login};"
            for name in listeners
            for mechanism, login in logins.items()
        },
    }
