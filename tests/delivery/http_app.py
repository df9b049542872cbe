"""An app that is pushed to: a real HTTP server in this loop, which answers as the test says."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import uvicorn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

DEADLINE_SECONDS = 8.0


class Got(NamedTuple):
    """One request."""

    headers: dict[str, str]
    body: bytes
    at: float
    """Loop time."""

    @property
    def id(self) -> str:
        return self.headers["ce-id"]

    @property
    def attempt(self) -> int:
        return int(self.headers["sidecar-attempt"])


class Answer(NamedTuple):
    status: int = 204
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


class HttpApp:
    """
    Serves on a port of its own, or on a Unix socket; stopped, it may be started again there.

    *answer* is asked for each request, and may take its time.
    """

    def __init__(
        self,
        answer: Callable[[Got], Awaitable[Answer]] | None = None,
        *,
        path: Path | None = None,
    ) -> None:
        self._answer = answer or _good
        self._path = path
        self._port = 0
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self.got: list[Got] = []
        self.under_way = 0
        self.most_under_way = 0
        self._came = asyncio.Event()

    @property
    def url(self) -> str:
        if self._path is not None:
            return f"unix://{self._path}:/events"
        return f"http://127.0.0.1:{self._port}/events"

    def reserve(self) -> None:
        """Choose the port, without listening yet."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", self._port))
            self._port = probe.getsockname()[1]

    async def start(self) -> None:
        if self._path is None and not self._port:
            self.reserve()
        config = uvicorn.Config(
            self._serve,
            host="127.0.0.1",
            port=self._port,
            uds=None if self._path is None else str(self._path),
            interface="asgi3",
            lifespan="off",
            log_level="critical",
            access_log=False,
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._serving = asyncio.create_task(self._server._serve())
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not self._server.started:
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        assert self._server is not None
        assert self._serving is not None
        self._server.should_exit = True
        await self._serving

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def take(self, count: int) -> list[Got]:
        """The first *count* requests there were."""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while len(self.got) < count:
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise AssertionError(f"{len(self.got)} of {count} came") from None
        return self.got[:count]

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        headers |= {":method": scope["method"], ":path": scope["path"]}
        got = Got(headers, body, asyncio.get_running_loop().time())
        self.got.append(got)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self._came.set()
        try:
            answer = await self._answer(got)
        finally:
            self.under_way -= 1
        await send(
            {
                "type": "http.response.start",
                "status": answer.status,
                "headers": [(name.encode(), value.encode()) for name, value in answer.headers],
            }
        )
        await send({"type": "http.response.body", "body": answer.body})


async def _good(_got: Got) -> Answer:
    return Answer()
