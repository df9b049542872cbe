"""An HTTP/1.1 server for an ASGI app: uvicorn's protocol in our loop and life cycle, with bounds."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from sidecar.servers import sockets as listening

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Response = tuple[int, Headers, bytes]
"""Status, headers without content-length, body."""

log = logging.getLogger(__name__)


async def respond(send: Send, response: Response, *, more_body: bool = False) -> None:
    """*more_body*: the response is whole for the client, and the call is still ours to end."""
    status, headers, body = response
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


def write_through(scope: Scope) -> None:
    """
    For a response that is written piece by piece: from now on `send` first waits until the system
    has taken all that was sent before, so that what a slow reader leaves is not kept here.
    """
    connection: _Connection = scope["state"]["connection"]
    connection.transport.set_write_buffer_limits(high=0)


class Door:
    """
    One ASGI app on several listening sockets.

    uvicorn parses and writes; its server object stays out: it owns signals, polls ten times a
    second, and has no bound for a client that says nothing. A call whose client has gone is
    cancelled.
    """

    def __init__(
        self,
        app: App,
        sockets: Sequence[socket.socket],
        *,
        tasks: asyncio.TaskGroup,
        max_connections: int = 1000,
        receive_seconds: float = 10,
        idle_seconds: float = 75,
        max_head_bytes: int = 65536,
    ) -> None:
        """
        *sockets* listen already, and are closed by `stop`. *receive_seconds*: a request has this
        long to arrive as a whole, and a new connection to begin one. *idle_seconds*: a connection
        is kept this long between requests, and a reader that takes nothing.
        """
        self._sockets = sockets
        self._tasks = tasks
        self._config = uvicorn.Config(
            _until_the_client_goes(app),
            http=_Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=math.ceil(idle_seconds),
        )
        self._state = ServerState()
        self._bounds = _Bounds(
            self._state, max_connections, receive_seconds, idle_seconds, max_head_bytes
        )
        self._servers: list[asyncio.Server] = []
        self._watch: asyncio.Task[None] | None = None

    @property
    def connections(self) -> int:
        return len(self._state.connections)

    @property
    def calls(self) -> int:
        return len(self._state.tasks)

    async def start(self) -> None:
        """Accept connections from now on."""
        self._config.load()
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            if sock.family == socket.AF_UNIX:
                server = await loop.create_unix_server(
                    self._connection, sock=sock, backlog=listening.BACKLOG
                )
            else:
                server = await loop.create_server(
                    self._connection, sock=sock, backlog=listening.BACKLOG
                )
            self._servers.append(server)
        self._watch = self._tasks.create_task(self._bounds.watch(), name="http-door")

    async def stop(self, grace_seconds: float) -> None:
        """Stop listening, let calls finish for *grace_seconds*, then end them. Safe to repeat."""
        self._close_listeners()
        for connection in self._bounds.connections():
            connection.shutdown()
        try:
            async with asyncio.timeout(grace_seconds):
                await self._bounds.wait_empty()
        except TimeoutError:
            if self.calls:
                log.warning("ended %d HTTP calls that did not finish in time", self.calls)
        if self._watch is not None:
            self._watch.cancel()
        while self._state.connections:
            for connection in self._bounds.connections():
                connection.transport.abort()
            await self._bounds.wait_empty()
        while self._state.tasks:  # cancelled with their connections, and about to end
            await asyncio.wait(list(self._state.tasks))

    def _close_listeners(self) -> None:
        for sock in self._sockets:
            listening.unlink(sock)
        for server in self._servers:
            server.close()
        for sock in self._sockets:
            sock.close()

    def _connection(self) -> asyncio.Protocol:
        return _Connection(self._config, self._state, self._bounds)


def _until_the_client_goes(app: App) -> App:
    """The app, cancelled without a noise when its connection is lost."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        connection: _Connection = scope["state"]["connection"]
        connection.call = asyncio.current_task()
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            # The task is uvicorn's, nobody waits for its outcome, and only connection_lost
            # cancels it. uvicorn would log a traceback.
            connection.transport.abort()
        finally:
            connection.call = None

    return call


class _Bounds:
    """What a connection may take, and the watch that holds it to that."""

    def __init__(
        self,
        state: ServerState,
        max_connections: int,
        receive_seconds: float,
        idle_seconds: float,
        max_head_bytes: int,
    ) -> None:
        self._state = state
        self.max_connections = max_connections
        self.receive_seconds = receive_seconds
        self.idle_seconds = idle_seconds
        self.max_head_bytes = max_head_bytes
        self._empty = asyncio.Event()
        self._empty.set()

    def connections(self) -> Sequence[_Connection]:
        return [c for c in self._state.connections if isinstance(c, _Connection)]

    def entered(self) -> None:
        self._empty.clear()

    def left(self) -> None:
        if not self._state.connections:
            self._empty.set()

    async def wait_empty(self) -> None:
        await self._empty.wait()

    async def watch(self) -> None:
        """One timer for all connections: a timer per request would cost every call."""
        loop = asyncio.get_running_loop()
        pause = min(1.0, self.receive_seconds / 4)
        while True:
            await asyncio.sleep(pause)
            now = loop.time()
            for connection in self.connections():
                connection.check(now)


class _Connection(HttpToolsProtocol):
    """
    uvicorn's protocol with deadlines.

    `due` is when the client must have done what we wait for: sent a whole request, begun the next
    one, or taken our bytes. Infinite while a call is being handled.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, bounds: _Bounds) -> None:
        super().__init__(config, state, {"connection": self})
        self.call: asyncio.Task[None] | None = None
        self._bounds = bounds
        self._due = math.inf
        self._unread_due = math.inf
        self._head_bytes = 0
        self._in_head = False
        self._in_body = False
        self._refused = False

    # -- what the transport says

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._bounds.entered()
        self._expect(self._bounds.receive_seconds)
        if len(self.connections) > self._bounds.max_connections:
            self._refuse(503, "unavailable", "too many connections: close some, or try again")
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._bounds.left()
        # Cut the ties between scope and connection: cycles are for the collector to find, much later.
        self.app_state.clear()
        self.cycle = None  # type: ignore[assignment]
        self.scope = None  # type: ignore[assignment]
        if self.call is not None:
            self.call.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self._bounds.max_head_bytes:
            self._refuse(431, "invalid_argument", "the request's headers are too large")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_due = self.loop.time() + self._bounds.idle_seconds

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_due = math.inf

    # -- what the parser says

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._expect(self._bounds.receive_seconds)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False
        self._in_body = True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_body = False
        if self.cycle.response_complete:
            # Answered before its body was there: uvicorn's own idle timer is gone by now.
            self._expect(self._bounds.idle_seconds)
        else:
            self._due = math.inf

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "invalid_argument", "this is not an HTTP/1.1 request")

    def shutdown(self) -> None:
        if self._refused:
            self.transport.close()
        else:
            super().shutdown()

    # -- what the watch does

    def check(self, now: float) -> None:
        if now < self._due and now < self._unread_due:
            if self.transport.is_closing() and self._due is math.inf:
                self._expect(self._bounds.receive_seconds)
            return
        if self._refused or self.transport.is_closing() or now >= self._unread_due:
            self.transport.abort()  # it does not take our last bytes, or does not leave
        elif self.flow.read_paused or (self._in_head and self.call is not None):
            self._expect(self._bounds.receive_seconds)  # pipelined: it is we who are not ready
        elif self._in_head or (self._in_body and not self.cycle.response_started):
            self._refuse(408, "deadline_exceeded", "the request did not arrive in time")
        else:
            self.transport.close()

    def _expect(self, seconds: float) -> None:
        self._due = self.loop.time() + seconds

    def _refuse(self, status: int, code: str, message: str) -> None:
        """
        Answer past the app, and wait a little for the client to leave.

        Closed at once, one that is still sending would see a reset instead of the answer.
        """
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if self.cycle is not None:  # as if it had left already: the app sends nothing more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = b'{"code":"%s","message":"%s"}' % (code.encode(), message.encode())
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s" % (status, _REASONS[status], len(body), body)
        )
        self.transport.write_eof()
        self._expect(self._bounds.receive_seconds)


_REASONS: Mapping[int, bytes] = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}
