"""The Connect protocol's unary form: every unary RPC as an HTTP POST, in JSON or protobuf."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import logging
import math
import re
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec
from google.protobuf import descriptor_pool, json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from sidecar.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    MalformedBody,
    MethodMissing,
    SidecarError,
    UnsupportedMediaType,
)
from sidecar.services.rpc import Call, UnaryMethod
from sidecar.wire import status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from google.protobuf.descriptor import Descriptor

    from sidecar.servers.asgi import Response

MessageT = TypeVar("MessageT", bound=Message)
AnyMethod = UnaryMethod[Any, Any]

JSON_TYPE = b"application/json"
PROTO_TYPE = b"application/proto"
MAX_TEXT = 300
"""Characters of a message that repeats what the caller sent."""

log = logging.getLogger(__name__)


class Connect:
    """The unary RPCs by path, and how to answer a POST to one."""

    def __init__(self, methods: Sequence[AnyMethod]) -> None:
        self.methods: Mapping[str, AnyMethod] = {method.path: method for method in methods}
        self._streams = dict(_streams(methods))

    async def answer(
        self, method: AnyMethod, headers: Mapping[bytes, bytes], body: bytes, peer: str
    ) -> Response:
        """
        Call *method*. Every failure is a response; raises nothing but CancelledError.

        *headers*: names in lower case; *body*: whole, its content encoding undone.
        """
        try:
            codec = _CODECS.get(headers.get(b"content-type", b"")) or _codec(headers)
            if headers.get(b"connect-protocol-version", b"1") != b"1":
                raise InvalidRequest(  # noqa: TRY301
                    'connect-protocol-version: must be "1"', field="connect-protocol-version"
                )
            request = codec.decode(method.request, body)
            timeout = headers.get(b"connect-timeout-ms")
            if timeout is None:
                response = await method.handler(request, Call(None, peer))
            else:
                response = await _in_time(method, request, _seconds(timeout), peer)
            return 200, [(b"content-type", codec.content_type)], codec.encode(response)
        except SidecarError as error:
            return error_response(error)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end the connection
            return fault_response(method.path, error)

    def missing(self, path: str) -> Response | None:
        """What to say of a path that is no unary RPC; None where it does not look like an RPC."""
        other = self._streams.get(path)
        if other is not None:
            name = path.rpartition("/")[2]
            return error_response(
                MethodMissing(f"{name} is a stream: use gRPC, or here {other}", method=path[1:])
            )
        if not _RPC_PATH.fullmatch(path):
            return None
        known = ", ".join(self.methods)
        return error_response(
            MethodMissing(f"no RPC {path[:MAX_TEXT]}; there are: {known}"), http_status=404
        )


_RPC_PATH = re.compile(r"/([A-Za-z_]\w*\.)+[A-Za-z_]\w*/[^/]*")


def _streams(methods: Iterable[AnyMethod]) -> Iterable[tuple[str, str]]:
    """Each streaming RPC of the services, and the unary ones that stand in for it."""
    for name in {method.service for method in methods}:
        service = descriptor_pool.Default().FindServiceByName(name)
        unary = ", ".join(method.name for method in methods if method.service == name)
        for method in service.methods:
            if method.client_streaming or method.server_streaming:
                yield f"/{name}/{method.name}", unary


async def _in_time(method: AnyMethod, request: Message, seconds: float, peer: str) -> Message:
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            response: Message = await method.handler(request, Call(seconds, peer))
            return response
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise DeadlineExceeded(
            f"no answer within {seconds:g} s, the caller's deadline", method=method.name
        ) from error


_TIMEOUT = re.compile(rb"[0-9]{1,10}")


def _seconds(timeout: bytes) -> float:
    if not _TIMEOUT.fullmatch(timeout):
        raise InvalidRequest(
            "connect-timeout-ms: must be a whole number of milliseconds, of at most 10 digits",
            field="connect-timeout-ms",
        )
    return int(timeout) / 1000


# -- errors

_HTTP_STATUS: Mapping[type[SidecarError], int] = {UnsupportedMediaType: 415}
"""Where the protocol names a status that its table of codes does not give."""


def error_response(
    error: SidecarError, *, code: int | None = None, http_status: int | None = None
) -> Response:
    """The error as the Connect protocol has it; *code* is a google.rpc.Code."""
    number = status.code_of(error) if code is None else code
    if http_status is None:
        http_status = _HTTP_STATUS.get(type(error)) or status.http_status_of(number)
    body = {
        "code": status.CONNECT_CODES[number],
        "message": error.message,
        "details": [_detail(item) for item in status.details_of(error)],
    }
    return http_status, error_headers(error), msgspec.json.encode(body)


def error_headers(error: SidecarError) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", JSON_TYPE)]
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % math.ceil(error.retry_after)))
    return headers


def _detail(item: Message) -> dict[str, object]:
    debug = json_format.MessageToDict(item)
    name = debug.pop("@type").rpartition("/")[2]
    value = base64.b64encode(item.value).rstrip(b"=").decode()  # type: ignore[attr-defined]
    return {"type": name, "value": value, "debug": debug}


def fault_response(where: str, error: Exception) -> Response:
    """An error nobody foresaw. *where* goes into the log: nothing of the caller's."""
    # Not the exception's text: it may quote event data.
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed: %s\n%s", where, type(error).__name__, frames)
    return error_response(Internal("a fault of the sidecar: its log says more"))


# -- bodies


@dataclass(frozen=True, slots=True)
class _Codec:
    content_type: bytes
    decode: Callable[[type[Message], bytes], Message]
    encode: Callable[[Message], bytes]


def _decode_proto(kind: type[MessageT], body: bytes) -> MessageT:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise MalformedBody(
            f"the body is not a {kind.DESCRIPTOR.full_name} in protobuf: cut short, or another "
            "message"
        ) from error


def _decode_json(kind: type[MessageT], body: bytes) -> MessageT:
    message = kind()
    data = _json_object(body)
    _check_fields(data, cast("Descriptor", kind.DESCRIPTOR), "")
    try:
        json_format.ParseDict(data, message)
    except json_format.ParseError as error:
        raise _json_error(str(error)) from error
    return message


def _encode_json(message: Message) -> bytes:
    return msgspec.json.encode(json_format.MessageToDict(message))


_PROTO = _Codec(PROTO_TYPE, _decode_proto, lambda message: message.SerializeToString())
_JSON = _Codec(JSON_TYPE, _decode_json, _encode_json)
_CODECS = {PROTO_TYPE: _PROTO, JSON_TYPE: _JSON}


def _codec(headers: Mapping[bytes, bytes]) -> _Codec:
    given = headers.get(b"content-type", b"")
    codec = _CODECS.get(given.partition(b";")[0].strip().lower())
    if codec is None:
        shown = given[:100].decode("ascii", "replace")
        raise UnsupportedMediaType(
            f"content-type {shown!r}: must be application/json or application/proto",
            field="content-type",
        )
    return codec


# -- JSON: what google.protobuf.json_format lets pass, or says badly


def _json_object(body: bytes) -> dict[str, object]:
    try:
        data = json.loads(body.decode(), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the body is not UTF-8: byte {error.start}") from error
    except RecursionError as error:
        raise MalformedBody("the body is nested too deeply") from error
    except ValueError as error:
        raise MalformedBody(f"the body is not JSON: {error}"[:MAX_TEXT]) from error
    if not isinstance(data, dict):
        raise MalformedBody("the body must be a JSON object")
    return data


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


_BASE64 = re.compile(r"[A-Za-z0-9+/_-]*={0,2}")


def _check_fields(data: object, descriptor: Descriptor, path: str) -> None:
    """Every field is known, every object is one, and bytes are base64 (else they would be lost)."""
    if not isinstance(data, dict):
        raise InvalidRequest(f"{path}: must be an object", field=path)
    fields = _fields_of(descriptor)
    _check_alternatives(data, fields, path)
    for name, value in data.items():
        where = f"{path}.{name}" if path else name
        field = fields.get(name)
        if field is None:
            accepted = ", ".join(f.json_name for f in descriptor.fields)
            raise InvalidRequest(
                f"{where[:MAX_TEXT]}: unknown field; accepted here: {accepted}",
                field=where[:MAX_TEXT],
            )
        if isinstance(value, list):
            for i, item in enumerate(value):
                _check_value(item, field, f"{where}[{i}]")
        else:
            _check_value(value, field, where)


def _check_value(value: object, field: FieldDescriptor, path: str) -> None:
    if value is None:
        return
    kind: Descriptor | None = field.message_type
    if kind is not None:
        # Maps and the well-known types have a JSON form of their own, and good errors.
        if not kind.GetOptions().map_entry and kind.file.package != "google.protobuf":
            _check_fields(value, kind, path)
    elif (
        field.type == FieldDescriptor.TYPE_BYTES
        and isinstance(value, str)
        and not (_BASE64.fullmatch(value) and len(value.rstrip("=")) % 4 != 1)
    ):
        raise InvalidRequest(f"{path}: must be base64", field=path)


def _check_alternatives(
    data: Mapping[str, object], fields: Mapping[str, FieldDescriptor], path: str
) -> None:
    """No field comes under both its names, and of a oneof's fields at most one comes."""
    seen: dict[str, str] = {}
    for name, value in data.items():
        field = fields.get(name)
        if field is None or value is None:
            continue
        # A field that is optional is in a oneof of its own, too.
        oneof = field.containing_oneof
        slot = field.full_name if oneof is None else oneof.full_name
        other = seen.setdefault(slot, name)
        if other != name:
            where = f"{path}.{name}" if path else name
            raise InvalidRequest(f"{where}: comes beside {other}; use one of them", field=where)


@functools.cache
def _fields_of(descriptor: Descriptor) -> Mapping[str, FieldDescriptor]:
    by_name = {field.name: field for field in descriptor.fields}
    return by_name | {field.json_name: field for field in descriptor.fields}


_FIELD_PREFIX = re.compile(r"Failed to parse (\S+) field: ")
_PLACE = re.compile(r'\s+at "?\w+\.([\w.\[\]]+?)"?\.*$')
_STRING_WANTED = re.compile(r"expected string or bytes-like object, got '(\w+)'")


def _json_error(text: str) -> InvalidRequest:
    """From "Failed to parse events field: … at PublishRequest.events[0].time.." to path and fact."""
    names = []
    while found := _FIELD_PREFIX.match(text):
        names.append(found[1])
        text = text[found.end() :]
    path = ".".join(names)
    place = _PLACE.search(text)
    if place is not None:
        path = place[1]
        text = text[: place.start()]
    text = _STRING_WANTED.sub(r"must be a string, not \1", text).rstrip(". \n")
    if not path:
        return InvalidRequest(text[:MAX_TEXT])
    return InvalidRequest(f"{path}: {text}"[:MAX_TEXT], field=path[:MAX_TEXT])
