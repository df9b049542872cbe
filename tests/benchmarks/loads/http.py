"""Loads on the HTTP door: callers with a kept connection each, whole requests as bytes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sidecar.v1 import pubsub_pb2 as pb
from tests.benchmarks import events
from tests.benchmarks.meter import Meter

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.spec import Sample, Spec

_LENGTH = b"content-length: "
PUBLISH = "/sidecar.v1.PubSub/Publish"


async def connect(spec: Spec) -> Sample:
    """Publish in the Connect protocol, one event in a protobuf body."""
    ids = events.Ids()
    headers = {"content-type": "application/proto", "connect-protocol-version": "1"}
    request = events.http_request(PUBLISH, headers, events.publish_request(ids, spec.topic))
    return await _load(spec, request, ids, _proto_receipt)


async def cloudevents(spec: Spec) -> Sample:
    """Publish a CloudEvent in binary mode."""
    ids = events.Ids()
    return await _load(spec, events.cloudevents_request(ids, spec.topic), ids, _json_receipt)


def _proto_receipt(body: bytes) -> bool:
    return pb.PublishResponse.FromString(body).results[0].HasField("receipt")


def _json_receipt(body: bytes) -> bool:
    return body.startswith(b'{"results":[{"receipt":')


async def _load(
    spec: Spec, template: bytes, ids: events.Ids, is_receipt: Callable[[bytes], bool]
) -> Sample:
    meter = Meter(spec)

    def next_request() -> bytes | None:
        return None if meter.stopping else template % ids.take(1)

    def answered(status: bytes, body: bytes) -> None:
        if status == b"200" and is_receipt(body):
            meter.events += 1
        else:
            meter.failed(1, f"{status.decode()} {body!r}")

    loop = asyncio.get_running_loop()
    for _ in range(spec.callers):
        await loop.create_unix_connection(lambda: _Caller(next_request, answered), spec.http_socket)
    return await meter.sample()


class _Caller(asyncio.Protocol):
    """One kept connection; the next request goes out when the answer is complete."""

    def __init__(
        self, next_request: Callable[[], bytes | None], answered: Callable[[bytes, bytes], None]
    ) -> None:
        """*next_request* gives None to stop; *answered* gets status and body."""
        self._next_request = next_request
        self._answered = answered
        self._rest = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._answered(b"", b"")

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        body = data.find(b"\r\n\r\n") + 4
        at = data.find(_LENGTH, 0, body) + len(_LENGTH)
        if body < 4 or len(data) < body + int(data[at : data.index(b"\r\n", at)]):
            self._rest = data
            return
        self._rest = b""
        self._answered(data[9:12], data[body:])
        self._send()

    def _send(self) -> None:
        request = self._next_request()
        if request is not None and self._transport is not None:
            self._transport.write(request)
