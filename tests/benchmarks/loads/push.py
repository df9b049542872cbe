"""An app that is pushed to: as little of an HTTP server as there can be, which counts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httptools

from tests.benchmarks.meter import Meter

if TYPE_CHECKING:
    from tests.benchmarks.spec import Sample, Spec

_ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


async def push(spec: Spec) -> Sample:
    """Answers each request at once; a request is as many events as it has of \"specversion\"."""
    meter = Meter(spec)
    first = asyncio.Event()

    class App(asyncio.Protocol):
        """One connection."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._transport = transport
            self._parser = httptools.HttpRequestParser(self)
            self._body = b""

        def data_received(self, data: bytes) -> None:
            self._parser.feed_data(data)

        def on_body(self, body: bytes) -> None:
            self._body += body

        def on_message_complete(self) -> None:
            events = self._body.count(b'"specversion"') if spec.batch > 1 else 1
            self._body = b""
            meter.events += events
            first.set()
            if meter.events >= spec.events:
                meter.run_out.set()
            self._transport.write(_ANSWER)  # type: ignore[attr-defined]

    server = await asyncio.get_running_loop().create_unix_server(App, spec.push_socket)
    async with server:
        return await meter.sample(first)
