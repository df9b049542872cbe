"""A small HTTP/1.1 client that can also misbehave, and an app behind a real door."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sidecar.servers.asgi import Door
from sidecar.servers.sockets import unix_socket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from sidecar.servers.asgi import App


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class HttpConnection:
    """One connection; requests on it follow each other."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        await self.send(request(method, path, body, headers))
        return await self.reply(head_only=method == "HEAD")

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):  # refused half-way: the reply tells why
            await self.writer.drain()

    async def reply(self, *, head_only: bool = False) -> Reply:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])
        }
        size = 0 if head_only else int(headers["content-length"])
        return Reply(int(head[0].split()[1]), headers, await self.reader.readexactly(size))

    async def closed(self) -> bytes:
        """What still comes until the server closes."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""


def request(
    method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: sidecar"]
    if body or method == "POST":
        lines.append(f"content-length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True, slots=True)
class Served:
    door: Door
    path: Path

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[HttpConnection]:
        reader, writer = await asyncio.open_unix_connection(self.path)
        try:
            yield HttpConnection(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        async with self.connect() as connection:
            return await connection.ask(method, path, body, headers)


@contextlib.asynccontextmanager
async def serving(app: App, path: Path, **bounds: Any) -> AsyncIterator[Served]:
    """The app behind a door on a Unix socket; stopped without grace at the end."""
    async with asyncio.TaskGroup() as tasks:
        door = Door(app, [unix_socket(path)], tasks=tasks, **bounds)
        await door.start()
        try:
            yield Served(door, path)
        finally:
            await door.stop(0)


async def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
