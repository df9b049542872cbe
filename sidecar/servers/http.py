"""The HTTP API: unary RPCs in the Connect protocol, and CloudEvents at /v1/topics/{topic}. Hot."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from sidecar.errors import (
    EventTooLarge,
    MalformedBody,
    MethodMissing,
    QueueFull,
    SidecarError,
    UnsupportedMediaType,
)
from sidecar.event import Event, Receipt
from sidecar.servers.asgi import Headers, Message, Receive, Response, Scope, Send, respond
from sidecar.servers.connect import (
    JSON_TYPE,
    MAX_TEXT,
    Connect,
    error_headers,
    error_response,
    fault_response,
)
from sidecar.servers.sse import SUBSCRIPTIONS
from sidecar.services.rpc import Call, UnaryMethod
from sidecar.wire import status
from sidecar.wire.cloudevents import Defaults, from_http, position_fields

if TYPE_CHECKING:
    from sidecar.config import Limits
    from sidecar.event import Outcome
    from sidecar.servers.sse import EventStreams

Publish = Callable[[str, Sequence[Event | SidecarError], Call], Awaitable[Sequence["Outcome"]]]

TOPICS = "/v1/topics/"
LINGER_SECONDS = 2.0
LINGER_BYTES = 64 * 1024 * 1024
LARGE_BODIES = 4
"""So many bodies of the largest size may be held at once; smaller ones accordingly more."""
_BATCH = b"application/cloudevents-batch"


class HttpApp:
    """The ASGI app of the HTTP door."""

    def __init__(
        self,
        methods: Sequence[UnaryMethod[Any, Any]],
        publish: Publish,
        defaults_for: Callable[[str], Defaults],
        limits: Limits,
        *,
        streams: EventStreams | None = None,
    ) -> None:
        """
        *publish* gets a topic, its events (an unusable one as its error) and the call, and answers
        one outcome per event, in order. *defaults_for* a topic are the attributes of plain bodies.
        """
        self._connect = Connect(methods)
        self._methods = self._connect.methods
        self._publish = publish
        self._defaults_for = defaults_for
        self._streams = streams
        # Base64 makes a third more of the data; the exact limit is for whoever sees the events.
        self._max_body = limits.max_batch_bytes * 3 // 2 + 65536
        self._room = LARGE_BODIES * self._max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if scope["method"] != "POST" or not (path in self._methods or path.startswith(TOPICS)):
            if self._streams is not None and path.startswith(SUBSCRIPTIONS):
                await self._streams(scope, receive, send)
            else:
                await respond(send, self._elsewhere(scope["method"], path))
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if int(headers.get(b"content-length", b"0")) > self._max_body:
            await self._refuse_unread(_too_large(self._size_error()), headers, receive, send)
            return
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        if message["more_body"] or len(message["body"]) > self._max_body:
            await self._answer_large(scope, headers, message, receive, send)
        else:
            await respond(send, await self._answer(scope, headers, message["body"]))

    # -- one call

    async def _answer(self, scope: Scope, headers: dict[bytes, bytes], body: bytes) -> Response:
        encoding = headers.get(b"content-encoding")
        if encoding is not None and encoding != b"identity":
            try:
                body = _decompress(encoding, body, self._max_body)
            except UnsupportedMediaType as error:
                # The code that Connect wants for an encoding; 415 is for media types.
                return error_response(error, code=status.UNIMPLEMENTED, http_status=501)
            except EventTooLarge as error:
                return _too_large(error)
            except MalformedBody as error:
                return error_response(error)
        path: str = scope["path"]
        method = self._methods.get(path)
        client = scope["client"]
        peer = f"{client[0]}:{client[1]}" if client else "unix"
        if method is not None:
            return await self._connect.answer(method, headers, body, peer)
        return await self._publish_events(path[len(TOPICS) :], scope["headers"], body, peer)

    async def _publish_events(
        self, topic: str, headers: Headers, body: bytes, peer: str
    ) -> Response:
        try:
            events = from_http(headers, body, self._defaults_for(topic))
            outcomes = await self._publish(topic, events, Call(None, peer))
        except SidecarError as error:
            return _publish_error(error)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end the connection
            return fault_response(TOPICS, error)
        return _publish_response(outcomes, batch=_is_batch(headers))

    # -- large bodies: rare, so they may cost more

    async def _answer_large(
        self,
        scope: Scope,
        headers: dict[bytes, bytes],
        first: Message,
        receive: Receive,
        send: Send,
    ) -> None:
        declared = int(headers.get(b"content-length", b"0"))
        if len(first["body"]) > self._max_body:
            await self._refuse_unread(_too_large(self._size_error()), headers, receive, send)
            return
        claim = declared or self._max_body
        if claim > self._room:
            busy = QueueFull("too many large requests at once: try again", retry_after=1)
            await self._refuse_unread(error_response(busy), headers, receive, send)
            return
        self._room -= claim
        try:
            body = bytearray(first["body"])
            more = first["more_body"]
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message["body"]
                more = message["more_body"]
                if len(body) > self._max_body:
                    response = _too_large(self._size_error())
                    await self._refuse_unread(response, headers, receive, send)
                    return
            await respond(send, await self._answer(scope, headers, bytes(body)))
        finally:
            self._room += claim

    def _size_error(self) -> EventTooLarge:
        return _size_error(self._max_body)

    async def _refuse_unread(
        self, response: Response, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        """
        Answer before the body is there, then throw away what comes for a moment, and close.

        Closed at once, a client that is still sending would see a reset instead of the answer.
        """
        response[1].append((b"connection", b"close"))
        await respond(send, response, more_body=True)
        if b"expect" not in headers:
            await _throw_away(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    # -- what is no call

    def _elsewhere(self, method: str, path: str) -> Response:
        is_call = path in self._methods or path.startswith(TOPICS)
        if is_call or (path == "/" and method not in {"GET", "HEAD"}):
            allowed = "POST" if is_call else "GET, HEAD"
            error = MethodMissing(f"{method} is not for {path[:MAX_TEXT]}: use {allowed}")
            response = error_response(error, http_status=405)
            response[1].append((b"allow", allowed.encode()))
            return response
        if path == "/":
            return 200, [(b"content-type", JSON_TYPE)], msgspec.json.encode(self._index())
        missing = self._connect.missing(path)
        if missing is not None:
            return missing
        hint = MethodMissing(
            f"nothing is at {path[:MAX_TEXT]}: POST an event to {TOPICS}{{topic}}, or call an RPC, "
            "as POST /sidecar.v1.PubSub/Publish; GET / lists them"
        )
        return error_response(hint, http_status=404)

    def _index(self) -> Mapping[str, object]:
        streams = {"events": f"GET {SUBSCRIPTIONS}{{name}}/events"} if self._streams else {}
        return {"cloudevents": f"POST {TOPICS}{{topic}}", **streams, "rpcs": list(self._methods)}


# -- bodies


def _size_error(limit: int) -> EventTooLarge:
    return EventTooLarge(
        f"the body is larger than {limit} bytes: send smaller batches, or raise "
        "limits.max_batch_bytes",
        limit=limit,
    )


def _too_large(error: EventTooLarge) -> Response:
    """The code that gRPC and Connect have for a message over the limit, and HTTP's own status."""
    return error_response(error, code=status.RESOURCE_EXHAUSTED, http_status=413)


def _decompress(encoding: bytes, body: bytes, limit: int) -> bytes:
    if encoding.strip().lower() not in {b"gzip", b"identity"}:
        shown = encoding[:100].decode("ascii", "replace")
        raise UnsupportedMediaType(
            f"content-encoding {shown!r}: must be gzip or identity", field="content-encoding"
        )
    if encoding.strip().lower() == b"identity":
        return body
    unpacker = zlib.decompressobj(wbits=31)  # gzip alone, not zlib
    try:
        plain = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedBody("the body is not gzip, as its content-encoding says") from error
    if len(plain) > limit:
        raise _size_error(limit)
    if not unpacker.eof or unpacker.unused_data:
        fault = "goes on behind its end" if unpacker.eof else "is cut short"
        raise MalformedBody(f"the body's gzip stream {fault}")
    return plain


async def _throw_away(receive: Receive) -> None:
    left = LINGER_BYTES
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] == "http.disconnect" or not message["more_body"]:
                    return
                left -= len(message["body"])
    except TimeoutError:
        return


# -- CloudEvents: outcomes as JSON

_PUBLISH_STATUS: Mapping[type[SidecarError], int] = {EventTooLarge: 413, UnsupportedMediaType: 415}
"""HTTP's own words, where they are plainer than those of the Connect protocol's table."""


def _is_batch(headers: Headers) -> bool:
    return any(
        name == b"content-type" and value.lower().startswith(_BATCH) for name, value in headers
    )


def _publish_status(error: SidecarError) -> int:
    return _PUBLISH_STATUS.get(type(error)) or status.http_status_of(status.code_of(error))


def _publish_error(error: SidecarError) -> Response:
    return error_response(error, http_status=_publish_status(error))


def _publish_response(outcomes: Sequence[Outcome], *, batch: bool) -> Response:
    """
    200 when an event of the batch was published; what failed is in its place.

    When nothing was, the status is that of the first failure; a single event's failure is an error
    like any other.
    """
    failure = _failure_of_all(outcomes)
    if failure is not None and not batch:
        return _publish_error(failure)
    body = msgspec.json.encode({"results": [_result(outcome) for outcome in outcomes]})
    if failure is None:
        return 200, [(b"content-type", JSON_TYPE)], body
    return _publish_status(failure), error_headers(failure), body


def _failure_of_all(outcomes: Sequence[Outcome]) -> SidecarError | None:
    """The first failure, when every event failed."""
    first = None
    for outcome in outcomes:
        if isinstance(outcome, Receipt):
            return None
        first = first or outcome
    return first


def _result(outcome: Outcome) -> dict[str, object]:
    if isinstance(outcome, Receipt):
        return {"receipt": _receipt(outcome)}
    failure: dict[str, object] = {
        "reason": outcome.code,
        "message": outcome.message,
        "retryable": outcome.retryable,
        "code": status.CONNECT_CODES[status.code_of(outcome)],
        "metadata": outcome.metadata,
    }
    if outcome.retry_after is not None:
        failure["retryAfterSeconds"] = outcome.retry_after
    return {"failure": failure}


def _receipt(receipt: Receipt) -> dict[str, object]:
    body: dict[str, object] = {
        "eventId": receipt.event_id,
        "broker": receipt.broker,
        "topic": receipt.topic,
        "durability": _DURABILITY[receipt.durability],
        "duplicate": receipt.duplicate,
    }
    if receipt.position is not None:
        body["position"] = position_fields(receipt.position)
    return body


_DURABILITY = ("", "sent", "spooled", "stored")
