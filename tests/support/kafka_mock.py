"""librdkafka's own mock of a Kafka cluster: for quick tests where Kafka cannot run."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Self

import confluent_kafka
from confluent_kafka import Producer

if TYPE_CHECKING:
    from types import TracebackType

NOT_SHOWN = (
    "what survives a node that dies, comes back or hangs; groups that change and positions that "
    "survive; seek and lag; topics that are made; TLS and SASL"
)


def librdkafka() -> ctypes.CDLL:
    """The library inside confluent-kafka, for what Python has no word for."""
    folder = Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs"
    (library,) = folder.glob("librdkafka*")
    return ctypes.CDLL(str(library))


def handle_of(client: object) -> ctypes.c_void_p:
    """The rd_kafka_t of a client: the first field behind CPython's head of an object."""
    return ctypes.c_void_p.from_address(id(client) + object.__basicsize__)


class MockCluster:
    """One node in this process, on a loopback port; a context manager."""

    def __init__(self) -> None:
        self._client = Producer(
            {"bootstrap.servers": "none:1", "test.mock.num.brokers": 1, "log_level": 0}
        )
        (node,) = self._client.list_topics(timeout=10).brokers.values()
        self.bootstrap_servers = f"{node.host}:{node.port}"
        self._library = librdkafka()
        find = self._library.rd_kafka_handle_mock_cluster
        find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self._mock = find(handle_of(self._client))
        make = self._library.rd_kafka_mock_topic_create
        make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]

    def create_topic(self, name: str, partitions: int = 1) -> None:
        """Left to itself it makes four partitions of any topic that is asked for."""
        error = self._library.rd_kafka_mock_topic_create(self._mock, name.encode(), partitions, 1)
        assert error == 0, error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._client
