"""CloudEvents 1.0 as JSON and over HTTP <-> Event."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import msgspec

from sidecar.errors import InvalidEvent, MalformedBody, UnsupportedMediaType
from sidecar.event import NOTHING, Event
from sidecar.wire.attributes import (
    CORE_ATTRIBUTES,
    MAX_HEADER_BYTES,
    STRUCTURED_PREFIX,
    Defaults,
    cached_percent_encode,
    check_binary,
    header_text,
    make_event,
    parse_time,
    percent_decode,
    percent_encode,
)
from sidecar.wire.timestamps import format_rfc3339

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sidecar.event import Position

__all__ = [
    "Defaults",
    "from_http",
    "from_json",
    "from_json_batch",
    "from_json_fields",
    "is_structured",
    "json_fields",
    "make_event",
    "position_fields",
    "to_http",
    "to_json",
]

_T = TypeVar("_T")

JSON_TYPE: Final = "application/cloudevents+json"
BATCH_TYPE: Final = "application/cloudevents-batch+json"

# -- the JSON format

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])
_SCALAR = msgspec.json.Decoder(str | int | float | bool | None)
_STRING = msgspec.json.Decoder(str)
_BASE64 = msgspec.json.Decoder(bytes)
_VALID = msgspec.json.Decoder(msgspec.Raw)
_encode_json = msgspec.json.Encoder().encode

_JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the JSON asked for; the last for absurd nesting."""


def from_json(
    data: bytes, *, headers: Mapping[str, str] = NOTHING, time_ns: int | None = None
) -> Event:
    """
    One event of the JSON format. Raises InvalidEvent.

    A `data` member is kept as its JSON text, and is "application/json" where nothing else is said;
    a string of another content type becomes its text in UTF-8. Extensions that are numbers or
    booleans become their text; null is absent; of a name given twice the last counts. *headers* and
    *time_ns* are what came beside the event; the latter is for one without a time.
    """
    try:
        fields = json_fields(data)
    except MalformedBody as error:
        raise InvalidEvent(error.message, field="data") from error
    return from_json_fields(fields, headers=headers, time_ns=time_ns)


def from_json_batch(
    data: bytes, *, headers: Mapping[str, str] = NOTHING
) -> list[Event | InvalidEvent]:
    """A JSON array of events; a bad one fails alone. Raises MalformedBody when it is no array."""
    try:
        elements = _ELEMENTS.decode(data)
    except _JSON_ERRORS as error:
        raise MalformedBody(f"not a JSON array of events: {_reason(error)}") from error
    return [_event_or_error(bytes(element), headers) for element in elements]


def _event_or_error(data: bytes, headers: Mapping[str, str]) -> Event | InvalidEvent:
    try:
        return from_json(data, headers=headers)
    except InvalidEvent as error:
        return error


def json_fields(data: bytes) -> dict[str, msgspec.Raw]:
    """The members of a JSON object, undecoded. Raises MalformedBody when it is none."""
    try:
        if not data.isascii():
            data.decode()  # msgspec.Raw skips over strings without a look at their bytes
        return _FIELDS.decode(data)
    except _JSON_ERRORS as error:
        raise MalformedBody(f"not a JSON object: {_reason(error)}") from error


def from_json_fields(
    fields: Mapping[str, msgspec.Raw],
    *,
    headers: Mapping[str, str] = NOTHING,
    time_ns: int | None = None,
) -> Event:
    """As from_json, for an object that was taken apart with json_fields. Raises InvalidEvent."""
    attributes: dict[str, str] = {}
    for name, raw in fields.items():
        if name not in ("data", "data_base64"):
            value = _attribute(name, raw)
            if value is not None:
                attributes[name] = value
    check_binary(attributes, where="")
    del attributes["specversion"]
    content_type = attributes.pop("datacontenttype", "")
    if not content_type and "data" in fields:
        content_type = "application/json"
    time = attributes.pop("time", "")
    return make_event(
        id=attributes.pop("id"),
        source=attributes.pop("source"),
        type=attributes.pop("type"),
        time_ns=parse_time(time) if time else time_ns,
        data=_data(fields, content_type),
        content_type=content_type,
        key=attributes.pop("partitionkey", ""),
        subject=attributes.pop("subject", ""),
        schema=attributes.pop("dataschema", ""),
        extensions=attributes or NOTHING,
        headers=headers,
        trust_headers=True,
    )


def _attribute(name: str, raw: msgspec.Raw) -> str | None:
    try:
        value = _SCALAR.decode(raw)
    except _JSON_ERRORS as error:
        field = name if name in CORE_ATTRIBUTES else "extensions"
        raise InvalidEvent(
            f"{name[:64]!a} must be a string, a number or a boolean: {_reason(error)}",
            field=field,
        ) from error
    if value is None or isinstance(value, str):
        return value
    if name in CORE_ATTRIBUTES:
        raise InvalidEvent(f"{name} must be a JSON string", field=name)
    if isinstance(value, bool):
        return "true" if value else "false"
    return bytes(raw).decode()


def _data(fields: Mapping[str, msgspec.Raw], content_type: str) -> bytes | None:
    raw, encoded = fields.get("data"), fields.get("data_base64")
    if encoded is not None:
        if raw is not None:
            raise InvalidEvent("data and data_base64 are both there: send one", field="data")
        return _decode_as(_BASE64, encoded, "data_base64", "a string in Base64")
    if raw is None:
        return None
    text = bytes(raw)
    if text[:1] == b'"' and _kind(content_type) != "json":
        return _decode_as(_STRING, raw, "data", "a JSON string").encode()
    return text


def _decode_as(
    decoder: msgspec.json.Decoder[_T], raw: msgspec.Raw, field: str, expected: str
) -> _T:
    try:
        return decoder.decode(raw)
    except _JSON_ERRORS as error:
        raise InvalidEvent(f"{field} must be {expected}: {_reason(error)}", field=field) from error


def _reason(error: Exception) -> str:
    """Why, without a byte of the data."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deep"
    return str(error)


def to_json(event: Event) -> bytes:
    """
    The event in the JSON format, with its key as the extension `partitionkey`.

    Data of a JSON content type is embedded as it is (less the white space around it), text as a
    string, and everything else, or what is not what its content type says, as `data_base64`.
    """
    members: dict[str, object] = {
        "specversion": "1.0",
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "time": format_rfc3339(event.time_ns),
    }
    if event.content_type:
        members["datacontenttype"] = event.content_type
    if event.schema:
        members["dataschema"] = event.schema
    if event.subject:
        members["subject"] = event.subject
    if event.key:
        members["partitionkey"] = event.key
    if event.extensions:
        members.update(event.extensions)
    if event.data is not None:
        embedded = _embeddable(event.data, _kind(event.content_type))
        # Non-obvious: msgspec writes bytes as Base64.
        members["data_base64" if embedded is None else "data"] = (
            event.data if embedded is None else embedded
        )
    return _encode_json(members)


def position_fields(position: Position) -> Mapping[str, object]:
    """A position as our JSON has it, beside an event or in its receipt."""
    if position.partition is None:
        return {"stream": position.stream, "sequence": position.sequence}
    return {"partition": position.partition, "offset": position.offset}


def _embeddable(data: bytes, kind: str) -> msgspec.Raw | str | None:
    """What stands for *data* in the member `data`; None: it has to be Base64."""
    if kind == "binary":
        return None
    try:
        text = data.decode()
        return text if kind == "text" else _VALID.decode(data)
    except _JSON_ERRORS:
        return None


_CHARSET = re.compile(r';\s*charset\s*=\s*+"?+(?!utf-?8\b|us-ascii\b)', re.IGNORECASE)


@lru_cache(maxsize=256)
def _kind(content_type: str) -> Literal["json", "text", "binary"]:
    """How JSON shows data of this content type."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type.endswith(("/json", "+json")):
        return "json"
    is_text = media_type.startswith("text/") or media_type.endswith(("/xml", "+xml"))
    return "text" if is_text and not _CHARSET.search(content_type) else "binary"


# -- the HTTP binding

_TRACE_HEADERS = frozenset((b"traceparent", b"tracestate", b"baggage"))
_BINARY_MARKS = frozenset((b"ce-specversion", b"ce-id", b"ce-type", b"ce-source"))
_PREFIX_LENGTH = len(STRUCTURED_PREFIX)


def is_structured(content_type: str) -> bool:
    """Whether the media type says that the whole event is in the body."""
    return content_type[:_PREFIX_LENGTH].lower() == STRUCTURED_PREFIX


def from_http(
    headers: Iterable[tuple[bytes, bytes]], body: bytes, defaults: Defaults
) -> list[Event | InvalidEvent]:
    """
    The events of a request, in order: one, or a batch. A bad one fails alone.

    *headers* are as ASGI gives them, with names in lower case. The mode is batched or structured by
    the content type, binary where there is a header ce-specversion, ce-id, ce-source or ce-type,
    and else plain: the body is the data and *defaults* are the attributes. An empty body without a
    content type is no data. Of other headers only the trace context's are kept.

    Raises MalformedBody and UnsupportedMediaType for the request as a whole.
    """
    pairs = headers if isinstance(headers, list) else list(headers)
    fields = dict(pairs)
    content_type = _text(fields.get(b"content-type", b"")).strip(" \t")
    beside: Mapping[str, str] = NOTHING
    if not fields.keys().isdisjoint(_TRACE_HEADERS):
        beside = _trace_headers(fields, pairs)
    if is_structured(content_type):
        return _from_http_body(content_type, body, beside)
    data = body if body or content_type else None
    try:
        if fields.keys().isdisjoint(_BINARY_MARKS):
            event = make_event(
                id="",
                source="",
                type="",
                time_ns=None,
                data=data,
                content_type=content_type,
                headers=beside,
                defaults=defaults,
                trust_headers=True,
            )
        else:
            event = _from_http_binary(fields, content_type, data, beside)
    except InvalidEvent as error:
        return [error]
    return [event]


def _trace_headers(
    fields: Mapping[bytes, bytes], pairs: list[tuple[bytes, bytes]]
) -> Mapping[str, str]:
    """
    A header that comes twice is one list (RFC 9110, 5.3). What is not text or too long is left out:
    a bad trace must not cost the event.
    """
    found = {}
    for name in _TRACE_HEADERS & fields.keys():
        value = _text(b",".join(value for other, value in pairs if other == name)).strip(" \t")
        if value.isascii() and value.isprintable() and len(value) <= MAX_HEADER_BYTES:
            found[name.decode()] = value
    return found


def _from_http_body(
    content_type: str, body: bytes, headers: Mapping[str, str]
) -> list[Event | InvalidEvent]:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == BATCH_TYPE:
        return from_json_batch(body, headers=headers)
    if media_type != JSON_TYPE:
        raise UnsupportedMediaType(
            f"{media_type[:64]!a} is not supported: send {JSON_TYPE}, {BATCH_TYPE}, or binary "
            "mode (ce-… headers and the data as the body)",
            field="content-type",
        )
    try:
        fields = json_fields(body)
    except MalformedBody as error:
        raise MalformedBody(
            f"the body is {error.message}; {JSON_TYPE} is one event, an array is {BATCH_TYPE}"
        ) from error
    try:
        return [from_json_fields(fields, headers=headers)]
    except InvalidEvent as error:
        return [error]


def _from_http_binary(
    fields: Mapping[bytes, bytes], content_type: str, data: bytes | None, headers: Mapping[str, str]
) -> Event:
    # Bytes that are not UTF-8 become lone surrogates, which the checks refuse.
    attributes = {
        name[3:].decode("utf-8", "surrogateescape"): value.decode("utf-8", "surrogateescape")
        for name, value in fields.items()
        if name[:3] == b"ce-"
    }
    joined = b"".join(fields.values())
    if b"%" in joined or b'"' in joined:
        attributes = {name: percent_decode(name, value) for name, value in attributes.items()}
    check_binary(attributes, where="the header ce-")
    del attributes["specversion"]
    # The binding forbids this header: Content-Type says it.
    other_type = attributes.pop("datacontenttype", "")
    time = attributes.pop("time", "")
    return make_event(
        id=attributes.pop("id"),
        source=attributes.pop("source"),
        type=attributes.pop("type"),
        time_ns=parse_time(time) if time else None,
        data=data,
        content_type=content_type or other_type,
        key=attributes.pop("partitionkey", ""),
        subject=attributes.pop("subject", ""),
        schema=attributes.pop("dataschema", ""),
        extensions=attributes or NOTHING,
        headers=headers,
        trust_headers=True,
    )


def _text(raw: bytes) -> str:
    """Never raises: bytes that are not UTF-8 become lone surrogates, which the checks refuse."""
    return raw.decode("utf-8", "surrogateescape")


_NOT_OURS_TO_SEND = frozenset(
    (
        "connection",
        "content-encoding",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)


def to_http(event: Event) -> tuple[list[tuple[str, str]], bytes]:
    """
    Headers and body of the event in binary mode; all header values are printable ASCII.

    The event's headers go along, but for those that frame a request: they come from whoever
    published the event, and are not theirs to choose.
    """
    headers = [
        ("ce-specversion", "1.0"),
        ("ce-id", percent_encode(event.id)),
        ("ce-source", cached_percent_encode(event.source)),
        ("ce-type", cached_percent_encode(event.type)),
        ("ce-time", format_rfc3339(event.time_ns)),
    ]
    if event.content_type:
        headers.append(("content-type", event.content_type))
    for name, value in (
        ("subject", event.subject),
        ("dataschema", event.schema),
        ("partitionkey", event.key),
    ):
        if value:
            headers.append((f"ce-{name}", percent_encode(value)))
    headers += [(f"ce-{name}", percent_encode(value)) for name, value in event.extensions.items()]
    headers += [
        (name, header_text(value, ascii_only=True))
        for name, value in event.headers.items()
        if name not in _NOT_OURS_TO_SEND
    ]
    return headers, event.data or b""
