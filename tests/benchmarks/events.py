"""The events of the benchmarks: 1 KiB of data, and requests made once, with holes for id and key."""

from __future__ import annotations

import base64
import random
import secrets
from typing import TYPE_CHECKING, Any

from sidecar.v1 import event_pb2, pubsub_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping

DATA = base64.b64encode(random.Random(1).randbytes(768))  # the same in every run
KEYS = 1000
SOURCE = "/benchmarks"
TYPE = "benchmark.happened"
CONTENT_TYPE = "application/octet-stream"
TIME = "2026-01-31T12:00:00.000000Z"
_ID_HOLE, _ID = "#" * 10, b"%010d"
_KEY_HOLE, _KEY = "@" * 3, b"%03d"


class Ids:
    """Ids that no other run has: a broker would take the same id for the same event."""

    def __init__(self, keys: int = KEYS) -> None:
        self.keys = keys
        self.prefix = secrets.token_hex(4)
        self._next = 0

    def take(self, count: int) -> tuple[int, ...]:
        """What fills the holes of *count* events: number and key, in turn."""
        first = self._next
        self._next = first + count
        if count == 1:
            return (first, first % self.keys)
        return tuple(x for n in range(first, first + count) for x in (n, n % self.keys))


def publish_request(ids: Ids, topic: str) -> bytes:
    """A PublishRequest of one event, as a template of `%`."""
    request = pubsub_pb2.PublishRequest(topic=topic, events=[_message(ids)])
    return _template(request.SerializeToString())


def publish_stream_request(ids: Ids, topic: str, batch: int) -> bytes:
    """A PublishStreamRequest of *batch* events, as a template of `%`."""
    request = pubsub_pb2.PublishStreamRequest(
        sequence=1, topic=topic, events=[_message(ids)] * batch
    )
    return _template(request.SerializeToString())


def http_request(path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """A whole HTTP/1.1 request; *body* may be a template, whose holes are as long as what fills them."""
    size = len(body % tuple([0] * body.count(b"%0")))
    lines = [f"POST {path} HTTP/1.1", "host: sidecar", f"content-length: {size}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def cloudevents_request(ids: Ids, topic: str) -> bytes:
    """An event in CloudEvents binary mode over HTTP, as a template of `%`."""
    headers = {**_ce_headers(), "content-type": CONTENT_TYPE}
    head = http_request(f"/v1/topics/{topic}", headers, DATA)
    return _template(head.replace(b"ce-id: ", b"ce-id: " + ids.prefix.encode() + b"-"))


def nats_headers(event_id: str, key: str) -> dict[str, str]:
    """The headers of the same event in the NATS binding, as the sidecar writes them."""
    return {
        "Nats-Msg-Id": f"{len(SOURCE)}:{SOURCE}:{event_id}",
        "ce-specversion": "1.0",
        "ce-id": event_id,
        "ce-source": SOURCE,
        "ce-type": TYPE,
        "ce-datacontenttype": CONTENT_TYPE,
        "ce-time": TIME,
        "ce-partitionkey": key,
    }


_REPEATING = [
    ("ce_specversion", b"1.0"),
    ("ce_source", SOURCE.encode()),
    ("ce_type", TYPE.encode()),
    ("content-type", CONTENT_TYPE.encode()),
]


def kafka_headers(event_id: str) -> list[tuple[str, bytes | str]]:
    """The headers of the same event in the Kafka binding, as the sidecar writes them; its key is the record's."""
    return [*_REPEATING, ("ce_id", event_id), ("ce_time", TIME)]


def _ce_headers() -> dict[str, str]:
    return {
        "ce-specversion": "1.0",
        "ce-id": _ID_HOLE,
        "ce-source": SOURCE,
        "ce-type": TYPE,
        "ce-time": TIME,
        "ce-partitionkey": _KEY_HOLE,
    }


def _message(ids: Ids) -> Any:
    return event_pb2.Event(
        id=f"{ids.prefix}-{_ID_HOLE}",
        source=SOURCE,
        type=TYPE,
        key=_KEY_HOLE,
        data_content_type=CONTENT_TYPE,
        data=DATA,
    )


def _template(data: bytes) -> bytes:
    data = data.replace(b"%", b"%%")
    return data.replace(_ID_HOLE.encode(), _ID).replace(_KEY_HOLE.encode(), _KEY)


def number_of(event_id: str) -> int:
    """The number of an event, from its id."""
    return int(event_id.rpartition("-")[2])
