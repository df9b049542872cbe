"""CloudEvents' NATS binding: a header block and a payload <-> Event."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import TYPE_CHECKING

from sidecar.errors import InvalidEvent, MalformedBody
from sidecar.event import NOTHING, Event
from sidecar.wire.attributes import (
    MAX_ATTRIBUTE_BYTES,
    Defaults,
    cached_percent_encode,
    check_binary,
    check_content_type,
    header_text,
    make_event,
    parse_time,
    percent_decode,
    percent_encode,
)
from sidecar.wire.cloudevents import (
    JSON_TYPE,
    from_json,
    from_json_fields,
    is_structured,
    json_fields,
    to_json,
)
from sidecar.wire.timestamps import format_rfc3339

if TYPE_CHECKING:
    from collections.abc import Mapping

_VERSION_LINE = b"NATS/1.0\r\n"
_STRUCTURED_LINE = f"Content-Type: {JSON_TYPE}; charset=UTF-8\r\n"
MAX_MSG_ID_LENGTH = 200

# -- out


def encode(event: Event, *, structured: bool = False, extra: bytes = b"") -> tuple[bytes, bytes]:
    r"""
    The header block ("NATS/1.0\r\n" to the empty line) and the payload.

    *extra* is put right behind the version line: whole raw lines, each with its "\r\n". Attributes
    are percent-encoded as the binding says. The event's headers go as they are, control characters
    alone as %XX, so that no value can start a line; a header whose name is no token, or belongs to
    NATS or the binding, is left out.

    Binary mode has no place for "no data": it is an empty payload, and so is empty data. decode
    tells them apart by whether there is a content type.
    """
    beside = _header_lines(event.headers) if event.headers else ""
    if structured:
        lines = _STRUCTURED_LINE + beside
        return b"".join((_VERSION_LINE, extra, lines.encode(), b"\r\n")), to_json(event)
    # In this order, which decode's fast way knows.
    lines = (
        f"ce-specversion: 1.0\r\nce-id: {percent_encode(event.id)}\r\n"
        f"{_repeating_lines(event.source, event.type, event.content_type)}"
        f"ce-time: {format_rfc3339(event.time_ns)}\r\n"
    )
    if event.key:
        lines += f"ce-partitionkey: {percent_encode(event.key)}\r\n"
    if event.subject:
        lines += f"ce-subject: {percent_encode(event.subject)}\r\n"
    if event.schema:
        lines += f"ce-dataschema: {percent_encode(event.schema)}\r\n"
    if event.extensions:
        for name, value in event.extensions.items():
            lines += f"ce-{name}: {percent_encode(value)}\r\n"
    return b"".join((_VERSION_LINE, extra, lines.encode(), beside.encode(), b"\r\n")), (
        event.data or b""
    )


@lru_cache(maxsize=512)
def _repeating_lines(source: str, type: str, content_type: str) -> str:  # noqa: A002
    """An app has few of each, and encoding them is most of the work."""
    lines = f"ce-source: {percent_encode(source)}\r\nce-type: {percent_encode(type)}\r\n"
    if content_type:
        lines += f"ce-datacontenttype: {percent_encode(content_type)}\r\n"
    return lines


def _header_lines(headers: Mapping[str, str]) -> str:
    lines = ""
    for name, value in headers.items():
        if _is_plain_header(name):
            lines += f"{name}: {header_text(value)}\r\n"
    return lines


def msg_id(event: Event) -> str:
    """
    What Nats-Msg-Id says: equal for equal (source, id), and for nothing else.

    Printable ASCII without spaces, at most 200 characters; a longer one is its SHA-256.
    """
    source = cached_percent_encode(event.source)
    # The length tells where the source ends, whatever it holds.
    text = f"{len(source)}:{source}:{percent_encode(event.id)}"
    if len(text) > MAX_MSG_ID_LENGTH:
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return text


# -- in

# What encode writes. Its values have no spaces and no quotes, which saves taking the lines apart
# and, without a "%", half of the checks: 3 us of 6.
_VALUE = r"([\x21\x23-\x7e]+)\r\n"
_OUR_BLOCK = re.compile(
    r"NATS/1\.0\r\n(?:Nats-[^\r\n]*\r\n)*ce-specversion: (1\.0)\r\n"
    rf"ce-id: {_VALUE}ce-source: {_VALUE}ce-type: {_VALUE}"
    rf"(?:ce-datacontenttype: {_VALUE})?ce-time: {_VALUE}"
    rf"(?:ce-partitionkey: {_VALUE})?(?:ce-subject: {_VALUE})?(?:ce-dataschema: {_VALUE})?"
    r"((?:ce-[a-z0-9]+: [\x21\x23-\x7e]*\r\n)*)"
    r"((?:(?!ce-|nats-|content-type:)[a-z0-9-]+: [\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\r\n)*)\r\n"
)
_OUR_ORDER = (
    "specversion",
    "id",
    "source",
    "type",
    "datacontenttype",
    "time",
    "partitionkey",
    "subject",
    "dataschema",
)


def decode(headers: bytes | None, payload: bytes, defaults: Defaults) -> Event:
    """
    The event in a message; *headers* is the raw block, or None.

    Structured where Content-Type is application/cloudevents…, binary where there are ce- headers,
    and else a plain message, which becomes an event by *defaults*. Leniency: senders of the
    binding's first version mark nothing, so a JSON object with "specversion" and neither of these
    headers is structured too. A missing time is that of *defaults*.

    Binary: an empty payload is no data (None), or empty data when there is a content type.
    Nats-… headers are left out; other plain ones become the event's headers, in lower case, lists
    where they come twice.

    Raises InvalidEvent for what claims to be a CloudEvent and is none.
    """
    if headers is None:
        return _decode_plain(payload, "", NOTHING, defaults)
    text = headers.decode("utf-8", "surrogateescape")
    ours = _OUR_BLOCK.fullmatch(text)
    if ours is not None and (event := _decode_ours(ours, payload, defaults)):
        return event
    attributes, content_type, beside = _take_apart(text)
    if is_structured(content_type):
        return _decode_structured(content_type, payload, beside, defaults)
    if attributes:
        return _decode_binary(attributes, content_type, payload, beside, defaults)
    return _decode_plain(payload, content_type, beside, defaults)


def _decode_ours(match: re.Match[str], payload: bytes, defaults: Defaults) -> Event | None:
    """None: take the lines apart, one by one."""
    *values, extensions, lines = match.groups("")
    headers = NOTHING
    if lines:
        found = [line.partition(": ") for line in lines.split("\r\n")[:-1]]
        headers = {name: value for name, _, value in found}
        if len(headers) != len(found):
            return None
    if extensions or match.end() > MAX_ATTRIBUTE_BYTES or "%" in match.string:
        attributes = {name: value for name, value in zip(_OUR_ORDER, values, strict=True) if value}
        for line in extensions.split("\r\n")[:-1]:
            name, _, value = line.partition(": ")
            attributes[name[3:]] = value
        return _decode_binary(attributes, "", payload, headers, defaults)
    _, id_, source, type_, content_type, time, key, subject, schema = values
    return Event(
        id_,
        source,
        type_,
        parse_time(time),
        payload if payload or content_type else None,
        key,
        check_content_type(content_type) if content_type else "",
        subject,
        schema,
        NOTHING,
        headers,
    )


def _take_apart(block: str) -> tuple[dict[str, str], str, Mapping[str, str]]:
    """The ce- attributes, the content type, and the other headers; all names in lower case."""
    attributes: dict[str, str] = {}
    plain: dict[str, str] = {}
    content_type = ""
    for line in block.split("\r\n"):
        name, colon, value = line.partition(":")
        if not colon:
            continue
        name = name.lower()
        value = value.strip(" \t")
        if name.startswith("ce-"):
            attributes[name[3:]] = value
        elif name == "content-type":
            # A foreign one may be anything; what cannot be a media type says nothing.
            content_type = value if value.isascii() and value.isprintable() else ""
        elif _is_plain_header(name):
            value = _without_surrogates(value)
            plain[name] = f"{plain[name]},{value}" if name in plain else value
    return attributes, content_type, plain or NOTHING


_TOKEN = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")


@lru_cache(maxsize=256)
def _is_plain_header(name: str) -> bool:
    """A token of RFC 9110, in lower case, that means nothing to NATS or to the binding."""
    return (
        _TOKEN.fullmatch(name) is not None
        and not name.startswith(("ce-", "nats-"))
        and name != "content-type"
    )


def _without_surrogates(value: str) -> str:
    if value.isascii():
        return value
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _decode_binary(
    attributes: dict[str, str],
    content_type: str,
    payload: bytes,
    headers: Mapping[str, str],
    defaults: Defaults,
) -> Event:
    for name, value in attributes.items():
        if "%" in value or '"' in value:  # percent_decode would look too, but a call costs more
            attributes[name] = percent_decode(name, value)
    check_binary(attributes, where="the header ce-")
    del attributes["specversion"]
    # The binding has ce-datacontenttype; some senders do as over HTTP.
    content_type = attributes.pop("datacontenttype", "") or content_type
    time = attributes.pop("time", "")
    return make_event(
        id=attributes.pop("id"),
        source=attributes.pop("source"),
        type=attributes.pop("type"),
        time_ns=parse_time(time) if time else defaults.time_ns,
        data=payload if payload or content_type else None,
        content_type=content_type,
        key=attributes.pop("partitionkey", ""),
        subject=attributes.pop("subject", ""),
        schema=attributes.pop("dataschema", ""),
        extensions=attributes or NOTHING,
        headers=headers,
        trust_headers=True,
    )


def _decode_structured(
    content_type: str, payload: bytes, headers: Mapping[str, str], defaults: Defaults
) -> Event:
    if content_type.partition(";")[0].strip().lower() != JSON_TYPE:
        raise InvalidEvent(
            f"{content_type[:64]!a} is not supported: publish {JSON_TYPE}, or binary mode",
            field="content-type",
        )
    return from_json(payload, headers=headers, time_ns=defaults.time_ns)


def _decode_plain(
    payload: bytes, content_type: str, headers: Mapping[str, str], defaults: Defaults
) -> Event:
    if not content_type and b'"specversion"' in payload:
        try:
            fields = json_fields(payload)
        except MalformedBody:
            fields = {}
        if "specversion" in fields:
            return from_json_fields(fields, headers=headers, time_ns=defaults.time_ns)
    return make_event(
        id="",
        source="",
        type="",
        time_ns=None,
        data=payload if payload or content_type else None,
        content_type=content_type,
        headers=headers,
        defaults=defaults,
        trust_headers=True,
    )
