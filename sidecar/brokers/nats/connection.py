"""One NATS connection: nats-py's client, with a synchronous path for the bytes of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.protocol.parser import Parser

from sidecar.broker import BrokerState
from sidecar.errors import BrokerRefused, BrokerUnavailable, ConfigInvalid, SidecarError

if TYPE_CHECKING:
    from sidecar.config import NatsConnection

log = logging.getLogger(__name__)

OnMessage = Callable[[bytes, bytes, "bytes | None", bytes], None]
"""subject, reply (empty: none), header block or None, payload. Synchronous; must not raise."""
OnAnswer = Callable[["dict[str, Any] | SidecarError"], None]

NO_RESPONDERS = b"NATS/1.0 503"
"""How the headers begin when nobody listens on the subject that was published to."""


class NobodyListens(BrokerUnavailable):
    """The server said so at once: no JetStream, no such stream, or no leader right now."""


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

    async def parse(self, data: bytes = b"") -> None:  # noqa: C901, PLR0912 - each call costs 50 ns
        chunks = self._chunks
        if chunks:
            # A large payload arrives in many reads: join them once, when it is complete.
            chunks.append(data)
            self._have += len(data)
            if self._have < self._want:
                return
            data = b"".join(chunks)
            chunks.clear()
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
                if self._chunks is not chunks:
                    # Non-obvious: an error ended the connection and reset us. What is left
                    # belongs to it, and must not be put before the next one's first bytes.
                    return
        if position < end:
            rest = data[position:]
            chunks.append(rest)
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
        self._questions: dict[int, tuple[OnAnswer, asyncio.TimerHandle]] = {}
        self._asked = 0
        replies = self.new_inbox()
        self._replies = replies.encode()
        self._subscriptions["replies"] = (f"{replies}.*", "", self._on_reply)
        self._last_error = ""
        self._ended: asyncio.Event = asyncio.Event()
        self.live = False
        """Connected, and everything that was unanswered has been sent again."""
        self.on_state: Callable[[BrokerState], None] = lambda _state: None
        self.on_live: list[Callable[[], None]] = []
        self.on_lost: list[Callable[[], None]] = []
        self.on_closed: list[Callable[[], None]] = []

    @property
    def max_payload(self) -> int:
        client = self._client
        return client.max_payload if client is not None and client.max_payload else 1024 * 1024

    async def connect(self) -> None:
        """Raises BrokerUnavailable, or BrokerRefused for wrong credentials. When live: nothing."""
        if self.live:
            return
        await self._let_go()
        self._ended.clear()
        self._last_error = ""
        self._handlers = {}
        self._subs.clear()
        client = Client()
        client._ps = FrameParser(client, self._handlers)
        servers = [self._embedded[0]] if self._embedded else self._settings.servers
        await self._dial(client, servers)
        client.options["allow_reconnect"] = True
        client.options["max_reconnect_attempts"] = -1
        self._client = client
        for key in list(self._subscriptions):
            await self._open(key)
        if client.is_connected:
            self._went_live()

    async def _dial(self, client: Client, servers: list[str]) -> None:
        patience = self._settings.connect_timeout_seconds * len(servers) + 0.5
        try:
            async with asyncio.timeout(patience):
                await client.connect(**self._options(servers))
        except (nats_errors.Error, OSError) as error:  # TimeoutError is an OSError
            await _close(client)
            if _is_refusal(error):
                raise BrokerRefused(
                    f"the NATS server at {_listed(servers)} refused the credentials",
                    server=_listed(servers),
                ) from error
            why = self._last_error or str(error) or "no answer"
            raise BrokerUnavailable(
                f"cannot connect to NATS at {_listed(servers)}: {why}", server=_listed(servers)
            ) from error
        except BaseException:
            await _close(client)
            raise

    def _options(self, servers: list[str]) -> dict[str, Any]:
        settings = self._settings
        pause = settings.reconnect_seconds
        if self._embedded:  # a neighbour that is started again at once
            pause = min(pause, 0.2)
        options: dict[str, Any] = {
            "servers": servers,
            "name": self._client_name,
            # Until it connected once, the first error is the answer, and each server is tried once:
            # nats-py drops those that failed more often than this.
            "allow_reconnect": False,
            "max_reconnect_attempts": 0.5,
            "reconnect_time_wait": pause * random.uniform(0.8, 1.2),  # spread, no secret
            "connect_timeout": settings.connect_timeout_seconds,
            "ping_interval": settings.ping_seconds,
            "max_outstanding_pings": 2,
            "error_cb": self._on_error,
            "disconnected_cb": self._on_disconnected,
            "reconnected_cb": self._on_reconnected,
            "closed_cb": self._on_closed,
        }
        try:
            if self._embedded:
                options["token"] = self._embedded[1]
            elif token := settings.secret("token"):
                options["token"] = token
            if settings.user:
                options["user"] = settings.user
                options["password"] = settings.secret("password")
        except ConfigInvalid as error:  # the file of a secret is gone
            raise BrokerRefused(f"no credentials for NATS: {error.message}") from error
        return options

    # -- what nats-py tells us

    async def _on_error(self, error: Exception) -> None:
        self._last_error = str(error) or type(error).__name__
        if self._client is not None and _is_refusal(error):
            # nats-py would try the same credentials for ever; connect() reads them anew.
            self._ended.set()

    async def _on_disconnected(self) -> None:
        self._went_away(self._last_error or "connection lost")

    async def _on_reconnected(self) -> None:
        self._went_live()

    async def _on_closed(self) -> None:
        self._went_away(self._last_error or "closed")
        self._ended.set()

    def _went_live(self) -> None:
        assert self._client is not None  # only called by a client that connected
        self.live = True
        self._last_error = ""
        for callback in list(self.on_live):
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
        for callback in list(self.on_lost):
            callback()
        for number in list(self._questions):
            self._answer(number, BrokerUnavailable("the connection to NATS broke"))
        self.on_state(BrokerState(connected=False, detail=why))

    async def ended(self) -> None:
        """Wait until the client gave up for good, or is refused; connect again then."""
        await self._ended.wait()

    # -- bytes

    def write(self, frames: bytes) -> bool:
        """Write whole frames now; False, and nothing written, when not connected."""
        client = self._client
        if not self.live or client is None or not client.is_connected:
            return False
        try:
            client._transport.write(frames)
        except RuntimeError:  # uvloop, when the socket is closed and nats-py does not know yet
            return False
        return True

    def confirm(self, answered: Callable[[], None]) -> bool:
        """
        Write a PING; *answered* is called when the server has read all that was written before.

        It is never called when the connection breaks first. False: not connected.
        """
        if not self.write(b"PING\r\n"):
            return False
        pong = asyncio.get_running_loop().create_future()
        pong.add_done_callback(lambda future: None if future.cancelled() else answered())
        self._client._pongs.append(pong)  # type: ignore[union-attr] # it took the write
        return True

    async def flushed(self, seconds: float) -> bool:
        """Wait until the server has read all that was written, for so long at most."""
        done = asyncio.Event()
        if not self.confirm(done.set):
            return False
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
        return f"_INBOX.{random.getrandbits(96):024x}.{self._inboxes}"  # unique, no secret

    async def subscribe(self, subject: str, handler: OnMessage, *, queue: str = "") -> str:
        """
        Raw frames of *subject* to *handler*, from now on and after every (re)connect.

        Answers a key to unsubscribe. What is written after this is read after the subscription.
        """
        self._inboxes += 1
        key = str(self._inboxes)
        self._subscriptions[key] = (subject, queue, handler)
        await self._open(key)
        return key

    async def _open(self, key: str) -> None:
        client, subscription = self._client, self._subscriptions.get(key)
        if client is None or subscription is None:
            return
        subject, queue, handler = subscription
        # Non-obvious: subscribe() takes the next sid before its first await, so the handler is in
        # place before the first frame can arrive.
        self._handlers[str(client._sid + 1).encode()] = handler
        try:
            self._subs[key] = await client.subscribe(subject, queue=queue)
        except nats_errors.Error as error:
            self._subscriptions.pop(key, None)
            raise BrokerUnavailable(f"cannot subscribe to {subject!r}: {error}") from error
        _write_pending(client)

    async def unsubscribe(self, key: str, *, seconds: float = 2) -> None:
        """
        End a subscription; what the server had sent before still comes to its handler.

        Never raises; waits for the server for so long at most.
        """
        self._subscriptions.pop(key, None)
        sub = self._subs.pop(key, None)
        client, handlers = self._client, self._handlers
        if sub is None or client is None:
            return
        try:
            await sub.unsubscribe()
            _write_pending(client)
            await self.flushed(seconds)
        except nats_errors.Error:
            log.debug("unsubscribing from %s: the connection is gone", sub.subject)
        finally:
            handlers.pop(str(sub._id).encode(), None)

    # -- questions to the server

    def ask(self, subject: str, payload: object, then: OnAnswer, *, seconds: float) -> None:
        """
        A JSON request of the server's API; *then* is called once, soon or now.

        It gets the answer, errors of the API included, or BrokerUnavailable when there is none.
        """
        self._asked += 1
        number = self._asked
        body = json.dumps(payload).encode() if payload is not None else b""
        silence = BrokerUnavailable(f"the NATS server did not answer in {seconds:g} s")
        timer = asyncio.get_running_loop().call_later(seconds, self._answer, number, silence)
        self._questions[number] = then, timer
        frame = b"PUB %b %b.%d %d\r\n%b\r\n"
        if not self.write(frame % (subject.encode(), self._replies, number, len(body), body)):
            self._answer(number, BrokerUnavailable("not connected to NATS"))

    async def call(
        self, subject: str, payload: object = None, *, seconds: float = 5
    ) -> dict[str, Any]:
        """The same for who waits. Raises BrokerUnavailable."""
        future: asyncio.Future[dict[str, Any] | SidecarError]
        future = asyncio.get_running_loop().create_future()
        self.ask(
            subject,
            payload,
            lambda a: None if future.done() else future.set_result(a),
            seconds=seconds,
        )
        answer = await future
        if isinstance(answer, SidecarError):
            raise answer
        return answer

    def _on_reply(self, subject: bytes, _reply: bytes, headers: bytes | None, data: bytes) -> None:
        number = int(subject.rpartition(b".")[2])
        if headers is not None and headers.startswith(NO_RESPONDERS):
            nobody = NobodyListens("JetStream does not answer: is it enabled on the server?")
            self._answer(number, nobody)
        else:
            self._answer(number, json.loads(data) if data else {})

    def _answer(self, number: int, answer: dict[str, Any] | SidecarError) -> None:
        question = self._questions.pop(number, None)
        if question is not None:
            then, timer = question
            timer.cancel()
            then(answer)

    async def close(self) -> None:
        """Never raises; bounded by two seconds."""
        for callback in list(self.on_closed):
            callback()
        self._went_away("closed")
        await self._let_go()

    async def _let_go(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await _close(client)


def _write_pending(client: Client) -> None:
    """
    What nats-py has queued, now: its own writer runs a turn later.

    Non-obvious: without this, a request that we write straight away overtakes the SUB of its answer.
    """
    if client.is_connected and client._pending:
        queued, client._pending = client._pending, []
        client._pending_data_size = 0
        with contextlib.suppress(RuntimeError):  # closed: a reconnect subscribes again
            client._transport.writelines(queued)


async def _close(client: Client) -> None:
    client._disconnected_cb = client._closed_cb = None  # we know
    try:
        async with asyncio.timeout(2):
            await client.close()
    except TimeoutError:  # the server reads no more: do not keep the socket for it
        writer = getattr(client._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
    except (nats_errors.Error, OSError, AttributeError, AssertionError) as error:
        # AttributeError, AssertionError: closing a client that never connected.
        log.debug("closing the NATS connection: %r", error)


_REFUSALS = ("authorization violation", "authentication expired", "authentication revoked")
"""What the server says of credentials, in its -ERR lines (nats-server, server/errors.go)."""


def _is_refusal(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, nats_errors.AuthorizationError) or any(r in text for r in _REFUSALS)


def _listed(servers: list[str]) -> str:
    return ", ".join(server.partition("://")[2].rpartition("@")[2] for server in servers)
