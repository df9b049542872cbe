"""Server-sent events: GET /v1/subscriptions/{name}/events, one event of the stream per delivery."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from sidecar.errors import Internal, InvalidRequest, MethodMissing, QueueFull, SidecarError
from sidecar.event import Settlement, Verdict
from sidecar.servers.asgi import respond, write_through
from sidecar.servers.connect import MAX_TEXT, error_response, fault_response
from sidecar.wire.cloudevents import position_fields, to_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sidecar.delivery.consumers import Delivery
    from sidecar.delivery.hub import Hub
    from sidecar.delivery.subscription import Subscription
    from sidecar.servers.asgi import Headers, Receive, Response, Scope, Send

SUBSCRIPTIONS = "/v1/subscriptions/"
CREDIT = 16
MAX_CREDIT = 1000
MAX_BATCH = 100
"""Deliveries that wait for the socket at once, at most."""
PING_SECONDS = 15.0
"""Quiet for so long, a comment is sent: proxies end connections that say nothing."""

_PATH = re.compile(rf"{SUBSCRIPTIONS}([^/]+)/events")
_HEADERS = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events until it has 4 kB of them
    (b"connection", b"close"),
)
_PING = b": ping\n\n"


class Options(NamedTuple):
    credit: int
    """So many deliveries may be unsettled."""
    auto: bool
    """Each delivery is acked when it was written, instead of by its token."""


class EventStreams:
    """The ASGI app of everything below SUBSCRIPTIONS."""

    def __init__(self, hub: Hub, *, max_streams: int, ping_seconds: float = PING_SECONDS) -> None:
        self._hub = hub
        self._max = max_streams
        self._ping_seconds = ping_seconds
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = self._open(scope)
        if not isinstance(stream, EventStream):
            await respond(send, stream)
            return
        self.open += 1
        try:
            await self._serve(stream, scope, send)
        finally:
            self.open -= 1
            stream.leave()

    def _open(self, scope: Scope) -> EventStream | Response:
        """The stream that is asked for, attached; or the answer where there is none to write."""
        path, method = scope["path"], scope["method"]
        found = _PATH.fullmatch(path)
        if found is None:
            missing = MethodMissing(
                f"nothing is at {path[:MAX_TEXT]}: GET {SUBSCRIPTIONS}{{name}}/events"
            )
            return error_response(missing, http_status=404)
        if method not in {"GET", "HEAD"}:
            wrong = MethodMissing(f"{method} is not for {path[:MAX_TEXT]}: use GET, HEAD")
            response = error_response(wrong, http_status=405)
            response[1].append((b"allow", b"GET, HEAD"))
            return response
        try:
            options = _options(scope["query_string"])
            subscription = self._hub.get(found[1])
            if method == "HEAD":
                return 200, list(_HEADERS), b""
            self._check_room()
            stream = EventStream(subscription, options)
            subscription.attach(stream, at_most=options.credit)
        except SidecarError as error:
            return error_response(error)
        return stream

    def _check_room(self) -> None:
        if self.open >= self._max:
            raise QueueFull(
                f"{self._max} event streams are open: close some, or raise limits.max_streams",
                retry_after=1,
            )

    async def _serve(self, stream: EventStream, scope: Scope, send: Send) -> None:
        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            # It waits for what is before it: nothing is called written that is still here.
            await send({"type": "http.response.body", "body": b"", "more_body": True})

        write_through(scope)
        headers: Headers = list(_HEADERS)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await stream.pump(write, self._ping_seconds)
        except Exception as error:  # noqa: BLE001 - its text may quote an event: only we log it
            fault_response(SUBSCRIPTIONS, error)
            await write(_event("closed", _closed(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class EventStream:
    """
    One stream: what waits to be written of it, and what becomes of it when its reader goes.

    Bounded for a reader that is slow: while anything is unwritten it gets no more, whatever its
    credit. What was written whole and is unsettled when the reader goes counts as failed, as for a
    gRPC stream that broke; what was not, is uncounted.
    """

    def __init__(self, subscription: Subscription, options: Options) -> None:
        self.credit = options.credit
        self.max_batch = min(options.credit, MAX_BATCH)
        self._subscription = subscription
        self._auto = options.auto
        self._unwritten: deque[Delivery] = deque()
        self._changed = asyncio.Event()
        self._ended: Exception | None = None

    @property
    def takes_more(self) -> bool:
        return not self._unwritten

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        self._unwritten += deliveries
        self._changed.set()

    def closed(self, why: Exception) -> None:
        self._ended = why
        self._changed.set()

    def leave(self) -> None:
        """No more is written, whoever ended it."""
        subscription = self._subscription
        subscription.hand_back([delivery.token for delivery in self._unwritten])
        self._unwritten.clear()
        subscription.detach(self, clean=self._auto or self._ended is not None)

    async def pump(self, write: Callable[[bytes], Awaitable[None]], ping_seconds: float) -> None:
        """Write what comes until `closed`; *write* returns when the system has all of it."""
        await write(_event("opened", _opened(self._subscription)))
        while True:
            while self._unwritten:
                # It is unwritten until it is written: we may be cancelled in between.
                try:
                    await self._write(self._unwritten[0], write)
                except Exception:
                    self._unwritten.popleft()  # it counts, or it would come again for ever
                    raise
                self._unwritten.popleft()
            self._subscription.written(self)
            if self._ended is not None:
                await write(_event("closed", _closed(self._ended)))
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(ping_seconds):
                    await self._changed.wait()
            except TimeoutError:
                await write(_PING)

    async def _write(self, delivery: Delivery, write: Callable[[bytes], Awaitable[None]]) -> None:
        if self._subscription.window.find(delivery.token) is None:
            return  # its lease ended while it waited: it is on its way to somebody else
        await write(_delivery(delivery))
        if self._auto:
            self._subscription.settle([Settlement(delivery.token, Verdict.ACK)])


# -- the query


def _options(query: bytes) -> Options:
    """Raises InvalidRequest."""
    try:
        given = parse_qsl(query.decode(), keep_blank_values=True, max_num_fields=10)
    except ValueError as error:
        raise InvalidRequest("the query cannot be read: use credit=16&settle=auto") from error
    credit, settle = str(CREDIT), "token"
    for name, value in given:
        if name == "credit":
            credit = value
        elif name == "settle":
            settle = value
        else:
            raise InvalidRequest(
                f"{name[:MAX_TEXT]!r} is not known: use credit and settle", field="query"
            )
    if not re.fullmatch(r"[0-9]{1,4}", credit) or not 1 <= int(credit) <= MAX_CREDIT:
        raise InvalidRequest(f"credit: must be a number from 1 to {MAX_CREDIT}", field="credit")
    if settle not in {"token", "auto"}:
        raise InvalidRequest('settle: must be "token" or "auto"', field="settle")
    return Options(int(credit), settle == "auto")


# -- the events of the stream


def _event(name: str, data: dict[str, object]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))


def _opened(subscription: Subscription) -> dict[str, object]:
    settings = subscription.settings
    return {
        "subscription": settings.name,
        "broker": subscription.broker.name,
        "topic": settings.topic,
        "leaseSeconds": settings.lease_seconds,
    }


def _closed(why: Exception) -> dict[str, object]:
    fault = Internal("a fault of the sidecar: its log says more")
    error = why if isinstance(why, SidecarError) else fault
    return {"reason": error.code, "message": error.message, "retryable": error.retryable}


def _delivery(delivery: Delivery) -> bytes:
    data: dict[str, object] = {
        "token": delivery.token,
        "attempt": delivery.attempt,
        "topic": delivery.topic,
    }
    if delivery.position is not None:
        data["position"] = position_fields(delivery.position)
    data["event"] = msgspec.Raw(_one_line(to_json(delivery.event)))
    return b"id: %s\n%s" % (delivery.token.encode(), _event("delivery", data))


_LINE_ENDS = bytes.maketrans(b"\r\n", b"  ")


def _one_line(text: bytes) -> bytes:
    """JSON has line ends between its parts only, where a space is as good."""
    return text.translate(_LINE_ENDS)
