"""
POST over kept connections, and exactly what became of each: a small HTTP/1.1 client.

Of an answer that did not come it has to be known whether the app had read the request: that is
what tells an app that is down, or was just going, from one that crashed with an event in its hands.
It also costs a fifth of what aiohttp's client does for a request (see tests/benchmarks/README.md).
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import ssl
from collections import deque
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import httptools

from sidecar.delivery.push.answers import MAX_TEXT, Answer

if TYPE_CHECKING:
    from collections.abc import Sequence

IDLE_SECONDS = 1.0
"""A connection that lay idle for longer may be closed by the app just as we write to it."""
READ_AT_ONCE_BYTES = 2048
"""Every server reads so much of a request at once, so it has read all of this, or nothing."""
FULL_SECONDS = 0.02
"""Pause before the next try where the app's queue of connections is full."""
_UNREAD = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN})
"""How a connection ends that has bytes nobody read, had ended before, or was none (a full queue)."""
MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 1024
"""An answer's body is read, so that the connection can be used again; of a larger one it is closed."""
_INFORMATIONAL = 200


class Unreachable(Exception):
    """No connection to the app: it never saw the request."""


class Broken(Exception):
    """The connection ended after the request was written, and before its answer was there."""

    def __init__(self, why: str, *, unread: bool = False) -> None:
        """*unread*: of what was written last, at least, nothing was read."""
        super().__init__(why)
        self.unread = unread


class NoAnswer(Exception):
    """The app has the request, and did not answer in time."""


class Client:
    """Connections to one address, each with one request at a time."""

    def __init__(self, path: str, url: str, *, connect_seconds: float) -> None:
        """*path*: of a Unix socket, or empty; *url*: as config.push_address gives it."""
        parts = urlsplit(url)
        self._path = path
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._connect_seconds = connect_seconds
        self._idle: deque[_Connection] = deque()
        self._all: set[_Connection] = set()
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        self._start = f"POST {target} HTTP/1.1\r\nhost: {parts.netloc}\r\n".encode()

    @property
    def connections(self) -> int:
        return len(self._all)

    async def probe(self) -> str:
        """Try to connect; returns why that failed, or nothing. What comes of it is kept."""
        try:
            connection = await self._connect()
        except Unreachable as error:
            return str(error)
        self._give_back(connection)
        return ""

    async def post(self, head: bytes, body: bytes, *, seconds: float) -> Answer:
        """
        POST *body*; *head* are header lines, each with its CRLF, but for host and content-length.

        Raises NoAnswer after *seconds*, Unreachable (also when they passed without a connection)
        and Broken. Cancelled, it closes its connection.

        Non-obvious: a system that closes a socket with unread bytes in it sends a reset, and else
        an orderly end. So after a reset the app has not read what fits into one read of any server.
        From another host an orderly end may also have crossed our request; where the connection had
        been idle it is taken for that, and the request is repeated, once.
        """
        request = b"%scontent-length: %d\r\n%s\r\n%s" % (self._start, len(body), head, body)
        deadline = asyncio.get_running_loop().time() + seconds
        again = False
        while True:
            connection = (None if again else self._take_idle()) or await self._connect(deadline)
            stale = not again and connection.may_be_stale
            try:
                return await self._send(connection, request, deadline)
            except Broken as error:
                unread = error.unread and len(request) <= READ_AT_ONCE_BYTES
                if connection.answers or not (unread or stale):
                    raise
                if not (connection.used or stale):
                    raise Unreachable("the connection ended before the request was read") from error
                again = True
                self._drop_stale()

    async def _send(self, connection: _Connection, request: bytes, deadline: float) -> Answer:
        try:
            async with asyncio.timeout_at(deadline):
                answer = await connection.send(request)
        except TimeoutError:
            connection.abort()
            raise NoAnswer from None
        except BaseException:
            connection.abort()
            raise
        self._give_back(connection)
        return answer

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()  # the one used last is the least likely to be closed
            if connection.usable and not connection.readable:
                return connection
            connection.abort()
        return None

    def _drop_stale(self) -> None:
        """One was, so the others may be: an event must not try them one after the other."""
        for connection in [one for one in self._idle if one.may_be_stale]:
            self._idle.remove(connection)
            connection.abort()

    def _give_back(self, connection: _Connection) -> None:
        if connection.usable:
            connection.rests()
            self._idle.append(connection)
        else:
            connection.abort()

    async def _connect(self, deadline: float = float("inf")) -> _Connection:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout_at(min(deadline, began + self._connect_seconds)):
                return await self._open()
        except TimeoutError:
            raise Unreachable(f"no connection within {loop.time() - began:.1f} s") from None
        except OSError as error:
            number = error.errno
            if number is None or isinstance(error, socket.gaierror | ssl.SSLError):
                # Their numbers are no system errors; an end in the midst of TLS has no word at all.
                reason = error.strerror or str(error) or "the connection ended at once"
            else:
                reason = os.strerror(number)
            raise Unreachable(reason) from error

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if not self._path:
            _, made = await loop.create_connection(self._new, self._host, self._port, ssl=self._tls)
            return made
        while True:
            try:
                _, made = await loop.create_unix_connection(self._new, self._path)
            except BlockingIOError:
                # The queue of a Unix socket is full, where TCP would wait: the app is busy.
                await asyncio.sleep(FULL_SECONDS)
            else:
                return made

    def _new(self) -> _Connection:
        return _Connection(self._all)

    def close(self) -> None:
        """End all connections, whatever is under way on them."""
        for connection in list(self._all):
            connection.abort()
        self._idle.clear()


class _Connection(asyncio.Protocol):
    """One connection; the parser calls its on_… methods."""

    def __init__(self, alive: set[_Connection]) -> None:
        """*alive*: where it is, while it is one; uvloop also makes those that never get so far."""
        self._alive = alive
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._poll = select.poll()
        self._same_host = True
        self.used = False
        """A request was answered on it."""
        self._loop = asyncio.get_running_loop()
        self._rested_at = self._loop.time()
        self._lost = False
        self._reset()
        self._reusable = True

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.answers = False
        """A byte of the answer came."""
        self._head_bytes = self._body_bytes = 0
        self._retry_after = self._content_type = ""
        self._text = b""
        self._head_complete = False

    @property
    def usable(self) -> bool:
        return not self._lost and self._reusable and self._transport is not None

    @property
    def readable(self) -> bool:
        """Between requests: the app has closed it, though the loop has not come to tell us."""
        return bool(self._poll.poll(0))

    @property
    def may_be_stale(self) -> bool:
        """It lay idle, and an end that the other host has sent may still be on its way."""
        return not self._same_host and self._loop.time() - self._rested_at > IDLE_SECONDS

    def rests(self) -> None:
        self._rested_at = self._loop.time()

    def send(self, request: bytes) -> asyncio.Future[Answer]:
        """Write a request; the future fails with Broken."""
        self._reset()
        self._waiting = waiting = self._loop.create_future()
        if self._transport is None or self._lost:
            self._break("the connection was closed", unread=True)
        else:
            self._transport.write(request)
        return waiting

    def abort(self) -> None:
        self._reusable = False
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass
        self._alive.add(self)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        here, there = (transport.get_extra_info(name) for name in ("sockname", "peername"))
        self._same_host = not isinstance(there, tuple) or here[0] == there[0]

    def data_received(self, data: bytes) -> None:
        if self._waiting is None:  # nobody asked
            self.abort()
            return
        self.answers = True
        try:
            self._parser.feed_data(data)
            if not self._head_complete:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    raise httptools.HttpParserError("too large")  # noqa: TRY301 - as any other
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(f"the answer is not HTTP: {error}")
            self.abort()
        if self._body_bytes > MAX_BODY_BYTES:
            self._reusable = False
            self._done()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self._alive.discard(self)
        if self._head_complete and self._waiting is not None:
            self._reusable = False
            self._done()  # the status was said, whatever was to follow
        if error is None:
            self._break("the connection ended before the answer")
        else:
            self._break(str(error), unread=getattr(error, "errno", 0) in _UNREAD)

    def _break(self, why: str, *, unread: bool = False) -> None:
        self._reusable = False
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_exception(Broken(why, unread=unread))

    # -- httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == b"retry-after":
            self._retry_after = value.decode("latin-1")
        elif lower == b"content-type":
            self._content_type = value.decode("latin-1").lower()

    def on_headers_complete(self) -> None:
        self._head_complete = True
        self._reusable = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if len(self._text) < MAX_TEXT:
            self._text += body[: MAX_TEXT - len(self._text)]

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < _INFORMATIONAL:
            self._head_complete = False  # as 100: the answer itself is still to come
            return
        self._done()

    def _done(self) -> None:
        self.used = True
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            status = self._parser.get_status_code()
            waiting.set_result(Answer(status, self._retry_after, self._content_type, self._text))


def header_lines(headers: Sequence[tuple[str, str]]) -> bytes:
    """As they stand in a request. Values are printable ASCII."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers]).encode("latin-1")
