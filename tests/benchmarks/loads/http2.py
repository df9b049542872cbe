"""A gRPC client that costs next to nothing: HTTP/2 frames by hand, messages as bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_SET_MAX_CONCURRENT, _SET_INITIAL_WINDOW, _SET_MAX_FRAME = 3, 4, 5
_WINDOW_BYTES = 1 << 30
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class GrpcConnection(asyncio.Protocol):
    """
    One connection for calls of one RPC. Flow control of the server is kept; what is sent goes out
    with `flush`, so that many calls share one write.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._first = True
        self._next_stream = 1
        self._calls: dict[int, Call] = {}
        self._pending: deque[tuple[Call, bytes, bool]] = deque()
        self._out: list[bytes] = []
        self._rest = b""
        self._room = 65535
        self._initial_room = 65535
        self._max_frame = 16384
        self._max_streams = 1 << 31
        self._taken = 0
        self._ready = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self.lost: Exception | None = None

    @classmethod
    async def connect(cls, socket: str, path: str) -> GrpcConnection:
        """*socket*: path of a Unix socket; *path*: as "/sidecar.v1.PubSub/Publish"."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_unix_connection(lambda: cls(path), socket)
        async with asyncio.timeout(5):
            await connection._ready.wait()
        return connection

    # -- calls

    def call(self, on_message: Callable[[bytes], None], on_end: Callable[[], None]) -> Call:
        """
        A new call; its first message opens the stream, once the server takes one more.

        *on_end* comes after the last message, however the call ended.
        """
        return Call(self, on_message, on_end)

    def _open(self, call: Call) -> bool:
        if len(self._calls) >= self._max_streams:
            return False
        call.stream, call.room = self._next_stream, self._initial_room
        self._next_stream += 2
        self._calls[call.stream] = call
        block = self._header_block()
        self._out.append(_frame(_HEADERS, _END_HEADERS, call.stream, block))
        return True

    def _header_block(self) -> bytes:
        if not self._first:
            # Indices of the table's entries: the five below, newest first, behind 61 static ones.
            return b"\x83\x86\xc2\xc1\xc0\xbf\xbe"
        self._first = False
        return b"\x83\x86" + b"".join(
            b"\x40" + _string(name) + _string(value)
            for name, value in (
                (b":path", self._path.encode()),
                (b":authority", b"localhost"),
                (b"content-type", b"application/grpc"),
                (b"te", b"trailers"),
                (b"user-agent", b"benchmarks"),
            )
        )

    def queue(self, call: Call, message: bytes, *, end: bool) -> None:
        data = b"\x00" + len(message).to_bytes(4, "big") + message
        self._pending.append((call, data, end))

    def flush(self) -> None:
        """Write what the server has room for."""
        pending, out = self._pending, self._out
        while pending:
            call, data, end = pending[0]
            if not call.stream and not self._open(call):
                break
            room = min(self._room, call.room, self._max_frame)
            if room <= 0:
                break
            part = data[:room]
            whole = len(part) == len(data)
            self._room -= len(part)
            call.room -= len(part)
            out.append(_frame(_DATA, _END_STREAM if end and whole else 0, call.stream, part))
            if whole:
                pending.popleft()
            else:
                pending[0] = (call, data[room:], end)
        if out and self._transport is not None:
            self._transport.write(b"".join(out))
            out.clear()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # -- what the transport says

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        settings = _SET_INITIAL_WINDOW.to_bytes(2, "big") + _WINDOW_BYTES.to_bytes(4, "big")
        settings += _SET_MAX_FRAME.to_bytes(2, "big") + (1 << 20).to_bytes(4, "big")
        grant = _frame(_WINDOW, 0, 0, (_WINDOW_BYTES - 65535).to_bytes(4, "big"))
        transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + grant)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = exc or ConnectionError("closed")
        for call in list(self._calls.values()):
            call.on_end()

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        position, end = 0, len(data)
        while position + 9 <= end:
            stop = position + 9 + int.from_bytes(data[position : position + 3], "big")
            if stop > end:
                break
            stream = int.from_bytes(data[position + 5 : position + 9], "big")
            kind, flags = data[position + 3], data[position + 4]
            self._frame(kind, flags, stream, data[position + 9 : stop])
            position = stop
        self._rest = data[position:]
        self.flush()

    def _frame(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == _DATA:
            self._data(stream, body)
        elif kind == _WINDOW:
            more = int.from_bytes(body, "big")
            if stream == 0:
                self._room += more
            elif (call := self._calls.get(stream)) is not None:
                call.room += more
        elif kind == _PING and not flags & _ACK:
            self._out.append(_frame(_PING, _ACK, 0, body))
        elif kind == _SETTINGS and not flags & _ACK:
            self._settings(body)
        elif kind == _GOAWAY:
            raise ConnectionError(f"the server said goodbye: {body[8:]!r}")
        if kind == _RST or (kind in {_DATA, _HEADERS} and flags & _END_STREAM):
            call = self._calls.pop(stream, None)
            if call is not None:
                call.on_end()

    def _data(self, stream: int, body: bytes) -> None:
        call = self._calls.get(stream)
        if call is not None:
            call.received(body)
        self._taken += len(body)
        if self._taken > _WINDOW_BYTES // 2:
            grant = self._taken.to_bytes(4, "big")
            self._out += [_frame(_WINDOW, 0, 0, grant), _frame(_WINDOW, 0, stream, grant)]
            self._taken = 0

    def _settings(self, body: bytes) -> None:
        for i in range(0, len(body), 6):
            name = int.from_bytes(body[i : i + 2], "big")
            value = int.from_bytes(body[i + 2 : i + 6], "big")
            if name == _SET_INITIAL_WINDOW:
                for call in self._calls.values():
                    call.room += value - self._initial_room
                self._initial_room = value
            elif name == _SET_MAX_FRAME:
                self._max_frame = value
            elif name == _SET_MAX_CONCURRENT:
                self._max_streams = value
        self._out.append(_frame(_SETTINGS, _ACK, 0, b""))
        self._ready.set()


class Call:
    """One stream of a connection."""

    __slots__ = ("_connection", "_rest", "on_end", "on_message", "room", "stream")

    def __init__(
        self,
        connection: GrpcConnection,
        on_message: Callable[[bytes], None],
        on_end: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._rest = b""
        self.stream = 0
        """0: not open yet."""
        self.room = 0
        self.on_message = on_message
        self.on_end = on_end

    def send(self, message: bytes, *, end: bool = False) -> None:
        """Queue a message; `flush` of the connection writes it."""
        self._connection.queue(self, message, end=end)

    def received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        position, end = 0, len(data)
        while position + 5 <= end:
            stop = position + 5 + int.from_bytes(data[position + 1 : position + 5], "big")
            if stop > end:
                break
            self.on_message(data[position + 5 : stop])
            position = stop
        self._rest = data[position:]


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    head = len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + body


def _string(text: bytes) -> bytes:
    assert len(text) < 127
    return bytes((len(text),)) + text
