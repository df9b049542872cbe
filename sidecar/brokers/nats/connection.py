"""One NATS connection: nats-py's client, with a synchronous path for the bytes of events."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.protocol.parser import Parser

from sidecar.broker import BrokerState
from sidecar.errors import BrokerRefused, BrokerUnavailable

if TYPE_CHECKING:
    from sidecar.config import NatsConnection

log = logging.getLogger(__name__)

OnMessage = Callable[[bytes, bytes, "bytes | None", bytes], None]
"""subject, reply (empty: none), header block or None, payload. Synchronous; must not raise."""


class FrameParser(Parser):  # type: ignore[misc] # nats-py is untyped
    """
    nats-py's parser, five times as fast, for subscriptions that take raw frames.

    Non-obvious: it stands in for `Client._ps`. It keeps its own buffer and hands every frame it
    does not know to the client's handlers; tests/brokers/test_nats_connection.py names what it
    leans on, for whoever raises nats-py's version.
    """

    def __init__(self, client: Client, handlers: dict[bytes, OnMessage]) -> None:
        self._handlers = handlers
        super().__init__(client)

    def reset(self) -> None:
        super().reset()
        self._chunks: list[bytes] = []
        self._have = 0
        self._want = 0

    async def parse(self, data: bytes = b"") -> None:
        if self._chunks:
            # A large payload arrives in many reads: join them once, when it is complete.
            self._chunks.append(data)
            self._have += len(data)
            if self._have < self._want:
                return
            data = b"".join(self._chunks)
            self._chunks.clear()
        end = len(data)
        position = 0
        self._want = 0
        while position < end:
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                break
            kind = data[position]
            if kind == 77 or kind == 72:  # M(SG), H(MSG)
                args = data[position:line_end].split()
                start = line_end + 2
                stop = start + int(args[-1])
                if stop + 2 > end:
                    self._want = stop + 2 - position
                    break
                if kind == 72:
                    body = start + int(args[-2])
                    headers = data[start:body]
                    reply = args[3] if len(args) == 6 else b""
                else:
                    body = start
                    headers = None
                    reply = args[3] if len(args) == 5 else b""
                position = stop + 2
                handler = self._handlers.get(args[2])
                if handler is not None:
                    handler(args[1], reply, headers, data[body:stop])
                else:
                    await self.nc._process_msg(
                        int(args[2]), args[1], reply, data[body:stop], headers
                    )
            else:
                line = data[position:line_end]
                position = line_end + 2
                await self._control(line)
        if position < end:
            rest = data[position:]
            self._chunks.append(rest)
            self._have = len(rest)

    async def _control(self, line: bytes) -> None:
        client = self.nc
        if line.startswith(b"PING"):
            await client._process_ping()
        elif line.startswith(b"PONG"):
            await client._process_pong()
        elif line.startswith(b"INFO"):
            await client._process_info(json.loads(line[5:]))
        elif line.startswith(b"-ERR"):
            await client._process_err(line[5:].decode(errors="replace").lower())
        elif not line.startswith(b"+OK"):
            raise nats_errors.ProtocolError(f"unknown protocol line: {line[:40]!r}")


class Connection:
    """
    Connects, stays connected, and says when it is back.

    `write` goes straight to the socket, past nats-py's pending buffer: what was written while the
    connection broke is then nowhere half-sent, and the owner, who knows what is unanswered, sends
    that again in its first order from *on_live*.
    """

    def __init__(
        self, settings: NatsConnection, *, client_name: str, embedded: tuple[str, str] | None = None
    ) -> None:
        """*embedded* is (url, token) of the supervised server."""
        self._settings = settings
        self._client_name = client_name
        self._embedded = embedded
        self._client: Client | None = None
        self._handlers: dict[bytes, OnMessage] = {}
        self._subscriptions: dict[str, tuple[str, str, OnMessage]] = {}
        self._subs: dict[str, Any] = {}
        self._inboxes = 0
        self._last_error = ""
        self._ended: asyncio.Event = asyncio.Event()
        self.live = False
        """Connected, and everything that was unanswered has been sent again."""
        self.on_state: Callable[[BrokerState], None] = lambda _state: None
        self.on_live: list[Callable[[], None]] = []
        self.on_lost: list[Callable[[], None]] = []

    @property
    def max_payload(self) -> int:
        client = self._client
        return client.max_payload if client is not None and client.max_payload else 1024 * 1024

    async def connect(self) -> None:
        """Raises BrokerUnavailable, or BrokerRefused for wrong credentials."""
        if self._client is not None:
            client, self._client = self._client, None
            await _close(client)
        self._ended.clear()
        self._handlers.clear()
        self._subs.clear()
        client = Client()
        client._ps = FrameParser(client, self._handlers)
        self._last_error = ""
        servers = [self._embedded[0]] if self._embedded else self._settings.servers
        patience = self._settings.connect_timeout_seconds * len(servers) + 0.5
        try:
            async with asyncio.timeout(patience):
                await client.connect(**self._options(servers))
        except TimeoutError as error:
            await _close(client)
            raise self._unavailable(servers, self._last_error or "no answer") from error
        except asyncio.CancelledError:
            await _close(client)
            raise
        except (nats_errors.Error, OSError) as error:
            await _close(client)
            if (
                isinstance(error, nats_errors.AuthorizationError)
                or "authorization" in str(error).lower()
            ):
                raise BrokerRefused(
                    f"the NATS server at {_listed(servers)} refused the credentials",
                    server=_listed(servers),
                ) from error
            raise self._unavailable(servers, str(error)) from error
        client.options["allow_reconnect"] = True
        self._client = client
        for key, (subject, queue, handler) in self._subscriptions.items():
            await self._open(key, subject, queue, handler)
        self._went_live()

    def _unavailable(self, servers: list[str], why: str) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"cannot connect to NATS at {_listed(servers)}: {why}", server=_listed(servers)
        )

    def _options(self, servers: list[str]) -> dict[str, Any]:
        settings = self._settings
        pause = settings.reconnect_seconds
        if self._embedded:  # a neighbour that is started again at once
            pause = min(pause, 0.2)
        options: dict[str, Any] = {
            "servers": servers,
            "name": self._client_name,
            "allow_reconnect": False,  # until it connected once: then the first error is the answer
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": pause * random.uniform(0.8, 1.2),
            "connect_timeout": settings.connect_timeout_seconds,
            "ping_interval": settings.ping_seconds,
            "max_outstanding_pings": 2,
            "error_cb": self._on_error,
            "disconnected_cb": self._on_disconnected,
            "reconnected_cb": self._on_reconnected,
            "closed_cb": self._on_closed,
        }
        if self._embedded:
            options["token"] = self._embedded[1]
        elif token := settings.secret("token"):
            options["token"] = token
        if settings.user:
            options["user"] = settings.user
            options["password"] = settings.secret("password")
        return options

    # -- what nats-py tells us

    async def _on_error(self, error: Exception) -> None:
        self._last_error = str(error) or type(error).__name__

    async def _on_disconnected(self) -> None:
        self._went_away(self._last_error or "connection lost")

    async def _on_reconnected(self) -> None:
        self._went_live()

    async def _on_closed(self) -> None:
        self._went_away(self._last_error or "closed")
        self._ended.set()

    def _went_live(self) -> None:
        assert self._client is not None
        self.live = True
        for callback in self.on_live:
            callback()
        url = self._client.connected_url
        self.on_state(
            BrokerState(
                connected=True, detail=url.netloc.rpartition("@")[2] if url else "connected"
            )
        )

    def _went_away(self, why: str) -> None:
        if not self.live:
            return
        self.live = False
        for callback in self.on_lost:
            callback()
        self.on_state(BrokerState(connected=False, detail=why))

    async def ended(self) -> None:
        """Wait until the client gave up for good (credentials changed); connect again then."""
        await self._ended.wait()

    # -- bytes

    def write(self, frames: bytes) -> bool:
        """Write whole frames now; False, and nothing written, when not connected."""
        client = self._client
        if not self.live or client is None or not client.is_connected:
            return False
        client._transport.write(frames)
        return True

    def confirm(self, answered: Callable[[], None]) -> None:
        """Write a PING; *answered* is called when the server has read all that was written before."""
        client = self._client
        assert client is not None
        pong = asyncio.get_running_loop().create_future()
        pong.add_done_callback(lambda future: None if future.cancelled() else answered())
        client._pongs.append(pong)
        client._transport.write(b"PING\r\n")

    async def flushed(self, seconds: float) -> bool:
        """Wait until the server has read all that was written, for so long at most."""
        if not self.live:
            return False
        done = asyncio.Event()
        self.confirm(done.set)
        try:
            async with asyncio.timeout(seconds):
                await done.wait()
        except TimeoutError:
            return False
        return True

    # -- subscriptions that outlive the client

    def new_inbox(self) -> str:
        """A subject prefix nobody else uses."""
        self._inboxes += 1
        return f"_INBOX.{random.getrandbits(96):024x}.{self._inboxes}"

    async def subscribe(self, subject: str, handler: OnMessage, *, queue: str = "") -> str:
        """Raw frames of *subject* to *handler*, also after reconnects; answers a key to unsubscribe."""
        self._inboxes += 1
        key = str(self._inboxes)
        self._subscriptions[key] = (subject, queue, handler)
        await self._open(key, subject, queue, handler)
        return key

    async def _open(self, key: str, subject: str, queue: str, handler: OnMessage) -> None:
        client = self._client
        if client is None:
            return
        # Non-obvious: subscribe() takes the next sid before its first await, so the handler is in
        # place before the first frame can arrive.
        self._handlers[str(client._sid + 1).encode()] = handler
        try:
            self._subs[key] = await client.subscribe(subject, queue=queue)
        except nats_errors.Error as error:
            raise BrokerUnavailable(f"cannot subscribe to {subject!r}: {error}") from error

    async def unsubscribe(self, key: str) -> None:
        """Never raises."""
        self._subscriptions.pop(key, None)
        sub = self._subs.pop(key, None)
        if sub is None:
            return
        self._handlers.pop(str(sub._id).encode(), None)
        try:
            await sub.unsubscribe()
        except nats_errors.Error:
            log.debug("unsubscribing from %s: the connection is gone", sub.subject)

    async def call(self, subject: str, payload: object, *, timeout: float = 5) -> dict[str, Any]:
        """
        A JSON request of the server's API; the answer, errors included, as a dict.

        Raises BrokerUnavailable when not connected or not answered in time.
        """
        client = self._client
        if client is None or not client.is_connected:
            raise BrokerUnavailable("not connected to NATS")
        body = json.dumps(payload).encode() if payload is not None else b""
        try:
            answer = await client.request(subject, body, timeout=timeout)
        except nats_errors.NoRespondersError as error:
            raise BrokerUnavailable(
                f"no answer to {subject.split('.')[2]}: is JetStream enabled on the server?"
            ) from error
        except (nats_errors.Error, TimeoutError) as error:
            raise BrokerUnavailable(f"the NATS server did not answer in {timeout:g} s") from error
        decoded: dict[str, Any] = json.loads(answer.data)
        return decoded

    async def close(self) -> None:
        """Never raises; bounded by two seconds."""
        self.live = False
        client, self._client = self._client, None
        self._subscriptions.clear()
        if client is not None:
            await _close(client)


async def _close(client: Client) -> None:
    client._disconnected_cb = client._closed_cb = None
    try:
        async with asyncio.timeout(2):
            await client.close()
    except (nats_errors.Error, OSError, TimeoutError, AttributeError, AssertionError) as error:
        # AttributeError, AssertionError: closing a client that never connected.
        log.debug("closing the NATS connection: %r", error)


def _listed(servers: list[str]) -> str:
    return ", ".join(server.partition("://")[2].rpartition("@")[2] for server in servers)
