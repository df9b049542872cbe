"""A real Kafka of one or three nodes that a test starts, kills, pauses and brings back."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.support.kafka_jars import install as jars
from tests.support.kafka_jars.install import Installation
from tests.support.kafka_jars.install import available as available  # noqa: PLC0414 - for others
from tests.support.kafka_jars.node import Node, kafka_uuid
from tests.support.kafka_jars.settings import (
    PASSWORD,
    USER,
    Listener,
    Mechanism,
    cluster_settings,
)
from tests.support.kafka_jars.tokens import TokenEndpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

QUICK_START: Final = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
DEADLINE_SECONDS: Final = 60.0

_POLL_SECONDS = 0.02
_LOG_TAIL = 6000


class KafkaCluster:
    """
    *nodes* brokers (1 or 3), each a KRaft controller too, on loopback ports; a context manager.

    Methods are plain functions and return when it is so. Starting takes 2 to 5 s: where an event loop
    must go on meanwhile, hand them to a thread. Nodes are numbered from 1, and naming none means all.
    Ports and data stay over stop, kill and restart; the files go with `close()`. The nodes end with
    the test process, whatever ends that.

    There is a PLAINTEXT listener always, and those in *listeners*; `client_options()` says how to get
    in. *config*: settings of server.properties, which win over ours. With three nodes a topic has three
    replicas, an acknowledged record is on two, and a node that is silent for 2 s is given up.
    *java_options*: QUICK_START halves the time to start, and was the faster for 300,000 records too.
    """

    def __init__(
        self,
        nodes: int = 1,
        *,
        listeners: Sequence[Listener] = (),
        config: Mapping[str, str] | None = None,
        java_options: Sequence[str] = QUICK_START,
        heap_mb: int = 384,
        installation: Installation | None = None,
    ) -> None:
        self._installed = installation or install()
        self._java_options = (f"-Xmx{heap_mb}m", *java_options)
        self._directory = Path(tempfile.mkdtemp(prefix="kafka-"))
        every: tuple[Listener, ...] = ("PLAINTEXT", *listeners)
        self._nodes = {n: Node(n, self._directory, every) for n in range(1, nodes + 1)}
        quorum = {number: node.ports["CONTROLLER"] for number, node in self._nodes.items()}
        self._settings = cluster_settings(quorum, every, self._installed.keystore)
        self._settings |= config or {}
        self._tokens = TokenEndpoint(USER, PASSWORD) if _any_sasl(listeners) else None
        # A child ends with the thread that launched it: one that lives as long as the cluster.
        self._launcher = ThreadPoolExecutor(1, "kafka-launcher")

    @property
    def bootstrap_servers(self) -> str:
        """host:port of all nodes, with commas between, for clients in plain text."""
        return self.bootstrap("PLAINTEXT")

    def bootstrap(self, listener: Listener) -> str:
        return ",".join(f"127.0.0.1:{node.ports[listener]}" for node in self._nodes.values())

    @property
    def ca_file(self) -> Path:
        """The certificate (PEM) that a client of SSL and SASL_SSL must trust."""
        return self._installed.ca_file

    @property
    def token_url(self) -> str:
        """Where an OAUTHBEARER client gets its token, for USER and PASSWORD (client credentials)."""
        assert self._tokens is not None, "for a cluster with a SASL listener"
        return self._tokens.url

    def client_options(
        self, listener: Listener = "PLAINTEXT", mechanism: Mechanism = "SCRAM-SHA-512"
    ) -> dict[str, str]:
        """librdkafka's settings with which a client gets in at *listener*, as USER."""
        options = {"bootstrap.servers": self.bootstrap(listener), "security.protocol": listener}
        if listener in {"SSL", "SASL_SSL"}:
            options["ssl.ca.location"] = str(self.ca_file)
        if listener.startswith("SASL"):
            options |= {"sasl.mechanism": mechanism, **self._credentials(mechanism)}
        return options

    def start(self) -> Self:
        """Format the storage, start all nodes, wait until they are ready; once."""
        first, *others = self._nodes.values()
        for node in self._nodes.values():
            node.configure(self._settings)
        user = f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"
        told = ("--cluster-id", kafka_uuid(), "--add-scram", user, "--config", str(first.config))
        tool = ("kafka.tools.StorageTool", "format", *told)
        jars.run(self._installed.java, *QUICK_START, *self._java(first, *tool))
        for node in others:
            node.copy_storage(first)
        self.restart()
        self.wait_ready()
        return self

    def stop(self, *nodes: int) -> None:
        """SIGTERM, as an operator would: what they lead is handed over. SIGKILL if that fails."""
        chosen = self._chosen(nodes)
        for node in chosen:
            node.ask_to_stop()
        for node in chosen:
            node.wait_until_gone()

    def kill(self, *nodes: int) -> None:
        """SIGKILL; what was acknowledged is in files."""
        for node in self._chosen(nodes):
            node.kill()

    def restart(self, *nodes: int) -> None:
        """
        Stop them if they run, and start them; returns when they accept connections.

        They may still have to catch up: `wait_ready()` waits for that. No node comes up unless most
        of the cluster does, so what was killed together is named together.
        """
        self.stop(*nodes)
        chosen = self._chosen(nodes)
        for node in chosen:
            command = self._java(node, "kafka.Kafka", str(node.config))
            java = self._installed.java
            self._launcher.submit(node.launch, java, *self._java_options, *command).result()
        self._wait(lambda: all(node.listens for node in chosen), "to accept connections", chosen)

    def pause(self, *nodes: int) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        for node in self._chosen(nodes):
            node.pause()

    def resume(self, *nodes: int) -> None:
        for node in self._chosen(nodes):
            node.resume()

    def wait_ready(self) -> None:
        """
        Wait until every node that answers knows exactly those that do, and all replicas on them are
        in sync. After a kill or a pause this includes that the others have given the node up.
        """
        self._wait(self._settled, "to be in step")

    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        replication: int | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Create a topic that every node knows on return; *replication*: the number of nodes if unset."""
        copies = replication or len(self._nodes)
        topic = NewTopic(name, partitions, copies, config=dict(config or {}))
        client = _admin(self.bootstrap_servers)  # Dropped before the answer, it would cancel.
        client.create_topics([topic])[name].result(DEADLINE_SECONDS)
        self._wait(lambda: self._settled(name), f"to know the topic {name}")

    @property
    def alive(self) -> bool:
        """Every node runs."""
        return all(node.alive for node in self._nodes.values())

    def pid(self, node: int = 1) -> int:
        return self._nodes[node].pid

    def log(self, node: int = 1) -> str:
        """What the node has logged so far, over all its starts."""
        return self._nodes[node].log

    def close(self) -> None:
        """End what runs, and take the files away."""
        for node in self._nodes.values():
            node.close()
        self._launcher.shutdown()
        if self._tokens is not None:
            self._tokens.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _credentials(self, mechanism: Mechanism) -> dict[str, str]:
        if mechanism != "OAUTHBEARER":
            return {"sasl.username": USER, "sasl.password": PASSWORD}
        return {
            "sasl.oauthbearer.method": "oidc",
            "sasl.oauthbearer.client.id": USER,
            "sasl.oauthbearer.client.secret": PASSWORD,
            "sasl.oauthbearer.token.endpoint.url": self.token_url,
        }

    def _chosen(self, nodes: Sequence[int]) -> list[Node]:
        return [self._nodes[number] for number in nodes or self._nodes]

    def _java(self, node: Node, *arguments: str) -> list[str]:
        shared = self._installed.archive
        return [
            *((f"-XX:SharedArchiveFile={shared}",) if shared.exists() else ()),
            f"-Dkafka.log={node.log_file}",
            # Its compressors unpack libraries there, which a node that is killed leaves behind.
            f"-Djava.io.tmpdir={self._directory}",
            f"-Dlog4j2.configurationFile={jars.HERE / 'log4j2.properties'}",
            "-cp",
            self._installed.classpath,
            *arguments,
        ]

    def _settled(self, topic: str | None = None) -> bool:
        """Whether the nodes that answer agree on who is there; each is asked for its own view."""
        here = {node.number for node in self._nodes.values() if node.answering}
        return all(_sees(self._nodes[number], here, topic) for number in here)

    def _wait(self, condition: Callable[[], bool], what: str, needed: Sequence[Node] = ()) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            ended = [node for node in needed if not node.alive]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(node.log[-_LOG_TAIL:] for node in ended or self._nodes.values())
                raise RuntimeError(f"waited for Kafka {what}: {[*self._nodes.values()]}\n{logs}")
            time.sleep(_POLL_SECONDS)


def install() -> Installation:
    """Kafka for this machine; the first time it takes some 15 s and the network."""
    return jars.install(_train)


def require() -> None:
    """Skip the test where Kafka cannot run, saying why; in continuous integration that is a failure."""
    reason = available()
    if reason is not None and os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must show every promise on a real broker")
    if reason is not None:
        pytest.skip(reason)


def _train(bare: Installation, archive: Path) -> None:
    """Let a node live for a moment; as it ends, Java writes down the classes that it loaded."""
    options = (*QUICK_START, f"-XX:ArchiveClassesAtExit={archive}")
    with KafkaCluster(java_options=options, installation=bare) as cluster:
        cluster.create_topic("any")
        cluster.stop()


def _sees(node: Node, here: set[int], topic: str | None) -> bool:
    # A new client asks the one node that it knows; a used one would ask any.
    client = _admin(f"127.0.0.1:{node.ports['PLAINTEXT']}")
    try:
        seen = client.list_topics(timeout=1)
    except KafkaException:
        return False
    partitions = [p for known in seen.topics.values() for p in known.partitions.values()]
    return (
        set(seen.brokers) == here
        and (topic is None or topic in seen.topics)
        and all(p.leader in here and here & {*p.replicas} <= {*p.isrs} for p in partitions)
    )


def _admin(servers: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": servers, "log_level": 0})


def _any_sasl(listeners: Sequence[Listener]) -> bool:
    return any(name.startswith("SASL") for name in listeners)


if __name__ == "__main__":
    # What takes long, ahead of the tests, which have little time: `python -m tests.support.kafka`.
    missing = available()
    if missing is None:
        install()
    else:
        sys.stderr.write(f"{missing}\n")
