"""The Kafka of the tests: what they lean on when they kill, pause and secure it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

from tests.support.kafka import KafkaCluster, require
from tests.support.kafka_jars.settings import LARGEST_BYTES, Mechanism

if TYPE_CHECKING:
    from collections.abc import Iterator

# The first one here may have to download Kafka.
pytestmark = pytest.mark.timeout(400)

SECONDS = 20.0
VAGUE = {"_TRANSPORT", "_ALL_BROKERS_DOWN"}
VAGUE_SECONDS = 2.0
"""A lost connection without another reason for so long is that, and nothing else."""
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def single() -> Iterator[KafkaCluster]:
    require()
    with KafkaCluster(listeners=["SSL", "SASL_PLAINTEXT", "SASL_SSL"]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three() -> Iterator[KafkaCluster]:
    require()
    with KafkaCluster(3) as cluster:
        yield cluster


@pytest.fixture
def topic() -> str:
    return f"topic-{uuid.uuid4()}"


class Deliveries:
    """What became of the records of one producer."""

    def __init__(self, **options: str) -> None:
        safe = {"acks": "all", "enable.idempotence": "true", "log_level": "0"}
        self._producer = Producer({**safe, **options, "message.max.bytes": f"{LARGEST_BYTES}"})
        self.errors: list[int] = []
        self.stored = 0

    def send(self, topic: str, *values: bytes) -> None:
        """Produce, and wait until every record has its answer."""
        for value in values:
            self._producer.produce(topic, value, on_delivery=self._answered)
        assert self._producer.flush(SECONDS) == 0

    def _answered(self, error: KafkaError | None, _: object) -> None:
        if error is None:
            self.stored += 1
        else:
            self.errors.append(error.code())


def read(cluster: KafkaCluster, topic: str, count: int, **options: str) -> list[bytes]:
    """The first *count* records of the topic, through a new group."""
    ours = {"group.id": f"{uuid.uuid4()}", "auto.offset.reset": "earliest", "log_level": "0"}
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap_servers, **ours, **options})
    try:
        consumer.subscribe([topic])
        found = consumer.consume(count, SECONDS)
        return [record.value() or b"" for record in found if record.error() is None]
    finally:
        consumer.close()


def refusal(options: dict[str, str]) -> str:
    """
    What keeps a client with these options out; empty: nothing does.

    A node that hangs up first is a lost connection, and one of the next tries tells why.
    """
    reasons: list[str] = []

    def note(error: KafkaError) -> None:
        reasons.append(error.name())

    client = Producer({**options, "error_cb": note, "log_level": 0})
    deadline = time.monotonic() + SECONDS
    while not set(reasons) - VAGUE:
        if time.monotonic() > deadline:
            assert reasons
            break
        if reasons:
            deadline = min(deadline, time.monotonic() + VAGUE_SECONDS)
        with contextlib.suppress(KafkaException):
            client.list_topics(timeout=0.2)
            return ""
        client.poll(0)
    return next((reason for reason in reasons if reason not in VAGUE), reasons[0])


def replicas_in_sync(cluster: KafkaCluster, topic: str) -> list[int]:
    """Of each partition, how many replicas are in sync."""
    client = AdminClient({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0})
    partitions = client.list_topics(topic, SECONDS).topics[topic].partitions
    return [len(partitions[number].isrs) for number in sorted(partitions)]


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_records_come_back_through_either_group_protocol(
    single: KafkaCluster, topic: str, protocol: str
) -> None:
    """The new protocol (KIP-848) is on beside the old one."""
    single.create_topic(topic)
    Deliveries(**single.client_options()).send(topic, b"a", b"b", b"c")

    assert read(single, topic, 3, **{"group.protocol": protocol}) == [b"a", b"b", b"c"]


def test_a_record_of_10_mib_is_accepted_and_one_beyond_the_limit_is_not(
    single: KafkaCluster, topic: str
) -> None:
    single.create_topic(topic)
    deliveries = Deliveries(**single.client_options())
    deliveries.send(topic, bytes(10 * 1024 * 1024))
    with pytest.raises(KafkaException) as refused:
        deliveries.send(topic, bytes(LARGEST_BYTES + 1))

    assert deliveries.stored == 1
    assert refused.value.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE


def test_a_topic_that_nobody_created_is_not_there(single: KafkaCluster, topic: str) -> None:
    impatient = {"topic.metadata.propagation.max.ms": "100"}
    deliveries = Deliveries(**single.client_options(), **impatient)
    deliveries.send(topic, b"a")

    assert deliveries.errors == [KafkaError.UNKNOWN_TOPIC_OR_PART]


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restarted_node_has_its_port_and_what_was_acknowledged(
    single: KafkaCluster, topic: str, end: str
) -> None:
    servers = single.bootstrap_servers
    single.create_topic(topic)
    Deliveries(**single.client_options()).send(topic, *[b"%d" % n for n in range(100)])
    getattr(single, end)()
    away = refusal(single.client_options())
    single.restart()
    single.wait_ready()

    assert away == "_TRANSPORT"
    assert single.bootstrap_servers == servers
    assert read(single, topic, 100) == [b"%d" % n for n in range(100)]


def test_a_paused_node_is_silent_and_goes_on_where_it_was(single: KafkaCluster, topic: str) -> None:
    single.create_topic(topic)
    deliveries = Deliveries(**single.client_options())
    deliveries.send(topic, b"before")
    single.pause()
    silent = refusal(single.client_options() | {"socket.timeout.ms": "1000"})
    single.resume()
    deliveries.send(topic, b"after")

    assert silent != ""
    assert read(single, topic, 2) == [b"before", b"after"]


def test_three_nodes_lose_nothing_and_go_on_without_one(three: KafkaCluster, topic: str) -> None:
    """Two of three replicas have what is acknowledged, so any one node may go."""
    three.create_topic(topic, partitions=3)
    deliveries = Deliveries(**three.client_options())
    deliveries.send(topic, *[b"%d" % n for n in range(300)])
    three.kill(1)
    deliveries.send(topic, *[b"%d" % n for n in range(300, 600)])
    three.wait_ready()
    found = read(three, topic, 600)
    three.restart(1)
    three.wait_ready()

    assert (deliveries.stored, deliveries.errors) == (600, [])
    assert sorted(map(int, found)) == list(range(600))
    assert replicas_in_sync(three, topic) == [3, 3, 3]


def test_three_nodes_are_given_up_and_come_back_together(three: KafkaCluster, topic: str) -> None:
    """Two of three are the quorum: after both are gone, they start when they start together."""
    three.create_topic(topic)
    Deliveries(**three.client_options()).send(topic, b"a")
    three.kill(2, 3)
    deliveries = Deliveries(**three.client_options(), **{"delivery.timeout.ms": "1500"})
    deliveries.send(topic, b"b")
    three.restart(2, 3)
    three.wait_ready()

    assert deliveries.errors == [KafkaError._MSG_TIMED_OUT]
    assert replicas_in_sync(three, topic) == [3]


def test_a_paused_node_of_three_is_given_up_and_taken_back(three: KafkaCluster, topic: str) -> None:
    three.create_topic(topic)
    three.pause(3)
    three.wait_ready()
    without = replicas_in_sync(three, topic)
    three.resume(3)
    three.wait_ready()

    assert without == [2]
    assert replicas_in_sync(three, topic) == [3]


def test_with_three_nodes_an_acknowledged_record_is_on_two(three: KafkaCluster, topic: str) -> None:
    three.create_topic(topic)
    resource = ConfigResource(ResourceType.TOPIC, topic)
    client = AdminClient({"bootstrap.servers": three.bootstrap_servers})
    settings = client.describe_configs([resource])[resource].result(SECONDS)

    assert settings["min.insync.replicas"].value == "2"


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN", "OAUTHBEARER"])
def test_over_tls_a_user_gets_in_with_the_right_secret_and_not_with_a_wrong_one(
    single: KafkaCluster, topic: str, mechanism: Mechanism
) -> None:
    options = single.client_options("SASL_SSL", mechanism)
    secret = "sasl.oauthbearer.client.secret" if mechanism == "OAUTHBEARER" else "sasl.password"
    single.create_topic(topic)
    Deliveries(**options).send(topic, b"a")

    assert read(single, topic, 1, **options) == [b"a"]
    assert refusal({**options, secret: "wrong"}) == "_AUTHENTICATION"


def test_tls_is_refused_by_a_client_that_does_not_know_the_authority(single: KafkaCluster) -> None:
    options = single.client_options("SSL")
    trusting = refusal(options)
    del options["ssl.ca.location"]

    assert trusting == ""
    assert refusal(options) == "_SSL"


def test_sasl_works_without_tls_too(single: KafkaCluster) -> None:
    assert refusal(single.client_options("SASL_PLAINTEXT")) == ""


def test_a_node_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also when that is killed, and could not clean up."""
    require()
    program = (
        "from tests.support.kafka import KafkaCluster\n"
        "cluster = KafkaCluster().start()\n"
        "print(cluster.pid(), flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # Nobody is left to take its files away.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        node = psutil.Process(int(owner.stdout.readline()))
        os.kill(owner.pid, signal.SIGKILL)
    gone, _ = psutil.wait_procs([node], timeout=SECONDS)

    assert gone == [node]
