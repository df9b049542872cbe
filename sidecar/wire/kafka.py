"""CloudEvents' Kafka binding: a record's headers, value and key <-> Event."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING

import msgspec

from sidecar.errors import InvalidEvent, MalformedBody
from sidecar.event import NOTHING, Event
from sidecar.wire.attributes import (
    _FORBIDDEN,
    MAX_ATTRIBUTE_BYTES,
    NO_DEFAULTS,
    Defaults,
    check_binary,
    check_content_type,
    header_text,
    make_event,
    parse_time,
)
from sidecar.wire.cloudevents import (
    JSON_TYPE,
    from_json_fields,
    is_structured,
    json_fields,
    to_json,
)
from sidecar.wire.timestamps import format_rfc3339, parse_rfc3339

if TYPE_CHECKING:
    from collections.abc import Mapping

    SentHeaders = list[tuple[str, bytes | str]]
    ReadHeaders = list[tuple[str, bytes | None]]

# -- out


def encode(
    event: Event, *, structured: bool = False
) -> tuple[SentHeaders, bytes | None, bytes | None]:
    """
    The headers, the value and the key of the record.

    A header's value is str where that saves encoding it: the client is as quick with both. The
    event's headers go along, but for those whose name is no token or belongs to a binding.

    In binary mode an event without data is a tombstone (None), and empty data an empty value. The
    record key is the event's key (see key_bytes), and in neither mode an attribute as well.
    """
    key = key_bytes(event.key) if event.key else None
    if structured:
        headers: SentHeaders = [_STRUCTURED_HEADER]
        if event.headers:
            headers += _plain_headers(event.headers)
        keyless = msgspec.structs.replace(event, key="") if event.key else event
        return headers, to_json(keyless), key
    headers = [
        *_repeating_headers(event.source, event.type, event.content_type),
        ("ce_id", event.id),
        ("ce_time", format_rfc3339(event.time_ns)),
    ]
    if event.subject:
        headers.append(("ce_subject", event.subject))
    if event.schema:
        headers.append(("ce_dataschema", event.schema))
    if event.extensions:
        headers += [(f"ce_{name}", value) for name, value in event.extensions.items()]
    if event.headers:
        headers += _plain_headers(event.headers)
    return headers, event.data, key


_STRUCTURED_HEADER = ("content-type", f"{JSON_TYPE}; charset=UTF-8".encode())


@lru_cache(maxsize=512)
def _repeating_headers(
    source: str,
    type: str,  # noqa: A002
    content_type: str,
) -> tuple[tuple[str, bytes], ...]:
    """An app has few of each."""
    headers = (
        ("ce_specversion", b"1.0"),
        ("ce_source", source.encode()),
        ("ce_type", type.encode()),
    )
    return (*headers, ("content-type", content_type.encode())) if content_type else headers


def _plain_headers(headers: Mapping[str, str]) -> SentHeaders:
    sent: SentHeaders = []
    for name, value in headers.items():
        if _is_plain_header(name):
            text = header_text(value)  # the client cuts a str at U+0000
            sent.append((name, _bytes(text) if text[:7] == _BASE64 else text))
    return sent


# -- in

_OUR_ORDER = ("specversion", "source", "type", "id", "time")
_OUR_NAMES = tuple(f"ce_{name}" for name in _OUR_ORDER)
_our_values = itemgetter(*_OUR_NAMES)
_TAKEN = frozenset((*_OUR_NAMES, "content-type"))


def decode(
    headers: ReadHeaders | None, value: bytes | None, key: bytes | None, defaults: Defaults
) -> Event:
    """
    The event in a record; a header's value may be null.

    Structured where content-type is application/cloudevents…, binary where there are ce_ headers,
    and else a plain record, which becomes an event by *defaults*. A missing time is that of
    *defaults*. A null value is no data (None).

    The record key is the event's key: see key_text. The extension partitionkey is the key where
    the record has none, and else says nothing: it is left out, also when it differs.

    Names match in any case, and null is the same as empty. Of an attribute that comes twice the
    last counts. Other headers become the event's, in lower case: lists where they come twice, and
    in Base64, as keys, where they are no text. Names that are no token, or a binding's, are left
    out.

    Raises InvalidEvent for what claims to be a CloudEvent and is none, and for a key too long.
    """
    if not headers:
        record_key = "" if key is None else key_text(key)
        return _decode_plain(value, "", NOTHING, record_key, defaults)
    event = decode_quickly(headers, value, key)
    if event is not None:
        return event
    record_key = "" if key is None else key_text(key)
    attributes, content_type, beside = _take_apart(headers)
    if is_structured(content_type):
        return _decode_structured(content_type, value, beside, record_key, defaults)
    if attributes:
        return _decode_binary(attributes, content_type, value, beside, record_key, defaults)
    return _decode_plain(value, content_type, beside, record_key, defaults)


def decode_quickly(
    headers: ReadHeaders | None, value: bytes | None, key: bytes | None
) -> Event | None:
    """The event in a record as `encode` writes it in binary mode; None: ask `decode`."""
    if not headers:
        return None
    fields = dict(headers)
    if len(fields) != len(headers):
        return None
    return _decode_ours(fields, value, "" if key is None else key_text(key))


_UNUSUAL = (KeyError, ValueError, AttributeError, TypeError, InvalidEvent)
"""An attribute that is missing, no plain text, null, or against the rules."""


def _decode_ours(fields: dict[str, bytes | None], value: bytes | None, key: str) -> Event | None:
    """What encode writes, in any order. None: take the headers apart, one by one."""
    attributes: dict[str, str] = {}
    headers = NOTHING
    try:
        values = _our_values(fields)
        version, raw_source, raw_type, raw_id, raw_time = values
        raw_content_type = fields.get("content-type") or b""
        if len(fields) > (len(_TAKEN) if raw_content_type else len(_OUR_NAMES)):
            attributes, headers = _rest(fields)
        subject = attributes.get("subject", "")
        source, type_, content_type = _repeating(raw_source, raw_type, raw_content_type)
        if len(attributes) > (1 if subject else 0):
            attributes.update(zip(_OUR_ORDER, map(bytes.decode, values), strict=True))
            # It has its time, so that nothing is left to defaults.
            return _decode_binary(attributes, content_type, value, headers, key, NO_DEFAULTS)
        id_ = raw_id.decode("ascii")
        time_ns = parse_rfc3339(raw_time.decode("ascii"))
    except _UNUSUAL:
        return None
    if version != b"1.0" or not id_ or not f"{id_}{subject}".isprintable():
        return None
    if (len(key) + len(id_) + len(subject)) * 4 > MAX_ATTRIBUTE_BYTES:
        return None
    return Event(
        id_, source, type_, time_ns, value, key, content_type, subject, "", NOTHING, headers
    )


@lru_cache(maxsize=512)
def _repeating(source: bytes, type: bytes, content_type: bytes) -> tuple[str, str, str]:  # noqa: A002
    """Checked once and shared by all events. Raises for what is unusual, so as not to keep it."""
    texts = source.decode("ascii"), type.decode("ascii"), content_type.decode("ascii")
    if (
        not (source and type and "".join(texts).isprintable())
        or " " in texts[0]
        or max(map(len, texts)) > MAX_ATTRIBUTE_BYTES
    ):
        raise ValueError
    return texts[0], texts[1], check_content_type(texts[2])


def _rest(fields: dict[str, bytes | None]) -> tuple[dict[str, str], Mapping[str, str]]:
    """The other attributes and the plain headers. Raises for what is unusual."""
    attributes = {}
    headers = {}
    for name, raw in fields.items():
        if name in _TAKEN:
            continue
        if _is_plain_header(name):
            headers[name] = _header_value(raw)
        elif name[:3] == "ce_" and raw is not None:
            attributes[name[3:]] = raw.decode()
        else:
            raise ValueError
    return attributes, headers or NOTHING


def _take_apart(headers: ReadHeaders) -> tuple[dict[str, str], str, Mapping[str, str]]:
    """The ce_ attributes, the content type, and the other headers; all names in lower case."""
    attributes: dict[str, str] = {}
    plain: dict[str, str] = {}
    content_type = ""
    for any_name, raw in headers:
        name = any_name.lower()
        if name.startswith("ce_"):
            # Bytes that are not UTF-8 become lone surrogates, which the checks refuse.
            attributes[name[3:]] = "" if raw is None else raw.decode("utf-8", "surrogateescape")
        elif name == "content-type":
            content_type = _content_type(raw)
        elif _is_plain_header(name):
            value = _header_value(raw)
            plain[name] = f"{plain[name]},{value}" if name in plain else value
    return attributes, content_type, plain or NOTHING


def _content_type(raw: bytes | None) -> str:
    """A foreign one may be anything; what cannot be a media type says nothing."""
    text = "" if raw is None else raw.decode("utf-8", "replace").strip(" \t")
    return text if text.isascii() and text.isprintable() else ""


# A token of RFC 9110, in lower case, that means nothing to any binding.
_PLAIN_NAME = re.compile(r"(?!ce[_-]|nats-|content-type$)[a-z0-9!#$%&'*+.^_`|~-]+")


@lru_cache(maxsize=256)
def _is_plain_header(name: str) -> bool:
    return _PLAIN_NAME.fullmatch(name) is not None


def _header_value(raw: bytes | None) -> str:
    return _text(raw).strip(" ") if raw else ""


def _decode_binary(  # noqa: PLR0917 - called once
    attributes: dict[str, str],
    content_type: str,
    value: bytes | None,
    headers: Mapping[str, str],
    record_key: str,
    defaults: Defaults,
) -> Event:
    check_binary(attributes, where="the header ce_")
    del attributes["specversion"]
    # The binding has content-type; some senders do as over NATS.
    other_type = attributes.pop("datacontenttype", "")
    time = attributes.pop("time", "")
    partition_key = attributes.pop("partitionkey", "")
    return make_event(
        id=attributes.pop("id"),
        source=attributes.pop("source"),
        type=attributes.pop("type"),
        time_ns=parse_time(time) if time else defaults.time_ns,
        data=value,
        content_type=content_type or other_type,
        key=record_key or partition_key,
        subject=attributes.pop("subject", ""),
        schema=attributes.pop("dataschema", ""),
        extensions=attributes or NOTHING,
        headers=headers,
        trust_headers=True,
    )


def _decode_structured(
    content_type: str,
    value: bytes | None,
    headers: Mapping[str, str],
    record_key: str,
    defaults: Defaults,
) -> Event:
    if content_type.partition(";")[0].strip().lower() != JSON_TYPE:
        raise InvalidEvent(
            f"{content_type[:64]!a} is not supported: publish {JSON_TYPE}, or binary mode",
            field="content-type",
        )
    try:
        fields = json_fields(value or b"")
    except MalformedBody as error:
        raise InvalidEvent(error.message, field="data") from error
    if record_key:
        fields["partitionkey"] = msgspec.Raw(msgspec.json.encode(record_key))
    return from_json_fields(fields, headers=headers, time_ns=defaults.time_ns)


def _decode_plain(
    value: bytes | None,
    content_type: str,
    headers: Mapping[str, str],
    record_key: str,
    defaults: Defaults,
) -> Event:
    return make_event(
        id="",
        source="",
        type="",
        time_ns=None,
        data=value,
        key=record_key,
        content_type=content_type,
        headers=headers,
        defaults=defaults,
        trust_headers=True,
    )


# -- bytes that are no text: keys are often integers or UUIDs, and Event has only text for them

_BASE64 = "base64:"


def key_text(raw: bytes) -> str:
    """
    The event's key for a record's; never empty, and different for different bytes.

    It is the text, if the bytes are UTF-8 with characters that CloudEvents allows in an attribute.
    Else it is "base64:" and the bytes in Base64, also for no bytes at all, and for a text that
    key_bytes would take for such a form.
    """
    return _text(raw, empty=_BASE64)


def key_bytes(text: str) -> bytes:
    """
    The record's key for an event's, which is not empty: what key_text reads as the same again.

    So a record that is published again has the key it had, and an app gets any key it wants.
    """
    return _bytes(text, empty=_BASE64)


def _text(raw: bytes, *, empty: str = "") -> str:
    """
    A text for any bytes, which _bytes turns back.

    *empty* is what stands for no bytes: a key has to differ from none, a header has not.
    """
    if not raw:
        return empty
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return _BASE64 + b64encode(raw).decode()
    allowed = text.isprintable() or not _FORBIDDEN.search(text)
    if allowed and (text[:7] != _BASE64 or _bytes(text, empty=empty) == raw):
        return text
    return _BASE64 + b64encode(raw).decode()


def _bytes(text: str, *, empty: str = "") -> bytes:
    if text[:7] == _BASE64:
        try:
            raw = b64decode(text[7:], validate=True)
        except ValueError:
            return text.encode()
        # Else an app's own text, which only looks like ours.
        if _text(raw, empty=empty) == text:
            return raw
    return text.encode()
